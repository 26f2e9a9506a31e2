//! Nix's own build hook as a child: asked in our place, and given the build if it takes it.
//!
//! Owns the child and the passing on. Must never decide what it is asked.

use crate::config::Settings;
use crate::fds;
use crate::nix_side::NixSide;
use crate::plan::Request;
use crate::programs;
use crate::wire::hook::{self, Reply, Said};
use nix_offload_proxy::exit;
use std::io::{self, BufRead, BufReader, PipeReader, Read, Write};
use std::process::{Child, ChildStderr, ChildStdin, Command, Stdio};
use std::thread;
use thiserror::Error;

/// The longest line that is taken.
const MAX_LINE: u64 = 16 << 20;

/// Why Nix's own hook cannot be asked.
#[derive(Debug, Error)]
pub enum StockError {
    /// It is not there.
    #[error("Nix's own build hook is not found (name it with {})", programs::STOCK_HOOK_VARIABLE)]
    NotFound,
    /// It cannot be started.
    #[error("cannot start Nix's own build hook '{program}'")]
    Start {
        /// Its name.
        program: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It ended before it answered, or answered what there is not.
    #[error("Nix's own build hook gave no answer")]
    NoAnswer(#[source] io::Error),
}

/// A running hook of Nix's own.
#[derive(Debug)]
pub struct Stock {
    child: Child,
    stdin: Option<ChildStdin>,
    said: BufReader<ChildStderr>,
    log: PipeReader,
}

impl Stock {
    /// Starts it with these settings and this list of machines. To be called in the main thread.
    ///
    /// # Errors
    /// If it is not found or cannot be started.
    pub fn start(verbosity: u64, settings: &Settings, builders: String) -> Result<Self, StockError> {
        let words = programs::stock_hook().ok_or(StockError::NotFound)?;
        let (program, arguments) = words.split_first().ok_or(StockError::NotFound)?;
        let failed = |source| StockError::Start { program: program.to_string_lossy().into_owned(), source };
        let mut command = Command::new(program);
        command.args(arguments).arg(verbosity.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let (mut child, log) = fds::start_hook(&mut command).map_err(failed)?;
        let (Some(stdin), Some(stderr)) = (child.stdin.take(), child.stderr.take()) else {
            return Err(failed(io::ErrorKind::BrokenPipe.into()));
        };
        let mut settings = settings.clone();
        settings.0.insert("builders".into(), builders);
        if settings.0.contains_key("build-hook") {
            // For stores that it opens itself Nix is asked in there once more, which is not to come back to us.
            let own: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
            settings.0.insert("build-hook".into(), own.join(" "));
        }
        let mut stock = Self { child, stdin: Some(stdin), said: BufReader::new(stderr), log };
        let mut bytes = Vec::new();
        hook::put_settings(&mut bytes, &settings);
        // A hook that ended at once is found by the first question, which reads what it said.
        let _ = stock.send(&bytes);
        Ok(stock)
    }

    /// Asks it, and passes on to Nix what it says before its answer.
    ///
    /// # Errors
    /// If it gives none.
    pub fn ask(&mut self, request: &Request, nix: &NixSide) -> Result<Reply, StockError> {
        let mut bytes = Vec::new();
        hook::put_request(&mut bytes, request);
        let _ = self.send(&bytes);
        loop {
            let line = self.line().map_err(StockError::NoAnswer)?;
            match Said::read(line.strip_suffix(b"\n").unwrap_or(&line)) {
                Said::Words => nix.pass(&line),
                Said::Reply(reply) => return Ok(reply),
                Said::AcceptOn => {
                    let name = self.line().map_err(StockError::NoAnswer)?;
                    let machine = String::from_utf8_lossy(&name).trim_end_matches('\n').to_owned();
                    return Ok(Reply::Accept { machine });
                }
                Said::Unknown => return Err(StockError::NoAnswer(io::ErrorKind::InvalidData.into())),
            }
        }
    }

    /// Leaves the accepted build to it: gives it what Nix still sends, and Nix what it says. Gives its exit status.
    pub fn carry_on(self, source: &mut impl Read, nix: &NixSide) -> u8 {
        let Self { mut child, stdin, mut said, mut log } = self;
        thread::scope(|scope| {
            scope.spawn(|| pass(&mut said, |bytes| nix.pass(bytes)));
            scope.spawn(|| pass(&mut log, |bytes| nix.pass_log(bytes)));
            if let Some(mut stdin) = stdin {
                // If it is gone, its exit status tells more.
                let _ = io::copy(source, &mut stdin);
            }
        });
        let status = child.wait().ok().and_then(|status| status.code());
        status.and_then(|code| u8::try_from(code).ok()).unwrap_or(exit::FAILURE)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let stdin = self.stdin.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        stdin.write_all(bytes)
    }

    fn line(&mut self) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        let mut source = Read::take(&mut self.said, MAX_LINE);
        source.read_until(b'\n', &mut line)?;
        if line.last() == Some(&b'\n') { Ok(line) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// Passes on all there is, as it comes.
fn pass(source: &mut impl Read, to: impl Fn(&[u8])) {
    let mut buffer = vec![0; 32 << 10];
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => to(&buffer[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}
