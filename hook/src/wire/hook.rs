//! The dialogue with Nix: settings, `try` requests and what follows an accept, replies, and the `@nix` lines.
//!
//! The only place where the words of that protocol occur. Must never decide anything.
//!
//! Source: Nix 2.34 `src/libstore/unix/build/hook-instance.cc` (what is sent),
//! `src/libstore/build/derivation-building-goal.cc` `tryBuildHook` (replies) and `src/libutil/logging.cc`
//! `handleJSONLogMessage` (lines).

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    MAX_ITEMS, MAX_NAME, MAX_STRING, WireError, put_str, put_strings, put_u64, read_list, read_string,
    read_u64,
};
use crate::config::Settings;
use crate::plan::Request;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};

/// Most bytes taken for all settings together; Nix sends about 7 KiB and the list of machines.
pub const MAX_SETTINGS: u64 = 128 << 20;

/// Reads the settings Nix sends first.
///
/// # Errors
/// If the stream ends early or what it holds is no list of settings.
pub fn read_settings(source: &mut impl Read) -> Result<Settings, WireError> {
    let mut settings = BTreeMap::new();
    let mut total = 0u64;
    loop {
        match read_u64(source, "the mark before a setting")? {
            0 => return Ok(Settings(settings)),
            1 => {}
            other => {
                return Err(WireError::Unexpected {
                    what: "the mark before a setting",
                    got: format!("{other:#x}"),
                    expected: "1 (a setting follows) or 0 (the end)",
                });
            }
        }
        let name = read_string(source, "a setting's name", MAX_NAME)?;
        // A value may hold a file name that is not UTF-8; a setting nobody asks for must not stop the hook.
        let value = super::read_bytes(source, "a setting's value", MAX_STRING)?;
        total += name.len() as u64 + value.len() as u64;
        if total > MAX_SETTINGS {
            return Err(WireError::TooLong { what: "the settings", length: total, limit: MAX_SETTINGS });
        }
        settings.insert(name, String::from_utf8_lossy(&value).into_owned());
    }
}

/// Reads the next request; `None` when Nix has closed the stream because it has no more work.
///
/// # Errors
/// If the stream ends inside a request or what it holds is none.
pub fn read_request(source: &mut impl Read) -> Result<Option<Request>, WireError> {
    // The end of the stream is an answer only before the first byte of a request.
    let mut first = [0u8; 1];
    loop {
        match source.read(&mut first) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(WireError::Io { what: "a request", source }),
        }
    }
    let mut source = (&first[..]).chain(source);
    let word = super::read_bytes(&mut source, "a request's first word", MAX_NAME)?;
    if word != b"try" {
        return Err(WireError::Unexpected {
            what: "a request's first word",
            got: format!("'{}'", String::from_utf8_lossy(&word[..word.len().min(32)]).escape_debug()),
            expected: "'try'",
        });
    }
    Ok(Some(Request {
        am_willing: read_u64(&mut source, "whether a local build is possible")? != 0,
        system: read_string(&mut source, "the system", MAX_NAME)?,
        drv_path: read_string(&mut source, "the derivation's path", MAX_NAME)?,
        required_features: read_strings(&mut source, "a required feature")?.into_iter().collect(),
    }))
}

/// Appends settings as Nix sends them, for another hook.
pub fn put_settings(buffer: &mut Vec<u8>, settings: &Settings) {
    for (name, value) in &settings.0 {
        put_u64(buffer, 1);
        put_str(buffer, name);
        put_str(buffer, value);
    }
    put_u64(buffer, 0);
}

/// Appends a request as Nix sends it, for another hook.
pub fn put_request(buffer: &mut Vec<u8>, request: &Request) {
    put_str(buffer, "try");
    put_u64(buffer, u64::from(request.am_willing));
    put_str(buffer, &request.system);
    put_str(buffer, &request.drv_path);
    put_strings(buffer, request.required_features.iter());
}

/// What Nix sends once a build was accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// The closure of the derivation's inputs, as full paths.
    pub inputs: Vec<String>,
    /// Names of the outputs that are not valid in the local store. Where Nix (up to 2.33) checks a build, with `--check`, or
    /// `--rebuild`, of all outputs; where it repairs one, also of those whose files it has just deleted (`tryBuildHook`
    /// in `src/libstore/build/derivation-goal.cc`).
    pub wanted_outputs: BTreeSet<String>,
}

/// Reads what follows an accept.
///
/// Nix writes it with a blocking write, so it is to be read at once whatever is done next.
///
/// # Errors
/// If the stream ends early or what it holds is no job.
pub fn read_job(source: &mut impl Read) -> Result<Job, WireError> {
    Ok(Job {
        inputs: read_strings(source, "an input path")?,
        wanted_outputs: read_strings(source, "an output name")?.into_iter().collect(),
    })
}

fn read_strings(source: &mut impl Read, what: &'static str) -> Result<Vec<String>, WireError> {
    read_list(source, what, MAX_ITEMS, |s| read_string(s, what, MAX_NAME))
}

/// An answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// This process builds it on the machine of that name; Nix cannot take it back.
    Accept {
        /// The machine's name as Nix is to show it.
        machine: String,
    },
    /// Not this one; ask for others.
    Decline,
    /// None, ever: Nix ends the hook and does not ask again.
    DeclinePermanently,
    /// Not now; ask for it again later.
    Postpone,
}

impl Reply {
    /// The lines to be written to Nix in one write.
    pub fn render(&self) -> Vec<u8> {
        match self {
            // Nix reads the name as one raw line.
            Self::Accept { machine } => format!("# accept\n{}\n", one_line(machine)).into_bytes(),
            Self::Decline => b"# decline\n".to_vec(),
            Self::DeclinePermanently => b"# decline-permanently\n".to_vec(),
            Self::Postpone => b"# postpone\n".to_vec(),
        }
    }
}

/// A line of another hook before it has answered, as Nix reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// An answer that is whole.
    Reply(Reply),
    /// An accept; the next line is the machine's name.
    AcceptOn,
    /// For Nix's user.
    Words,
    /// A reply that there is not.
    Unknown,
}

impl Said {
    /// Reads a line without its end.
    pub fn read(line: &[u8]) -> Self {
        match line.strip_prefix(b"# ") {
            None => Self::Words,
            Some(b"accept") => Self::AcceptOn,
            Some(b"decline") => Self::Reply(Reply::Decline),
            Some(b"decline-permanently") => Self::Reply(Reply::DeclinePermanently),
            Some(b"postpone") => Self::Reply(Reply::Postpone),
            Some(_) => Self::Unknown,
        }
    }
}

/// How important a message is to Nix's user (`Verbosity` in `src/libutil/include/nix/util/error.hh`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Verbosity {
    /// Always shown.
    Error = 0,
    /// Shown unless asked to be quiet.
    Warn = 1,
    /// Shown by default.
    Info = 3,
    /// Shown with `-v`.
    Talkative = 4,
    /// The least important of all.
    Vomit = 7,
}

/// Kinds of activities (`ActivityType` in `src/libutil/include/nix/util/logging.hh`).
pub mod activity {
    use super::Field;

    /// Without a meaning of its own.
    pub const UNKNOWN: u64 = 0;
    /// One path is copied; fields: path, from, to.
    pub const COPY_PATH: u64 = 100;
    /// A file is fetched; field: where from. Has the number of [`super::result::BUILD_LOG_LINE`], and Nix takes a
    /// hook's line of that type for one, whatever its action.
    pub const FILE_TRANSFER: u64 = 101;
    /// A goal is realised; one of a daemon's books on its own work.
    pub const REALISE: u64 = 102;
    /// Several paths are copied.
    pub const COPY_PATHS: u64 = 103;
    /// Derivations are built; the sum of a daemon's builds.
    pub const BUILDS: u64 = 104;
    /// A derivation is built; fields: derivation, machine, round, rounds.
    pub const BUILD: u64 = 105;
    const OPTIMISE_STORE: u64 = 106;
    const VERIFY_PATHS: u64 = 107;
    const SUBSTITUTE: u64 = 108;
    const QUERY_PATH_INFO: u64 = 109;
    const POST_BUILD_HOOK: u64 = 110;
    const BUILD_WAITING: u64 = 111;
    const FETCH_TREE: u64 = 112;

    /// Whether Nix can show such an activity. The programs of its users read fields by their places and end at once if one
    /// is missing or of the other type (`getS` and `getI` in `src/libmain/progress-bar.cc` of 2.8 to 2.34), and what a
    /// builder tells may be the words of a build.
    pub fn is_readable(kind: u64, fields: &[Field]) -> bool {
        match kind {
            UNKNOWN | REALISE | COPY_PATHS | BUILDS | OPTIMISE_STORE | VERIFY_PATHS | BUILD_WAITING
            | FETCH_TREE => true,
            POST_BUILD_HOOK => matches!(fields, [Field::Text(_), ..]),
            SUBSTITUTE | QUERY_PATH_INFO => matches!(fields, [Field::Text(_), Field::Text(_), ..]),
            COPY_PATH => matches!(fields, [Field::Text(_), Field::Text(_), Field::Text(_), ..]),
            BUILD => {
                matches!(fields, [Field::Text(_), Field::Text(_), Field::Int(_), Field::Int(_), ..])
            }
            // Nix takes it for a line of the log; of any other kind nothing is known.
            _ => false,
        }
    }
}

/// Kinds of results of an activity (`ResultType` in the same file).
pub mod result {
    use super::Field;

    const FILE_LINKED: u64 = 100;
    /// A line of the build's log.
    pub const BUILD_LOG_LINE: u64 = 101;
    const UNTRUSTED_PATH: u64 = 102;
    const CORRUPTED_PATH: u64 = 103;
    /// The build entered a phase.
    pub const SET_PHASE: u64 = 104;
    /// Fields: done, expected, running, failed.
    pub const PROGRESS: u64 = 105;
    const SET_EXPECTED: u64 = 106;
    const POST_BUILD_LOG_LINE: u64 = 107;
    const FETCH_STATUS: u64 = 108;

    /// Whether Nix can read such a result; see [`super::activity::is_readable`]. Besides, Nix itself takes the first field of
    /// a log line for a text, and ends the whole command if it is none (`src/libstore/build/`: `derivation-goal.cc` of 2.8
    /// and 2.26, `derivation-building-goal.cc` of 2.34).
    pub fn is_readable(kind: u64, fields: &[Field]) -> bool {
        match kind {
            UNTRUSTED_PATH | CORRUPTED_PATH => true,
            FILE_LINKED => matches!(fields, [Field::Int(_), ..]),
            BUILD_LOG_LINE | SET_PHASE | POST_BUILD_LOG_LINE | FETCH_STATUS => {
                matches!(fields, [Field::Text(_), ..])
            }
            SET_EXPECTED => matches!(fields, [Field::Int(_), Field::Int(_), ..]),
            PROGRESS => {
                matches!(fields, [Field::Int(_), Field::Int(_), Field::Int(_), Field::Int(_), ..])
            }
            _ => false,
        }
    }
}

/// A field of an activity or result. Nix takes nothing but these two; anything else ends the whole command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Field {
    /// A number.
    Int(u64),
    /// A text, not necessarily UTF-8 when it comes from a builder.
    Text(Vec<u8>),
}

impl Field {
    fn json(&self) -> Value {
        match self {
            Self::Int(n) => json!(n),
            Self::Text(t) => json!(String::from_utf8_lossy(t)),
        }
    }
}

impl From<u64> for Field {
    fn from(n: u64) -> Self {
        Self::Int(n)
    }
}

impl From<&str> for Field {
    fn from(text: &str) -> Self {
        Self::Text(text.as_bytes().to_vec())
    }
}

/// A structured line for Nix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line<'a> {
    /// A message for the user.
    Message {
        /// Its importance.
        level: Verbosity,
        /// Its text; may have several lines.
        text: &'a str,
    },
    /// An activity begins.
    Start {
        /// Its number, unique in this process.
        id: u64,
        /// Its importance, a number of [`Verbosity`].
        level: u64,
        /// Its kind, of [`activity`].
        kind: u64,
        /// What to show.
        text: &'a str,
        /// Fields by the kind.
        fields: &'a [Field],
    },
    /// An activity has a result.
    Result {
        /// The activity's number.
        id: u64,
        /// The result's kind, of [`result`].
        kind: u64,
        /// Fields by the kind.
        fields: &'a [Field],
    },
    /// An activity is over.
    Stop {
        /// The activity's number.
        id: u64,
    },
    /// The build entered a phase. For the build's log (descriptor 4), not for the dialogue: on the latter it
    /// would set the phase of another goal.
    Phase {
        /// The phase's name.
        name: &'a str,
    },
}

impl Line<'_> {
    /// The line with its end, to be written in one write.
    pub fn render(&self) -> Vec<u8> {
        let mut value = match self {
            Self::Message { level, text } => json!({"action": "msg", "level": *level as u8, "msg": text}),
            Self::Start { id, level, kind, text, .. } => json!({
                "action": "start", "id": id, "level": level, "type": kind, "text": text, "parent": 0,
            }),
            Self::Result { id, kind, .. } => json!({"action": "result", "id": id, "type": kind}),
            Self::Stop { id } => json!({"action": "stop", "id": id}),
            Self::Phase { name } => json!({"action": "setPhase", "phase": name}),
        };
        if let Self::Start { fields, .. } | Self::Result { fields, .. } = self
            && !fields.is_empty()
        {
            // An empty list must be left out: Nix 2.26 looks at the first field of a line of type 104 if there is
            // a list at all, and aborts (`derivation-goal.cc`, `handleChildOutput`).
            value["fields"] = fields.iter().map(Field::json).collect();
        }
        format!("@nix {value}\n").into_bytes()
    }
}

/// A line of the build's log as bytes for descriptor 4, with its end.
///
/// What begins with `@nix ` there is an instruction to Nix. A line of a builder's log that does was no instruction to the
/// builder's Nix, and one without all its parts ends the whole command here (2.8 `src/libutil/logging.cc`,
/// `handleJSONLogMessage`), so a blank makes it a text again. Nix writes over a line from its beginning after a carriage
/// return; the builder's has done that.
pub fn log_line(line: &[u8]) -> Vec<u8> {
    let quote = if line.starts_with(b"@nix ") { &b" "[..] } else { b"" };
    let text = line.iter().map(|byte| if matches!(byte, b'\r' | b'\n') { b' ' } else { *byte });
    quote.iter().copied().chain(text).chain([b'\n']).collect()
}

/// A text as one line without control characters.
pub fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings_bytes(settings: &[(&str, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, value) in settings {
            put_u64(&mut bytes, 1);
            put_str(&mut bytes, name);
            super::super::put_bytes(&mut bytes, value);
        }
        put_u64(&mut bytes, 0);
        bytes
    }

    fn try_bytes() -> Vec<u8> {
        let mut bytes = Vec::new();
        put_str(&mut bytes, "try");
        put_u64(&mut bytes, 1);
        put_str(&mut bytes, "x86_64-linux");
        put_str(&mut bytes, "/nix/store/abc-x.drv");
        put_strings(&mut bytes, ["kvm", "big-parallel"].iter());
        bytes
    }

    #[test]
    fn settings_of_any_size_and_content_are_read() {
        let big = vec![b'm'; 3 << 20];
        let bytes = settings_bytes(&[("builders", &big), ("odd", b"\xff"), ("empty", b"")]);
        let settings = read_settings(&mut bytes.as_slice()).unwrap();
        assert_eq!(settings.get("builders").unwrap().len(), 3 << 20);
        assert_eq!(settings.get("odd"), Some("\u{fffd}"));
        assert_eq!(settings.get("empty"), Some(""));
    }

    #[test]
    fn settings_together_are_bounded() {
        let big = vec![b'm'; 60 << 20];
        let bytes = settings_bytes(&[("a", &big), ("b", &big), ("c", &big)]);
        assert!(matches!(read_settings(&mut bytes.as_slice()), Err(WireError::TooLong { .. })));
    }

    #[test]
    fn any_number_of_requests_is_read_and_the_end_is_no_error() {
        let mut bytes = try_bytes();
        bytes.extend(try_bytes());
        let mut source = bytes.as_slice();
        for _ in 0..2 {
            let request = read_request(&mut source).unwrap().unwrap();
            assert!(request.am_willing);
            assert_eq!(request.system, "x86_64-linux");
            assert_eq!(request.drv_path, "/nix/store/abc-x.drv");
            assert_eq!(request.required_features, ["big-parallel".to_owned(), "kvm".to_owned()].into());
        }
        assert_eq!(read_request(&mut source).unwrap(), None);
    }

    #[test]
    fn what_is_written_for_another_hook_is_what_nix_writes() {
        let request = read_request(&mut try_bytes().as_slice()).unwrap().unwrap();
        let mut bytes = Vec::new();
        put_request(&mut bytes, &request);
        assert_eq!(read_request(&mut bytes.as_slice()).unwrap().unwrap(), request);
        let settings = read_settings(&mut settings_bytes(&[("a", b"1"), ("b", b"")]).as_slice()).unwrap();
        bytes.clear();
        put_settings(&mut bytes, &settings);
        assert_eq!(bytes, settings_bytes(&[("a", b"1"), ("b", b"")]));
    }

    #[test]
    fn the_lines_of_another_hook_are_told_apart() {
        for reply in [Reply::Decline, Reply::DeclinePermanently, Reply::Postpone] {
            let line = reply.render();
            assert_eq!(Said::read(&line[..line.len() - 1]), Said::Reply(reply));
        }
        assert_eq!(Said::read(b"# accept"), Said::AcceptOn);
        assert_eq!(Said::read(b"# frobnicate"), Said::Unknown);
        assert_eq!(Said::read(b"@nix {}"), Said::Words);
    }

    #[test]
    fn every_truncation_of_a_request_is_an_error() {
        let bytes = try_bytes();
        for end in 1..bytes.len() {
            assert!(matches!(read_request(&mut &bytes[..end]), Err(WireError::Truncated { .. })), "{end}");
        }
    }

    #[test]
    fn garbage_is_refused_with_what_was_expected() {
        let mut bytes = Vec::new();
        put_str(&mut bytes, "frobnicate\x1b[31m");
        let error = read_request(&mut bytes.as_slice()).unwrap_err().to_string();
        assert_eq!(error, "a request's first word is 'frobnicate\\u{1b}[31m', expected 'try'");
        let error = read_settings(&mut &[7u8; 8][..]).unwrap_err().to_string();
        assert!(error.starts_with("the mark before a setting is 0x707070707070707"), "{error}");
        assert!(read_request(&mut &[0xff; 64][..]).is_err());
    }

    #[test]
    fn a_job_is_inputs_and_wanted_outputs() {
        let mut bytes = Vec::new();
        put_strings(&mut bytes, ["/nix/store/a", "/nix/store/b"].iter());
        put_strings(&mut bytes, ["out"].iter());
        let job = read_job(&mut bytes.as_slice()).unwrap();
        assert_eq!(job.inputs, ["/nix/store/a", "/nix/store/b"]);
        assert_eq!(job.wanted_outputs, ["out".to_owned()].into());
    }

    #[test]
    fn replies_are_the_lines_nix_reads() {
        let accept = Reply::Accept { machine: "ssh://mac\n# decline".into() };
        assert_eq!(accept.render(), b"# accept\nssh://mac # decline\n");
        assert_eq!(Reply::Decline.render(), b"# decline\n");
        assert_eq!(Reply::DeclinePermanently.render(), b"# decline-permanently\n");
        assert_eq!(Reply::Postpone.render(), b"# postpone\n");
    }

    #[test]
    fn what_nix_could_not_read_is_told_apart() {
        let (text, int) = (Field::from("x"), Field::from(7));
        let two = [text.clone(), text.clone()];
        for (kind, good) in [
            (100, vec![int.clone(), int.clone()]),
            (101, vec![text.clone()]),
            (104, vec![text.clone()]),
            (105, vec![int.clone(); 4]),
            (106, vec![int.clone(); 2]),
            (107, vec![text.clone()]),
            (108, vec![text.clone()]),
        ] {
            assert!(result::is_readable(kind, &good), "{kind}");
            for field in 0..good.len().min(if kind == 100 { 1 } else { 4 }) {
                let mut bad = good.clone();
                bad[field] = if matches!(good[field], Field::Int(_)) { text.clone() } else { int.clone() };
                assert!(!result::is_readable(kind, &bad) && !result::is_readable(kind, &good[..field]));
            }
        }
        assert!(!result::is_readable(109, &two) && result::is_readable(102, &[]));
        assert!(activity::is_readable(activity::UNKNOWN, &[]) && !activity::is_readable(113, &two));
        assert!(activity::is_readable(108, &two) && !activity::is_readable(108, &two[..1]));
        assert!(!activity::is_readable(activity::FILE_TRANSFER, &two), "for Nix a line of the log");
        let build = [text.clone(), text, int.clone(), int];
        assert!(activity::is_readable(activity::BUILD, &build));
        assert!(!activity::is_readable(activity::BUILD, &build[1..]));
    }

    #[test]
    fn no_line_of_a_log_is_an_instruction_to_nix() {
        for (line, rendered) in [
            (&b"a line"[..], &b"a line\n"[..]),
            (b"", b"\n"),
            (b"@nix {}", b" @nix {}\n"),
            (b"x @nix {}", b"x @nix {}\n"),
            (b"?nix {}\r@", b"?nix {} @\n"),
            (b"x\n@nix {}", b"x @nix {}\n"),
        ] {
            assert_eq!(log_line(line), rendered);
        }
    }

    #[test]
    fn lines_are_one_line_of_json_with_every_field_nix_insists_on() {
        let line = Line::Start {
            id: 3,
            level: Verbosity::Talkative as u64,
            kind: activity::COPY_PATH,
            text: "two\nlines",
            fields: &["p".into(), 7.into(), Field::Text(vec![0xff])],
        };
        let bytes = line.render();
        assert_eq!(bytes.iter().filter(|b| **b == b'\n').count(), 1);
        let value: Value = serde_json::from_slice(bytes.strip_prefix(b"@nix ").unwrap()).unwrap();
        assert_eq!(
            value,
            json!({"action": "start", "id": 3, "level": 4, "type": 100, "text": "two\nlines",
                   "fields": ["p", 7, "\u{fffd}"], "parent": 0})
        );
        let plain = Line::Result { id: 3, kind: result::PROGRESS, fields: &[] }.render();
        assert_eq!(plain, b"@nix {\"action\":\"result\",\"id\":3,\"type\":105}\n");
        let message = Line::Message { level: Verbosity::Error, text: "x" }.render();
        assert_eq!(message, b"@nix {\"action\":\"msg\",\"level\":0,\"msg\":\"x\"}\n");
    }
}
