//! The manual has what the program has.
#![expect(clippy::unwrap_used, reason = "a surprise is a failed test")]

use std::fs;
use std::process::Command;

fn help(words: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_nix-offload")).args(words).arg("--help").output().unwrap();
    assert!(output.status.success(), "{words:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_manual_has_every_command_and_every_flag() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/man/nix-offload.1");
    // Without roff's escapes of hyphens.
    let manual = fs::read_to_string(path).unwrap().replace("\\-", "-");
    let top = help(&[]);
    let commands: Vec<&str> = top
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .map_while(|line| line.strip_prefix("  ")?.split_whitespace().next())
        .filter(|word| *word != "help")
        .collect();
    assert!(commands.contains(&"ping-store") && commands.contains(&"check"), "{commands:?}");
    let mut flags = 0;
    for words in [vec![]].into_iter().chain(commands.iter().map(|command| vec![*command])) {
        // A command's flags stand in its own section.
        let section = match words.first() {
            None => manual.as_str(),
            Some(command) => {
                let head = format!(".SS {command}\n");
                let (_, section) = manual.split_once(&head).unwrap_or_else(|| panic!("no section {command}"));
                section.split("\n.S").next().unwrap()
            }
        };
        let general = manual.split_once(".SH OPTIONS\n").unwrap().1.split("\n.SH ").next().unwrap();
        let text = help(&words);
        for line in text.lines().filter(|line| line.trim_start().starts_with('-')) {
            for flag in line.split([' ', ',', '=', '[', ')']).filter(|word| word.starts_with('-')) {
                flags += 1;
                let named = [format!("{flag} "), format!("{flag}\n"), format!("{flag},")];
                let has = |text: &str| named.iter().any(|named| text.contains(named));
                assert!(has(section) || has(general), "the manual lacks {words:?} {flag}");
            }
        }
    }
    assert!(flags > 10, "{flags} flags found");
    for code in ["0", "1", "2", "69", "75", "77", "78"] {
        assert!(manual.contains(&format!(".B {code}\n")), "the manual lacks exit code {code}");
    }
}

#[test]
fn the_manual_has_every_variable_that_the_readme_has() {
    let file = |name| fs::read_to_string(format!("{}/../{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let (readme, manual) = (file("README.md"), file("packaging/man/nix-offload.1"));
    let (_, section) = readme.split_once("\n## Environment\n").unwrap();
    let rows = section.split("\n## ").next().unwrap().lines();
    let names: Vec<&str> = rows.filter_map(|row| row.strip_prefix("| `")?.split('`').next()).collect();
    assert!(names.len() >= 5, "{names:?}");
    for name in names {
        assert!(manual.contains(&format!("\n.B {name}\n")), "the manual lacks {name}");
    }
}
