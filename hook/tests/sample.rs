//! The script that asks a machine for its load, given to real shells.

#[cfg(test)]
mod tests {
    use nix_offload::sample::{PING, PONG, Progress, READY, SCRIPT, has_line, parse, progress, request};
    use std::io::{BufRead, BufReader, Read, Write};
    use std::process::{Command, Stdio};
    use std::thread;
    use std::time::UNIX_EPOCH;

    /// What a shell of this machine answers to some requests that come after it said it was ready.
    fn asked(shell: &[&str], requests: &str) -> Vec<u8> {
        let mut child = Command::new(shell[0])
            .args(&shell[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdin.write_all(SCRIPT.as_bytes()).unwrap();
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), READY, "{shell:?}");
        stdin.write_all(requests.as_bytes()).unwrap();
        drop(stdin);
        let mut heard = Vec::new();
        stdout.read_to_end(&mut heard).unwrap();
        assert!(child.wait().unwrap().success());
        heard
    }

    #[test]
    fn real_shells_understand_the_script() {
        for shell in [&["sh"][..], &["bash"], &["bash", "--posix"]] {
            let directory = tempfile::Builder::new().prefix("a $(b) *").tempdir().unwrap();
            let request = request(directory.path().to_str());
            let heard = asked(shell, &format!("what\n{PING}{request}"));
            assert!(has_line(&heard, PONG), "{shell:?}");
            assert_eq!(progress(&heard), Progress::Complete, "{shell:?}");
            let sample = parse(&heard, UNIX_EPOCH);
            let cores = thread::available_parallelism().unwrap().get() as u32;
            assert_eq!(sample.cores, Some(cores), "{shell:?}");
            assert!(sample.load_average.is_some() && sample.memory_free > Some(1 << 20), "{sample:?}");
            assert!(sample.disk_free > Some(0), "{sample:?}");
            // Where there is nothing there is no answer, and no end of the session.
            let heard = asked(shell, &format!("sample /no/such/place\n{PING}"));
            assert!(has_line(&heard, PONG) && progress(&heard) == Progress::Complete);
            assert_eq!(parse(&heard, UNIX_EPOCH).disk_free, None);
            let heard = asked(shell, "sample\n");
            assert_eq!(parse(&heard, UNIX_EPOCH).disk_free, None);
            assert!(progress(&heard) == Progress::Complete && parse(&heard, UNIX_EPOCH).cores.is_some());
        }
    }
}
