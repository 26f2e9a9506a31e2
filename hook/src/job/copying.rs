//! What Nix is told of paths that are copied one after the other.
//!
//! Must never write twice where once will do: each write wakes Nix.

use crate::nix_side::NixSide;
use crate::wire::hook::{Field, Line, Verbosity, activity, result};
use std::sync::{Mutex, PoisonError};

/// The activity over several copies, and that of the current one. Nix hears of it when the first begins.
pub(super) struct Copying<'a> {
    nix: &'a NixSide,
    what: &'static str,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    done: u64,
    expected: u64,
    /// The numbers of the activities, once they have begun.
    all: Option<u64>,
    current: Option<u64>,
}

/// A path that is copied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Copy<'c> {
    pub(super) path: &'c str,
    pub(super) from: &'c str,
    pub(super) to: &'c str,
}

impl<'a> Copying<'a> {
    pub(super) fn new(nix: &'a NixSide, what: &'static str, expected: usize) -> Self {
        let counts = Counts { expected: expected as u64, ..Counts::default() };
        Self { nix, what, counts: Mutex::new(counts) }
    }

    /// The copy that was begun last, if any, is done, and this one begins, if there is one.
    pub(super) fn next(&self, copy: Option<Copy<'_>>) {
        self.tell(|counts| counts.next(self.what, copy, || self.nix.new_activity()));
    }

    /// That many need not be done.
    pub(super) fn spare(&self, number: usize) {
        self.tell(|counts| {
            counts.expected = counts.expected.saturating_sub(number as u64);
            counts.all.map(|all| counts.progress(all)).unwrap_or_default()
        });
    }

    fn tell(&self, change: impl FnOnce(&mut Counts) -> Vec<u8>) {
        let lines = change(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner));
        self.nix.lines(&lines);
    }
}

impl Drop for Copying<'_> {
    fn drop(&mut self) {
        self.tell(|counts| {
            let left = counts.current.take().into_iter().chain(counts.all.take());
            left.flat_map(|id| Line::Stop { id }.render()).collect()
        });
    }
}

impl Counts {
    fn next(&mut self, what: &str, copy: Option<Copy<'_>>, mut new_activity: impl FnMut() -> u64) -> Vec<u8> {
        let mut lines = Vec::new();
        if let Some(id) = self.current.take() {
            self.done += 1;
            lines.extend(Line::Stop { id }.render());
        }
        if copy.is_some() && self.all.is_none() {
            let (id, level) = (new_activity(), Verbosity::Talkative as u64);
            let start = Line::Start { id, level, kind: activity::COPY_PATHS, text: what, fields: &[] };
            lines.extend(start.render());
            self.all = Some(id);
        }
        lines.extend(self.all.map(|all| self.progress(all)).unwrap_or_default());
        if let Some(Copy { path, from, to }) = copy {
            let (id, level) = (new_activity(), Verbosity::Info as u64);
            let text = format!("copying path '{path}' from '{from}' to '{to}'");
            let fields = [path, from, to].map(Field::from);
            let start = Line::Start { id, level, kind: activity::COPY_PATH, text: &text, fields: &fields };
            lines.extend(start.render());
            self.current = Some(id);
        }
        lines
    }

    fn progress(&self, id: u64) -> Vec<u8> {
        let (done, expected) = (self.done, self.expected);
        let fields = [done, expected, u64::from(done < expected), 0].map(Field::Int);
        Line::Result { id, kind: result::PROGRESS, fields: &fields }.render()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The actions in what was rendered, with their numbers, and the first two fields of results.
    fn told(lines: &[u8]) -> Vec<String> {
        let line = |line: &str| {
            let value: serde_json::Value = serde_json::from_str(line.strip_prefix("@nix ").unwrap()).unwrap();
            let fields = value["fields"].as_array().filter(|_| value["action"] == "result");
            let counts = fields.map(|fields| format!(" {}/{}", fields[0], fields[1])).unwrap_or_default();
            format!("{} {}{counts}", value["action"].as_str().unwrap(), value["id"])
        };
        String::from_utf8_lossy(lines).lines().map(line).collect()
    }

    #[test]
    fn all_that_happens_at_once_is_told_at_once_and_nothing_before_there_is_something() {
        let mut counts = Counts { expected: 3, ..Counts::default() };
        let mut number = 0;
        let mut next = |counts: &mut Counts, copy| {
            told(&counts.next("sending inputs", copy, || {
                number += 1;
                number
            }))
        };
        let copy = Some(Copy { path: "/nix/store/x", from: "local", to: "mac" });
        assert_eq!(next(&mut counts, None), [""; 0]);
        assert_eq!(next(&mut counts, copy), ["start 1", "result 1 0/3", "start 2"]);
        counts.expected -= 1;
        assert_eq!(next(&mut counts, copy), ["stop 2", "result 1 1/2", "start 3"]);
        assert_eq!(next(&mut counts, None), ["stop 3", "result 1 2/2"]);
    }
}
