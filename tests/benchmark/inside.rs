//! What this program does inside the client's machine.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::fd::OwnedFd,
    path::Path,
    process::{Child, ChildStdin, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::{
        resource::{UsageWho, getrusage},
        time::TimeValLike,
    },
    unistd::pipe,
};

/// How long a started hook is left alone with its settings until it is asked.
const SETTLE: Duration = Duration::from_millis(10);

/// Starts `times` hooks, gives each its settings and no request, and prints the processor time of each.
pub(crate) fn starts(settings: &Path, times: u32, hook: &[String]) {
    let _log = open_log();
    let settings = settings_frame(&fs::read_to_string(settings).unwrap());
    for _ in 0..times {
        let before = children_cpu_us();
        let (child, mut stdin) = start(hook);
        stdin.write_all(&settings).unwrap();
        end(child, stdin);
        println!("{}", (children_cpu_us() - before) as f64 / 1000.0);
    }
}

/// The hook writes the build's log to descriptor 4, which therefore must be open; nothing is written here.
fn open_log() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = pipe().unwrap();
    fcntl(&writer, FcntlArg::F_DUPFD(4)).unwrap();
    (reader, writer)
}

/// User and system time of all children that were waited for, in microseconds.
fn children_cpu_us() -> i64 {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    usage.user_time().num_microseconds() + usage.system_time().num_microseconds()
}

/// Runs a hook with this process's descriptors; appends a line about what it used; ends as it did.
pub(crate) fn measure(file: &Path, hook: &[String]) -> ExitCode {
    let status = Command::new(&hook[0]).args(&hook[1..]).status().expect("the hook can be started");
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    let line = format!("{{\"cpu_us\": {}, \"max_rss_kib\": {}}}\n", children_cpu_us(), usage.max_rss());
    let mut file = File::options().append(true).open(file).unwrap();
    file.write_all(line.as_bytes()).unwrap();
    ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// Asks `times` times in two ways and prints a line for each: `warm` from the question, which comes
/// when the process has read its settings, and `cold` from the start of the process, which gets both at once.
pub(crate) fn ask(settings: &Path, drv: &str, times: u32, hook: &[String]) {
    let _log = open_log();
    let settings = settings_frame(&fs::read_to_string(settings).unwrap());
    let request = request_frame(drv);
    for _ in 0..times {
        let (mut child, mut stdin) = start(hook);
        stdin.write_all(&settings).unwrap();
        thread::sleep(SETTLE);
        let begin = Instant::now();
        stdin.write_all(&request).unwrap();
        read_reply(&mut child);
        println!("warm {}", begin.elapsed().as_secs_f64() * 1000.0);
        end(child, stdin);

        let both = [settings.as_slice(), &request].concat();
        let begin = Instant::now();
        let (mut child, mut stdin) = start(hook);
        stdin.write_all(&both).unwrap();
        read_reply(&mut child);
        println!("cold {}", begin.elapsed().as_secs_f64() * 1000.0);
        end(child, stdin);
    }
}

/// Asks one hook for all derivations that a file names, none of which it can take now.
pub(crate) fn postpone(settings: &Path, drvs: &Path, hook: &[String]) {
    let _log = open_log();
    let (mut child, mut stdin) = start(hook);
    stdin.write_all(&settings_frame(&fs::read_to_string(settings).unwrap())).unwrap();
    let mut replies = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    for drv in fs::read_to_string(drvs).unwrap().lines() {
        stdin.write_all(&request_frame(drv)).unwrap();
        let reply = replies.find(|line| line.starts_with("# "));
        assert_eq!(reply.as_deref(), Some("# postpone"), "{drv}");
    }
    drop(replies);
    end(child, stdin);
}

fn start(hook: &[String]) -> (Child, ChildStdin) {
    let mut child = Command::new(&hook[0])
        .args(&hook[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the hook can be started");
    let stdin = child.stdin.take().unwrap();
    (child, stdin)
}

fn read_reply(child: &mut Child) {
    let stderr = BufReader::new(child.stderr.as_mut().unwrap());
    let mut before = String::new();
    for line in stderr.lines() {
        let line = line.unwrap();
        if line.starts_with("# ") {
            assert_eq!(line, "# accept", "the hook does not accept: {before}");
            return;
        }
        before.push_str(&line);
    }
    panic!("the hook ended without a reply: {before}");
}

/// A hook whose Nix has gone ends by itself.
fn end(mut child: Child, stdin: ChildStdin) {
    drop(stdin);
    drop(child.stderr.take());
    child.wait().unwrap();
}

fn settings_frame(text: &str) -> Vec<u8> {
    let mut frame = Vec::new();
    for line in text.lines() {
        let Some((name, value)) = line.split_once(" =") else { continue };
        put_number(&mut frame, 1);
        put_text(&mut frame, name);
        put_text(&mut frame, value.trim_start());
    }
    put_number(&mut frame, 0);
    frame
}

fn request_frame(drv: &str) -> Vec<u8> {
    let mut frame = Vec::new();
    put_text(&mut frame, "try");
    put_number(&mut frame, 0);
    put_text(&mut frame, "x86_64-linux");
    put_text(&mut frame, drv);
    put_number(&mut frame, 0);
    frame
}

fn put_number(frame: &mut Vec<u8>, number: u64) {
    frame.extend(number.to_le_bytes());
}

fn put_text(frame: &mut Vec<u8>, text: &str) {
    put_number(frame, text.len() as u64);
    frame.extend(text.as_bytes());
    frame.resize(frame.len().next_multiple_of(8), 0);
}
