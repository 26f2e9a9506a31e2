//! Small derivations, as texts in the Nix language; they need nothing but /bin/sh and coreutils.

use std::fmt::Write as _;

/// What every derivation here has: a shell, a system and a PATH, as sandboxes are off.
const PRELUDE: &str = r#"
  d = name: script: attrs: derivation ({
    inherit name;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-c" script ];
    PATH = "/usr/bin:/bin";
  } // attrs);
"#;

/// An expression with `d name script attrs` in scope, for anything the other functions do not do.
pub fn expression(body: &str) -> String {
    format!("let {PRELUDE} in {body}")
}

/// A text as a string of the Nix language.
pub fn quote(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace("${", "\\${");
    format!("\"{escaped}\"")
}

/// A derivation that runs a script; the script makes `$out`.
pub fn script(name: &str, script: &str) -> String {
    expression(&format!("d {} {} {{ }}", quote(name), quote(script)))
}

/// The smallest useful one: its output is its name.
pub fn trivial(name: &str) -> String {
    script(name, &format!("echo {name} > $out"))
}

/// Writes the name of the machine it is built on.
pub fn where_built(name: &str) -> String {
    script(name, "cat /etc/machine-name > $out")
}

/// A list of `n` that have nothing to do with each other.
pub fn independent(n: u32) -> String {
    expression(&format!(
        r#"builtins.genList (i: d "independent-${{toString i}}" "echo ${{toString i}} > $out" {{ }}) {n}"#
    ))
}

/// The last of `n`, each of which reads the one before.
pub fn chain(n: u32) -> String {
    let mut links = String::from(r#"link0 = d "link-0" "echo 0 > $out" { }; "#);
    for i in 1..n {
        let before = i - 1;
        write!(links, r#"link{i} = d "link-{i}" "{{ cat ${{link{before}}}; echo {i}; }} > $out" {{ }}; "#)
            .unwrap();
    }
    format!("let {PRELUDE} {links} in link{}", n - 1)
}

/// Prints a line and fails with this exit code.
pub fn failing(name: &str, says: &str, code: i32) -> String {
    script(name, &format!("echo {says}; exit {code}"))
}

/// Sleeps without a word, then succeeds. `seconds` shows in the process list as an argument of sleep.
pub fn silent_sleep(name: &str, seconds: &str) -> String {
    script(name, &format!("sleep {seconds}; echo done > $out"))
}

/// Two outputs: `out` names `dev`, `dev` names itself.
pub fn multiple_outputs(name: &str) -> String {
    expression(&format!(
        r#"d {} "mkdir $out $dev; echo $dev > $out/dev; echo $dev > $dev/self" {{ outputs = [ "out" "dev" ]; }}"#,
        quote(name)
    ))
}

/// A fixed-output derivation whose single file must have this hash (`sha256:...` or SRI).
pub fn fixed_flat(name: &str, make: &str, hash: &str) -> String {
    fixed(name, make, hash, "flat")
}

/// A fixed-output derivation whose tree must have this hash.
pub fn fixed_recursive(name: &str, make: &str, hash: &str) -> String {
    fixed(name, make, hash, "recursive")
}

fn fixed(name: &str, make: &str, hash: &str, mode: &str) -> String {
    expression(&format!(
        r#"d {} {} {{ outputHashMode = "{mode}"; outputHashAlgo = "sha256"; outputHash = {}; }}"#,
        quote(name),
        quote(make),
        quote(hash)
    ))
}
