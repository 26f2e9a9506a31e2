use super::*;
use std::sync::Mutex;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(20);
const MANY: u64 = 256;

fn queue() -> (tempfile::TempDir, Queue) {
    let runtime = tempfile::tempdir().unwrap();
    let queue = Queue::open(runtime.path(), Path::new(USUAL_STORE)).unwrap();
    (runtime, queue)
}

fn wait_until(what: &str, mut question: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !question() {
        assert!(begin.elapsed() < LIMIT, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// That many seconds after a time long ago.
fn soon(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_700_000_000 + seconds)
}

fn one_of(machines: &[&str]) -> Wish {
    Wish { machines: machines.iter().map(|name| (*name).to_owned()).collect(), slots: 1 }
}

/// Those who wait for the turn, and the one who has it.
fn in_line_of_all(queue: &Queue) -> usize {
    queue.names().iter().filter(|name| name.line.whose == Whose::All).count()
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
    let mut places: Vec<Option<Place>> =
        (0..20).map(|_| queue.place(one_of(&["m"]), 0, soon(0), MANY).unwrap()).collect();
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
                let turn = place.wait(None).unwrap().unwrap();
                served.lock().unwrap().push(number);
                drop(turn);
            });
        }
    });
    assert_eq!(served.into_inner().unwrap(), [2, 3, 4, 5, 6, 10, 11, 12, 13, 14, 16, 17, 18]);
    // What the last one left is found by the next.
    assert_eq!(queue.waiting(), Waiting::default());
    assert_eq!(queue.names().len(), 0);
}

#[test]
fn users_take_turns_and_the_builds_of_each_keep_their_order() {
    let (_runtime, queue) = queue();
    let users: [(u32, usize); 3] = [(1000, 6), (1001, 2), (1002, 1)];
    let places = users.map(|(user, count)| {
        (0..count)
            .map(|_| queue.place(one_of(&["m"]), user, soon(0), MANY).unwrap().unwrap())
            .collect::<Vec<_>>()
    });
    let left = Mutex::new(users.map(|(_, count)| count));
    let served = Mutex::new(Vec::new());
    thread::scope(|scope| {
        let (left, served, queue) = (&left, &served, &queue);
        for (user, places) in places.into_iter().enumerate() {
            for (number, place) in places.into_iter().enumerate() {
                scope.spawn(move || {
                    let turn = place.wait(None).unwrap().unwrap();
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
fn no_more_of_a_user_wait_than_may_and_the_killed_do_not_count() {
    let (_runtime, queue) = queue();
    let place = |machines: &[&str], user| queue.place(one_of(machines), user, soon(0), 3).unwrap();
    let mut places: Vec<Place> = (0..3).map(|_| place(&["a", "b"], 1000).unwrap()).collect();
    assert!(place(&["b", "a"], 1000).is_none(), "the same machines");
    assert!(place(&["a"], 1000).is_some(), "other machines");
    assert!(place(&["a", "b"], 1001).is_some(), "another user");
    kill(places.remove(1));
    places.push(place(&["a", "b"], 1000).unwrap());
    assert!(place(&["a", "b"], 1000).is_none());
}

#[test]
fn many_who_come_at_once_keep_to_the_bound() {
    const MOST: u64 = 5;
    let (runtime, queue) = queue();
    let door = queue.door().unwrap();
    let places: Vec<Option<Place>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..16)
            .map(|_| {
                scope.spawn(|| {
                    // As if each were a process.
                    let queue = Queue::open(runtime.path(), Path::new(USUAL_STORE)).unwrap();
                    queue.place(one_of(&["m"]), 0, soon(0), MOST).unwrap()
                })
            })
            .collect();
        wait_until("all stand before the door", || held_up(&queue) == 16);
        drop(door);
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(places.iter().flatten().count() as u64, MOST);
}

#[test]
fn each_store_has_a_queue_of_its_own() {
    let (runtime, queue) = queue();
    let [private, third] = ["/home/me/nix/var/nix", "/srv/nix/var/nix"].map(Path::new);
    let other = Queue::open(runtime.path(), private).unwrap();
    let waiting = |store: &Path| Queue::of(runtime.path(), store).waiting().all_of("m");
    let _here = queue.place(one_of(&["m"]), 0, soon(0), MANY).unwrap().unwrap();
    let _there = [1, 2].map(|at| other.place(one_of(&["m"]), 0, soon(at), MANY).unwrap().unwrap());
    let numbers = [Path::new(USUAL_STORE), private, third].map(waiting);
    assert_eq!(numbers, [1, 2, 0]);
}

#[test]
fn a_number_is_never_given_twice() {
    let (runtime, queue) = queue();
    let place = || queue.place(one_of(&["m"]), 0, soon(0), MANY).unwrap().unwrap();
    let first = place();
    let path = first.ticket.path.clone();
    drop(first);
    // Whoever still means to remove the file of the first one must not find that of the next.
    let second = place();
    assert_ne!(second.ticket.path, path);
    assert_eq!(second.ticket.name.number, 2);
    // A door without a number: as after another version.
    fs::write(runtime.path().join("queue").join(DOOR), "").unwrap();
    assert_eq!(place().ticket.name.number, 3);
}

#[test]
fn the_earlier_ticket_is_served_first_but_whoever_has_the_turn_keeps_it() {
    let (_runtime, queue) = queue();
    let place = |seconds| queue.place(one_of(&["m"]), 0, soon(seconds), MANY).unwrap().unwrap();
    let turn = place(100).wait(None).unwrap().unwrap();
    let served = Mutex::new(Vec::new());
    thread::scope(|scope| {
        let served = &served;
        let wait = |place: Place, name: u64| {
            scope.spawn(move || {
                let turn = place.wait(None).unwrap().unwrap();
                served.lock().unwrap().push(name);
                drop(turn);
            });
        };
        let waits = || held_up(&queue);
        for (count, seconds) in [50, 40, 60, 10, 45].into_iter().enumerate() {
            wait(place(seconds), seconds);
            wait_until("it waits", || waits() == count + 1);
        }
        // One learns later that much waits for it, one was killed at the front.
        let mut urgent = place(70);
        urgent.came_at(soon(20)).unwrap();
        kill(place(5));
        wait(urgent, 20);
        wait_until("it waits, too", || waits() == 6);
        assert_eq!(served.lock().unwrap().len(), 0);
        drop(turn);
    });
    assert_eq!(served.into_inner().unwrap(), [10, 20, 40, 45, 50, 60]);
    assert_eq!(queue.names().len(), 0);
}

/// Locks in this queue that somebody waits for: `->` in `/proc/locks`.
fn held_up(queue: &Queue) -> usize {
    let inode = |entry: io::Result<fs::DirEntry>| Some(format!(":{} ", entry.ok()?.metadata().ok()?.ino()));
    let inodes: Vec<String> = fs::read_dir(&queue.directory).unwrap().filter_map(inode).collect();
    let locks = fs::read_to_string("/proc/locks").unwrap();
    locks
        .lines()
        .filter(|line| line.contains("->") && inodes.iter().any(|inode| line.contains(inode)))
        .count()
}

#[test]
fn who_waits_for_other_machines_goes_to_their_line_and_to_his_place_in_it() {
    let (_runtime, queue) = queue();
    let place =
        |machines: &[&str], seconds| queue.place(one_of(machines), 0, soon(seconds), MANY).unwrap().unwrap();
    let first = place(&["fast", "slow"], 10).wait(None).unwrap().unwrap();
    let next = place(&["fast", "slow"], 20);
    let early = place(&["fast"], 5);
    let late = place(&["fast"], 15);
    let first = first.change(one_of(&["fast"])).unwrap();
    // The next one of its line has the turn at once.
    let next = next.wait(None).unwrap().unwrap();
    assert_eq!(next.wish(), &one_of(&["fast", "slow"]));
    let order: Vec<PathBuf> = [&early, &first, &late].map(|place| place.ticket.path.clone()).to_vec();
    assert!(order.is_sorted(), "{order:?}");
    // Those that can use fewer machines only are before it there.
    let narrower = queue.waiting().narrower(next.wish());
    assert_eq!(["fast", "slow"].map(|machine| narrower.all_of(machine)), [3, 0]);
    assert_eq!(queue.waiting().narrower(&one_of(&["fast"])).all_of("fast"), 0);
    drop(early);
    assert_eq!(first.wait(None).unwrap().unwrap().wish(), &one_of(&["fast"]));
}

#[test]
fn it_is_known_how_many_wait_for_a_machine() {
    let (_runtime, queue) = queue();
    assert_eq!(queue.waiting(), Waiting::default());
    let place = |machines: &[&str]| queue.place(one_of(machines), 0, soon(0), MANY).unwrap().unwrap();
    let [a, b, c] = [place(&["a", "b"]), place(&["a", "b"]), place(&["b"])];
    let of = |machine| queue.waiting().of(machine, 8, 1);
    assert_eq!(["a", "b", "c"].map(of), [2, 3, 0]);
    kill(b);
    kill(c);
    let turn = a.wait(None).unwrap().unwrap();
    assert_eq!(["a", "b", "c"].map(of), [1, 1, 0], "one whose turn it is waits, too");
    drop(turn);
    assert_eq!(queue.waiting(), Waiting::default());
}

#[test]
fn who_needs_several_slots_keeps_nobody_from_less_than_that() {
    let (_runtime, queue) = queue();
    let big = queue.place(Wish { slots: 5, ..one_of(&["m"]) }, 0, soon(0), MANY).unwrap().unwrap();
    let waiting = queue.waiting();
    let free = |free| waiting.of("m", 8, free);
    assert_eq!([0, 1, 4, 5, 8].map(free), [0, 0, 0, 1, 1]);
    assert_eq!([waiting.of("m", 3, 2), waiting.of("m", 3, 3)], [0, 1], "all that it has");
    // People are told of all of them.
    assert_eq!([waiting.all_of("m"), waiting.all_of("n")], [1, 0]);
    // Nor do those that need less stand behind it.
    let _turn = big.wait(None).unwrap().unwrap();
    let small = queue.place(one_of(&["m"]), 0, soon(0), MANY).unwrap().unwrap().wait(None).unwrap().unwrap();
    assert!(small.has_elder());
}

#[test]
fn whoever_came_on_later_lets_others_go_first_who_want_the_same_machine() {
    let (_runtime, queue) = queue();
    let turn = |machines: &[&str]| {
        queue.place(one_of(machines), 0, soon(0), MANY).unwrap().unwrap().wait(None).unwrap().unwrap()
    };
    let elder = turn(&["a", "b"]);
    let younger = turn(&["b", "c"]);
    let apart = turn(&["d"]);
    assert_eq!([&elder, &younger, &apart].map(Turn::has_elder), [false, true, false]);
    drop(elder);
    assert!(!younger.has_elder());
    // Now the first set is the later one.
    assert!(turn(&["a", "b"]).has_elder());
    let Turn { turn: ticket, place } = younger;
    kill(Place { queue: queue.clone(), wish: Wish::default(), user: 0, came: 0, ticket });
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
                    let turn = queue
                        .place(one_of(&["m"]), user, soon(0), MANY)
                        .unwrap()
                        .unwrap()
                        .wait(None)
                        .unwrap()
                        .unwrap();
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

#[test]
fn whoever_waits_no_longer_than_until_gives_up_its_place_and_holds_nobody_up() {
    let (_runtime, queue) = queue();
    let place = || queue.place(one_of(&["m"]), 0, soon(0), MANY).unwrap().unwrap();
    let (first, second, third) = (place().wait(None).unwrap().unwrap(), place(), place());
    let begin = Instant::now();
    let bound = Duration::from_millis(50);
    assert!(second.wait(Some(begin + bound)).unwrap().is_none());
    assert!(begin.elapsed() >= bound && begin.elapsed() < LIMIT);
    assert_eq!(queue.waiting().all_of("m"), 2);
    // Nor does it wait for longer than it must.
    thread::scope(|scope| {
        let third = scope.spawn(|| third.wait(Some(Instant::now() + LIMIT)).unwrap().is_some());
        drop(first);
        assert!(third.join().unwrap());
    });
    assert!(begin.elapsed() < LIMIT);
    assert!(place().wait(Some(Instant::now())).unwrap().is_some(), "nobody is there");
}

#[test]
fn the_killed_of_one_user_are_not_counted_for_those_of_another_that_live() {
    let (_runtime, queue) = queue();
    let place = |user, second| queue.place(one_of(&["m"]), user, soon(second), MANY).unwrap().unwrap();
    let dead: Vec<Place> = (0..50).map(|_| place(1001, 0)).collect();
    dead.into_iter().for_each(kill);
    let (live, behind) = (place(1000, 1), place(1000, 2));
    let turn = live.wait(None).unwrap().unwrap();
    assert_eq!(queue.waiting().all_of("m"), 2);
    // And those of all users that live are.
    let other = place(1002, 0);
    assert_eq!(queue.waiting().all_of("m"), 3);
    drop((turn, behind, other));
    assert_eq!(queue.waiting(), Waiting::default());
}
