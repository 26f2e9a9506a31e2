//! Asking another program, with a bound on time and on what it may say.
//!
//! Must never know what the answer is for.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// More than this is not read of each output, in bytes.
const MOST: u64 = 4 << 20;

/// How a program ended and what it said.
#[derive(Debug)]
pub struct Answer {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// Runs a program to its end. It has its own process group, which is killed when it takes longer than `bound`.
///
/// # Errors
/// If it cannot be started; `TimedOut` if it took too long.
pub fn run(command: &mut Command, bound: Duration) -> io::Result<Answer> {
    let pipes = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.process_group(0).spawn()?;
    let (done, results) = mpsc::channel();
    let pipes: [Option<Box<dyn Read + Send>>; 2] = [
        child.stdout.take().map(|pipe| Box::new(pipe) as _),
        child.stderr.take().map(|pipe| Box::new(pipe) as _),
    ];
    for (index, pipe) in pipes.into_iter().enumerate() {
        let (done, Some(pipe)) = (done.clone(), pipe) else { continue };
        thread::spawn(move || {
            let mut bytes = Vec::new();
            let read = pipe.take(MOST).read_to_end(&mut bytes);
            // Nobody listens any more when it took too long.
            let _ = done.send((index, read.map(|_| String::from_utf8_lossy(&bytes).into_owned())));
        });
    }
    let deadline = Instant::now() + bound;
    let mut texts = [String::new(), String::new()];
    let mut failure = None;
    for _ in 0..2 {
        match results.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((index, Ok(text))) => texts[index] = text,
            Ok((_, Err(error))) => failure = Some(error),
            Err(_) => failure = Some(io::ErrorKind::TimedOut.into()),
        }
    }
    // One that closed its outputs and goes on is no better.
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if failure.is_none() && Instant::now() < deadline => thread::sleep(Duration::from_millis(1)),
            None => {
                failure.get_or_insert_with(|| io::ErrorKind::TimedOut.into());
                if let Ok(leader) = i32::try_from(child.id()) {
                    // It may be gone in between, which is what we want.
                    let _ = killpg(Pid::from_raw(leader), Signal::SIGKILL);
                }
                break child.wait()?;
            }
        }
    };
    let [stdout, stderr] = texts;
    failure.map_or(Ok(Answer { status, stdout, stderr }), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_has_only_so_much_time() {
        let shell =
            |script: &str, bound| run(Command::new("sh").args(["-c", script]), Duration::from_millis(bound));
        let answer = shell("echo a; echo b >&2; exit 3", 20_000).unwrap();
        assert_eq!(
            (answer.stdout.as_str(), answer.stderr.as_str(), answer.status.code()),
            ("a\n", "b\n", Some(3))
        );
        for script in ["sleep 60 & sleep 60", "exec >&- 2>&-; sleep 60"] {
            let begin = Instant::now();
            assert_eq!(shell(script, 200).unwrap_err().kind(), io::ErrorKind::TimedOut, "{script}");
            assert!(begin.elapsed() < Duration::from_secs(20));
        }
        assert_eq!(
            run(&mut Command::new("/absent"), Duration::ZERO).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
