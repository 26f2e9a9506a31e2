use super::*;

/// The end of the stream, as the far side says it: RFC 4254 in clear, as in proxy mode.
const EOF: [u8; 10] = [0, 0, 0, 6, 0, 96, 0, 0, 0, 0];

fn keeper() -> Keeper {
    Keeper {
        control: PathBuf::from("/proc/no-such"),
        started_with: None,
        recipe: Recipe { socket_path: "/far".into(), words: Vec::new() },
        opening: Vec::new(),
        target: 2,
        most: 2,
        streams: VecDeque::new(),
        waiting: VecDeque::new(),
        guarded: Vec::new(),
        leaving: Vec::new(),
        abandoned: Vec::new(),
        paused_until: None,
        refill_at: None,
        wake_at: None,
        wanted_at: Instant::now(),
        is_closing: false,
    }
}

/// A stream that is ready, and the master's end of its connection.
fn ready() -> (Prepared, UnixStream) {
    let (socket, master) = UnixStream::pair().unwrap();
    let confirmed = Some(Confirmed { channel: 1, window: 1024, max_packet: 1024 });
    let dialogue = Dialogue::default();
    (Prepared { socket, dialogue, confirmed, answered: true, since: Instant::now() }, master)
}

#[test]
fn a_stream_that_the_far_side_ends_is_held_until_the_master_has_parted_from_it() {
    let mut keeper = keeper();
    let ((first, mut first_master), (second, _second_master)) = (ready(), ready());
    keeper.streams.extend([first, second]);
    first_master.write_all(&EOF).unwrap();
    keeper.wait(None, Instant::now()).unwrap();
    assert_eq!((keeper.streams.len(), keeper.leaving.len()), (1, 1));
    // It was ended on this side only, and what still comes is taken.
    assert_eq!(first_master.read(&mut [0]).unwrap(), 0);
    first_master.write_all(b"more").unwrap();
    keeper.wait(None, Instant::now()).unwrap();
    assert_eq!((keeper.leaving.len(), keeper.wake_at), (1, None));
    drop(first_master);
    keeper.wait(None, Instant::now()).unwrap();
    assert_eq!((keeper.streams.len(), keeper.leaving.len()), (1, 0));
    assert!(keeper.wake_at.is_some(), "the master is to be woken");
}

#[test]
fn whoever_waits_is_told_when_a_stream_fails_and_others_are_heard_all_the_same() {
    let mut keeper = keeper();
    let ((lost, master), (kept, _kept_master)) = (ready(), ready());
    keeper.streams.extend([lost, kept]);
    let client = |asked| {
        let (connection, theirs) = UnixStream::pair().unwrap();
        connection.set_nonblocking(true).unwrap();
        (Client { connection, asked }, theirs)
    };
    let ((asked, mut asked_theirs), (silent, _silent_theirs), (gone, gone_theirs)) =
        (client(true), client(false), client(false));
    keeper.waiting.extend([asked, silent, gone]);
    drop((master, gone_theirs));
    keeper.wait(None, Instant::now()).unwrap();
    let mut word = [0; 8];
    assert_eq!(asked_theirs.read(&mut word).unwrap(), 1);
    assert_eq!(word[0], Word::None.to_packet()[0]);
    assert_eq!((keeper.streams.len(), keeper.waiting.len()), (1, 1));
}
