use super::*;
use crate::plan::machine::Scheme;

fn set(words: &[&str]) -> BTreeSet<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}

fn parse(text: &str) -> Fleet {
    parse_with(text, &|_| Ok(None))
}

fn parse_with(text: &str, read: ReadFile<'_>) -> Fleet {
    parse_machines("builders", text, &set(&["x86_64-linux"]), read)
}

fn names(fleet: &Fleet) -> Vec<&str> {
    fleet.machines.iter().map(|m| m.name.as_str()).collect()
}

#[test]
fn the_manuals_example_is_read_column_by_column() {
    let fleet = parse(
        "nix@scratchy.labs.cs.uu.nl  i686-linux      /home/nix/.ssh/id_scratchy_auto        8 1 kvm\n\
         nix@itchy.labs.cs.uu.nl     i686-linux      /home/nix/.ssh/id_scratchy_auto        8 2\n\
         nix@poochie.labs.cs.uu.nl   i686-linux      /home/nix/.ssh/id_scratchy_auto        1 2 kvm benchmark\n",
    );
    assert_eq!(fleet.problems, []);
    let [scratchy, itchy, poochie] = fleet.machines.as_slice() else { panic!("{fleet:?}") };
    assert_eq!(scratchy.name, "ssh://nix@scratchy.labs.cs.uu.nl");
    assert_eq!(scratchy.uri.scheme, Scheme::Ssh);
    assert_eq!(scratchy.systems, set(&["i686-linux"]));
    assert_eq!(scratchy.identity.as_deref(), Some("/home/nix/.ssh/id_scratchy_auto"));
    assert_eq!((scratchy.max_jobs, scratchy.speed_factor), (8, 1.0));
    assert_eq!(scratchy.supported_features, set(&["kvm"]));
    assert_eq!((itchy.max_jobs, itchy.speed_factor), (8, 2.0));
    assert!(itchy.supported_features.is_empty());
    assert_eq!(poochie.mandatory_features, set(&["benchmark"]));
    assert_eq!((poochie.place.line, poochie.place.column), (3, 1));
}

#[test]
fn a_host_alone_has_all_the_defaults() {
    let fleet = parse("mac");
    let [mac] = fleet.machines.as_slice() else { panic!("{fleet:?}") };
    assert_eq!(mac.systems, set(&["x86_64-linux"]));
    assert_eq!((mac.max_jobs, mac.speed_factor, mac.identity.as_deref()), (1, 1.0, None));
    assert_eq!(mac.host_key, None);
}

#[test]
fn dashes_mean_the_default_in_every_column_but_the_first() {
    let fleet = parse("mac - - - - - - -");
    assert_eq!(fleet.machines, {
        let mut plain = parse("mac").machines;
        plain[0].place = fleet.machines[0].place.clone();
        plain
    });
    let fleet = parse("- - - 1");
    assert_eq!(fleet.machines, []);
    assert_eq!(fleet.problems[0].message, "the first column must be a store URI; this machine is left out");
}

#[test]
fn machines_are_separated_by_semicolons_and_newlines() {
    let fleet = parse("ssh://mac x86_64-darwin ; ssh://beastie x86_64-freebsd\n;;\n \tthird\r\n");
    assert_eq!(names(&fleet), ["ssh://mac", "ssh://beastie", "ssh://third"]);
    assert_eq!(fleet.machines[1].place.column, 27);
    assert_eq!((fleet.machines[2].place.line, fleet.machines[2].place.column), (3, 3));
}

#[test]
fn a_comment_reaches_to_the_end_of_its_line() {
    assert_eq!(names(&parse("# a ; N")), [""; 0]);
    assert_eq!(names(&parse("N # x ; I")), ["ssh://N"]);
    assert_eq!(names(&parse("N - - 2 # fast\nM")), ["ssh://N", "ssh://M"]);
    assert_eq!(parse("N - - 2# fast").machines[0].max_jobs, 2);
}

#[test]
fn numbers_follow_nix() {
    assert_eq!(parse("N - - 8 0").machines[0].speed_factor, 1.0);
    assert_eq!(parse("N - - 8 1.5").machines[0].speed_factor, 1.5);
    assert_eq!(parse("N - - 0").machines[0].max_jobs, 0);
    assert_eq!(names(&parse("N - - 1 1 - - - extra more")), ["ssh://N"]);
    assert_eq!(parse("N a,b,a - 1 1 ,f,,g,f").machines[0].systems, set(&["a", "b"]));
    assert_eq!(parse("N a,b,a - 1 1 ,f,,g,f").machines[0].supported_features, set(&["f", "g"]));
    for bad in
        ["N - - 1.5", "N - - -1", "N - - x", "N - - 1 -1", "N - - 1 fast", "N - - 1 nan", "N - - 1 inf"]
    {
        let fleet = parse(bad);
        assert_eq!((fleet.machines.len(), fleet.problems.len()), (0, 1), "{bad}");
    }
}

#[test]
fn a_bad_line_is_shown_with_place_caret_and_cure_and_only_it_is_left_out() {
    let fleet = parse("good - - 4\nßad x86_64-linux - many 1; other\n");
    assert_eq!(names(&fleet), ["ssh://good", "ssh://other"]);
    let [problem] = fleet.problems.as_slice() else { panic!("{fleet:?}") };
    assert_eq!(
        problem.to_string(),
        "builders:2:20: the maximum of jobs (column 4) must be a whole number, not 'many'; this machine is left out\n\
         \x20 ßad x86_64-linux - many 1; other\n\
         \x20                    ^^^^\n\
         \x20 write how many builds the machine may run at the same time, or '-' for 1"
    );
}

#[test]
fn a_bad_uri_is_a_fault_of_its_line() {
    let fleet = parse("ssh://mac:99999 ; ssh://ok");
    assert_eq!(names(&fleet), ["ssh://ok"]);
    assert_eq!(
        fleet.problems[0].message,
        "the port '99999' is not a number from 1 to 65535; this machine is left out"
    );
}

#[test]
fn included_files_may_include_files_and_faults_name_the_file() {
    let read = |name: &str| -> io::Result<Option<String>> {
        match name {
            "/etc/nix/machines" => Ok(Some("a\n@/etc/nix/more ; b - - x\n".into())),
            "/etc/nix/more" => Ok(Some("c".into())),
            "/dir" => Err(io::Error::from(io::ErrorKind::IsADirectory)),
            _ => Ok(None),
        }
    };
    let fleet = parse_with("@/etc/nix/machines", &read);
    assert_eq!(names(&fleet), ["ssh://a", "ssh://c"]);
    assert_eq!(fleet.problems[0].place, Place { source: "/etc/nix/machines".into(), line: 2, column: 24 });
    let fleet = parse_with("@ /etc/nix/more ; @/none ; @/dir ; d", &read);
    assert_eq!(names(&fleet), ["ssh://c", "ssh://d"]);
    assert!(fleet.problems[0].message.ends_with("; its machines are left out"), "{fleet:?}");
    assert_eq!(fleet.missing_files, ["/none"]);
    assert!(fleet.problems[0].message.starts_with("cannot read '/dir'"), "{fleet:?}");
}

#[test]
fn a_file_that_includes_itself_is_a_fault_and_no_endless_loop() {
    let fleet = parse_with("@x", &|_| Ok(Some("@x\nm".into())));
    assert_eq!(fleet.machines.len(), MAX_INCLUDE_DEPTH);
    assert_eq!(fleet.problems.len(), 1);
    assert_eq!(fleet.problems[0].cure, "remove the '@' line that closes the circle");
}

#[test]
fn the_host_key_is_decoded_from_column_or_parameter_and_the_column_wins() {
    let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAwRG5pZ root@mac\n";
    let encoded = base64::engine::general_purpose::STANDARD.encode(key);
    let fleet = parse(&format!("mac - - - - - - {encoded}"));
    assert_eq!(fleet.machines[0].host_key.as_deref(), Some(key));
    let fleet = parse(&format!("mac?base64-ssh-public-host-key={encoded}"));
    assert_eq!(fleet.machines[0].host_key.as_deref(), Some(key), "{fleet:?}");
    for bad in ["mac - - - - - - %%%", "mac - - - - - - aGVsbG8=", "mac - - - - - - AAAA"] {
        let fleet = parse(bad);
        assert!(fleet.machines.is_empty() && fleet.problems.len() == 1, "{bad}: {fleet:?}");
    }
}

#[test]
fn a_thousand_machines_are_ordinary() {
    let text: String = (0..1000).map(|n| format!("ssh-ng://builder{n} x86_64-linux - 8 1.5 kvm\n")).collect();
    assert_eq!(parse(&text).machines.len(), 1000);
}

#[test]
fn settings_say_what_can_be_built_here() {
    let settings = Settings(
        [
            ("max-jobs", "4"),
            ("system", "x86_64-linux"),
            ("extra-platforms", "i686-linux"),
            ("system-features", "kvm big"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .into(),
    );
    let local = settings.local();
    assert_eq!(local.max_jobs, 4);
    assert_eq!(local.systems, set(&["i686-linux", "x86_64-linux"]));
    assert_eq!(local.features, set(&["big", "kvm"]));
    assert_eq!(settings.default_systems(), set(&["x86_64-linux"]));
}

#[test]
fn a_line_that_is_written_is_read_as_the_same_machine() {
    let text = "ssh-ng://a@m:22?compress=true i686-linux,x86_64-linux /k 3 2 kvm,x big \
                c3NoLWVkMjU1MTkgQUFBQUMzTnphQzFsWkRJMU5URTVBQUFB\nplugin://x?y=z\n";
    let read =
        |text: &str| parse_machines("builders", text, &["x86_64-linux".to_owned()].into(), &|_| Ok(None));
    let first = read(text).machines;
    assert_eq!((first.len(), first[0].host_key.is_some()), (2, true));
    let lines: Vec<String> = first.iter().map(line).collect();
    let again = read(&lines.join("\n")).machines;
    let plain = |machines: Vec<Machine>| -> Vec<Machine> {
        machines.into_iter().map(|machine| Machine { place: Place::default(), ..machine }).collect()
    };
    assert_eq!(plain(again), plain(first));
}
