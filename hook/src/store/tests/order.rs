use super::*;

fn bare(name: &str, references: &[&str]) -> PathInfo {
    let restored = Restored { nar_hash: [0; 32], nar_size: 1 };
    let references: Vec<StorePath> = references.iter().map(|name| store_path(name)).collect();
    info(&store_path(name), &restored, &references.iter().collect::<Vec<_>>())
}

fn names(infos: &[PathInfo]) -> Vec<&str> {
    infos.iter().map(|info| info.path.name()).collect()
}

#[test]
fn references_come_first() {
    let sorted = references_first(vec![
        bare("d", &["b", "c", "d"]),
        bare("b", &["a"]),
        bare("c", &["a", "elsewhere"]),
        bare("a", &["a"]),
        bare("b", &["never looked at"].map(|_| "d")),
    ])
    .unwrap();
    assert_eq!(names(&sorted), ["a", "b", "c", "d"]);
}

#[test]
fn a_cycle_is_named() {
    let error = references_first(vec![
        bare("x", &["b"]),
        bare("a", &["b", "a"]),
        bare("b", &["c"]),
        bare("c", &["a"]),
    ])
    .unwrap_err();
    let cycle: Vec<&str> = error.cycle.iter().map(StorePath::name).collect();
    assert_eq!(cycle, ["b", "c", "a"]);
    let text = error.to_string();
    assert!(text.starts_with("cycle detected in the references: "), "{text}");
    assert_eq!(text.matches("-b").count(), 2, "{text}");
}

#[test]
fn a_long_chain_does_not_overflow_the_stack() {
    let name = |index: usize| format!("{index:07}");
    let chain: Vec<PathInfo> = (0..100_000).map(|index| bare(&name(index), &[&name(index + 1)])).collect();
    let sorted = references_first(chain).unwrap();
    assert_eq!(sorted[0].path.name(), "0099999");
    assert_eq!(sorted[99_999].path.name(), "0000000");
}
