//! Where log events go: journald if it is there, else the fallback that the caller chose.
//!
//! The only file that names tracing_subscriber and tracing_journald. It must not assume that stderr is free.

use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;

/// What to do with events when there is no journald.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// Drop them. Right wherever stderr is a protocol.
    Nothing,
    /// Write them to stderr, one line each.
    Stderr,
}

/// Sends events up to `level` to journald under `identifier` (`journalctl -t identifier`), their fields as
/// journal fields of the same name in capitals. Never fails; only the first call of a process counts.
pub fn init(identifier: &str, level: LevelFilter, fallback: Fallback) {
    let registry = tracing_subscriber::registry().with(level);
    let ignored = match (tracing_journald::layer(), fallback) {
        (Ok(journal), _) => {
            let journal = journal.with_syslog_identifier(identifier.to_owned()).with_field_prefix(None);
            tracing::subscriber::set_global_default(registry.with(journal))
        }
        (Err(_), Fallback::Stderr) => {
            let lines = tracing_subscriber::fmt::layer()
                .with_writer(std::io::stderr)
                .with_target(false)
                .without_time();
            tracing::subscriber::set_global_default(registry.with(lines))
        }
        (Err(_), Fallback::Nothing) => Ok(()),
    };
    // A second call means that somebody has set up logging already, which is as good.
    drop(ignored);
}

/// Reads a level by its name (`off`, `error`, `warn`, `info`, `debug`, `trace`, in any case) or its number
/// (0 to 5).
pub fn parse_level(text: &str) -> Option<LevelFilter> {
    let text = text.trim();
    if text.is_empty() { None } else { text.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_read_by_name_and_number() {
        assert_eq!(parse_level("debug"), Some(LevelFilter::DEBUG));
        assert_eq!(parse_level(" WARN "), Some(LevelFilter::WARN));
        assert_eq!(parse_level("0"), Some(LevelFilter::OFF));
        assert_eq!(parse_level(""), None);
        assert_eq!(parse_level("loud"), None);
    }
}
