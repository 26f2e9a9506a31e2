use super::*;
use std::fs;

#[test]
fn a_shell_of_this_machine_answers_and_again() {
    let mut conversation = Conversation::begin(&Open::here()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    for _ in 0..3 {
        let answer = conversation.sample(directory.path().to_str()).unwrap();
        assert!(!answer.hangs);
        let Entry { sample, round_trip } = answer.entry;
        assert!(
            sample.cores > Some(0) && sample.load_average.is_some() && sample.disk_free > Some(0),
            "{sample:?}"
        );
        assert!(round_trip.is_some_and(|seconds| seconds > 0.0 && seconds < 5.0), "{round_trip:?}");
    }
}

#[test]
fn a_thousand_machines_are_read_quickly() {
    let directory = tempfile::tempdir().unwrap();
    let path = Samples::path(directory.path());
    let mut samples = Samples::default();
    let mut conversation = Conversation::begin(&Open::here()).unwrap();
    let mut entry = conversation.sample(directory.path().to_str()).unwrap().entry;
    entry.sample.own_load = Some(1.25);
    for number in 0..1000 {
        samples.put(&format!("{number:020x}"), entry.clone());
    }
    samples.write(&path).unwrap();
    assert!(fs::metadata(&path).unwrap().len() < 400_000);
    let clock = Instant::now();
    assert!(Samples::read(&path).of(&format!("{:020x}", 999)).is_some());
    let took = clock.elapsed();
    // Tests are not optimised, and this machine may be busy.
    assert!(took < Duration::from_millis(200), "{took:?}");
}
