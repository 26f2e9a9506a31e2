//! Choosing: which machine a build goes to, and why every other one does not get it.
//!
//! Owns the verdict and its reasons. Must never do I/O, read a clock or the environment, or log: the caller
//! brings what is known (machines, load, request) and carries out what is decided.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod here;
pub mod machine;
pub mod outputs;
pub mod trust;

use machine::Machine;
use std::collections::BTreeSet;
use std::fmt;

/// Builds that may be accepted to wait for one set of machines. Each costs a process of about 1 MiB; those above
/// are postponed, for which Nix has no better clock than asking again every 5 seconds.
pub const MAX_WAITING: u64 = 256;

/// One `try` of Nix: may this derivation be built elsewhere?
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Whether Nix has a local slot free at this moment.
    pub am_willing: bool,
    /// The derivation's `system`.
    pub system: String,
    /// Full path of the derivation in the local store.
    pub drv_path: String,
    /// The derivation's `requiredSystemFeatures`.
    pub required_features: BTreeSet<String>,
}

/// What the local machine could build itself, from Nix's settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Local {
    /// The setting `max-jobs`; 0 means that nothing is ever built locally.
    pub max_jobs: u64,
    /// `system` and `extra-platforms`.
    pub systems: BTreeSet<String>,
    /// `system-features`.
    pub features: BTreeSet<String>,
}

impl Local {
    /// Whether the request could be built locally at some time, be it not now.
    pub fn could_build(&self, request: &Request) -> bool {
        self.max_jobs > 0
            && self.systems.contains(&request.system)
            && request.required_features.is_subset(&self.features)
    }
}

/// How busy a machine is with builds of this client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Slots taken, of the machine's `max_jobs`.
    pub taken: u64,
}

/// What is known of a machine besides its line in the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Nothing speaks against it; so many of its slots are taken.
    Ready(Load),
    /// It could not be reached a short while ago, as the text says. It is left alone while another one will do, but
    /// never ruled out by memory alone.
    Ailing(Load, String),
    /// It sleeps and has been told to wake up. It gets nothing yet, but is worth waiting for.
    Waking,
    /// It failed earlier; the text says how.
    Failed(String),
    /// Its store URI is of a kind that cannot be reached; the text says why.
    Unreachable(String),
}

/// Why a machine does not get a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// It does not build for the derivation's system.
    System,
    /// It lacks these of the required features.
    MissingFeatures(BTreeSet<String>),
    /// It insists on these features, which the derivation does not require.
    MandatoryFeatures(BTreeSet<String>),
    /// All its slots are taken.
    Full {
        /// Slots it has.
        slots: u64,
    },
    /// It is being woken.
    Waking,
    /// It failed when it was last tried; the text says how.
    Failed(String),
    /// Its store URI is of a kind that cannot be reached; the text says why.
    Unreachable(String),
    /// Another one was better.
    Outranked,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let join = |set: &BTreeSet<String>| set.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        match self {
            Self::System => write!(f, "does not build for this system"),
            Self::MissingFeatures(set) => write!(f, "lacks the features [{}]", join(set)),
            Self::MandatoryFeatures(set) => {
                write!(f, "builds only derivations that require the features [{}]", join(set))
            }
            Self::Full { slots: 0 } => write!(f, "has no slots (its maximum of jobs is 0)"),
            Self::Full { slots } => write!(f, "full: {slots} of {slots} slots taken"),
            Self::Waking => write!(f, "is being woken"),
            Self::Failed(why) => write!(f, "failed: {why}"),
            Self::Unreachable(why) => write!(f, "cannot be used: {why}"),
            Self::Outranked => write!(f, "another machine is less loaded or faster"),
        }
    }
}

/// What to answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// Build it on the machine of this index.
    Accept(usize),
    /// Suitable machines (these) are busy or about to wake up, and it cannot be built locally at any time: accept it and wait for a slot,
    /// unless [`MAX_WAITING`] do so already.
    Wait(Vec<usize>),
    /// Ask again later: suitable machines (these) are busy or about to wake up, but Nix may have a local slot for it sooner.
    Postpone(Vec<usize>),
    /// Not to be built by any machine now.
    Decline,
}

/// A verdict and, for every machine that is not to build, why.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct Decision {
    /// What to answer.
    pub verdict: Verdict,
    /// Index of the machine and reason, in the order of the list.
    pub refusals: Vec<(usize, Refusal)>,
}

/// Whether a machine's line in the list admits the request at all; the reason if not.
///
/// Follows `Machine::systemSupported`, `allSupported` and `mandatoryMet` in Nix 2.34
/// `src/libstore/machines.cc`: any machine will do for the system `builtin`.
pub fn suits(machine: &Machine, request: &Request) -> Result<(), Refusal> {
    if request.system != "builtin" && !machine.systems.contains(&request.system) {
        return Err(Refusal::System);
    }
    let missing: BTreeSet<String> = request
        .required_features
        .iter()
        .filter(|f| !machine.supported_features.contains(*f) && !machine.mandatory_features.contains(*f))
        .cloned()
        .collect();
    if !missing.is_empty() {
        return Err(Refusal::MissingFeatures(missing));
    }
    let unmet: BTreeSet<String> =
        machine.mandatory_features.difference(&request.required_features).cloned().collect();
    if !unmet.is_empty() {
        return Err(Refusal::MandatoryFeatures(unmet));
    }
    Ok(())
}

/// Chooses among the machines of the list.
///
/// `state` is asked once for each machine whose line suits the request, with its index. The rule is that of the
/// stock hook (`src/nix/build-remote/build-remote.cc`): the lowest load in relation to the speed factor wins,
/// then the higher speed factor, then the lower load, then the earlier place in the list.
pub fn decide(
    machines: &[Machine],
    local: &Local,
    request: &Request,
    mut state: impl FnMut(usize) -> State,
) -> Decision {
    let mut refusals = Vec::new();
    let mut ready = Vec::new();
    let mut ailing = Vec::new();
    let mut waking = Vec::new();
    for (index, machine) in machines.iter().enumerate() {
        if let Err(refusal) = suits(machine, request) {
            refusals.push((index, refusal));
            continue;
        }
        match state(index) {
            State::Ready(load) => ready.push((index, load)),
            State::Ailing(load, why) => ailing.push((index, load, why)),
            State::Waking => waking.push(index),
            State::Failed(why) => refusals.push((index, Refusal::Failed(why))),
            State::Unreachable(why) => refusals.push((index, Refusal::Unreachable(why))),
        }
    }
    refusals.extend(waking.iter().map(|index| (*index, Refusal::Waking)));
    if ready.is_empty() && waking.is_empty() {
        ready = ailing.into_iter().map(|(index, load, _)| (index, load)).collect();
    } else {
        refusals.extend(ailing.into_iter().map(|(index, _, why)| (index, Refusal::Failed(why))));
    }
    let (free, full): (Vec<_>, Vec<_>) =
        ready.into_iter().partition(|(index, load)| load.taken < machines[*index].max_jobs);
    refusals
        .extend(full.iter().map(|(index, _)| (*index, Refusal::Full { slots: machines[*index].max_jobs })));
    // A machine without slots will never have a free one, so nobody is to wait for it.
    let mut full: Vec<usize> = full.iter().map(|(index, _)| *index).chain(waking).collect();
    full.retain(|index| machines[*index].max_jobs > 0);
    full.sort_unstable();
    let best = free.iter().copied().reduce(|best, next| {
        let outranks = outranks((&machines[next.0], next.1), (&machines[best.0], best.1));
        if outranks { next } else { best }
    });
    let verdict = match best {
        Some((best, _)) => {
            let others = free.iter().filter(|(index, _)| *index != best);
            refusals.extend(others.map(|(index, _)| (*index, Refusal::Outranked)));
            Verdict::Accept(best)
        }
        None if full.is_empty() => Verdict::Decline,
        // As in the stock hook: when a local build can start at once there is no reason to wait for a machine.
        None if request.am_willing && local.could_build(request) => Verdict::Decline,
        None if local.could_build(request) => Verdict::Postpone(full),
        None => Verdict::Wait(full),
    };
    refusals.sort_by_key(|(index, _)| *index);
    Decision { verdict, refusals }
}

/// Whether the first machine is to be preferred to the second, which stands earlier in the list.
fn outranks((a, load_a): (&Machine, Load), (b, load_b): (&Machine, Load)) -> bool {
    let relative = |machine: &Machine, load: Load| load.taken as f32 / machine.speed_factor;
    let (ra, rb) = (relative(a, load_a), relative(b, load_b));
    if ra != rb {
        return ra < rb;
    }
    if a.speed_factor != b.speed_factor {
        return a.speed_factor > b.speed_factor;
    }
    load_a.taken < load_b.taken
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(name: &str, jobs: u64, speed: f32) -> Machine {
        Machine {
            max_jobs: jobs,
            speed_factor: speed,
            ..Machine::for_uri(name, ["x86_64-linux".to_owned()].into()).unwrap()
        }
    }

    fn request() -> Request {
        Request {
            am_willing: false,
            system: "x86_64-linux".into(),
            drv_path: "/nix/store/x.drv".into(),
            required_features: BTreeSet::new(),
        }
    }

    fn set(words: &[&str]) -> BTreeSet<String> {
        words.iter().map(|w| (*w).to_owned()).collect()
    }

    fn with_loads(machines: &[Machine], request: &Request, loads: &[u64]) -> Decision {
        decide(machines, &Local::default(), request, |i| State::Ready(Load { taken: loads[i] }))
    }

    #[test]
    fn a_machine_of_another_system_is_refused_for_its_system() {
        let mut m = machine("a", 1, 1.0);
        m.systems = set(&["aarch64-linux"]);
        let d = with_loads(&[m], &request(), &[0]);
        assert_eq!(d, Decision { verdict: Verdict::Decline, refusals: vec![(0, Refusal::System)] });
    }

    #[test]
    fn builtin_suits_any_machine() {
        let mut m = machine("a", 1, 1.0);
        m.systems = set(&["aarch64-linux"]);
        let d = with_loads(&[m], &Request { system: "builtin".into(), ..request() }, &[0]);
        assert_eq!(d.verdict, Verdict::Accept(0));
    }

    #[test]
    fn features_must_be_supported_and_mandatory_ones_required() {
        let mut plain = machine("plain", 1, 1.0);
        plain.supported_features = set(&["kvm"]);
        let mut strict = machine("strict", 1, 1.0);
        strict.supported_features = set(&["kvm"]);
        strict.mandatory_features = set(&["benchmark"]);
        let machines = [plain, strict];
        let ask = |features: &[&str]| {
            with_loads(&machines, &Request { required_features: set(features), ..request() }, &[0, 0])
        };
        let none = ask(&[]);
        assert_eq!(none.verdict, Verdict::Accept(0));
        assert_eq!(none.refusals, [(1, Refusal::MandatoryFeatures(set(&["benchmark"])))]);
        let benchmark = ask(&["benchmark"]);
        assert_eq!(benchmark.verdict, Verdict::Accept(1));
        assert_eq!(benchmark.refusals, [(0, Refusal::MissingFeatures(set(&["benchmark"])))]);
        assert_eq!(ask(&["benchmark", "kvm"]).verdict, Verdict::Accept(1));
        assert_eq!(ask(&["cuda"]).verdict, Verdict::Decline);
    }

    #[test]
    fn the_lower_load_for_its_speed_wins_then_speed_then_load_then_place() {
        let pick = |a: (u64, f32), b: (u64, f32)| {
            let machines = [machine("a", 99, a.1), machine("b", 99, b.1)];
            with_loads(&machines, &request(), &[a.0, b.0]).verdict
        };
        assert_eq!(pick((2, 1.0), (3, 2.0)), Verdict::Accept(1));
        assert_eq!(pick((1, 1.0), (3, 2.0)), Verdict::Accept(0));
        assert_eq!(pick((0, 1.0), (0, 2.0)), Verdict::Accept(1));
        assert_eq!(pick((1, 1.0), (2, 2.0)), Verdict::Accept(1));
        assert_eq!(pick((0, 1.0), (0, 1.0)), Verdict::Accept(0));
        assert_eq!(pick((0, 1.5), (0, 1.25)), Verdict::Accept(0));
    }

    #[test]
    fn the_leader_that_is_overtaken_is_reported_as_outranked() {
        let machines = [machine("a", 9, 1.0), machine("b", 9, 2.0)];
        let d = with_loads(&machines, &request(), &[0, 0]);
        assert_eq!(d, Decision { verdict: Verdict::Accept(1), refusals: vec![(0, Refusal::Outranked)] });
    }

    #[test]
    fn full_machines_postpone_unless_a_local_build_can_start_now() {
        let machines = [machine("a", 2, 1.0)];
        let local = Local { max_jobs: 1, systems: set(&["x86_64-linux"]), features: BTreeSet::new() };
        let ask = |am_willing, local: &Local| {
            decide(&machines, local, &Request { am_willing, ..request() }, |_| {
                State::Ready(Load { taken: 2 })
            })
        };
        assert_eq!(ask(false, &local).verdict, Verdict::Postpone(vec![0]));
        assert_eq!(ask(true, &local).verdict, Verdict::Decline);
        assert_eq!(ask(true, &Local::default()).verdict, Verdict::Wait(vec![0]));
        assert_eq!(ask(false, &Local::default()).verdict, Verdict::Wait(vec![0]));
        assert_eq!(ask(false, &local).refusals, [(0, Refusal::Full { slots: 2 })]);
    }

    #[test]
    fn failed_and_unreachable_machines_are_left_out_with_their_reason() {
        let machines = [machine("a", 1, 1.0), machine("b", 1, 1.0), machine("c", 1, 1.0)];
        let d = decide(&machines, &Local::default(), &request(), |i| match i {
            0 => State::Failed("no route".into()),
            1 => State::Unreachable("file://".into()),
            _ => State::Ready(Load::default()),
        });
        assert_eq!(d.verdict, Verdict::Accept(2));
        assert_eq!(
            d.refusals,
            [(0, Refusal::Failed("no route".into())), (1, Refusal::Unreachable("file://".into()))]
        );
    }

    #[test]
    fn an_ailing_machine_is_left_alone_while_another_will_do() {
        let machines = [machine("a", 1, 2.0), machine("b", 1, 1.0)];
        let ask = |taken| {
            decide(&machines, &Local::default(), &request(), |i| match i {
                0 => State::Ailing(Load::default(), "no route".into()),
                _ => State::Ready(Load { taken }),
            })
        };
        let free = ask(0);
        assert_eq!(free.verdict, Verdict::Accept(1));
        assert_eq!(free.refusals, [(0, Refusal::Failed("no route".into()))]);
        assert_eq!(ask(1).verdict, Verdict::Wait(vec![1]));
    }

    #[test]
    fn a_machine_that_wakes_up_is_waited_for_unless_another_is_free() {
        let machines = [machine("a", 4, 1.0), machine("b", 1, 1.0)];
        let nowhere = Local::default();
        let here = Local { max_jobs: 1, systems: set(&["x86_64-linux"]), ..Local::default() };
        let states = |other: State| move |index| if index == 0 { State::Waking } else { other.clone() };
        let decision = decide(&machines, &nowhere, &request(), states(State::Ready(Load::default())));
        assert_eq!(decision.verdict, Verdict::Accept(1));
        assert_eq!(decision.refusals, [(0, Refusal::Waking)]);
        let full = State::Ready(Load { taken: 1 });
        let decision = decide(&machines, &nowhere, &request(), states(full));
        assert_eq!(decision.verdict, Verdict::Wait(vec![0, 1]));
        let ill = State::Ailing(Load::default(), "no route".into());
        let decision = decide(&machines, &here, &request(), states(ill));
        assert_eq!(decision.verdict, Verdict::Postpone(vec![0]));
    }

    #[test]
    fn an_ailing_machine_is_asked_when_there_is_no_other() {
        let machines = [machine("a", 1, 1.0), machine("b", 1, 2.0)];
        let d = decide(&machines, &Local::default(), &request(), |i| match i {
            0 => State::Failed("just now".into()),
            _ => State::Ailing(Load::default(), "a while ago".into()),
        });
        assert_eq!(d.verdict, Verdict::Accept(1));
    }

    #[test]
    fn a_failed_machine_alone_declines_instead_of_postponing_for_ever() {
        let d = decide(&[machine("a", 1, 1.0)], &Local::default(), &request(), |_| State::Failed("x".into()));
        assert_eq!(d.verdict, Verdict::Decline);
    }

    #[test]
    fn a_machine_without_slots_is_never_free() {
        let d = with_loads(&[machine("a", 0, 1.0)], &request(), &[0]);
        assert_eq!(d.verdict, Verdict::Decline);
        assert_eq!(d.refusals, [(0, Refusal::Full { slots: 0 })]);
    }
}
