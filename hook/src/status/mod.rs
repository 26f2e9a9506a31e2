//! `status`: what is known of every machine, and what runs there.
//!
//! Must never connect to a machine, or keep anybody from choosing for longer than a look takes.

mod table;

use crate::cli::Meant;
use crate::config::Fleet;
use crate::config::rules::Offload;
use crate::plan::known::{Health, Sample, Withholding};
use crate::plan::machine::Machine;
use crate::plan::verdict::Resource;
use crate::plan::{self, Refusal, Rules};
use crate::reach::Reach;
use crate::slots::{Holder, Slots};
use crate::survey::Survey;
use crate::vantage::{Vantage, VantageError};
use nix_offload_proxy::exit::{self, Failure};
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, SystemTime};
use thiserror::Error;

/// How often the state is looked at anew.
const EVERY: Duration = Duration::from_secs(2);
/// Clears a terminal.
const CLEAR: &str = "\u{1b}[H\u{1b}[2J";

/// Why there is no state to be told.
#[derive(Debug, Error)]
pub enum StatusError {
    /// There is no ground to stand on.
    #[error(transparent)]
    Vantage(#[from] VantageError),
    /// It cannot be printed.
    #[error("cannot write the report")]
    Output(#[source] io::Error),
}

impl StatusError {
    /// What to do about it.
    pub fn cure(&self) -> Option<String> {
        match self {
            Self::Vantage(error) => error.cure(),
            Self::Output(_) => None,
        }
    }

    /// The exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Vantage(error) => error.exit_code(),
            Self::Output(_) => exit::FAILURE,
        }
    }
}

impl From<StatusError> for Failure {
    fn from(error: StatusError) -> Self {
        Failure::new(&error, error.cure().as_deref(), error.exit_code())
    }
}

/// Prints the state of all machines, with `watch` again and again until nobody reads it; gives the exit code.
///
/// # Errors
/// If there is no way to see what the hook sees.
pub fn status(meant: &Meant, as_json: bool, watch: bool) -> Result<u8, StatusError> {
    let vantage = Vantage::find(meant)?;
    vantage.ours()?;
    let Fleet { problems, .. } = vantage.some_fleet()?;
    for problem in &problems {
        // What cannot be shown cannot be helped.
        let _ = writeln!(io::stderr(), "warning: {problem}");
    }
    let desk = Desk {
        slots: vantage.slots(),
        reach: vantage.reach()?,
        state: vantage.state().ok(),
        rules: vantage.offload::<Offload>()?.rules(),
        vantage,
    };
    let is_terminal = io::stdout().is_terminal();
    let in_colour = is_terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    loop {
        let now = SystemTime::now();
        let rows = desk.rows(now);
        let report = match (as_json, watch) {
            (true, false) => format!("{:#}\n", table::json(&rows, now)),
            (true, true) => format!("{}\n", table::json(&rows, now)),
            (false, true) if is_terminal => format!("{CLEAR}{}", table::text(&rows, now, in_colour)),
            (false, true) => format!("{}\n", table::text(&rows, now, in_colour)),
            (false, false) => table::text(&rows, now, in_colour),
        };
        let mut out = io::stdout().lock();
        match out.write_all(report.as_bytes()).and_then(|()| out.flush()) {
            // Whoever reads has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(exit::OK),
            Err(error) => return Err(StatusError::Output(error)),
            Ok(()) if !watch => return Ok(exit::OK),
            Ok(()) => thread::sleep(EVERY),
        }
    }
}

/// How a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mood {
    /// It gets builds.
    Well,
    /// It gets none for now because somebody wants that.
    Withheld,
    /// Something is wrong with it.
    Ill,
}

impl Mood {
    /// The terminal's number of its colour.
    fn colour(self) -> Option<u8> {
        match self {
            Self::Well => None,
            Self::Withheld => Some(33),
            Self::Ill => Some(31),
        }
    }
}

/// What is told of a machine.
#[derive(Debug, Clone)]
struct Row {
    name: String,
    state: &'static str,
    mood: Mood,
    reason: Option<String>,
    /// When that state is over.
    until: Option<SystemTime>,
    slots: u64,
    /// Slots taken; none if they cannot be counted.
    taken: Option<u64>,
    /// One entry for each build running on the machine; `None` where its hook wrote nothing (a stock hook).
    builds: Vec<Option<Holder>>,
    /// Builds that wait for a slot there, if that is known.
    waiting: Option<u64>,
    /// Whether there is a master to it, and since when.
    master: Option<Option<SystemTime>>,
    sample: Option<Sample>,
}

/// Everything that is looked at.
struct Desk {
    vantage: Vantage,
    slots: Slots,
    reach: Reach,
    state: Option<PathBuf>,
    rules: Rules,
}

impl Desk {
    fn rows(&self, now: SystemTime) -> Vec<Row> {
        let location = &self.vantage.location;
        let machines = self.vantage.fleet().machines;
        let state = self.state.as_deref();
        let survey = Survey::begin(&machines, &self.slots, &self.reach, location, state, now);
        machines.iter().map(|machine| self.row(&survey, machine, now)).collect()
    }

    fn row(&self, survey: &Survey<'_>, machine: &Machine, now: SystemTime) -> Row {
        let look = {
            // Looking at a free slot locks it for a moment; a hook that is choosing must not see that.
            let _choosing = self.slots.lock_choice();
            survey.look(machine)
        };
        let mut row = Row {
            name: machine.name.clone(),
            state: "unknown",
            mood: Mood::Ill,
            reason: None,
            until: None,
            slots: machine.max_jobs,
            taken: None,
            builds: Vec::new(),
            waiting: None,
            master: self.reach.master(machine),
            sample: None,
        };
        let known = match look {
            Ok(look) => {
                row.waiting = Some(look.waiting);
                look.known
            }
            Err(error) => {
                row.reason = Some(exit::reason(&error));
                return row;
            }
        };
        let taken = known.load.taken;
        row.taken = Some(taken);
        if taken > 0 {
            row.builds = self.slots.running(&machine.name, machine.max_jobs);
        }
        (row.state, row.mood) = match plan::obstacle(&known, &self.rules, now) {
            Some(refusal) => {
                (row.reason, row.until) = reason(&refusal, now);
                word(&refusal)
            }
            None => match &known.health {
                Health::Waking => ("waking", Mood::Withheld),
                Health::CoolDown { until, why } => {
                    (row.reason, row.until) = (Some(why.clone()), *until);
                    ("down", Mood::Ill)
                }
                _ if machine.max_jobs == 0 => ("no slots", Mood::Withheld),
                _ if taken >= machine.max_jobs => ("full", Mood::Well),
                _ => ("ready", Mood::Well),
            },
        };
        row.sample = known.sample;
        row
    }
}

/// A word for what keeps a machine from getting anything.
fn word(refusal: &Refusal) -> (&'static str, Mood) {
    match refusal {
        Refusal::Withheld(withheld) => match withheld.how {
            Withholding::Drained => ("drained", Mood::Withheld),
            Withholding::Disabled => ("disabled", Mood::Withheld),
        },
        Refusal::Recalled { what, .. } => word(what),
        Refusal::Inhibited(_) => ("inhibited", Mood::Withheld),
        Refusal::Short { of: Resource::Disk, .. } => ("short of disk", Mood::Ill),
        Refusal::Short { of: Resource::Inodes, .. } => ("short of inodes", Mood::Ill),
        Refusal::Short { of: Resource::Memory, .. } => ("short of memory", Mood::Ill),
        _ => ("not used", Mood::Withheld),
    }
}

/// What there is to say of it besides, and when it is over.
fn reason(refusal: &Refusal, now: SystemTime) -> (Option<String>, Option<SystemTime>) {
    match refusal {
        Refusal::Withheld(withheld) => {
            (Some(withheld.why.clone()).filter(|why| !why.is_empty()), withheld.until)
        }
        Refusal::Inhibited(why) => (Some(why.clone()).filter(|why| !why.is_empty()), None),
        Refusal::Unreachable(why) => (Some(why.clone()), None),
        other => (Some(other.describe(now)), None),
    }
}
