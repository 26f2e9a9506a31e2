use super::*;
use std::sync::Mutex;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(20);
const MANY: u64 = 256;

fn queue() -> (tempfile::TempDir, Queue) {
    let runtime = tempfile::tempdir().unwrap();
    let queue = Queue::open(runtime.path()).unwrap();
    (runtime, queue)
}

fn wait_until(what: &str, mut question: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !question() {
        assert!(begin.elapsed() < LIMIT, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Those who wait for the turn, and the one who has it.
fn in_line_of_all(queue: &Queue) -> usize {
    queue.names().iter().filter(|name| name.line.ends_with("-all")).count()
}

/// As a killed process leaves it: the file is there, the lock is not.
fn kill(place: Place) {
    let (queue, path) = (place.queue.clone(), place.ticket.path.clone());
    let text = fs::read(&path).unwrap();
    drop(place);
    fs::write(&path, text).unwrap();
    assert!(queue.names().iter().any(|name| queue.path(name) == path));
}

#[test]
fn twenty_are_served_in_their_order_and_the_killed_hold_nobody_up() {
    let (_runtime, queue) = queue();
    let mut places: Vec<Option<Place>> = (0..20).map(|_| queue.place(&["m"], 0, MANY).unwrap()).collect();
    for killed in [0, 1, 7, 8, 9, 15, 19] {
        kill(places[killed].take().unwrap());
    }
    let served = Mutex::new(Vec::new());
    thread::scope(|scope| {
        let served = &served;
        // The last are the first to ask.
        for (number, place) in places.into_iter().enumerate().rev() {
            let Some(place) = place else { continue };
            scope.spawn(move || {
                let turn = place.wait().unwrap();
                served.lock().unwrap().push(number);
                drop(turn);
            });
        }
    });
    assert_eq!(served.into_inner().unwrap(), [2, 3, 4, 5, 6, 10, 11, 12, 13, 14, 16, 17, 18]);
    // What the last one left is found by the next.
    assert_eq!(queue.waiting().len(), 0);
    assert_eq!(queue.names().len(), 0);
}

#[test]
fn users_take_turns_and_the_builds_of_each_keep_their_order() {
    let (_runtime, queue) = queue();
    let users: [(u32, usize); 3] = [(1000, 6), (1001, 2), (1002, 1)];
    let places = users.map(|(user, count)| {
        (0..count).map(|_| queue.place(&["m"], user, MANY).unwrap().unwrap()).collect::<Vec<_>>()
    });
    let left = Mutex::new(users.map(|(_, count)| count));
    let served = Mutex::new(Vec::new());
    thread::scope(|scope| {
        let (left, served, queue) = (&left, &served, &queue);
        for (user, places) in places.into_iter().enumerate() {
            for (number, place) in places.into_iter().enumerate() {
                scope.spawn(move || {
                    let turn = place.wait().unwrap();
                    // Nobody is served before all who can have come on.
                    wait_until("the first of each user has come on", || {
                        in_line_of_all(queue) >= left.lock().unwrap().iter().filter(|left| **left > 0).count()
                    });
                    served.lock().unwrap().push((user, number));
                    left.lock().unwrap()[user] -= 1;
                    drop(turn);
                });
            }
        }
    });
    let served = served.into_inner().unwrap();
    for user in 0..3 {
        let own: Vec<usize> =
            served.iter().filter(|(whose, _)| *whose == user).map(|(_, number)| *number).collect();
        assert!(own.is_sorted(), "{served:?}");
    }
    // Whoever has several never has two in a row while another waits.
    let mut first: Vec<usize> = served[..3].iter().map(|(user, _)| *user).collect();
    first.sort_unstable();
    assert_eq!(first, [0, 1, 2], "{served:?}");
    assert!(served[..5].iter().filter(|(user, _)| *user == 1).count() == 2, "{served:?}");
}

#[test]
fn no_more_wait_than_may_and_the_killed_do_not_count() {
    let (_runtime, queue) = queue();
    let mut places: Vec<Place> =
        (0..3).map(|user| queue.place(&["a", "b"], user, 3).unwrap().unwrap()).collect();
    assert!(queue.place(&["b", "a"], 0, 3).unwrap().is_none(), "the same machines");
    assert!(queue.place(&["a"], 0, 3).unwrap().is_some(), "other machines");
    kill(places.remove(1));
    assert!(queue.place(&["a", "b"], 0, 3).unwrap().is_some());
}

#[test]
fn it_is_known_how_many_wait_for_a_machine() {
    let (_runtime, queue) = queue();
    assert_eq!(queue.waiting(), BTreeMap::new());
    let place = |machines: &[&str]| queue.place(machines, 0, MANY).unwrap().unwrap();
    let [a, b, c] = [place(&["a", "b"]), place(&["a", "b"]), place(&["b"])];
    let known =
        |list: &[(&str, u64)]| list.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
    assert_eq!(queue.waiting(), known(&[("a", 2), ("b", 3)]));
    kill(b);
    kill(c);
    let turn = a.wait().unwrap();
    assert_eq!(queue.waiting(), known(&[("a", 1), ("b", 1)]), "one whose turn it is waits, too");
    drop(turn);
    assert_eq!(queue.waiting(), BTreeMap::new());
}

#[test]
fn whoever_came_on_later_lets_others_go_first_who_want_the_same_machine() {
    let (_runtime, queue) = queue();
    let turn = |machines: &[&str]| queue.place(machines, 0, MANY).unwrap().unwrap().wait().unwrap();
    let elder = turn(&["a", "b"]);
    let younger = turn(&["b", "c"]);
    let apart = turn(&["d"]);
    assert_eq!([&elder, &younger, &apart].map(Turn::has_elder), [false, true, false]);
    drop(elder);
    assert!(!younger.has_elder());
    // Now the first set is the later one.
    assert!(turn(&["a", "b"]).has_elder());
    let Turn { turn: ticket, place } = younger;
    kill(Place { queue: queue.clone(), machines: Vec::new(), ticket });
    assert!(!turn(&["a", "b"]).has_elder(), "it was killed");
    drop(place);
}

#[test]
fn nobody_has_the_turn_together_with_another() {
    let (_runtime, queue) = queue();
    let (tell, hear) = mpsc::channel();
    thread::scope(|scope| {
        for user in 0..4 {
            for _ in 0..10 {
                let (queue, tell) = (&queue, tell.clone());
                scope.spawn(move || {
                    let turn = queue.place(&["m"], user, MANY).unwrap().unwrap().wait().unwrap();
                    tell.send(true).unwrap();
                    thread::yield_now();
                    tell.send(false).unwrap();
                    drop(turn);
                });
            }
        }
    });
    drop(tell);
    let events: Vec<bool> = hear.into_iter().collect();
    assert_eq!(events.len(), 80);
    assert!(events.chunks(2).all(|pair| pair == [true, false]));
}

#[test]
fn the_client_of_a_daemons_process_is_read_from_its_words() {
    assert_eq!(client_in(b"nix-daemon\x001234\0\0\0\0\0"), Some(1234));
    assert_eq!(client_in(b"/usr/bin/nix-daemon\x0012345678\0"), Some(12_345_678));
    for words in
        [&b"nix-daemon\0--daemon\0"[..], b"nix-daemon\0", b"", b"nix-build\0", b"sleep\x001000\0", b"nix\0\0"]
    {
        assert_eq!(client_in(words), None, "{}", String::from_utf8_lossy(words));
    }
    // A test runner is no daemon.
    assert_eq!(whose(), nix::unistd::geteuid().as_raw());
}
