//! The accepted build until it has a slot: its place in the queue, looking again, and going to another line.
//!
//! Must never lose a build for a trouble that passes, or have a rule of its own about whose turn it is.

use super::choosing::Choice;
use super::{Candidate, Chosen, Failed, Hook, Stage};
use crate::derivation;
use crate::plan::{Because, Verdict, telling, turn};
use crate::queue::{self, Place, QueueError, Turn, Wish};
use crate::slots::Watch;
use crate::state::Times;
use crate::wire::hook::Verbosity;
use nix_offload_proxy::exit;
use std::error::Error;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// How often a waiting build looks at the slots even if nothing seems to happen.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// How long a build that could take a slot leaves it to those who have had their turn for longer, in other lines.
const ELDERS_FIRST: Duration = Duration::from_millis(5);

/// How often it is noted for those behind that obstacles are still there. What is older than two minutes is forgotten.
const NOTE_AGAIN: Duration = Duration::from_secs(30);

impl Hook<'_> {
    /// Chooses for a build that is accepted, and waits for a slot if need be. None if no machine will do.
    pub(super) fn choose_again(
        &self,
        candidate: &Candidate,
        stage: Stage<'_>,
        failed: &mut Failed,
    ) -> Option<Chosen> {
        candidate.wait.go_on(SystemTime::now());
        match self.choose(candidate, stage, failed) {
            Ok(Choice::Machine(chosen)) => Some(*chosen),
            Ok(Choice::Decline(_)) => None,
            Ok(Choice::Wait(machines) | Choice::Postpone(machines)) => {
                // It is accepted, so it has to wait however many do.
                let (wish, came) = (self.wish(&machines), self.ticket(candidate));
                let place = self.queue.place(wish, queue::whose(), came, u64::MAX);
                let place = place.unwrap_or_else(|error| {
                    self.tell_error(&error, Verbosity::Warn);
                    None
                });
                self.wait_for_slot(candidate, failed, place)
            }
            Err(_) => self.wait_for_slot(candidate, failed, None),
        }
    }

    /// Waits at a place that was taken before the reply, when it was not known yet what waits for this build.
    pub(super) fn wait_in(
        &self,
        candidate: &Candidate,
        failed: &mut Failed,
        mut place: Place,
    ) -> Option<Chosen> {
        if let Err(error) = place.came_at(self.ticket(candidate)) {
            self.tell_error(&error, Verbosity::Warn);
        }
        self.wait_for_slot(candidate, failed, Some(place))
    }

    /// When the build counts as having come.
    fn ticket(&self, candidate: &Candidate) -> SystemTime {
        let tail = candidate.tail.get_or_init(|| {
            let history = |names: &[&str]| self.memory.seconds_of(names);
            let typical = self.rules.typical_duration;
            let tail = derivation::chain(&self.location, &candidate.drv_path, history, typical);
            tail.map_err(|error| {
                let name = derivation::name_in(&candidate.request.drv_path);
                tracing::warn!("cannot see what waits for '{name}': {}", exit::reason(&error));
            })
            .ok()
        });
        turn::ticket(candidate.wait.since(), *tail)
    }

    /// Waits until a machine has a slot for the build. None if no machine will ever do.
    fn wait_for_slot(
        &self,
        candidate: &Candidate,
        failed: &mut Failed,
        place: Option<Place>,
    ) -> Option<Chosen> {
        let begin = Instant::now();
        if place.is_some() {
            self.tell_that_it_waits(candidate);
        }
        let holds_back =
            || self.memory.latest().as_ref().is_some_and(|latest| latest.because == Because::HeldBack);
        let mut is_held_back = holds_back();
        let (mut trouble, mut no_place) = (Trouble::default(), Trouble::default());
        // Without a turn it may still get a slot.
        let wait_for_turn = |place: Place, is_held_back: bool, no_place: &mut Trouble| {
            let turn = self.wait_for_turn(place, candidate, is_held_back);
            turn.map_err(|error| no_place.tell(self, &error)).ok().flatten()
        };
        let mut turn = place.and_then(|place| wait_for_turn(place, is_held_back, &mut no_place));
        let mut obstacles = Obstacles::since(candidate.wait.since());
        let mut watch: Option<Watch> = None;
        loop {
            if watch.is_none() {
                watch = self.slots.watch().map_err(|error| trouble.tell(self, &error)).ok();
            }
            if turn.as_ref().is_some_and(Turn::has_elder) {
                thread::sleep(ELDERS_FIRST);
            }
            let wish = turn.as_ref().map(Turn::wish);
            obstacles.inherit(self, candidate, wish);
            self.forget_what_is_well(failed);
            match self.choose(candidate, Stage::Waited(wish), failed) {
                Ok(Choice::Wait(machines) | Choice::Postpone(machines)) => {
                    trouble.since = None;
                    obstacles.note(self, candidate, wish);
                    self.attend(failed);
                    self.interest.show();
                    self.tell_what_is_waited_for(&candidate.request);
                    // The next in its line may take what it leaves free, and it comes back when nothing is free. For which
                    // machines exactly it is held back may change with each look; it stays in the line of the first.
                    if holds_back() != is_held_back {
                        let place = self.change_line(&mut turn, self.wish(&machines), candidate);
                        let place = place.map_err(|error| no_place.tell(self, &error));
                        if let Ok(Some(place)) = place {
                            obstacles.entered = SystemTime::now();
                            is_held_back = holds_back();
                            turn = wait_for_turn(place, is_held_back, &mut no_place);
                            continue;
                        }
                    }
                }
                Ok(Choice::Decline(_)) => {
                    obstacles.note(self, candidate, wish);
                    return None;
                }
                Ok(Choice::Machine(chosen)) => {
                    obstacles.note(self, candidate, wish);
                    let duration_ms = begin.elapsed().as_millis() as u64;
                    let name = derivation::name_in(&candidate.request.drv_path);
                    tracing::info!(
                        event = "waited for a slot",
                        derivation = candidate.request.drv_path,
                        duration_ms,
                        "'{name}' waited {} s for a slot",
                        exit::seconds(begin.elapsed())
                    );
                    return Some(*chosen);
                }
                Err(error) => {
                    trouble.tell(self, &error);
                    let since = *trouble.since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= self.rules.obstacle_patience {
                        self.tell_error(&error, Verbosity::Error);
                        return None;
                    }
                    // It may be one that wakes the watch at once.
                    thread::sleep(LOOK_AGAIN);
                    continue;
                }
            }
            match &watch {
                Some(watch) => watch.wait(LOOK_AGAIN),
                None => thread::sleep(LOOK_AGAIN),
            }
        }
    }

    /// Nix says that a build is being done as soon as it is accepted.
    fn tell_that_it_waits(&self, candidate: &Candidate) {
        let latest = self.memory.latest();
        let Some(decision) = latest.as_ref() else { return };
        let (Verdict::Wait(machines) | Verdict::Postpone(machines)) = &decision.verdict else { return };
        if !matches!(decision.because, Because::Full | Because::HeldBack) {
            // There is more to say, which is told elsewhere.
            return;
        }
        let (waiting, slots) = (self.queue.waiting(), telling::names(self.machines, machines));
        let most = machines.iter().map(|index| waiting.all_of(&self.machines[*index].name)).max();
        // Its own place is one of them.
        let others = match most.unwrap_or(0).saturating_sub(1) {
            0 => String::new(),
            1 => ", and so does 1 other build".to_owned(),
            others => format!(", and so do {others} other builds"),
        };
        let text = format!("'{}' waits for a slot of {slots}{others}", candidate.request.drv_path);
        self.nix.message(Verbosity::Info, &text);
    }

    /// A place in the line of those that have this wish; none if that is where it has its turn. The turn in another line is
    /// given up.
    fn change_line(
        &self,
        turn: &mut Option<Turn>,
        wish: Wish,
        candidate: &Candidate,
    ) -> Result<Option<Place>, QueueError> {
        match turn.take() {
            Some(same) if same.wish().machines == wish.machines => {
                *turn = Some(same);
                Ok(None)
            }
            Some(turn) => turn.change(wish).map(Some),
            // It was held back for long enough.
            None => self.queue.place(wish, queue::whose(), self.ticket(candidate), u64::MAX),
        }
    }

    /// None if a build that is held back has been that for long enough.
    fn wait_for_turn(
        &self,
        place: Place,
        candidate: &Candidate,
        is_held_back: bool,
    ) -> Result<Option<Turn>, QueueError> {
        let waited = SystemTime::now().duration_since(candidate.wait.since()).unwrap_or_default();
        let left = self.rules.hold_back.saturating_sub(waited);
        let until = is_held_back.then(|| Instant::now() + left);
        place.wait(until)
    }
}

/// Slots that cannot be looked at, or no place in the queue to be had.
#[derive(Default)]
struct Trouble {
    is_told: bool,
    since: Option<Instant>,
}

impl Trouble {
    /// Tells of it, once.
    fn tell(&mut self, hook: &Hook<'_>, error: &dyn Error) {
        if !std::mem::replace(&mut self.is_told, true) {
            hook.tell_error(error, Verbosity::Warn);
        }
    }
}

/// What those who wait for the same let each other know: since when obstacles keep them from every machine. Only the first
/// of them looks, and when it has no more patience the next one need not begin to count.
struct Obstacles {
    /// Since when the build waits, in this line if it has been in others. What was before that does not count against it.
    entered: SystemTime,
    line: Option<String>,
    noted: Option<Instant>,
}

impl Obstacles {
    fn since(entered: SystemTime) -> Self {
        Self { entered, line: None, noted: None }
    }

    /// Since when a build is kept from every machine that has found so itself since `own`, and heard in its line `since`.
    fn inherited(&self, own: Option<SystemTime>, since: SystemTime) -> SystemTime {
        let since = since.max(self.entered);
        own.map_or(since, |own| own.min(since))
    }

    /// When it is its turn in a line: learns from those before it.
    fn inherit(&mut self, hook: &Hook<'_>, candidate: &Candidate, wish: Option<&Wish>) {
        let line = wish.map(|wish| format!("waiting {}", wish.name()));
        if line == self.line {
            return;
        }
        self.noted = None;
        self.line = line;
        let Some(line) = &self.line else { return };
        if let Some(since) = hook.memory.asked(line).obstructed {
            let since = self.inherited(candidate.wait.obstructed(), since);
            candidate.wait.note_obstructed(Some(since));
            self.noted = Some(Instant::now());
        }
    }

    /// After a decision: lets those behind know.
    fn note(&mut self, hook: &Hook<'_>, candidate: &Candidate, wish: Option<&Wish>) {
        let (Some(line), Some(_)) = (&self.line, wish) else { return };
        let obstructed = candidate.wait.obstructed();
        let is_due = match (obstructed, self.noted) {
            (Some(_), noted) => noted.is_none_or(|noted| noted.elapsed() >= NOTE_AGAIN),
            (None, noted) => noted.is_some(),
        };
        if is_due {
            let first = obstructed.unwrap_or_else(SystemTime::now);
            hook.memory.postponed(line, Times { first, obstructed });
            self.noted = obstructed.map(|_| Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_patience_of_others_is_used_up_for_a_build_only_since_it_came_into_their_line() {
        let at = |seconds: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let obstacles = Obstacles::since(at(590));
        // Somebody has waited since 0 and gives up at 600.
        assert_eq!(obstacles.inherited(None, at(0)), at(590));
        assert_eq!(obstacles.inherited(None, at(595)), at(595));
        // What it knows itself, it knew before.
        assert_eq!(obstacles.inherited(Some(at(300)), at(0)), at(300));
        assert_eq!(obstacles.inherited(Some(at(598)), at(595)), at(595));
    }
}
