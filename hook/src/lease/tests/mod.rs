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

    fn lease(&self) -> (Sender<Heard>, Lease) {
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
        say.send(Ok(Word::Here)).unwrap();
        say.send(Ok(Word::Held)).unwrap();
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
    drop(say);
    let (permit, _) = wait(&mut lease, [LIMIT, LIMIT]);
    assert_eq!(
        (permit, bench.is_without()),
        (Permit::Unanswered("a shell there ended without a word".into()), false)
    );
    // What the script says of the machine holds for all.
    let (say, mut lease) = bench.lease();
    say.send(Ok(Word::None("no flock".into()))).unwrap();
    let (permit, _) = wait(&mut lease, [LIMIT, LIMIT]);
    assert_eq!((permit, bench.is_without()), (Permit::Without("no flock".into()), true));
}

#[test]
fn an_account_without_a_shell_is_asked_for_none_again() {
    let bench = Bench::new();
    let (say, mut lease) = bench.lease();
    drop(say);
    let (permit, _) = wait(&mut lease, [LIMIT, LIMIT]);
    assert_eq!((permit, bench.is_without()), (Permit::Without(NO_SHELL.into()), true));
    // A lease that is had after all ends that.
    bench.reach.note_lease(&bench.machine);
    assert!(!bench.is_without());
}
