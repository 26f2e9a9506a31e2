//! The shell script that takes a shared slot on a machine and holds it, and its words.
//!
//! Slots are lock files in a directory that everybody there may use. They are opened for reading only: in a directory of
//! that kind Linux lets nobody open another user's file for writing if it might have to be created
//! (`fs.protected_regular`). The first in the queue tries the slots in turn, ten times a second; the others sleep. What
//! runs there ends with its input, or when nothing has come for a while: then the link is dead, and nobody else would
//! notice for hours.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::time::Duration;

/// Where the lock files are, on every machine.
pub(super) const DIRECTORY: &str = "/tmp/nix-offload-slots";

/// What each of its words begins with. Whatever else comes is the account's own.
const MARK: &str = "nix-offload-lease ";

/// For any `sh` of POSIX, on its standard input. Everything is read before it begins, for a shell may read ahead. Only
/// descriptors below 10 can be named in some shells.
const SCRIPT: &str = r#"LC_ALL=C; PATH="$PATH:/usr/bin:/bin:/run/current-system/sw/bin:/nix/var/nix/profiles/default/bin:$HOME/.nix-profile/bin:/usr/local/bin:/opt/homebrew/bin"; export LC_ALL PATH
say() { echo "nix-offload-lease $*"; }
give_up() { say none "$*"; if [ -n "$listener" ]; then kill "$listener"; fi; exit; }
usable() {
  if [ ! -e "$1" ]; then (umask 0; set -C; : >"$1") 2>/dev/null; fi
  [ -f "$1" ] && [ ! -L "$1" ] && [ -r "$1" ]
}
listen() {
  if timeout 9 true; then
    while [ "$(timeout "$1" head -c 1 <&3 | wc -c)" -gt 0 ]; do :; done
  else
    cat <&3
  fi
}
lease() {
  slots=$1; directory=$3; listener=
  say here
  command -v flock >/dev/null || give_up "flock(1) is not there"
  if [ ! -e "$directory" ]; then mkdir -m 1777 "$directory" 2>/dev/null; fi
  if [ -L "$directory" ] || [ ! -d "$directory" ]; then give_up "$directory is not a directory"; fi
  usable "$directory/queue" || give_up "$directory/queue is not a file that can be read"
  exec 3<&0 </dev/null
  { listen "$2"; kill $$; } >/dev/null 2>&1 &
  listener=$!
  exec 3<&- 8<"$directory/queue"
  waits=
  flock -n 8 2>/dev/null
  case $? in
    0) ;;
    1) waits=1; say waiting; flock 8 || give_up "flock(1) fails" ;;
    *) give_up "flock(1) cannot lock a descriptor" ;;
  esac
  while :; do
    number=0; tried=
    while [ "$number" -lt "$slots" ]; do
      if usable "$directory/slot-$number"; then
        tried=1
        exec 9<"$directory/slot-$number"
        if flock -n 9; then
          exec 8<&-
          read -r nothing <&9
          say held; wait; exit
        fi
        exec 9<&-
      fi
      number=$((number + 1))
    done
    if [ -z "$tried" ]; then give_up "no file can be made in $directory"; fi
    if [ -z "$waits" ]; then waits=1; say waiting; fi
    sleep 0.1 2>/dev/null || sleep 1
  done
}
"#;

/// The script for one of that many slots. It ends when it has heard nothing for the time `quiet`.
pub(super) fn text(slots: u32, quiet: Duration, directory: &str) -> String {
    format!("{SCRIPT}lease {slots} {} {directory}; exit\n", quiet.as_secs().max(1))
}

/// What it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Word {
    /// It runs.
    Here,
    /// All slots are taken.
    Waiting,
    /// It has a slot, until it ends.
    Held,
    /// There are no slots to be had on that machine, and why.
    None(String),
}

/// A line of its output; none if it is not one of its words.
pub(super) fn word(line: &str) -> Option<Word> {
    const LONGEST: usize = 300;
    let (word, rest) = {
        let words = line.trim_end().strip_prefix(MARK)?;
        words.split_once(' ').unwrap_or((words, ""))
    };
    match word {
        "here" => Some(Word::Here),
        "waiting" => Some(Word::Waiting),
        "held" => Some(Word::Held),
        "none" => Some(Word::None(rest.chars().filter(|c| !c.is_control()).take(LONGEST).collect())),
        _ => None,
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, clippy::disallowed_types, reason = "shells are real in tests")]
#[path = "tests/script.rs"]
mod tests;
