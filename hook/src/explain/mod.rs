//! `explain`: where a build would go now and why, or what was decided about it last.
//!
//! Asks the very rules that the hook asks. Must never take a slot, or connect to a machine.

mod installable;
mod journal;

use crate::cli::Wish;
use crate::config::Fleet;
use crate::config::rules::Offload;
use crate::derivation::{self, Subject, Unfit};
use crate::local_load;
use crate::local_time;
use crate::plan::machine::Machine;
use crate::plan::{
    self, Decision, Health, Known, Load, Local, Policy, Question, Request, Rules, Verdict, Work, telling,
};
use crate::reach::Reach;
use crate::slots::Slots;
use crate::state::{Asked, Decided, End, History, Trial, Withholdings};
use crate::store::{Location, Query};
use crate::survey::{self, Needs, Survey};
use crate::vantage::{Vantage, VantageError};
use installable::{InstallableError, Place};
use nix_offload_proxy::exit::{self, Failure};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};
use thiserror::Error;

/// Why nothing is explained.
#[derive(Debug, Error)]
pub enum ExplainError {
    /// There is no ground to stand on.
    #[error(transparent)]
    Vantage(#[from] VantageError),
    /// What is asked about leads nowhere.
    #[error(transparent)]
    Installable(#[from] InstallableError),
    /// The hook runs as another user, who should be asked by this command.
    #[error("{source}")]
    NotOurs {
        /// Which one.
        source: VantageError,
        /// What to run.
        command: String,
    },
    /// The report cannot be printed.
    #[error("cannot write the report")]
    Output(#[source] io::Error),
}

impl ExplainError {
    /// What to do about it.
    pub fn cure(&self) -> Option<String> {
        match self {
            Self::Vantage(error) => error.cure(),
            Self::Installable(error) => error.cure(),
            Self::NotOurs { command, .. } => Some(format!("run: {command}")),
            Self::Output(_) => None,
        }
    }

    /// Another program's words that belong above the error.
    fn said(&self) -> Option<&str> {
        match self {
            Self::Installable(error) => error.said(),
            _ => None,
        }
    }

    /// The exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Vantage(error) | Self::NotOurs { source: error, .. } => error.exit_code(),
            Self::Installable(error) => error.exit_code(),
            Self::Output(_) => exit::FAILURE,
        }
    }
}

impl From<ExplainError> for Failure {
    fn from(error: ExplainError) -> Self {
        let Failure { mut report, code } = Failure::new(&error, error.cure().as_deref(), error.exit_code());
        if let Some(said) = error.said() {
            report.insert_str(0, &format!("{said}\n"));
        }
        Failure { report, code }
    }
}

/// What is told of one derivation.
struct Told {
    text: String,
    json: Value,
    /// There is nothing to tell.
    is_nothing: bool,
}

/// Explains and prints it; gives the exit code.
///
/// # Errors
/// If what is asked about leads to no derivation, or there is no way to see what the hook would see.
pub fn explain(wish: &Wish, as_json: bool) -> Result<u8, ExplainError> {
    let vantage = Vantage::find(&wish.meant)?;
    let place =
        Place { location: &vantage.location, store: wish.meant.store.as_deref(), file: wish.file.as_deref() };
    let derivations = place.derivations(&wish.words)?;
    if let Err(source) = vantage.ours() {
        let last = if wish.last { " --last" } else { "" };
        let command = format!("sudo nix-offload explain{last} {}", derivations.join(" "));
        return Err(ExplainError::NotOurs { source, command });
    }
    let told: Vec<Told> = if wish.last {
        let decided = Decided::at(&vantage.state()?);
        let now = SystemTime::now();
        derivations.iter().map(|path| last(path, &decided, now)).collect()
    } else {
        let Fleet { machines, problems, .. } = vantage.some_fleet()?;
        for problem in &problems {
            // What cannot be shown cannot be helped.
            let _ = writeln!(io::stderr(), "warning: {problem}");
        }
        let local = vantage.settings.local();
        let max_jobs = wish.max_jobs.unwrap_or(local.max_jobs);
        let state = vantage.state().ok();
        let desk = Desk {
            machines: &machines,
            rules: vantage.offload::<Offload>()?.rules(),
            local: Local { max_jobs, ..local },
            location: &vantage.location,
            slots: vantage.slots(),
            reach: vantage.reach()?,
            history: state.as_deref().map(History::at),
            state,
        };
        derivations.iter().map(|path| desk.now(path)).collect()
    };
    let report = if as_json {
        format!("{:#}\n", told.iter().map(|told| told.json.clone()).collect::<Value>())
    } else {
        told.iter().map(|told| told.text.as_str()).collect::<Vec<_>>().join("\n")
    };
    match io::stdout().write_all(report.as_bytes()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(ExplainError::Output(error)),
        _ => {}
    }
    Ok(if told.iter().any(|told| told.is_nothing) { exit::FAILURE } else { exit::OK })
}

/// What was decided last about a derivation.
fn last(drv_path: &str, decided: &Decided, now: SystemTime) -> Told {
    let kept = decided.last(drv_path).map(|last| (last.time(), last.ranking, last.trials, "state"));
    let noted = || journal::last(drv_path).map(|noted| (noted.at, noted.text, Vec::new(), "journal"));
    let Some((at, told, trials, source)) = kept.or_else(noted) else {
        return Told {
            text: format!("{drv_path}\n  nothing is kept of a decision about it, nor is it in the journal\n"),
            json: json!({ "derivation": drv_path, "at": null, "source": null, "text": null, "trials": [] }),
            is_nothing: true,
        };
    };
    let when = format!("decided on {}, {} ago", local_time::text(at), local_time::ago(at, now));
    let from = if source == "journal" { ", from the journal" } else { "" };
    Told {
        text: format!("{drv_path}\n{}{when}{from}:\n{}", outcome(&trials, now), indented(&told)),
        json: json!({
            "derivation": drv_path,
            "at": at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            "source": source,
            "text": told,
            "trials": trials,
        }),
        is_nothing: false,
    }
}

/// What came of it: the last word first, then where it was tried before that.
fn outcome(trials: &[Trial], now: SystemTime) -> String {
    let mut text = String::new();
    for (number, trial) in trials.iter().rev().enumerate() {
        let Trial { machine, end, text: how, .. } = trial;
        let ago = local_time::ago(trial.time(), now);
        let before = if number == 0 { "" } else { "  before that: " };
        // Writing to a String cannot fail.
        let _ = match end {
            End::Open => {
                writeln!(text, "{before}begun on {machine} {ago} ago; it runs, or was stopped without a word")
            }
            End::Built => writeln!(text, "{before}built on {machine} {ago} ago: {how}"),
            End::Failed => writeln!(text, "{before}failed on {machine} {ago} ago: {how}"),
            End::GivenUp => writeln!(text, "{before}not built on {machine} {ago} ago: {how}"),
            End::BrokenOff => writeln!(text, "{before}broken off on {machine} {ago} ago: {how}"),
            End::Moved => writeln!(text, "{before}stopped on {machine} {ago} ago, to begin anew elsewhere"),
        };
    }
    text
}

/// Everything that a decision is made from.
struct Desk<'a> {
    machines: &'a [Machine],
    rules: Rules,
    local: Local,
    location: &'a Location,
    slots: Slots,
    reach: Reach,
    history: Option<History>,
    state: Option<PathBuf>,
}

impl Desk<'_> {
    /// What would be decided now.
    fn now(&self, drv_path: &str) -> Told {
        let subject = match derivation::subject(self.location, drv_path) {
            Ok(subject) => subject,
            Err(unfit) => return not_for_us(drv_path, &unfit),
        };
        let request = derivation::request(&subject.drv, drv_path, self.local.max_jobs > 0);
        let now = SystemTime::now();
        let asked = Asked::at(self.reach.directory()).times(drv_path, now);
        let since = asked.map_or(now, |asked| asked.first);
        let work = Work {
            obstructed_since: asked.and_then(|asked| asked.obstructed),
            ..survey::work(self.history.as_ref(), subject.drv.name(), since)
        };
        let decision = self.decide(&subject, &request, &work, now);
        let notes = self.notes(&subject, &request, &decision);
        let features = request.required_features.iter().map(String::as_str).collect::<Vec<_>>();
        let mut text = format!("{drv_path}\n  for {}", request.system);
        // Writing to a String cannot fail.
        if !features.is_empty() {
            let _ = write!(text, ", requires the features [{}]", features.join(", "));
        }
        let record = self.history.as_ref().and_then(|history| history.of(subject.drv.name()));
        let _ = match record {
            Some(record) => writeln!(
                text,
                "; {} of that name took {} on average",
                count(record.builds, "build"),
                telling::seconds(record.seconds)
            ),
            None => writeln!(text, "; no build of that name is remembered"),
        };
        text.push_str(&indented(&telling::ranking(&decision, self.machines)));
        for note in &notes {
            let _ = writeln!(text, "  note: {note}");
        }
        let json = self.json(&request, &work, &decision, &notes);
        Told { text, json, is_nothing: false }
    }

    /// Asks the rules as the hook does, but takes nothing.
    fn decide(&self, subject: &Subject, request: &Request, work: &Work, now: SystemTime) -> Decision {
        let inputs = survey::asks_for_inputs(self.machines, request)
            .then(|| derivation::weighed_inputs(self.location, &subject.drv))
            .flatten();
        let needs = Needs { inputs: inputs.as_deref(), usual: work.usual };
        let state = self.state.as_deref();
        let survey = Survey::begin(self.machines, &self.slots, &self.reach, self.location, state, now)
            .for_build(self.machines, request, &needs);
        let here = (self.rules.policy == Policy::Cost).then(|| local_load::sample(now));
        let question = Question {
            machines: self.machines,
            rules: &self.rules,
            local: &self.local,
            here: here.as_ref(),
            request,
            work,
            now,
        };
        // Looking at a free slot locks it for a moment; a hook that is choosing must not see that.
        let _choosing = self.slots.lock_choice();
        plan::decide(&question, |index| match survey.look(&self.machines[index]) {
            Ok(look) => look.known,
            Err(error) => Known::ready(Load::default()).with_health(Health::Failed(exit::reason(&error))),
        })
    }

    /// What a reader should know besides.
    fn notes(&self, subject: &Subject, request: &Request, decision: &Decision) -> Vec<String> {
        let mut notes = Vec::new();
        let could_build = self.local.could_build(request);
        let is_there = |query: Query| {
            subject.outputs.values().all(|wanted| query.is_valid(&wanted.path).unwrap_or(false))
        };
        if Query::open(self.location).is_ok_and(is_there) {
            notes.push("its outputs are there already, so Nix does not ask for it".to_owned());
        }
        if could_build && derivation::prefers_local(&subject.drv) {
            notes.push("it says preferLocalBuild, so Nix builds it here and does not ask for it".to_owned());
        } else if could_build {
            notes.push("Nix could build it here too; it is assumed to have a free slot for that".to_owned());
        } else if self.local.max_jobs == 0 {
            notes.push("Nix builds nothing here (max-jobs is 0)".to_owned());
        } else {
            notes.push("Nix cannot build it here: this machine lacks its system or features".to_owned());
        }
        if let Verdict::Accept(index) = &decision.verdict
            && !self.reach.is_warm(&self.machines[*index])
        {
            notes.push(format!(
                "{} has not answered within the last minute, so it is connected to first; if that fails or takes long, \
                 another one gets the build",
                self.machines[*index].name
            ));
        }
        if decision.verdict == Verdict::Decline {
            let withheld = self.state.as_deref().map(Withholdings::read).unwrap_or_default();
            let is_withheld =
                |machine: &Machine| withheld.of(&machine.name).is_some_and(|it| it.holds(decision.at));
            let foreign = self.machines.iter().filter(|machine| !machine.uri.is_ours());
            let foreign: Vec<&str> = foreign
                .filter(|machine| plan::suits(machine, request).is_ok() && !is_withheld(machine))
                .map(|machine| machine.name.as_str())
                .collect();
            if !foreign.is_empty() {
                notes.push(format!("Nix's own hook is asked about {}", foreign.join(", ")));
            }
        }
        notes
    }

    fn json(&self, request: &Request, work: &Work, decision: &Decision, notes: &[String]) -> Value {
        let name = |index: &usize| self.machines.get(*index).map(|machine| machine.name.clone());
        let (verdict, named) = match &decision.verdict {
            Verdict::Accept(index) => ("build", vec![*index]),
            Verdict::Wait(machines) => ("wait", machines.clone()),
            Verdict::Postpone(machines) => ("postpone", machines.clone()),
            Verdict::Decline => ("decline", Vec::new()),
        };
        let machines = self.machines.iter().zip(&decision.standings).map(|(machine, standing)| {
            let estimate = standing.estimate.as_ref().map(|estimate| {
                json!({
                    "total": estimate.total,
                    "wait": estimate.wait,
                    "inputs": estimate.transfer,
                    "build": estimate.build,
                    "outputs": estimate.fetch,
                })
            });
            json!({
                "machine": machine.name,
                "place": standing.place,
                "seconds": estimate,
                "reason": standing.refusal.as_ref().map(|refusal| refusal.describe(decision.at)),
            })
        });
        json!({
            "derivation": request.drv_path,
            "system": request.system,
            "features": request.required_features,
            "expectedSeconds": work.duration,
            "verdict": verdict,
            "named": named.iter().filter_map(name).collect::<Vec<_>>(),
            "slots": decision.slots,
            "answer": telling::answer(decision, self.machines),
            "measured": decision.order == plan::Order::Estimate,
            "machines": machines.collect::<Vec<_>>(),
            "notes": notes,
        })
    }
}

/// A derivation that we have no rule for.
fn not_for_us(drv_path: &str, unfit: &Unfit) -> Told {
    let who = if unfit.is_for_stock() { "left to Nix's own hook" } else { "left to Nix" };
    let answer = format!("{who}: {}", exit::reason(unfit));
    Told {
        text: format!("{drv_path}\n  {answer}\n"),
        json: json!({
            "derivation": drv_path,
            "verdict": if unfit.is_for_stock() { "stock" } else { "decline" },
            "answer": answer,
            "named": [],
            "machines": [],
            "notes": [],
        }),
        is_nothing: false,
    }
}

fn count(number: u64, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
