//! Starting one master: ssh's command line, the wait for its first command, and what it left behind.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::{Pid, User, geteuid},
};

use super::{
    diagnosis::{Context, Fault, diagnose, is_about_host_key},
    directory::DIRECTORY_VARIABLE,
    error::StartError,
    liveness::ALIVE_BOUND,
    mux::{self, Health},
    name::Endpoint,
    process, traffic,
};
use crate::key_file;
pub(super) use crate::small_file::write_whole;

/// Set for every ssh that is started here: the names of the masters that are being started, from the outermost
/// on. A ProxyCommand of ours knows by it that it serves a start and must not wait for that start.
const STARTING_VARIABLE: &str = "NIX_OFFLOAD_STARTING";
/// Set with it: in how many milliseconds that start is given up.
const WITHIN_VARIABLE: &str = "NIX_OFFLOAD_STARTING_WITHIN";
/// How much sooner a ProxyCommand of ours gives up, to be heard.
const LAST_WORD: Duration = Duration::from_secs(1);
/// How often a silent link is asked whether it lives, and how many times in vain before the master gives it up: what
/// is cut off is noticed within 40 seconds.
const LINK_INTERVAL: Duration = Duration::from_secs(10);
const LINK_TRIES: u32 = 3;
/// After so long a silence that has happened.
pub(super) const LINK_SILENCE: Duration = LINK_INTERVAL.saturating_mul(LINK_TRIES + 1);
/// How long the second connection, for the sake of the host's key, may take.
const FINGERPRINT_BOUND: Duration = Duration::from_secs(5);
/// How long ssh may take to go when asked to.
const LEAVE_BOUND: Duration = Duration::from_millis(300);
/// How often a start that has taken half of its time is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// How much of ssh's stderr is looked at, in bytes: its end.
const STDERR_READ: u64 = 16 * 1024;
/// How much of the first command's output is kept, in bytes.
const OUTPUT_READ: u64 = 4096;

/// The files of one master, all in the runtime directory.
#[derive(Debug, Clone)]
pub(super) struct Files {
    pub(super) name: String,
    /// ssh's control socket.
    pub(super) socket: PathBuf,
    /// Held while a master is started or ended.
    pub(super) lock: PathBuf,
    /// Who it is: destination, process, time.
    pub(super) record: PathBuf,
    /// What its first command wrote to stdout.
    pub(super) output: PathBuf,
    /// What ssh wrote to stderr and, later, to its log.
    pub(super) log: PathBuf,
    /// The pinned host keys.
    pub(super) hosts: PathBuf,
    /// The last failed start, for those who waited for it.
    pub(super) failure: PathBuf,
    /// Why it is to be left alone for a moment.
    pub(super) avoid: PathBuf,
    /// Where its keeper of streams listens, and what that locks.
    pub(super) keeper: PathBuf,
    pub(super) keeping: PathBuf,
}

impl Files {
    pub(super) fn new(directory: &Path, name: &str) -> Self {
        let file = |extension: &str| directory.join(format!("{name}.{extension}"));
        Files {
            name: name.to_owned(),
            socket: file("sock"),
            lock: file("lock"),
            record: file("json"),
            output: file("out"),
            log: file("log"),
            hosts: file("hosts"),
            failure: file("failed"),
            avoid: file("avoid"),
            keeper: file("keeper"),
            keeping: file("keeping"),
        }
    }
}

/// A start that failed, in the form that can be handed to others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Setback {
    pub(super) timed_out: bool,
    /// If it timed out: whether the host had taken the connection, as far as that is known.
    pub(super) connected: bool,
    pub(super) stderr: String,
    /// The host's key (`ssh-ed25519 SHA256:...`), if it is the key that is the matter.
    pub(super) fingerprint: Option<String>,
}

impl Setback {
    /// What ssh stumbled over.
    pub(super) fn fault(&self, endpoint: &Endpoint) -> Fault {
        diagnose(&self.stderr, endpoint.host_keys.is_some(), self.fingerprint.clone())
    }

    /// The error to give to the caller, with all that its cure needs.
    pub(super) fn explain(
        self,
        endpoint: &Endpoint,
        files: &Files,
        bound: Duration,
        known_hosts: Option<PathBuf>,
    ) -> StartError {
        let destination = endpoint.destination.clone();
        if self.timed_out {
            let Setback { connected, stderr, .. } = self;
            return StartError::TimedOut { destination, bound, connected, stderr };
        }
        let account = User::from_uid(geteuid()).ok().flatten();
        // ssh looks in the home directory of the password database, not in $HOME.
        let (user, home) = account.map_or_else(
            || (geteuid().to_string(), PathBuf::from("~")),
            |account| (account.name, account.dir),
        );
        let known_hosts = known_hosts.unwrap_or_else(|| "~/.ssh/known_hosts".into());
        let known_hosts = known_hosts.strip_prefix("~").map_or(known_hosts.clone(), |rest| home.join(rest));
        let fault = self.fault(endpoint);
        let mut context = Context::of(endpoint, user, known_hosts, files.log.clone());
        if matches!(fault, Fault::PermissionDenied { .. }) {
            context.locked = locked_key(endpoint, &home);
        }
        StartError::Failed { fault, context: Box::new(context), destination }
    }
}

/// The key that has a passphrase, which ssh cannot ask for here: the one that is named, else the first of the usual ones.
fn locked_key(endpoint: &Endpoint, home: &Path) -> Option<PathBuf> {
    const USUAL: [&str; 3] = ["id_rsa", "id_ecdsa", "id_ed25519"];
    let usual = || USUAL.iter().map(|name| home.join(".ssh").join(name)).collect();
    let keys: Vec<PathBuf> = endpoint.identity.clone().map_or_else(usual, |key| vec![key]);
    let keys = keys.into_iter().map(|key| key.strip_prefix("~").map(|rest| home.join(rest)).unwrap_or(key));
    keys.into_iter().find(|key| key_file::has_passphrase(key).unwrap_or(false))
}

/// What became of an attempt.
pub(super) enum Attempt {
    /// A master answers.
    Started { pid: u32 },
    /// ssh did not get there.
    Failed(Setback),
}

/// Runs ssh once. The caller holds the lock, and no socket is in the way. `idle` is how long the master is to live on
/// without a client. `is_silent`: ssh would not say why it fails.
pub(super) fn attempt(
    endpoint: &Endpoint,
    files: &Files,
    bound: Duration,
    first_command: &str,
    idle: Duration,
    is_silent: bool,
) -> Result<Attempt, StartError> {
    let deadline = Instant::now() + bound;
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| StartError::Io { path, source }
    };
    let output = private_file(&files.output).map_err(at(&files.output))?;
    let log = private_file(&files.log).map_err(at(&files.log))?;

    // Descriptors that we inherited without close-on-exec (a build hook's 4 and 5) do not stay open in the
    // master: ssh begins with closefrom(3) (main in ssh.c). In the background it has its own session.
    let mut command = Command::new("ssh");
    set_environment(&mut command, files);
    command
        .args(loudly(is_silent))
        .args(arguments(endpoint, files, bound, first_command, idle))
        .env(WITHIN_VARIABLE, bound.as_millis().to_string())
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(log)
        .current_dir("/")
        .process_group(0);
    let mut child = command.spawn().map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => StartError::NoSsh { destination: endpoint.destination.clone(), source },
        _ => StartError::Io { path: "ssh".into(), source },
    })?;
    let pid = child.id();
    // The thread reaps it whenever it ends, which may be after we went on.
    let (ended, wait) = mpsc::channel();
    let reaper = std::thread::Builder::new()
        .spawn(move || ended.send(child.wait().is_ok_and(|status| status.success())));
    if let Err(source) = reaper {
        end_group(pid, Signal::SIGKILL);
        return Err(StartError::Io { path: "ssh".into(), source });
    }

    // Who waits has something to do on the master, too: a first command that takes its time gets half of it.
    let half = Instant::now() + bound / 2;
    let mut first = wait.recv_timeout(half.saturating_duration_since(Instant::now()));
    while first == Err(RecvTimeoutError::Timeout)
        && Instant::now() < deadline
        && !matches!(mux::health(&files.socket, ALIVE_BOUND), Health::Alive { .. })
    {
        first = wait.recv_timeout(LOOK_INTERVAL.min(deadline.saturating_duration_since(Instant::now())));
    }
    // On a machine with too much to do the answer takes its time, and there may be some left.
    let answer = loop {
        match mux::health(&files.socket, ALIVE_BOUND) {
            Health::Silent if Instant::now() < deadline => {}
            answer => break answer,
        }
    };
    if let Health::Alive { pid } = answer {
        // While the first command still runs its output is not complete, but the master is there.
        if first != Ok(true) {
            let _ = fs::remove_file(&files.output);
        }
        return Ok(Attempt::Started { pid });
    }
    let timed_out = first.is_err();
    let connected = timed_out && traffic::of([pid].into_iter(), "").contains_key(&pid);
    if timed_out {
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            end_group(pid, signal);
            if wait.recv_timeout(LEAVE_BOUND).is_ok() {
                break;
            }
        }
    }
    let _ = fs::remove_file(&files.socket);
    let _ = fs::remove_file(&files.output);
    let stderr = read_end(&files.log, STDERR_READ);
    let left = deadline.saturating_duration_since(Instant::now()).min(FINGERPRINT_BOUND);
    let wanted = is_about_host_key(&stderr) && !left.is_zero();
    let fingerprint = if wanted { fingerprint(endpoint, files, left) } else { None };
    Ok(Attempt::Failed(Setback { timed_out, connected, stderr, fingerprint }))
}

/// The key that the host shows. ssh tells it only to those who want to hear all, and then it would never be silent
/// again; so it is asked once more. It goes no further than to the key.
fn fingerprint(endpoint: &Endpoint, files: &Files, bound: Duration) -> Option<String> {
    const SAID: &str = "Server host key: ";
    let mut command = Command::new("ssh");
    set_environment(&mut command, files);
    command.args(["-v", "-o", "ControlMaster=no", "-o", "PreferredAuthentications=none"]);
    command.args(words(endpoint, files, bound)).args(["-S", "none", "--"]);
    command.args([endpoint.destination.as_str(), "true"]).stdin(Stdio::null()).current_dir("/");
    let (_, stderr) = process::output(&mut command, bound).ok()?;
    stderr.lines().find_map(|line| line.split_once(SAID)).map(|(_, key)| key.trim().to_owned())
}

/// What every ssh of ours finds in its environment, beside what is there.
pub(super) fn set_environment(command: &mut Command, files: &Files) {
    command
        .env(STARTING_VARIABLE, chain(&starting(), &files.name))
        // A ProxyCommand of ours is to find the same masters.
        .env(DIRECTORY_VARIABLE, files.socket.parent().unwrap_or(Path::new("/")))
        .env_remove("DISPLAY")
        .env_remove("SSH_ASKPASS")
        .env_remove("SSH_ASKPASS_REQUIRE");
}

/// The names of the masters for whose start this process works, from the outermost on.
pub(super) fn starting() -> Vec<String> {
    names(&std::env::var(STARTING_VARIABLE).unwrap_or_default())
}

/// How much time there is to find a way for the start that this process works for, and to say why there is none.
pub(super) fn time_left() -> Option<Duration> {
    let millis = std::env::var(WITHIN_VARIABLE).ok()?.parse().ok()?;
    (!starting().is_empty()).then(|| heard_within(Duration::from_millis(millis)))
}

fn heard_within(bound: Duration) -> Duration {
    bound - LAST_WORD.min(bound / 4)
}

/// Only what can be a name counts.
fn names(value: &str) -> Vec<String> {
    let is_name = |word: &&str| word.bytes().all(|byte| byte.is_ascii_alphanumeric());
    value.split_whitespace().filter(is_name).map(str::to_owned).collect()
}

fn chain(before: &[String], name: &str) -> String {
    before.iter().map(String::as_str).chain([name]).collect::<Vec<_>>().join(" ")
}

fn end_group(leader: u32, signal: Signal) {
    if let Ok(number) = i32::try_from(leader) {
        // It may be gone in between, which is what we want.
        let _ = killpg(Pid::from_raw(number), signal);
    }
}

/// What has a silent ssh say why it fails: nobody else knows, and it goes to our log alone.
fn loudly(is_silent: bool) -> &'static [&'static str] {
    if is_silent { &["-o", "LogLevel=ERROR"] } else { &[] }
}

/// ssh's words for a master. Where an option is given more than once the first one counts, except for `-S` and `-E`,
/// where the last one does. So ours come first where they must hold, then the user's, then our defaults.
fn arguments(
    endpoint: &Endpoint,
    files: &Files,
    bound: Duration,
    first_command: &str,
    idle: Duration,
) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = Vec::new();
    option(&mut arguments, "ControlMaster=yes");
    option(&mut arguments, &format!("ControlPersist={}", idle.as_secs().max(1)));
    arguments.extend(words(endpoint, files, bound));
    arguments.extend(["-S".into(), escape_percent(&files.socket)]);
    // In the background ssh's stderr is /dev/null; a log file it keeps.
    arguments.extend(["-E".into(), files.log.clone().into()]);
    arguments.extend(["--".into(), endpoint.destination.clone().into(), first_command.into()]);
    arguments
}

/// How an endpoint is connected to, without what makes a master of it.
pub(super) fn words(endpoint: &Endpoint, files: &Files, bound: Duration) -> Vec<OsString> {
    let mut words: Vec<OsString> = Vec::new();
    if endpoint.host_keys.is_some() {
        option(&mut words, &format!("HostKeyAlias={}", alias(files)));
        option(&mut words, "GlobalKnownHostsFile=/dev/null");
        option(&mut words, "StrictHostKeyChecking=yes");
        option(&mut words, "VerifyHostKeyDNS=no");
        option(&mut words, "UpdateHostKeys=no"); // the file is ours
        let mut hosts = OsString::from("UserKnownHostsFile=\"");
        hosts.push(escape_percent(&files.hosts));
        hosts.push("\"");
        words.extend(["-o".into(), hosts]);
    }
    words.extend(endpoint.ssh_options.iter().filter_map(|word| without_ours(word)).map(OsString::from));
    words.extend(["-x", "-a", "-T"].map(OsString::from));
    option(&mut words, "BatchMode=yes");
    let seconds = bound.as_secs() + u64::from(bound.subsec_nanos() > 0);
    option(&mut words, &format!("ConnectTimeout={}", seconds.max(1)));
    option(&mut words, &format!("ServerAliveInterval={}", LINK_INTERVAL.as_secs()));
    option(&mut words, &format!("ServerAliveCountMax={LINK_TRIES}"));
    option(&mut words, "RemoteCommand=none");
    option(&mut words, "PermitLocalCommand=no");
    option(&mut words, "ClearAllForwardings=yes");
    if let Some(identity) = &endpoint.identity {
        words.extend(["-i".into(), identity.into()]);
    }
    if let Some(port) = endpoint.port {
        words.extend(["-p".into(), port.to_string().into()]);
    }
    if endpoint.compress {
        words.push("-C".into());
    }
    words
}

fn option(words: &mut Vec<OsString>, option: &str) {
    words.extend(["-o".into(), option.into()]);
}

/// A second ControlMaster=yes, which is what -M means, would make ssh ask before each use; and with -q, which overrules
/// all options, it would not say why it fails. They may stand among other letters that take no argument (main in ssh.c of 9.2).
fn without_ours(word: &str) -> Option<String> {
    const PLAIN: &str = "1246afgknqstvxACGKMNTVXYy";
    let Some(letters) = word.strip_prefix('-') else { return Some(word.to_owned()) };
    let plain = letters.find(|letter| !PLAIN.contains(letter)).unwrap_or(letters.len());
    let (plain, rest) = letters.split_at(plain);
    let left = plain.replace(['M', 'q'], "");
    (word == "-" || !left.is_empty() || !rest.is_empty()).then(|| format!("-{left}{rest}"))
}

/// The name under which the pinned keys are filed, whatever ssh calls the host.
fn alias(files: &Files) -> String {
    format!("nix-offload-{}", files.name)
}

fn escape_percent(path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let bytes = path.as_os_str().as_bytes();
    OsString::from_vec(
        bytes.iter().flat_map(|byte| std::iter::repeat_n(*byte, 1 + usize::from(*byte == b'%'))).collect(),
    )
}

/// Writes the pinned host keys down for ssh, if there are any.
pub(super) fn write_hosts(endpoint: &Endpoint, files: &Files) -> io::Result<()> {
    if endpoint.host_keys.is_none() {
        return Ok(());
    }
    let alias = alias(files);
    let text: String = endpoint.pinned_keys().map(|key| format!("{alias} {key}\n")).collect();
    private_file(&files.hosts)?.write_all(text.as_bytes())
}

/// An empty file for us alone. Appending, because ssh writes to its log by two ways.
fn private_file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    file.set_len(0)?;
    Ok(file)
}

/// The end of a text file, or as much as can be had of it.
fn read_end(path: &Path, most: u64) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(most)))?;
        let mut bytes = Vec::new();
        file.take(most).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

/// What the first command wrote, without blanks around it.
pub(super) fn first_output(files: &Files) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(&files.output).ok()?.take(OUTPUT_READ).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes).trim().to_owned();
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_of_starts_is_read_as_it_is_written() {
        assert_eq!(chain(&[], "a1"), "a1");
        assert_eq!(names(&chain(&["a1".into(), "b2".into()], "c3")), ["a1", "b2", "c3"]);
        assert_eq!(names(" ../x a1 "), ["a1"]);
    }

    #[test]
    fn the_letters_that_make_a_master_and_silence_are_left_out_of_the_users_words() {
        for (word, left) in [
            ("-4MC", "-4C"),
            ("-qC", "-C"),
            ("-MpM", "-pM"),
            ("-oM", "-oM"),
            ("M", "M"),
            ("--", "--"),
            ("-", "-"),
        ] {
            assert_eq!(without_ours(word).as_deref(), Some(left));
        }
        assert_eq!(["-M", "-MM", "-q", "-Mq"].map(without_ours), [const { None }; 4]);
    }

    #[test]
    fn a_proxy_command_has_most_of_the_time_and_the_last_word() {
        assert_eq!(heard_within(Duration::from_secs(6)), Duration::from_secs(5));
        assert_eq!(heard_within(Duration::from_secs(2)), Duration::from_millis(1500));
        assert_eq!(heard_within(Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn what_must_hold_comes_before_the_users_words_and_the_defaults_after() {
        let mut endpoint = Endpoint::new("u@h").unwrap();
        endpoint.ssh_options = ["-M", "-o", "ControlMaster=no", "-4"].map(String::from).to_vec();
        endpoint.host_keys = Some("ssh-ed25519 AAAA".into());
        endpoint.port = Some(7);
        let files = Files::new(Path::new("/run/10%"), "n");
        let words = arguments(&endpoint, &files, Duration::from_millis(1500), "true", Duration::from_secs(7));
        let words: Vec<_> = words.iter().map(|word| word.to_str().unwrap()).collect();
        let place = |word: &str| words.iter().position(|w| *w == word).unwrap_or_else(|| panic!("no {word}"));
        assert!(place("ControlMaster=yes") < place("ControlMaster=no"));
        assert!(place("ControlPersist=7") < place("ControlMaster=no"));
        assert!(place("StrictHostKeyChecking=yes") < place("-4"));
        assert!(place("UserKnownHostsFile=\"/run/10%%/n.hosts\"") < place("-4"));
        assert!(place("-4") < place("ConnectTimeout=2"));
        // Forty seconds until a link that was cut is noticed, unless the user has it otherwise.
        assert!(place("-4") < place("ServerAliveInterval=10"));
        assert!(place("-4") < place("ServerAliveCountMax=3"));
        assert!(place("-4") < place("/run/10%%/n.sock"));
        assert!(!words.contains(&"-M"));
        assert_eq!(words[words.len() - 3..], ["--", "u@h", "true"]);
    }
}
