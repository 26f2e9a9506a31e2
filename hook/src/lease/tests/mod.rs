use super::*;
use std::collections::BTreeSet;

const MOMENT: Duration = Duration::from_millis(20);
const LIMIT: Duration = Duration::from_secs(20);

/// A lease whose shell says what the test says.
struct Bench {
    _directory: tempfile::TempDir,
    reach: Reach,
    machine: Machine,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let runtime = directory.path().join("run");
        let name = |name: &str| (name == "NIX_OFFLOAD_RUNTIME_DIR").then(|| runtime.clone().into());
        let reach = Reach::new(name).unwrap();
        let machine = Machine::for_uri("ssh-ng://mac", BTreeSet::new()).unwrap();
        Self { _directory: directory, reach, machine }
    }

    fn lease(&self) -> (Sender<News>, Lease) {
        let (say, heard) = mpsc::channel();
        let (reach, machine, end) = (self.reach.clone(), self.machine.clone(), Arc::default());
        (say, Lease { reach, machine, slots: 1, heard, end })
    }

    fn is_without(&self) -> bool {
        self.reach.is_without_leases(&self.machine)
    }
}

fn wait(lease: &mut Lease, bounds: [Duration; 2]) -> (Permit, usize) {
    let mut told = 0;
    let permit = lease.wait_within(bounds, &mut || told += 1).unwrap();
    (permit, told)
}

#[test]
fn a_shell_that_is_silent_is_named_as_that_and_is_no_news_for_other_builds() {
    let bench = Bench::new();
    let (_say, mut lease) = bench.lease();
    let silent = "no shell there has said a word within 0 seconds";
    assert_eq!(wait(&mut lease, [MOMENT, LIMIT]), (Permit::Unanswered(silent.into()), 0));
    assert!(!bench.is_without());
}

#[test]
fn where_there_were_leases_a_silent_shell_is_waited_for() {
    let bench = Bench::new();
    bench.reach.note_lease(&bench.machine);
    let (say, mut lease) = bench.lease();
    let mut told = 0;
    let permit = lease.wait_within([MOMENT, LIMIT], &mut || {
        told += 1;
        say.send(News::Waiting).unwrap();
        say.send(News::Held).unwrap();
    });
    assert_eq!((permit.unwrap(), told, bench.is_without()), (Permit::Held, 1, false));
}

#[test]
fn where_there_were_leases_no_answer_is_no_news_for_other_builds() {
    let bench = Bench::new();
    bench.reach.note_lease(&bench.machine);
    let (say, mut lease) = bench.lease();
    let (permit, told) = wait(&mut lease, [MOMENT, MOMENT]);
    assert!(matches!(permit, Permit::Unanswered(_)), "{permit:?}");
    assert_eq!((told, bench.is_without()), (1, false));
    // No process can be started there, for instance.
    say.send(News::NoShell).unwrap();
    let (permit, _) = wait(&mut lease, [LIMIT, LIMIT]);
    assert_eq!(
        (permit, bench.is_without()),
        (Permit::Unanswered("a shell there ended without a word".into()), false)
    );
    // What the script says of the machine holds for all.
    let (say, mut lease) = bench.lease();
    say.send(News::Without("no flock".into())).unwrap();
    let (permit, _) = wait(&mut lease, [LIMIT, LIMIT]);
    assert_eq!((permit, bench.is_without()), (Permit::Without("no flock".into()), true));
}

#[test]
fn an_account_without_a_shell_is_asked_for_none_again() {
    let bench = Bench::new();
    let (say, mut lease) = bench.lease();
    say.send(News::NoShell).unwrap();
    let (permit, _) = wait(&mut lease, [LIMIT, LIMIT]);
    assert_eq!((permit, bench.is_without()), (Permit::Without(NO_SHELL.into()), true));
    // A lease that is had after all ends that.
    bench.reach.note_lease(&bench.machine);
    assert!(!bench.is_without());
}

#[test]
fn a_thread_of_ours_that_is_missing_says_nothing_of_the_account() {
    let bench = Bench::new();
    let (say, mut lease) = bench.lease();
    drop(say);
    let (permit, _) = wait(&mut lease, [LIMIT, LIMIT]);
    assert!(matches!(permit, Permit::Unanswered(_)), "{permit:?}");
    assert!(!bench.is_without());
}

#[test]
fn each_shell_has_its_time_for_a_first_word_and_no_more() {
    let heard = |news: Vec<News>| {
        let bench = Bench::new();
        let (say, mut lease) = bench.lease();
        news.into_iter().for_each(|news| say.send(news).unwrap());
        wait(&mut lease, [MOMENT, LIMIT])
    };
    let silent = || Permit::Unanswered("no shell there has said a word within 0 seconds".into());
    // One that comes after others of ours had all that we may have.
    assert_eq!(heard(vec![News::Crowded]), (silent(), 1));
    // One that comes after another one had the slot while the inputs travelled.
    assert_eq!(heard(vec![News::Waiting, News::Held, News::Lost]), (silent(), 0));
    assert_eq!(heard(vec![News::Held, News::Lost, News::Waiting, News::Held]), (Permit::Held, 0));
}

#[test]
fn a_shell_that_cannot_be_started_costs_the_build_no_connection() {
    let bench = Bench::new();
    let (say, mut lease) = bench.lease();
    for why in ["no login", "still no login"] {
        say.send(News::NotStarted(why.into())).unwrap();
    }
    let why = "no shell could be started there within 0 seconds: still no login";
    assert_eq!(wait(&mut lease, [MOMENT, LIMIT]), (Permit::Unanswered(why.into()), 0));
    assert!(!bench.is_without());
}

/// What is said to a shell, and whether its stream has ended.
struct Said(Sender<Vec<u8>>);

impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(bytes.to_vec()).map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl CloseWrite for Said {
    fn shutdown(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn nothing_more_is_said_to_a_shell_that_is_gone() {
    let end = Arc::<End>::default();
    let (said, hears) = mpsc::channel();
    let over = end.watch();
    let talking = thread::spawn(move || talk(Box::new(Said(said)), 1, &over));
    assert!(hears.recv_timeout(LIMIT).is_ok());
    let begin = Instant::now();
    // As the thread does that started it, when it is to start another one.
    assert!(!end.wait(Duration::ZERO));
    while hears.recv_timeout(LIMIT).is_ok() {}
    talking.join().unwrap();
    assert!(begin.elapsed() < BEAT / 2, "its session was held for {:?}", begin.elapsed());
    // The end itself is heard of by whoever watches then, and later.
    let over = end.watch();
    end.come();
    for over in [over, end.watch()] {
        assert_eq!(over.recv_timeout(LIMIT), Err(RecvTimeoutError::Disconnected));
    }
    assert!(end.wait(LIMIT));
}
