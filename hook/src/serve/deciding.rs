//! Asking `plan` with all that is known, taking the slot, and keeping what was decided for those who ask later.

use super::moment::Moment;
use super::{Candidate, Failed, Hook, NOWHERE, Stage, env};
use crate::derivation;
use crate::local_load;
use crate::plan::machine::Machine;
use crate::plan::{self, Decision, Health, Known, Load, Policy, Question, Refusal, Verdict, Work, telling};
use crate::reach::Reach;
use crate::slots::{Held, Holder, SlotError};
use crate::state::{self, Asked, Decided, End, History, Times, Told, Trial};
use crate::survey::{self, Needs, Survey};
use nix_derivation::{Derivation, StorePath};
use nix_offload_proxy::exit;
use std::cell::{Ref, RefCell};
use std::collections::HashSet;
use std::path::PathBuf;
use std::process;
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

/// What hooks remember together.
pub(super) struct Memory {
    state: Option<PathBuf>,
    history: Option<History>,
    decided: Option<Decided>,
    asked: Asked,
    told: Told,
    /// The last decision of this process, until it is kept.
    latest: RefCell<Option<Rc<Decision>>>,
    /// How machines failed that the user was told of because of this request, by their indexes.
    said: RefCell<Failed>,
    /// The derivation, the ranking and the time of that which was kept last.
    kept: RefCell<Option<(String, String, SystemTime)>>,
}

impl Memory {
    pub(super) fn new(reach: &Reach) -> Self {
        let state = state::directory(env);
        let history = state.as_deref().map(History::at);
        let decided = state.as_deref().map(Decided::at);
        let (asked, told) = (Asked::at(reach.directory()), Told::at(reach.directory()));
        Self {
            state,
            history,
            decided,
            asked,
            told,
            latest: RefCell::default(),
            said: RefCell::default(),
            kept: RefCell::default(),
        }
    }

    /// When Nix first asked for this derivation, and since when there are obstacles.
    pub(super) fn asked(&self, drv_path: &str) -> Times {
        let now = SystemTime::now();
        self.asked.times(drv_path, now).unwrap_or(Times { first: now, obstructed: None })
    }

    pub(super) fn postponed(&self, drv_path: &str, times: Times) {
        self.asked.postponed(drv_path, times, SystemTime::now());
    }

    /// Seconds that builds of these names take, where it is known.
    pub(super) fn seconds_of(&self, names: &[&str]) -> Vec<Option<f64>> {
        self.history.as_ref().map(|history| history.seconds_of(names)).unwrap_or_default()
    }

    /// Whether Nix was asked a moment ago to ask again for something.
    pub(super) fn is_anything_postponed(&self) -> bool {
        self.asked.is_anything_postponed(SystemTime::now())
    }

    /// The last decision of this process, unless it is kept already.
    pub(super) fn latest(&self) -> Ref<'_, Option<Rc<Decision>>> {
        self.latest.borrow()
    }

    /// Whether nobody has told this in this Nix command.
    pub(super) fn is_first_told(&self, what: &str) -> bool {
        self.told.is_first(what)
    }

    /// The user was told in full how a machine failed.
    pub(super) fn note_said(&self, index: usize, how: &str) {
        self.said.borrow_mut().insert(index, how.to_owned());
    }

    /// Whether that stands right above: it was told because of this request, by this process.
    pub(super) fn was_said(&self, index: usize, how: &str) -> bool {
        self.said.borrow().get(&index).is_some_and(|said| said == how)
    }

    /// Another request comes. What was said because of the last one may be far above.
    pub(super) fn begin_request(&self) {
        self.said.borrow_mut().clear();
    }

    /// Keeps the last decision, about this derivation, for `explain --last`, and what came of it.
    pub(super) fn keep_latest(&self, drv_path: &str, machines: &[Machine], trials: &[Trial]) {
        let Some(decided) = &self.decided else { return };
        let mut kept = self.kept.borrow_mut();
        if let Some(decision) = self.latest.take() {
            *kept = Some((drv_path.to_owned(), telling::ranking(&decision, machines), decision.at));
        }
        if let Some((_, ranking, at)) = kept.as_ref().filter(|(of, ..)| of == drv_path) {
            decided.note(drv_path, ranking, trials, *at);
        }
    }

    /// Machines that the last decision left alone for what is known of their health.
    pub(super) fn left_alone(&self) -> Vec<usize> {
        self.refused(|refusal| matches!(refusal, Refusal::CoolDown { .. } | Refusal::Failed(_)))
    }

    /// Machines that the last decision left out because they were not to be waited for.
    pub(super) fn unasked(&self) -> HashSet<usize> {
        self.refused(|refusal| *refusal == Refusal::Unasked)
    }

    /// Machines that the last decision passed over for what they said of themselves.
    pub(super) fn short(&self) -> Vec<usize> {
        self.refused(|refusal| {
            matches!(refusal, Refusal::Short { .. } | Refusal::Inhibited(_) | Refusal::Recalled { .. })
        })
    }

    /// Those of them that are to be asked before they get a build.
    pub(super) fn recalled(&self) -> HashSet<usize> {
        self.refused(|refusal| matches!(refusal, Refusal::Recalled { .. }))
    }

    /// Machines that the last decision passed over for such a reason.
    fn refused<C: FromIterator<usize>>(&self, is_such: impl Fn(&Refusal) -> bool) -> C {
        let latest = self.latest.borrow();
        let refusals = latest.iter().flat_map(|decision| decision.refusals());
        refusals.filter(|(_, refusal)| is_such(refusal)).map(|(index, _)| index).collect()
    }

    /// Notes how many seconds a build took where each of them is worth `pace` of the usual.
    pub(super) fn built(&self, drv: &Derivation, seconds: f64, pace: f64, output: u64) {
        if let Some(history) = &self.history {
            history.note(drv.name(), seconds * pace, output);
        }
    }
}

impl Hook<'_> {
    /// What is known of a build before it is done.
    pub(super) fn work(&self, drv: &Derivation, since: SystemTime) -> Work {
        survey::work(self.memory.history.as_ref(), drv.name(), since)
    }

    /// Decides, and takes the slot of the machine that is chosen; none if it is not free any more.
    pub(super) fn decide(
        &self,
        candidate: &Candidate,
        stage: Stage<'_>,
        failed: &Failed,
        cut_off: &HashSet<usize>,
    ) -> Result<(Decision, Option<Held>), SlotError> {
        let wait = &candidate.wait;
        wait.look(Moment::now());
        let work = Work {
            obstructed_since: wait.obstructed(),
            waiting_since: Some(wait.since()),
            silent_since: self.asking.silent.get(),
            ..candidate.work
        };
        let unfit = candidate.unfit.borrow();
        let health = |index: usize| {
            let reason = failed.get(&index).or_else(|| unfit.get(&index));
            let health = reason.map(|reason| Health::Failed(reason.clone()));
            health.or_else(|| cut_off.contains(&index).then_some(Health::CutOff))
        };
        let decided = self.decide_if((candidate, &work), stage, health, |_| true)?;
        wait.note_obstructed(decided.0.obstructed_since(work.obstructed_since));
        self.asking.silent.set(decided.0.silent_since(work.silent_since));
        Ok(decided)
    }

    /// The same with other words of what is known of the build and of the `health` of machines, by their index, which are
    /// not looked at then; and takes the slot only if it is `wanted` after that decision.
    pub(super) fn decide_if(
        &self,
        (candidate, work): (&Candidate, &Work),
        stage: Stage<'_>,
        health: impl Fn(usize) -> Option<Health>,
        wanted: impl FnOnce(&Decision) -> bool,
    ) -> Result<(Decision, Option<Held>), SlotError> {
        let now = SystemTime::now();
        let state = self.memory.state.as_deref();
        let needs = Needs { inputs: self.inputs(candidate), usual: candidate.work.usual };
        let survey = Survey::begin(self.machines, &self.slots, &self.reach, &self.location, state, now)
            .for_build(self.machines, &candidate.request, &needs);
        // What is new does not overtake those that wait.
        let (survey, local) = match stage {
            Stage::New { .. } => (survey, &self.local),
            Stage::Again => (survey.at_its_turn(None), &NOWHERE),
            Stage::Waited(wish) => (survey.at_its_turn(wish), &NOWHERE),
        };
        let here = (self.rules.policy == Policy::Cost).then(|| local_load::sample(now));
        let question = Question {
            machines: self.machines,
            rules: &self.rules,
            local,
            here: here.as_ref(),
            request: &candidate.request,
            work,
            now,
        };
        let mut free: Vec<Option<u64>> = vec![None; self.machines.len()];
        let mut fault = None;
        let unasked = self.not_to_be_asked(candidate, stage);
        let _choosing = self.slots.lock_choice()?;
        let decision = plan::decide(&question, |index| {
            let unused = Known::ready(Load::default());
            if let Some(health) = health(index) {
                return unused.with_health(health);
            }
            match survey.look(&self.machines[index]) {
                Ok(look) => {
                    free[index] = look.free;
                    let is_to_be_asked = matches!(look.known.health, Health::Well | Health::CoolDown { .. });
                    if is_to_be_asked && unasked.contains(&index) {
                        return look.known.with_health(Health::Unasked);
                    }
                    look.known
                }
                Err(error) => {
                    let reason = exit::reason(&error);
                    fault = Some(error);
                    unused.with_health(Health::Failed(reason))
                }
            }
        });
        match (&decision.verdict, fault) {
            (Verdict::Accept(_), _) if !wanted(&decision) => Ok((decision, None)),
            (Verdict::Accept(index), _) => {
                let machine = &self.machines[*index];
                let slot = match free[*index] {
                    Some(number) if decision.slots == 1 => self.slots.take(&machine.name, number)?,
                    Some(_) => self.slots.take_many(&machine.name, machine.max_jobs, decision.slots)?,
                    None => None,
                };
                Ok((decision, slot))
            }
            (_, Some(error)) => Err(error),
            (_, None) => Ok((decision, None)),
        }
    }

    /// The direct inputs and their sizes, where it matters which machine has them.
    fn inputs<'c>(&self, candidate: &'c Candidate) -> Option<&'c [(StorePath, u64)]> {
        if !survey::asks_for_inputs(self.machines, &candidate.request) {
            return None;
        }
        let look_up = || derivation::weighed_inputs(&self.location, &candidate.drv);
        candidate.inputs.get_or_init(look_up).as_deref()
    }

    /// Says in the slot what it is used for.
    pub(super) fn say(&self, candidate: &Candidate, slot: &Held, pace: f64) {
        slot.say(&Holder {
            pid: process::id(),
            derivation: candidate.request.drv_path.clone(),
            since: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            expected: candidate.work.duration.map(|seconds| seconds / pace),
        });
    }

    /// Notes how the build fares on a machine, in the place of what was open there.
    pub(super) fn note_trial(&self, candidate: &Candidate, index: usize, end: End, text: &str) {
        let mut trials = candidate.trials.borrow_mut();
        let name = &self.machines[index].name;
        let was_begun = trials.iter().any(|trial| trial.end == End::Open && trial.machine == *name);
        let end = if was_begun && end == End::GivenUp { End::BrokenOff } else { end };
        let trial = Trial::new(name, end, text, SystemTime::now());
        trials.retain(|other| other.end != End::Open && other.machine != trial.machine);
        trials.push(trial);
    }

    pub(super) fn log_decision(&self, candidate: &Candidate, decision: &Rc<Decision>) {
        self.memory.latest.replace(Some(Rc::clone(decision)));
        let derivation = candidate.request.drv_path.as_str();
        let name = derivation::name_in(derivation);
        for (index, refusal) in decision.refusals() {
            let builder = self.machines[index].name.as_str();
            let reason = refusal.describe(decision.at);
            tracing::debug!(
                event = "not chosen",
                derivation,
                builder,
                reason,
                "'{name}' not on {builder}: {reason}"
            );
        }
        let reason = telling::answer(decision, self.machines);
        match &decision.verdict {
            Verdict::Accept(index) => {
                let builder = self.machines[*index].name.as_str();
                tracing::info!(event = "chosen", derivation, builder, reason, "'{name}': {reason}");
            }
            Verdict::Wait(_) => tracing::debug!(event = "waiting", derivation, reason, "'{name}': {reason}"),
            Verdict::Postpone(_) => {
                tracing::info!(event = "postponed", derivation, reason, "'{name}': {reason}")
            }
            Verdict::Decline => {
                let table = telling::table(decision, self.machines, None);
                let whole = format!("{reason}\n{}", table.trim_end());
                tracing::info!(
                    event = "declined",
                    derivation,
                    reason = whole,
                    "'{name}': {reason}{}",
                    telling::in_one_line(decision, self.machines)
                );
            }
        }
    }
}
