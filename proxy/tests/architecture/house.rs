//! Reading a house: the rooms of a package and the arrows between them, as drawn and as they are.
//!
//! A room is a source file. Tests, comments and the contents of strings are not looked at for arrows.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The line at the head of a room that must not do I/O.
const PURE: &str = "#![deny(clippy::disallowed_methods, clippy::disallowed_types)]";

/// What a room's file says, without its tests.
pub(crate) struct Room {
    /// Everything but comments.
    pub(crate) text: String,
    /// The same with the contents of strings left out.
    pub(crate) code: String,
    /// Whether the file has the line of a pure room.
    pub(crate) pure: bool,
    /// Rooms it names.
    pub(crate) arrows: BTreeSet<String>,
}

/// What the plan says of a room.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Drawn {
    /// Whether it is marked as pure.
    pub(crate) pure: bool,
    /// Rooms it may name.
    pub(crate) arrows: BTreeSet<String>,
}

/// Names of modules from the root on.
type ModulePath = Vec<String>;

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

/// The text of ARCHITECTURE.md.
pub(crate) fn plan(manifest: &str) -> String {
    read(&Path::new(manifest).join("../ARCHITECTURE.md"))
}

/// The drawing for a package: the lines between "```arrows PACKAGE" and "```" in the plan.
pub(crate) fn drawn(plan: &str, package: &str) -> BTreeMap<String, Drawn> {
    let head = format!("```arrows {package}");
    let lines: Vec<&str> = plan.lines().skip_while(|line| *line != head).skip(1).collect();
    assert!(!lines.is_empty(), "the plan has no line '{head}'");
    let mut rooms = BTreeMap::new();
    for line in lines.into_iter().take_while(|line| *line != "```").filter(|line| !line.trim().is_empty()) {
        let (room, targets) = line.split_once("->").unwrap_or((line, ""));
        let (name, pure) = match room.trim().strip_suffix(" (pure)") {
            Some(name) => (name, true),
            None => (room.trim(), false),
        };
        let arrows = targets.split(',').map(str::trim).filter(|t| !t.is_empty()).map(str::to_owned).collect();
        let before = rooms.insert(name.to_owned(), Drawn { pure, arrows });
        assert!(before.is_none(), "the room '{name}' is drawn twice");
    }
    rooms
}

/// The rooms of a package as they are. `own` is the name by which its binary calls its library; paths that begin
/// with `lower` lead to the rooms of the storey below, called `proxy::...`.
pub(crate) fn real(manifest: &str, own: &str, lower: Option<&str>) -> BTreeMap<String, Room> {
    let source = Path::new(manifest).join("src");
    let mut files = Vec::new();
    collect(&source, &mut files);
    let mut modules: BTreeMap<ModulePath, (String, Room)> = BTreeMap::new();
    for file in files {
        let module = module_of(&file, &source);
        let raw = read(&file);
        let (text, code) = without_tests(&raw);
        let pure = code.lines().take_while(|line| !line.starts_with("use ")).any(|line| line == PURE);
        let room = Room { text, code, pure, arrows: BTreeSet::new() };
        modules.insert(module.clone(), (module.join("::"), room));
    }
    let arrows: Vec<(ModulePath, BTreeSet<String>)> = modules
        .iter()
        .map(|(module, (_, room))| (module.clone(), arrows(module, &room.code, &modules, own, lower)))
        .collect();
    for (module, arrows) in arrows {
        if let Some((_, room)) = modules.get_mut(&module) {
            room.arrows = arrows;
        }
    }
    modules.into_values().collect()
}

/// Differences between drawing and house, each a sentence.
pub(crate) fn differences(drawn: &BTreeMap<String, Drawn>, real: &BTreeMap<String, Room>) -> Vec<String> {
    let mut found = Vec::new();
    for name in drawn.keys().filter(|name| !real.contains_key(*name)) {
        found.push(format!("'{name}' is drawn but there is no such room"));
    }
    for (name, room) in real {
        let Some(drawing) = drawn.get(name) else {
            let pure = if room.pure { " (pure)" } else { "" };
            let arrows = room.arrows.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            found.push(format!(
                "the room '{name}' is not drawn; its line would be '{name}{pure} -> {arrows}'"
            ));
            continue;
        };
        for target in room.arrows.difference(&drawing.arrows) {
            found.push(format!("'{name}' uses '{target}', but no such arrow is drawn"));
        }
        for target in drawing.arrows.difference(&room.arrows) {
            found.push(format!("the arrow from '{name}' to '{target}' is drawn but not used"));
        }
        match (drawing.pure, room.pure) {
            (true, false) => found.push(format!("'{name}' is drawn as pure but lacks the line {PURE}")),
            (false, true) => {
                found.push(format!("'{name}' has the line of a pure room but is not drawn as one"))
            }
            _ => {}
        }
    }
    found
}

/// Rooms without a row of their own in the table below "## The rooms of PACKAGE".
pub(crate) fn without_row(plan: &str, package: &str, real: &BTreeMap<String, Room>) -> Vec<String> {
    let head = format!("## The rooms of {package}");
    let section =
        plan.lines().skip_while(|line| *line != head).skip(1).take_while(|line| !line.starts_with("## "));
    let rows: BTreeSet<&str> =
        section.filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    real.keys().filter(|name| !rows.contains(name.as_str())).cloned().collect()
}

/// Rooms other than `allowed` (or rooms in it) whose code has that word.
pub(crate) fn naming(real: &BTreeMap<String, Room>, word: &str, allowed: &str) -> Vec<String> {
    let is_allowed =
        |name: &str| name == allowed || name.strip_prefix(allowed).is_some_and(|rest| rest.starts_with("::"));
    let has = |code: &str| words(code).any(|range| &code[range] == word);
    real.iter()
        .filter(|(name, room)| !is_allowed(name) && has(&room.code))
        .map(|(name, _)| name.clone())
        .collect()
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    for entry in entries {
        let path = entry.unwrap_or_else(|error| panic!("{}: {error}", directory.display())).path();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        if path.is_dir() {
            if stem != "tests" {
                collect(&path, files);
            }
        } else if path.extension().is_some_and(|e| e == "rs") && !matches!(stem, "tests" | "lib") {
            files.push(path);
        }
    }
}

fn module_of(file: &Path, source: &Path) -> ModulePath {
    let relative = file.strip_prefix(source).unwrap_or(file).with_extension("");
    let mut module: ModulePath = relative.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if module.last().is_some_and(|last| last == "mod") {
        module.pop();
    }
    module
}

/// A file's text without comments and tests, and the same with empty strings.
fn without_tests(raw: &str) -> (String, String) {
    const TEST: &str = "#[cfg(test)]";
    let (mut text, mut code) = blanked(raw);
    while let Some(start) = code.find(TEST) {
        let rest = &code.as_bytes()[start..];
        let mut depth = 0;
        let mut end = rest.len();
        for (at, byte) in rest.iter().enumerate() {
            match byte {
                b'{' => depth += 1,
                b'}' => depth -= 1,
                _ => {}
            }
            if depth == 0 && matches!(byte, b'}' | b';') {
                end = at + 1;
                break;
            }
        }
        let empty = " ".repeat(end);
        text.replace_range(start..start + end, &empty);
        code.replace_range(start..start + end, &empty);
    }
    (text, code)
}

/// Comments become blanks in the first text, the contents of strings and characters in the second one too.
/// What is not ASCII becomes question marks, so that places in both are the same.
fn blanked(raw: &str) -> (String, String) {
    let bytes: Vec<u8> = raw.chars().map(|c| if c.is_ascii() { c as u8 } else { b'?' }).collect();
    let mut text = String::with_capacity(bytes.len());
    let mut code = String::with_capacity(bytes.len());
    let mut at = 0;
    let follows = |at: usize, what: &[u8]| bytes[at..].starts_with(what);
    let find = |from: usize, what: &[u8]| {
        (from..bytes.len()).find(|at| follows(*at, what)).map_or(bytes.len(), |at| at + what.len())
    };
    let is_word = |at: usize| bytes.get(at).is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_');
    while at < bytes.len() {
        let begin = at;
        let mut comment = false;
        let hashes = bytes[at + 1..].iter().take_while(|b| **b == b'#').count();
        if follows(at, b"//") {
            at = find(at, b"\n").saturating_sub(1).max(at + 2);
            comment = true;
        } else if follows(at, b"/*") {
            at = find(at + 2, b"*/");
            comment = true;
        } else if bytes[at] == b'r'
            && bytes.get(at + 1 + hashes) == Some(&b'"')
            && (at == 0 || !is_word(at - 1) || matches!(bytes[at - 1], b'b' | b'c'))
        {
            let end: Vec<u8> = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
            at = find(at + 2 + hashes, &end);
        } else if bytes[at] == b'"' {
            at += 1;
            while at < bytes.len() && bytes[at] != b'"' {
                at += if bytes[at] == b'\\' { 2 } else { 1 };
            }
            at = (at + 1).min(bytes.len());
        } else if follows(at, b"'\\") {
            at = find(at + 3, b"'");
        } else if bytes[at] == b'\'' && bytes.get(at + 2) == Some(&b'\'') {
            at += 3;
        } else {
            text.push(char::from(bytes[at]));
            code.push(char::from(bytes[at]));
            at += 1;
            continue;
        }
        for byte in &bytes[begin..at] {
            let blank = if *byte == b'\n' { '\n' } else { ' ' };
            text.push(if comment { blank } else { char::from(*byte) });
            code.push(blank);
        }
    }
    (text, code)
}

/// Places of the words of a text.
fn words(code: &str) -> impl Iterator<Item = Range<usize>> {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let bytes = code.as_bytes();
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < bytes.len() && !is_word(bytes[at]) {
            at += 1;
        }
        let begin = at;
        while at < bytes.len() && is_word(bytes[at]) {
            at += 1;
        }
        (begin < at).then_some(begin..at)
    })
}

fn arrows(
    module: &ModulePath,
    code: &str,
    modules: &BTreeMap<ModulePath, (String, Room)>,
    own: &str,
    lower: Option<&str>,
) -> BTreeSet<String> {
    let parent = &module[..module.len().saturating_sub(1)];
    let child = |word: &str| [module.as_slice(), &[word.to_owned()]].concat();
    let mut found = BTreeSet::new();
    for place in words(code) {
        let before = code[..place.start].trim_end();
        if before.ends_with("::") || !code[place.end..].trim_start().starts_with("::") {
            continue;
        }
        let word = &code[place.clone()];
        let base: ModulePath = match word {
            "crate" => Vec::new(),
            "super" => parent.to_vec(),
            _ if Some(word) == lower => {
                for path in tree(&code[place.end..]) {
                    found.insert(format!("proxy::{}", path.first().map_or("", String::as_str)));
                }
                continue;
            }
            _ if word == own => Vec::new(),
            // A directory's own file names its rooms without `self`. That it opens them to others is no arrow.
            _ if modules.contains_key(&child(word)) && !before.ends_with("pub use") => child(word),
            _ => continue,
        };
        for path in tree(&code[place.end..]) {
            if let Some(target) = resolve(module, &base, &path, modules) {
                found.insert(target);
            }
        }
    }
    found.remove(&module.join("::"));
    found
}

/// The room that a path leads to.
fn resolve(
    module: &ModulePath,
    base: &[String],
    path: &[String],
    modules: &BTreeMap<ModulePath, (String, Room)>,
) -> Option<String> {
    let mut at = base.to_vec();
    let mut rest = path;
    while let Some((next, others)) = rest.split_first() {
        if next == "super" {
            at.pop();
        } else {
            let deeper = [at.as_slice(), std::slice::from_ref(next)].concat();
            if !modules.contains_key(&deeper) {
                break;
            }
            at = deeper;
        }
        rest = others;
    }
    let (name, facade) = modules.get(&at)?;
    // Within a directory the way through its own file is a way to the room that the thing comes from.
    if module.starts_with(&at)
        && let Some(thing) = rest.first()
        && let Some(room) = opened(&facade.code, thing)
    {
        return Some([at.as_slice(), &[room]].concat().join("::"));
    }
    Some(name.clone())
}

/// The room from which a directory's own file takes a thing with `use room::thing`.
fn opened(code: &str, thing: &str) -> Option<String> {
    for (at, _) in code.match_indices("use ") {
        let declared = &code[at + "use ".len()..];
        let room = &declared[..declared.find("::")?];
        let simple = !room.contains(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        if simple && tree(&declared[room.len()..]).iter().any(|path| path.last().is_some_and(|l| l == thing))
        {
            return Some(room.to_owned());
        }
    }
    None
}

/// The paths of a tree as in `use`, which begins with `::`.
fn tree(code: &str) -> Vec<ModulePath> {
    let mut paths = Vec::new();
    branch(code, &[], &mut paths);
    paths
}

/// Reads one branch and returns what follows it.
fn branch<'a>(code: &'a str, stem: &[String], paths: &mut Vec<ModulePath>) -> &'a str {
    let mut stem = stem.to_vec();
    let mut rest = code.trim_start();
    while let Some(after) = rest.strip_prefix("::") {
        let after = after.trim_start();
        if let Some(mut inner) = after.strip_prefix('{') {
            loop {
                inner = inner.trim_start();
                if let Some(end) = inner.strip_prefix('}') {
                    return end;
                }
                let Some(next) = words(inner).next().filter(|word| word.start == 0) else {
                    // A star, or the comma between two branches.
                    let mut chars = inner.chars();
                    if chars.next().is_none() {
                        return inner;
                    }
                    inner = chars.as_str();
                    continue;
                };
                let mut deeper = stem.clone();
                if &inner[next.clone()] != "self" {
                    deeper.push(inner[next.clone()].to_owned());
                }
                inner = branch(&inner[next.end..], &deeper, paths);
            }
        }
        match words(after).next().filter(|word| word.start == 0) {
            Some(word) => {
                stem.push(after[word.clone()].to_owned());
                rest = after[word.end..].trim_start();
            }
            None => break,
        }
    }
    // Another name given to it is none of a room.
    if let Some(renamed) = rest.strip_prefix("as ") {
        let name = words(renamed).next().map_or(0, |word| word.end);
        rest = &renamed[name..];
    }
    paths.push(stem);
    rest
}
