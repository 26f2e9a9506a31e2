//! How a command ends: one line for the error with its causes, one for the cure, and a code scripts can use.

use std::{
    error::Error,
    fmt::Write as _,
    io::{self, Write},
    time::Duration,
};

/// All went well.
pub const OK: u8 = 0;
/// It did not work, for a reason that has no code of its own.
pub const FAILURE: u8 = 1;
/// The command line is wrong.
pub const USAGE: u8 = 2;
/// A host or a service cannot be reached (`EX_UNAVAILABLE` of sysexits.h).
pub const UNAVAILABLE: u8 = 69;
/// Something failed that may work later (`EX_TEMPFAIL`).
pub const TEMPORARY: u8 = 75;
/// The far side does not let us in (`EX_NOPERM`).
pub const NO_PERMISSION: u8 = 77;
/// Something is set up wrongly on this machine (`EX_CONFIG`).
pub const CONFIG: u8 = 78;

/// A failed command.
#[derive(Debug)]
pub struct Failure {
    /// What people read, without a newline at the end.
    pub report: String,
    /// The code for scripts.
    pub code: u8,
}

impl Failure {
    /// Of an error, as [`report`] renders it.
    pub fn new(error: &dyn Error, cure: Option<&str>, code: u8) -> Self {
        Self { report: report(error, cure), code }
    }

    /// Says it on stderr; gives the code.
    pub fn tell(self) -> u8 {
        // Nowhere is left to report that this failed.
        let _ = writeln!(io::stderr(), "{}", self.report);
        self.code
    }
}

/// What a command says when it fails: `error: `, and then as [`reason_and_cure`].
pub fn report(error: &dyn Error, cure: Option<&str>) -> String {
    format!("error: {}", reason_and_cure(error, cure))
}

/// An error with its chain of causes, and below it the cure: `a: b: c`, then `hint: ...` if there is one.
/// Without a newline at the end.
pub fn reason_and_cure(error: &dyn Error, cure: Option<&str>) -> String {
    let mut text = reason(error);
    if let Some(cure) = cure {
        // Writing to a String cannot fail.
        let _ = write!(text, "\nhint: {}", one_line(cure));
    }
    text
}

/// An error with its chain of causes in one line, to be quoted: `a: b: c`. Line breaks within become blanks, and a
/// cause whose text the line has already is not repeated.
pub fn reason(error: &dyn Error) -> String {
    let mut text = one_line(&error.to_string());
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = one_line(&cause.to_string());
        if !text.contains(&cause_text) {
            // Writing to a String cannot fail.
            let _ = write!(text, ": {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// The first line of a text, to be quoted in one line.
pub fn first_line(text: &str) -> &str {
    text.trim_start().lines().next().unwrap_or_default().trim_end_matches([' ', ';', ':'])
}

/// Seconds as people read them: rounded to a tenth, without a zero behind the point, and nothing only for nothing.
pub fn seconds(time: Duration) -> String {
    let tenths = (time.as_secs_f64() * 10.0).round().max(if time.is_zero() { 0.0 } else { 1.0 });
    format!("{}", tenths / 10.0)
}

fn one_line(text: &str) -> String {
    text.split(['\n', '\r']).map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open\nthe door")]
    struct Outer(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("no key")]
    struct Inner(#[source] io::Error);

    #[test]
    fn the_chain_becomes_one_line_and_the_cure_another() {
        let error = Outer(Inner(io::Error::other("lost")));
        assert_eq!(report(&error, None), "error: cannot open the door: no key: lost");
        assert_eq!(
            report(&error, Some("look\nagain")),
            "error: cannot open the door: no key: lost\nhint: look again"
        );
        assert_eq!(reason(&error), "cannot open the door: no key: lost");
        assert_eq!(reason_and_cure(&error, Some("look")), "cannot open the door: no key: lost\nhint: look");
    }

    #[test]
    fn seconds_are_rounded_to_a_tenth() {
        let told = |seconds: f64| super::seconds(Duration::from_secs_f64(seconds));
        for (seconds, text) in [
            (4.99985, "5"),
            (5.999_871_3, "6"),
            (0.16, "0.2"),
            (1.25, "1.3"),
            (0.004, "0.1"),
            (0.0, "0"),
            (120.0, "120"),
        ] {
            assert_eq!(told(seconds), text, "{seconds}");
        }
    }

    #[test]
    fn the_first_line_is_quoted_without_what_leads_to_the_next() {
        assert_eq!(first_line("it failed;\nlast lines:\n> x"), "it failed");
        assert_eq!(first_line(""), "");
    }

    #[test]
    fn a_cause_said_already_is_not_said_twice() {
        let error = Outer(Inner(io::Error::other("no key")));
        assert_eq!(report(&error, None), "error: cannot open the door: no key");
    }
}
