//! How long a decision and the reading of a list take, with a thousand machines.

use crate::scene::median;
use nix_offload::config;
use nix_offload::plan::known::Link;
use nix_offload::plan::machine::Machine;
use nix_offload::plan::{self, Known, Load, Local, Question, Request, Rules, Sample, Work};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::hint::black_box;
use std::time::{Duration, Instant, SystemTime};

const MACHINES: usize = 1000;
const TIMES: usize = 201;

/// Medians in milliseconds, and the worst.
pub(crate) struct Speed {
    pub(crate) deciding: (f64, f64),
    pub(crate) parsing: (f64, f64),
}

impl std::fmt::Display for Speed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (deciding, parsing) = (self.deciding, self.parsing);
        writeln!(
            f,
            "With {MACHINES} machines, medians of {TIMES} (and the worst): a decision {:.3} ms ({:.3} ms), reading the \
             list {:.2} ms ({:.2} ms).",
            deciding.0, deciding.1, parsing.0, parsing.1
        )
    }
}

pub(crate) fn measure() -> Speed {
    let mut list = String::new();
    for index in 0..MACHINES {
        let speed = 1 + index % 8;
        let _ = writeln!(
            list,
            "ssh-ng://nix@builder{index}.example.org x86_64-linux,i686-linux /etc/nix/key 16 {speed} kvm,big-parallel -"
        );
    }
    let read = || -> Vec<Machine> {
        config::parse_machines("builders", &list, &BTreeSet::new(), &|_| Ok(None)).machines
    };
    let machines = read();
    let (rules, local, work) = (Rules::default(), Local::default(), Work::default());
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    let request = Request {
        am_willing: false,
        system: "x86_64-linux".into(),
        drv_path: "/nix/store/00000000000000000000000000000000-x.drv".into(),
        required_features: ["big-parallel".to_owned()].into(),
    };
    let known = |index: usize| Known {
        sample: Some(Sample {
            cores: Some(16),
            load_average: Some((index % 23) as f64),
            cpu_pressure: Some((index % 50) as f64),
            disk_free: Some(1 << 40),
            memory_free: Some(1 << 34),
            ..Sample::empty(now)
        }),
        link: Link {
            missing: Some((index as u64 * 7919) % (1 << 30)),
            bandwidth: Some(1e8),
            round_trip: Some(0.01),
            ..Link::default()
        },
        ..Known::ready(Load { taken: (index % 17) as u64 })
    };
    let decide = || {
        let question = Question {
            machines: &machines,
            rules: &rules,
            local: &local,
            here: None,
            request: &request,
            work: &work,
            now,
        };
        plan::decide(&question, known)
    };
    Speed { deciding: time(|| drop(black_box(decide()))), parsing: time(|| drop(black_box(read()))) }
}

fn time(mut what: impl FnMut()) -> (f64, f64) {
    let mut samples = Vec::with_capacity(TIMES);
    for _ in 0..TIMES {
        let begin = Instant::now();
        what();
        samples.push(begin.elapsed().as_secs_f64() * 1000.0);
    }
    (median(samples.iter().copied()), samples.into_iter().fold(0.0, f64::max))
}
