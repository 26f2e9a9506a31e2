//! From the moment in which a slot is given back to the moment in which a build that waited for it has it.

use std::{
    fs::{self, File},
    path::PathBuf,
    thread,
    time::{Duration, SystemTime},
};

use harness::{Running, drv, wait_until};
use nix::fcntl::{Flock, FlockArg};

use crate::{
    report::{Bound, Figure, Section},
    scene::{Contender, Scene},
};

const GOAL_MS: f64 = 20.0;
const LIMIT: Duration = Duration::from_secs(120);
/// Those who wait have nothing more to do before it is their turn. There is no event for that.
const SETTLED: Duration = Duration::from_millis(500);

/// Gives back slots as Nix's own hook does, by closing its lock, while one build waits, and while many do.
pub(crate) fn waiting(scene: &Scene, slots: u32, many: u32) -> Section {
    let figures: Vec<Figure> = [1, many].into_iter().map(|count| with(scene, slots, count)).collect();
    let goals: Vec<(String, f64)> =
        figures.iter().map(|figure| (figure.label().to_owned(), figure.max())).collect();
    let title = format!("From a slot's release to the build that has it, the worst of {slots}");
    goals.iter().fold(Section::new(title, figures), |section, (label, worst)| {
        section.goal(&format!("waiting, {label}: worst, ms"), *worst, Bound::AtMost(GOAL_MS))
    })
}

fn with(scene: &Scene, slots: u32, count: u32) -> Figure {
    let mut figure = Figure::new(&format!("{count} waiting"), "ms");
    let mut held: Vec<Option<Flock<File>>> = (0..slots).map(|number| Some(take(scene, number))).collect();
    let mut builds = Vec::new();
    let mut started = 0;
    for slot in &mut held {
        let taken = figure.count();
        if builds.is_empty() || count == 1 {
            builds.push(start(scene, &format!("wait-{count}-{taken}"), count));
            started += count;
        }
        let left = (started - taken as u32) as usize;
        wait_until("all wait", LIMIT, || waiting_now(scene) == left);
        thread::sleep(SETTLED);
        let lock = slot.take().unwrap();
        let path = path(scene, taken as u32);
        let begin = SystemTime::now();
        drop(lock);
        // Whoever takes it says since when. (A look at /proc/locks would hold up all who lock files.)
        let mut since = None;
        wait_until("somebody takes the slot", LIMIT, || {
            since = fs::metadata(&path).unwrap().modified().unwrap().duration_since(begin).ok();
            since.is_some()
        });
        figure.push(since.unwrap().as_secs_f64() * 1000.0);
    }
    scene.client.write(&format!("/mnt/share/go-{count}"), "");
    drop(held);
    for build in builds {
        build.wait().assert_success();
    }
    figure
}

/// Builds that go on only when all is measured, so that each keeps the slot it has.
fn start(scene: &Scene, name: &str, count: u32) -> Running {
    let name = scene.fresh(name);
    let go = if count == 1 { "go-1".to_owned() } else { format!("go-{count}") };
    let body = format!("until [ -e /mnt/share/{go} ]; do sleep 0.1; done; echo > $out");
    let all = format!(r#"builtins.genList (i: d "{name}-${{toString i}}" "{body}" {{ }}) {count}"#);
    scene.spawn(Contender::Ours, &drv::expression(&all))
}

fn path(scene: &Scene, number: u32) -> PathBuf {
    scene.client.path(&format!("/nix/var/nix/current-load/ssh-ng:__mac-{number}"))
}

/// Takes a slot as Nix's own hook does.
pub(crate) fn take(scene: &Scene, number: u32) -> Flock<File> {
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(false).open(path(scene, number)).unwrap();
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error).unwrap()
}

fn waiting_now(scene: &Scene) -> usize {
    scene.client.entries("/run/nix-offload/queue").iter().filter(|name| name.contains("-u")).count()
}
