//! How busy this machine is itself, for the policy that weighs it against the others.
//!
//! Must never ask another machine. What cannot be read is not known.

use crate::plan::Sample;
use std::fs;
use std::thread;
use std::time::SystemTime;

/// Looks at `/proc`, which costs some microseconds.
pub fn sample(now: SystemTime) -> Sample {
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    Sample {
        cores: thread::available_parallelism().ok().and_then(|cores| u32::try_from(cores.get()).ok()),
        load_average: load_average(&read("/proc/loadavg")),
        cpu_pressure: cpu_pressure(&read("/proc/pressure/cpu")),
        ..Sample::empty(now)
    }
}

/// The first number of `/proc/loadavg`, over one minute (proc(5)).
fn load_average(text: &str) -> Option<f64> {
    number(text.split_whitespace().next()?)
}

/// `avg10` of the line `some` (Documentation/accounting/psi.rst in Linux).
fn cpu_pressure(text: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    number(line.split_whitespace().find_map(|word| word.strip_prefix("avg10="))?)
}

fn number(text: &str) -> Option<f64> {
    text.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_figures_are_read_and_nonsense_is_not() {
        assert_eq!(load_average("2.50 1.00 0.50 3/400 12345\n"), Some(2.5));
        let pressure =
            "some avg10=12.34 avg60=1.00 avg300=0.10 total=5\nfull avg10=0.00 avg60=0.00 total=0\n";
        assert_eq!(cpu_pressure(pressure), Some(12.34));
        for nonsense in ["", "x", "-1", "NaN", "inf", "some", "some avg10=", "some avg10=nan"] {
            assert_eq!((load_average(nonsense), cpu_pressure(nonsense)), (None, None), "{nonsense}");
        }
        let here = sample(SystemTime::now());
        assert!(here.cores.is_some_and(|cores| cores > 0) && here.load_average.is_some());
    }
}
