use super::*;
use proptest::prelude::*;
use std::time::UNIX_EPOCH;

fn read(text: &str) -> Sample {
    parse(text.as_bytes(), UNIX_EPOCH)
}

fn block(machine: &str, disk: &str, inodes: &str) -> String {
    format!("{BEGIN}\n{machine}\n{LOADED}\ndisk\n{disk}\ninodes\n{inodes}\n{END}\n")
}

/// What Debian says (coreutils), with a banner in front.
const LINUX: &str = "Welcome to mac!\n\
    nix-offload-sample begin\n\
    os Linux\n\
    cores 8\n\
    load 5.97 4.04 2.46 6/138 23115\n\
    pressure some avg10=94.11 avg60=90.91 avg300=55.16 total=9362121090\n\
    pressure full avg10=1.00 avg60=0.00 avg300=0.00 total=0\n\
    memory 23501544 kB\n\
    inhibit nightly backup, until 6\n\
    nix-offload-sample loaded\n\
    disk\n\
    Filesystem     1024-blocks     Used Available Capacity Mounted on\n\
    /dev/vda         264212084 42678860  52607028      45% /\n\
    inodes\n\
    Filesystem       Inodes  IUsed    IFree IUse% Mounted on\n\
    /dev/vda       16777216 494756 16282460    3% /\n\
    nix-offload-sample end\n";

#[test]
fn linux_says_everything() {
    let sample = read(LINUX);
    let expected = Sample {
        cores: Some(8),
        load_average: Some(5.97),
        cpu_pressure: Some(94.11),
        memory_free: Some(23_501_544 << 10),
        disk_free: Some(52_607_028 << 10),
        inodes_free: Some(16_282_460),
        inhibited: Some("nightly backup, until 6".into()),
        ..Sample::empty(UNIX_EPOCH)
    };
    assert_eq!(sample, expected);
    assert_eq!(read(&LINUX.replace('\n', "\r\n")), expected, "through a terminal");
}

#[test]
fn busybox_has_other_columns_and_no_pressure() {
    let sample = read(
        "nix-offload-sample begin\nos Linux\ncores 2\nload 0.20 0.18 0.12 1/80 112\nmemory 100 kB\n\
         nix-offload-sample loaded\ndisk\n\
         Filesystem           1024-blocks    Used Available Capacity Mounted on\n\
         /dev/vda             264212084  42679056  52606832  45% /\ninodes\n\
         Filesystem              Inodes      Used Available Capacity Mounted on\n\
         /dev/vda              16777216    494765  16282451   3% /\nnix-offload-sample end\n",
    );
    let expected = Sample {
        cores: Some(2),
        load_average: Some(0.2),
        memory_free: Some(100 << 10),
        disk_free: Some(52_606_832 << 10),
        inodes_free: Some(16_282_451),
        ..Sample::empty(UNIX_EPOCH)
    };
    assert_eq!(sample, expected);
}

#[test]
fn darwin_has_neither_proc_nor_a_column_for_inodes_alone() {
    let columns = "Filesystem     1024-blocks      Used Available Capacity iused      ifree %iused  Mounted on\n\
                   /dev/disk3s1s1   971350180  10485760 350000000     3%  404167 3500000000    0%   /nix";
    let disk = "Filesystem     1024-blocks      Used Available Capacity  Mounted on\n\
                /dev/disk3s1s1   971350180  10485760 350000000     3%    /nix";
    let sample = read(&block("os Darwin\ncores 10\nload { 1.53 1.60 1.70 }", disk, columns));
    let expected = Sample {
        cores: Some(10),
        load_average: Some(1.53),
        disk_free: Some(350_000_000 << 10),
        inodes_free: Some(3_500_000_000),
        ..Sample::empty(UNIX_EPOCH)
    };
    assert_eq!(sample, expected);
}

#[test]
fn what_a_file_system_does_not_count_is_not_known_and_nothing_left_is_nothing() {
    let inodes = |line: &str| read(&block("", "", line)).inodes_free;
    assert_eq!(inodes("/dev/sda2 0 0 0 - /nix"), None, "btrfs, coreutils");
    assert_eq!(inodes("/dev/sda2 0 0 0 0% /nix"), None, "btrfs, busybox");
    assert_eq!(inodes("/dev/sda2 1000 1000 0 100% /nix"), Some(0));
    let disk = |line: &str| read(&block("", line, "")).disk_free;
    assert_eq!(disk("/dev/sda2 1000 1000 0 100% /nix"), Some(0));
    assert_eq!(
        disk("/dev/disk1 1000 1050 -50 105% /nix"),
        Some(0),
        "less than nothing, for others than root"
    );
    assert_eq!(disk("//server/my share 1000 10 990 1% /mnt/a b 5% c"), Some(990 << 10));
    assert_eq!(disk("df: /nix/store: No such file or directory"), None);
}

#[test]
fn an_inhibit_file_counts_whatever_is_in_it() {
    let inhibited = |line: &str| read(&block(line, "", "")).inhibited;
    assert_eq!(inhibited("cores 2"), None);
    for empty in ["inhibit", "inhibit ", "inhibit    "] {
        assert_eq!(inhibited(empty).as_deref(), Some(""), "{empty:?}");
    }
    assert_eq!(inhibited("inhibit \u{1b}[2J\u{7}gone\tfishing").as_deref(), Some("[2Jgonefishing"));
    let long = inhibited(&format!("inhibit {}", "x".repeat(10_000)));
    assert_eq!(long.map(|text| text.len()), Some(MOST_REASON));
}

#[test]
fn nonsense_is_not_known() {
    for line in [
        "cores 0",
        "cores -1",
        "cores 99999999999",
        "cores many",
        "cores",
        "load nan",
        "load -1",
        "load inf",
        "load 1e99",
        "load",
        "pressure some avg10=101",
        "pressure some avg10=nan",
        "pressure some",
        "pressure full avg10=5",
        "memory 1 MB",
        "memory -1 kB",
        "memory 99999999999999999999 kB",
        "memory 18446744073709551615 kB",
        "",
        " ",
        "cores\t8",
    ] {
        assert_eq!(read(&block(line, line, line)), Sample::empty(UNIX_EPOCH), "{line}");
    }
    for line in ["a 1 99999999999999999999999999999999999999999999 5% /", "a 1 18446744073709551615 5% /"] {
        assert_eq!(read(&block("", line, "")).disk_free, None, "{line}");
    }
    // What was said before stands.
    assert_eq!(read(&block("cores 4\ncores none", "", "")).cores, Some(4));
}

#[test]
fn only_what_is_between_the_marks_counts_and_the_last_answer() {
    assert_eq!(read("cores 4\nload 1 1 1\n"), Sample::empty(UNIX_EPOCH));
    assert_eq!(read(&format!("{END}\ncores 4\n")), Sample::empty(UNIX_EPOCH));
    let two = format!("{}{}", block("cores 4\ninhibit", "", ""), block("cores 8", "", ""));
    assert_eq!((read(&two).cores, read(&two).inhibited), (Some(8), None));
    // A place that is called like a part, and parts in another order.
    assert_eq!(read(&block("disk\nx 1 2 3 4% /\ninodes\nx 1 2 3 4% /", "", "")), Sample::empty(UNIX_EPOCH));
}

#[test]
fn what_was_cut_short_is_read_as_far_as_it_goes_and_never_a_part_of_a_line() {
    let whole = read(LINUX);
    for end in 0..LINUX.len() {
        let cut = parse(&LINUX.as_bytes()[..end], UNIX_EPOCH);
        for (cut, whole) in [
            (cut.cores.map(u64::from), whole.cores.map(u64::from)),
            (cut.memory_free, whole.memory_free),
            (cut.disk_free, whole.disk_free),
            (cut.inodes_free, whole.inodes_free),
        ] {
            assert!(cut.is_none() || cut == whole, "cut at {end}: {cut:?}");
        }
        let expected = match &LINUX[..end] {
            text if text.ends_with("end\n") => Progress::Complete,
            text if text.contains("loaded\n") => Progress::Loaded,
            _ => Progress::Begun,
        };
        assert_eq!(progress(&LINUX.as_bytes()[..end]), expected, "cut at {end}");
    }
}

#[test]
fn a_line_is_found_among_others_if_it_is_whole_and_alone() {
    assert!(has_line(b"\xff\xfe\nbanner\r\nnix-offload-sample ready\r\n", READY));
    assert!(!has_line(b"nix-offload-sample ready", READY));
    assert!(!has_line(b"echo nix-offload-sample ready\n", READY));
}

#[test]
fn a_directory_is_named_in_a_line_or_not_at_all() {
    assert_eq!(request(Some("/nix/store")), "sample /nix/store\n");
    assert_eq!(request(Some("/srv/a b/store")), "sample /srv/a b/store\n");
    for bad in ["", "store", "/a\nping", "/a ", "/a\0", &format!("/{}", "x".repeat(5000))] {
        assert_eq!(request(Some(bad)), "sample\n", "{bad:?}");
    }
}

proptest! {
    #[test]
    fn whatever_is_said_does_no_harm(heard in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let _ = (parse(&heard, UNIX_EPOCH), progress(&heard), has_line(&heard, READY));
    }

    #[test]
    fn whatever_is_said_in_the_right_form_does_no_harm(
        words in proptest::collection::vec("(cores|load|\\{|pressure|some|avg10=|memory|inhibit|disk|inodes|kB|[0-9]{1,40}|-|[0-9]{1,30}%|nix-offload-sample (begin|loaded|end)|.{0,20})[ \n]", 0..200)
    ) {
        let text = format!("{BEGIN}\n{}\n", words.concat());
        let sample = read(&text);
        prop_assert!(sample.load_average.is_none_or(|load| load.is_finite() && load >= 0.0));
        prop_assert!(sample.cpu_pressure.is_none_or(|share| (0.0..=100.0).contains(&share)));
        prop_assert!(sample.cores.is_none_or(|cores| cores > 0));
        prop_assert!(sample.inhibited.is_none_or(|why| why.chars().count() <= MOST_REASON));
    }
}
