//! What this program does inside the client's machine; it prints lines of numbers.

use std::{
    io::{self, IoSliceMut, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Instant,
};

use clap::{Subcommand, ValueEnum};
use nix::{
    cmsg_space,
    sys::{
        resource::{UsageWho, getrusage},
        socket::{ControlMessageOwned, MsgFlags, Shutdown, recv, recvmsg, send, shutdown},
        time::TimeValLike,
    },
    unistd::close,
};

use super::server::{self, ANSWER, BANNER};

/// How it is called.
#[derive(Subcommand)]
pub(crate) enum Inside {
    /// Runs command lines in turns; prints for each run its place in the row and milliseconds.
    Race { times: u32, lines: Vec<String> },
    /// Opens streams with ProxyCommands in turns; prints for each its place in the row, milliseconds of processor
    /// time, and milliseconds until the host speaks.
    Starts { times: u32, lines: Vec<String> },
    /// Moves this many bytes through a ProxyCommand; prints seconds.
    Transfer { direction: Direction, bytes: u64, line: String },
    /// Starts that many processes at once, each with the next of the command lines; prints milliseconds until the last
    /// one has ended, how many failed, and on stderr what those said.
    Stampede { count: usize, lines: Vec<String> },
}

/// Which way the bytes go.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Direction {
    /// From the host.
    Down,
    /// To the host.
    Up,
}

impl Direction {
    /// Both.
    pub(crate) const BOTH: [Self; 2] = [Self::Down, Self::Up];
}

impl Inside {
    /// Does it.
    pub(crate) fn run(self) {
        match self {
            Self::Race { times, lines } => race(times, &lines),
            Self::Starts { times, lines } => starts(times, &lines),
            Self::Transfer { direction, bytes, line } => transfer(direction, bytes, &line),
            Self::Stampede { count, lines } => stampede(count, &lines),
        }
    }
}

fn race(times: u32, lines: &[String]) {
    for _ in 0..times {
        for (place, line) in lines.iter().enumerate() {
            let mut command = command(line);
            command.stdin(Stdio::null()).stdout(Stdio::null());
            let begin = Instant::now();
            let status = command.status().expect("it can be started");
            println!("{place} {}", milliseconds(begin));
            assert!(status.success(), "{line}: {status}");
        }
    }
}

fn starts(times: u32, lines: &[String]) {
    for _ in 0..times {
        for (place, line) in lines.iter().enumerate() {
            let before = children_cpu_ms();
            let begin = Instant::now();
            let mut stream = Stream::open(line);
            stream.read_exact(&mut [0]).expect("the host speaks");
            let spoken = milliseconds(begin);
            stream.end_of_input();
            let rest = io::copy(&mut stream, &mut io::sink()).unwrap();
            assert_eq!(rest + 1, BANNER.len() as u64, "{line}");
            stream.child.wait().unwrap();
            println!("{place} {} {spoken}", children_cpu_ms() - before);
        }
    }
}

/// The clock runs from the host's first word on: the way is there.
fn transfer(direction: Direction, bytes: u64, line: &str) {
    let mut stream = Stream::open(line);
    stream.read_exact(&mut [0; BANNER.len()]).expect("the host speaks");
    let begin = Instant::now();
    match direction {
        Direction::Down => {
            stream.write_all(&[0]).unwrap();
            server::take(&mut stream, bytes).unwrap();
        }
        Direction::Up => {
            server::send(&mut stream, bytes).unwrap();
            stream.read_exact(&mut [0; ANSWER.len()]).expect("the host has everything");
        }
    }
    println!("{}", begin.elapsed().as_secs_f64());
    stream.end_of_input();
    let _ = io::copy(&mut stream, &mut io::sink());
    stream.child.wait().unwrap();
}

/// Each process is there and waits before the first one may begin.
fn stampede(count: usize, lines: &[String]) {
    const WAIT: &str = r#"echo; read -r _; exec "$@" </dev/null >/dev/null"#;
    let (gate, opener) = io::pipe().unwrap();
    let (mut ready, report) = io::pipe().unwrap();
    let start = |line: &String| {
        let mut command = Command::new("sh");
        command.args(["-c", WAIT, "sh"]).args(line.split_whitespace()).stderr(Stdio::piped());
        command.stdin(gate.try_clone().unwrap()).stdout(report.try_clone().unwrap());
        command.spawn().expect("sh can be started")
    };
    let children: Vec<Child> = lines.iter().cycle().take(count).map(start).collect();
    ready.read_exact(&mut vec![0; count]).unwrap();
    let begin = Instant::now();
    drop(opener);
    let outputs: Vec<_> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    let took = milliseconds(begin);
    let failed: Vec<_> = outputs.iter().filter(|output| !output.status.success()).collect();
    println!("{took} {}", failed.len());
    for output in failed {
        io::stderr().write_all(&output.stderr).unwrap();
    }
}

fn command(line: &str) -> Command {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().expect("a command line has words"));
    command.args(words);
    command
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// What all processes that were waited for have used, user and system.
fn children_cpu_ms() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    (usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1000.0
}

/// A ProxyCommand, started as ssh does, and what it gives.
struct Stream {
    child: Child,
    ends: Ends,
}

enum Ends {
    Pipes {
        input: Option<ChildStdin>,
        output: ChildStdout,
    },
    /// A socket that was handed over, by its number.
    Socket(RawFd),
}

impl Stream {
    /// With pipes, or with a socket for a descriptor if it is to hand one over.
    fn open(line: &str) -> Self {
        let mut command = command(line);
        if line.contains(" --fdpass ") {
            let (own, its) = UnixStream::pair().unwrap();
            command.stdin(Stdio::null()).stdout(OwnedFd::from(its));
            let child = command.spawn().expect("it can be started");
            // Its end of the socket is closed here with the command.
            drop(command);
            return Self { child, ends: Ends::Socket(receive(&own)) };
        }
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it can be started");
        let (input, output) = (child.stdin.take(), child.stdout.take().unwrap());
        Self { child, ends: Ends::Pipes { input, output } }
    }

    fn end_of_input(&mut self) {
        match &mut self.ends {
            Ends::Pipes { input, .. } => drop(input.take()),
            // The host may have ended the stream already.
            Ends::Socket(socket) => drop(shutdown(*socket, Shutdown::Write)),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.ends {
            Ends::Pipes { output, .. } => output.read(buffer),
            Ends::Socket(socket) => Ok(recv(*socket, buffer, MsgFlags::empty())?),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match &mut self.ends {
            Ends::Pipes { input, .. } => input.as_mut().expect("its input is open").write(buffer),
            Ends::Socket(socket) => Ok(send(*socket, buffer, MsgFlags::MSG_NOSIGNAL)?),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Ends::Socket(socket) = self.ends {
            let _ = close(socket);
        }
    }
}

fn receive(from: &UnixStream) -> RawFd {
    let mut byte = [0];
    let mut slices = [IoSliceMut::new(&mut byte)];
    let mut space = cmsg_space!(RawFd);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(from.as_raw_fd(), &mut slices, Some(&mut space), flags).unwrap();
    let rights = message.cmsgs().unwrap().find_map(|message| match message {
        ControlMessageOwned::ScmRights(rights) => rights.first().copied(),
        _ => None,
    });
    rights.expect("a descriptor is handed over")
}
