//! What a machine says of its load and of what it has left: the shell script that makes it speak, and the reading of its
//! words.
//!
//! Must never know how the script gets there. What a machine does not say is not known, never 0.
//!
//! The script is for any `sh` of POSIX, on its standard input. It says [`READY`], then it answers lines:
//!
//! ```text
//! ping          -> PONG
//! sample [DIR]  -> BEGIN, lines about the machine, LOADED, lines about the file system of DIR, END
//! ```
//!
//! What a file system says comes last, because one that hangs never says anything.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::plan::Sample;
use std::str;
use std::time::SystemTime;

/// The script understands requests from now on. None must be sent before: a shell may have read ahead.
pub const READY: &str = "nix-offload-sample ready";
/// The answer to [`PING`].
pub const PONG: &str = "nix-offload-sample pong";
const BEGIN: &str = "nix-offload-sample begin";
const LOADED: &str = "nix-offload-sample loaded";
const END: &str = "nix-offload-sample end";

/// Asks for [`PONG`] and nothing else.
pub const PING: &str = "ping\n";

/// Most bytes of an answer. What has more is no answer.
pub const MOST_BYTES: usize = 64 * 1024;

/// The longest reason of an inhibit file that is kept, in characters.
const MOST_REASON: usize = 200;

/// More processors than this no machine has.
const MOST_CORES: u32 = 65_536;

/// What the script is sent as the standard input of `sh`. It ends with its input.
///
/// The last command is read whole before it begins, so nothing of a later request is taken for a part of it. Files are
/// read by the shell itself: the only programs that run for a sample are those of `df`, and `sysctl` where there is
/// no `/proc`. An inhibit file that is there keeps builds away, whatever is in it.
pub const SCRIPT: &str = r#"LC_ALL=C; PATH="$PATH:/usr/bin:/bin:/usr/sbin:/sbin:/run/current-system/sw/bin"; export LC_ALL PATH
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null)
inhibit=/etc/nix/offload-inhibit
machine() {
  echo "cores $cores"
  load=
  if [ -r /proc/loadavg ]; then read -r load </proc/loadavg; else load=$(sysctl -n vm.loadavg); fi
  printf 'load %s\n' "$load"
  if [ -r /proc/pressure/cpu ]; then while read -r line; do echo "pressure $line"; done </proc/pressure/cpu; fi
  if [ -r /proc/meminfo ]; then
    while read -r name value; do
      case $name in MemAvailable:) echo "memory $value"; break ;; esac
    done </proc/meminfo
  fi
  if [ -e "$inhibit" ] || [ -L "$inhibit" ]; then
    line=
    if [ -f "$inhibit" ] && [ -r "$inhibit" ]; then read -r line <"$inhibit"; fi
    printf 'inhibit %s\n' "$line"
  fi
}
disk() {
  [ -n "$1" ] || return
  echo "disk"
  df -Pk "$1"
  echo "inodes"
  df -Pi "$1"
}
echo "nix-offload-sample ready"; while read -r word directory; do
  case $word in
    ping) echo "nix-offload-sample pong" ;;
    sample)
      echo "nix-offload-sample begin"
      machine </dev/null 2>/dev/null
      echo "nix-offload-sample loaded"
      disk "$directory" </dev/null 2>/dev/null
      echo "nix-offload-sample end" ;;
  esac
done
"#;

/// Asks for a sample, with the directory of the machine's store. One that cannot be named in a line is left out.
pub fn request(store_dir: Option<&str>) -> String {
    let is_plain = |directory: &&str| {
        directory.starts_with('/')
            && directory.trim() == *directory
            && directory.len() < 4096
            && !directory.contains(|c: char| c.is_control())
    };
    store_dir.filter(is_plain).map_or_else(|| "sample\n".into(), |directory| format!("sample {directory}\n"))
}

/// How much of an answer has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Not yet enough.
    Begun,
    /// All but what file systems say.
    Loaded,
    /// All of it.
    Complete,
}

/// How much of the answer to [`request`] is in what came.
pub fn progress(heard: &[u8]) -> Progress {
    let mut progress = Progress::Begun;
    for line in lines(heard) {
        match line {
            LOADED => progress = Progress::Loaded,
            END if progress == Progress::Loaded => return Progress::Complete,
            _ => {}
        }
    }
    progress
}

/// Whether this line, alone on it, is in what came.
pub fn has_line(heard: &[u8], line: &str) -> bool {
    lines(heard).any(|heard| heard == line)
}

/// Whole lines that are text.
fn lines(heard: &[u8]) -> impl Iterator<Item = &str> {
    let whole = heard.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let all = heard.get(..whole).unwrap_or_default().split(|byte| *byte == b'\n');
    all.filter_map(|line| str::from_utf8(line).ok()).map(|line| line.strip_suffix('\r').unwrap_or(line))
}

/// Which part of an answer a line belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Before,
    Machine,
    Loaded,
    Disk,
    Inodes,
}

/// Reads an answer, be it cut short, as one of that time. Lines that are not understood are left out.
pub fn parse(heard: &[u8], at: SystemTime) -> Sample {
    let mut sample = Sample::empty(at);
    let mut part = Part::Before;
    for line in lines(heard) {
        part = match (line, part) {
            (BEGIN, _) => {
                sample = Sample::empty(at);
                Part::Machine
            }
            (LOADED, Part::Machine) => Part::Loaded,
            (END, _) => Part::Before,
            ("disk", Part::Loaded) => Part::Disk,
            ("inodes", Part::Disk) => Part::Inodes,
            (_, part) => {
                match part {
                    Part::Before | Part::Loaded => {}
                    Part::Machine => about_machine(&mut sample, line),
                    Part::Disk => {
                        sample.disk_free = disk_free(line).or(sample.disk_free);
                    }
                    Part::Inodes => {
                        sample.inodes_free = inodes_free(line).or(sample.inodes_free);
                    }
                }
                part
            }
        };
    }
    sample
}

fn about_machine(sample: &mut Sample, line: &str) {
    let (name, value) = line.split_once(' ').unwrap_or((line, ""));
    let mut words = value.split_ascii_whitespace();
    match name {
        "cores" => {
            let cores = words.next().and_then(|word| word.parse().ok());
            sample.cores = cores.filter(|cores| (1..=MOST_CORES).contains(cores)).or(sample.cores);
        }
        // Of Linux `0.20 0.18 0.12 1/80 11206`, of Darwin and BSD `{ 1.53 1.60 1.70 }`.
        "load" => {
            let load = words.find(|word| *word != "{").and_then(amount);
            sample.load_average = load.filter(|load| *load <= 1e6).or(sample.load_average);
        }
        "pressure" if words.next() == Some("some") => {
            let share = words.find_map(|word| word.strip_prefix("avg10=")).and_then(amount);
            sample.cpu_pressure = share.filter(|share| *share <= 100.0).or(sample.cpu_pressure);
        }
        "memory" => {
            let kib = words.next().and_then(|word| word.parse::<u64>().ok());
            let is_kib = words.next().is_none_or(|unit| unit == "kB");
            sample.memory_free = kib.filter(|_| is_kib).and_then(bytes).or(sample.memory_free);
        }
        "inhibit" => {
            let plain = value.chars().filter(|c| !c.is_control()).take(MOST_REASON).collect::<String>();
            sample.inhibited = Some(plain.trim().to_owned());
        }
        _ => {}
    }
}

fn amount(word: &str) -> Option<f64> {
    word.parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0)
}

fn bytes(kib: u64) -> Option<u64> {
    kib.checked_mul(1024)
}

/// Of a line of `df -Pk`: what is available. The name of the file system and the place it is at may have blanks.
fn disk_free(line: &str) -> Option<u64> {
    shares(line).first().and_then(|[_, free]| bytes(*free))
}

/// Of a line of `df -Pi`: what is free. Darwin and BSD have the bytes in the same line, in front. A file system that
/// does not count them says 0 of everything.
fn inodes_free(line: &str) -> Option<u64> {
    shares(line).last().and_then(|[used, free]| (*used > 0 || *free > 0).then_some(*free))
}

/// What is used and what is free, in front of each share of use: `20%` or `-`.
fn shares(line: &str) -> Vec<[u64; 2]> {
    let words: Vec<&str> = line.split_ascii_whitespace().take(64).collect();
    let share = |words: &[&str]| {
        let [used, free, share] = words else { return None };
        let is_share = *share == "-" || share.strip_suffix('%').is_some_and(|n| n.parse::<u64>().is_ok());
        // Where some is set aside for root there may be less than nothing.
        let free = free.parse::<i128>().ok().map(|free| free.max(0))?;
        is_share.then_some([used.parse().ok()?, u64::try_from(free).ok()?])
    };
    words.windows(3).filter_map(share).collect()
}

#[cfg(test)]
#[path = "sample/tests.rs"]
mod tests;
