//! What is allowed in a list of machines and surely wrong.

use super::super::finding::{self, Finding, Severity};
use super::super::machines::{Judged, Own, judge};
use crate::config;
use base64::Engine as _;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

const SOCKET: &str = "/nix/var/nix/daemon-socket/socket";

fn own() -> Own {
    Own { systems: ["my-own".to_owned()].into(), features: ["mine".to_owned()].into(), socket: SOCKET.into() }
}

fn judged(text: &str, files: &[(&str, &str)]) -> Judged {
    let texts = RefCell::new(BTreeMap::from([("m".to_owned(), text.to_owned())]));
    let read = |file: &str| {
        let text = files.iter().find(|(name, _)| *name == file).map(|(_, text)| (*text).to_owned());
        texts.borrow_mut().extend(text.clone().map(|text| (file.to_owned(), text)));
        Ok(text)
    };
    let fleet = config::parse_machines("m", text, &BTreeSet::new(), &read);
    let mut judged = judge(&texts.into_inner(), &fleet, &own());
    finding::sort(&mut judged.findings);
    judged
}

/// Place, culprit, message and cure of each finding.
fn told(findings: &[Finding]) -> Vec<String> {
    let one = |finding: &Finding| {
        let place = &finding.spot.place;
        let culprit: String =
            finding.spot.line.chars().skip(place.column - 1).take(finding.spot.width).collect();
        let Finding { severity, message, cure, .. } = finding;
        format!("{}:{} [{culprit}] {}: {message} -> {cure}", place.line, place.column, severity.as_str())
    };
    findings.iter().map(one).collect()
}

/// There is exactly one finding, and it has all these parts.
#[track_caller]
fn assert_one(text: &str, parts: &[&str]) {
    let told = told(&judged(text, &[]).findings);
    assert_eq!(told.len(), 1, "{text:?}: {told:#?}");
    for part in parts {
        assert!(told[0].contains(part), "{text:?} lacks {part:?}: {}", told[0]);
    }
}

#[track_caller]
fn assert_none(text: &str) {
    let told = told(&judged(text, &[]).findings);
    assert!(told.is_empty(), "{text:?}: {told:#?}");
}

fn key(kind: &str, named: &str) -> String {
    let engine = base64::engine::general_purpose::STANDARD;
    let mut body = u32::try_from(named.len()).unwrap().to_be_bytes().to_vec();
    body.extend(named.bytes());
    body.extend([7; 36]);
    engine.encode(format!("{kind} {} root@mac", engine.encode(body)))
}

#[test]
fn a_list_as_it_should_be_has_no_findings() {
    let key = key("ssh-ed25519", "ssh-ed25519");
    assert_none(&format!(
        "# comment; with 'quotes'\n\
         ssh-ng://nix@mac x86_64-darwin,aarch64-darwin - 4 1.5 kvm,big-parallel,cuda,mine benchmark {key}\n\
         ssh://pi:2222?compress=true&remote-store=/x x86_64-linux,i686-linux,x86_64-v3-linux,my-own,builtin /k 1 1\n\
         big ; unix:///run/other ; /srv/store ; ssh-ng://localhost?remote-store=/x ; auto?root=/x\n\
         mounted-ssh-ng://x ; plugin://y armv7l-linux,riscv64-linux,wasm32-wasi,x86_64-freebsd - 2"
    ));
}

#[test]
fn two_lines_for_one_machine() {
    for (list, shared) in [
        ("ssh-ng://mac - - 2\nssh-ng://MAC - - 2", false),
        ("ssh-ng://mac - - 2\nssh-ng://mac?compress=true - - 2", false),
        ("ssh-ng://mac - - 2\nssh-ng://mac - - 2", true),
        ("ssh-ng://mac?ssh-key=/k&compress=true\nssh-ng://mac?compress=true&ssh-key=/k", true),
    ] {
        let slots = if shared { "the two share their slots" } else { "each has slots of its own" };
        assert_one(list, &["warning: this machine is there already: m:1:1; ", slots]);
    }
    assert_none("ssh-ng://mac x86_64-linux - 2\nssh-ng://mac i686-linux - 2");
}

#[test]
fn paths_that_were_meant_as_machines() {
    assert_one(
        "ssh-ng//big x86_64-linux - 4",
        &[
            "1:1 [ssh-ng//big] warning: this is a relative path",
            "/ssh-ng//big",
            "did you mean 'ssh-ng://big'?",
        ],
    );
    assert_one(
        "ssh-ng:/big?compress=true x86_64-linux",
        &["[ssh-ng:/big] warning: 'ssh-ng' is not followed by '://'", "did you mean 'ssh-ng://big'?"],
    );
    assert_one("ssh:/big", &["did you mean 'ssh://big'?"]);
    assert_one(
        "stores/a x86_64-linux",
        &["this is a relative path", "write /stores/a for a store on this machine"],
    );
}

#[test]
fn systems_that_nix_does_not_know() {
    for (system, meant) in [
        ("x86_64", "'x86_64-linux'"),
        ("linux", "'x86_64-linux'"),
        ("darwin", "'aarch64-darwin'"),
        ("x86-64-linux", "'x86_64-linux'"),
        ("amd64-linux", "'x86_64-linux'"),
        ("arm64-darwin", "'aarch64-darwin'"),
        ("aarch64-macos", "'aarch64-darwin'"),
        ("X86_64-Linux", "'x86_64-linux'"),
        ("x86_64-linx", "'x86_64-linux'"),
        ("x86_64-unknown-linux-gnu", "'x86_64-linux'"),
        ("qqq", "architecture and system"),
    ] {
        let text = format!("mac i686-linux,{system} - 2");
        assert_one(
            &text,
            &[&format!("1:16 [{system}] warning: '{system}' is no system that Nix knows"), meant],
        );
    }
}

#[test]
fn features_that_are_all_but_known_ones() {
    for (feature, meant) in [
        ("bigparallel", "'big-parallel'"),
        ("big_parallel", "'big-parallel'"),
        ("KVM", "'kvm'"),
        ("nixos-tests", "'nixos-test'"),
        ("benchmrak", "'benchmark'"),
        ("recursivenix", "'recursive-nix'"),
        ("Mine", "'mine'"),
    ] {
        assert_one(
            &format!("mac - - 1 1 a,{feature}"),
            &[&format!("1:15 [{feature}] warning"), "(column 6)", meant],
        );
        assert_one(&format!("mac - - 1 1 - {feature}"), &["(column 7)", meant]);
    }
    assert_none("mac - - 1 1 kvm2,cuda,tpm,gpu,big");
}

#[test]
fn numbers_that_cannot_be_meant() {
    assert_one("mac - - 0", &["1:9 [0] warning: the machine may run no builds", "'#'"]);
    assert_one("mac - - 4 0", &["1:11 [0] warning: the speed factor (column 5) is 0, which counts as 1"]);
    assert_one("mac - - 4 3200", &["1:11 [3200] warning: the speed factor (column 5) is odd"]);
    assert_one("mac - - 4 0.0001", &["is odd"]);
    assert_one("mac - - 4 -1", &["1:11 [-1] error", "number of 0 or more"]);
}

#[test]
fn columns_that_are_divided_in_another_way_than_was_meant() {
    assert_one("mac x86_64-linux, - 4", &["1:19 [-] warning: there is a blank beside a comma"]);
    assert_one("mac x86_64-linux ,i686-linux", &["[,i686-linux] warning: there is a blank beside a comma"]);
    assert_one("mac \"x86_64-linux\"", &["1:5 [\"x86_64-linux\"] warning: there is a quote"]);
    let key = key("ssh-ed25519", "ssh-ed25519");
    let text = format!("mac - - 1 1 - - {key} more and more");
    assert_one(&text, &["[more] warning: there are 11 columns"]);
}

#[test]
fn marks_of_other_editors() {
    let told = told(&judged("\u{feff}ssh-ng://a - - 2\nssh-ng://b\r\nssh-ng://c\r\n", &[]).findings);
    assert_eq!(told.len(), 2, "{told:#?}");
    assert!(told[0].starts_with("1:1 [\u{feff}] error: the text begins with a byte order mark"), "{told:#?}");
    assert!(
        told[1].starts_with("2:11 [") && told[1].contains("CRLF") && told[1].contains("sed -i"),
        "{told:#?}"
    );
}

#[test]
fn uris_with_words_that_no_store_knows() {
    assert_one("mac?ssh-kye=/k", &["1:5 [ssh-kye] warning: no store has", "'ssh-key'"]);
    assert_one("mac?port=22", &["1:5 [port]", "ssh-ng://host:22"]);
    assert_one("compress?compress", &["1:10 [compress]", "'compress' has no value", "write 'compress='"]);
    assert_one("mac?remote-store=/x&store-x=/y", &["1:21 [store-x] warning: no store has"]);
    assert_one("mac?StrictHostKeyChecking=no", &["ssh_config"]);
    assert_one("shh-ng://mac", &["1:1 [shh-ng] warning: there is no store of the kind", "'ssh-ng'"]);
    assert_one("https://cache.example", &["1:1 [https] warning", "cannot build", "substituters"]);
}

#[test]
fn ports_in_a_wrong_place() {
    assert_one("ssh-ng://me:22@mac", &["1:12 [:22@] warning: '22' stands behind the user"]);
    assert_one("ssh://fe80::1:22", &["[fe80::1:22] warning: '22' is taken for", "[fe80::1]:22"]);
    assert_none("ssh://[fe80::1:22] ; ssh://[fe80::1]:22 ; ssh://fe80::1");
}

#[test]
fn stores_of_this_very_machine() {
    for text in [
        "localhost",
        "ssh-ng://localhost",
        "daemon",
        "auto",
        "local",
        "unix://",
        "unix:///nix/var/nix/daemon-socket/socket",
        "ssh-ng://localhost?remote-store=auto",
        "ssh-ng://localhost?remote-store=daemon",
        "ssh-ng://localhost?remote-store=unix:///nix/var/nix/daemon-socket/socket",
    ] {
        assert_one(text, &["1:1 [", "warning: this is the store of this very machine", "max-jobs"]);
    }
}

#[test]
fn one_machine_in_two_lines() {
    let told = told(
        &judged(
            "ssh://Mac x86_64-linux\n\n@n",
            &[("n", "ssh://mac?compress=true i686-linux,x86_64-linux\n")],
        )
        .findings,
    );
    assert_eq!(told.len(), 1, "{told:#?}");
    assert!(told[0].starts_with("1:1 [ssh://mac?compress=true] warning"), "{told:#?}");
    assert!(told[0].contains("m:1:1"), "{told:#?}");
    assert_one("ssh-ng://me@mac\nssh-ng://me@MAC", &["2:1 [ssh-ng://me@MAC] warning", "m:1:1"]);
    // Each of these two gets builds that the other one cannot have.
    assert_none("ssh://mac x86_64-linux\nssh://mac i686-linux");
    assert_none("ssh://mac x86_64-linux\nssh://mac x86_64-linux - 1 1 - benchmark");
    assert_none("ssh://mac\nssh://mac:23\nssh-ng://mac\nssh://me@mac");
}

#[test]
fn host_keys_that_are_none() {
    let wrong = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let line = |key: &str| format!("mac - - 1 1 - - {key}");
    let body = "AAAAC3NzaC1lZDI1NTE5AAAAIAcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcH";
    assert_none(&line(&wrong(&format!("ssh-ed25519 {body} me\n"))));
    for (key, part) in [
        (key("ssh-rsa", "ssh-ed25519"), "it says 'ssh-rsa', and the key 'ssh-ed25519'"),
        (
            wrong(&format!("my-host ecdsa-sha2-nistp256 {body}")),
            "begins with the host 'my-host', as in known_hosts",
        ),
        (wrong(&format!("ssh-ed25519 {}", &body[..30])), "cut or changed"),
        (wrong("no-key abcdefghijklmnopqrstuvwxyz"), "does not begin with a type"),
    ] {
        assert_one(&line(&key), &["1:17 [", "error: the public host key (column 8) is none", part]);
        assert_one(
            &format!("mac?base64-ssh-public-host-key={}", key.replace('+', "%2B")),
            &["1:5 [base64-ssh", part],
        );
    }
    assert_one(&line("AAAA"), &["not base64 of a key line"]);
}

#[test]
fn lists_that_are_not_there() {
    let told = told(&judged("@/a\nmac ; @/b c # x\n", &[("/a", "@/nested\n")]).findings);
    assert_eq!(told.len(), 2, "{told:#?}");
    assert!(told[0].starts_with("1:1 [@/nested] warning: there is no file '/nested'"), "{told:#?}");
    assert!(told[1].starts_with("2:7 [@/b c] warning: there is no file '/b c'"), "{told:#?}");
}

#[test]
fn keys_and_hosts_are_handed_back_with_their_places() {
    let judged = judged(
        "a?ssh-key=/k\nssh-ng://me@ssh:23 - /l\nssh-ng://c?remote-store=/x\nssh://d?remote-store=auto\nlocalhost?ssh-key=/k&remote-store=/x\n",
        &[],
    );
    let keys: Vec<_> = judged.keys.iter().map(|(spot, file)| (spot.place.column, file.as_str())).collect();
    assert_eq!(keys, [(3, "/k"), (22, "/l"), (11, "/k")]);
    let hosts: Vec<_> = judged
        .hosts
        .iter()
        .map(|t| (t.spot.place.column, t.host.destination.as_str(), t.host.port, t.must_be_elsewhere))
        .collect();
    assert_eq!(
        hosts,
        [(1, "a", None, true), (13, "me@ssh", Some(23), true), (10, "c", None, false), (7, "d", None, true)]
    );
}

#[test]
fn all_findings_come_in_the_order_of_their_places() {
    let findings = judged("mac x86_64 - 0 0\nb - - x\nc - - - - kmv", &[]).findings;
    let places: Vec<_> = findings.iter().map(|f| (f.spot.place.line, f.spot.place.column)).collect();
    assert_eq!(places, [(1, 5), (1, 14), (1, 16), (2, 7)], "{findings:#?}");
    assert_eq!(finding::count(&findings, Severity::Error), 1);
    assert_eq!(
        findings[0].to_string(),
        "warning: m:1:5: 'x86_64' is no system that Nix knows (column 2)\n  mac x86_64 - 0 0\n      ^^^^^^\n  did you mean 'x86_64-linux'?"
    );
    let json = findings[0].json();
    assert_eq!((&json["source"], &json["line"], &json["column"]), (&"m".into(), &1.into(), &5.into()));
    assert_eq!(
        (&json["severity"], &json["hint"]),
        (&"warning".into(), &"did you mean 'x86_64-linux'?".into())
    );
}
