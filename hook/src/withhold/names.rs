//! Machines by the names that people type: the host, the host with its user or port, the store's URI, or the name in the
//! list.
//!
//! Must never take a part of a name for the name.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::plan::machine::StoreUri;

/// Two names are alike enough for "did you mean" from here on, between 0 and 1.
const ALIKE: f64 = 0.8;

/// The names of machines that a word means, in their order.
pub(super) fn meant<'a>(word: &str, names: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let as_uri = StoreUri::parse(&StoreUri::with_implied_scheme(word)).ok();
    let lower = word.to_lowercase();
    let is_meant = |name: &&str| {
        let uri = StoreUri::parse(name).ok();
        *name == word
            || (word.contains("://") && uri.is_some() && uri == as_uri)
            || shorter(name).any(|form| form.to_lowercase() == lower)
    };
    names.into_iter().filter(is_meant).collect()
}

/// The name that a word without a meaning was probably meant to be.
pub(super) fn likeliest<'a>(word: &str, names: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let word = word.to_lowercase();
    let alike = |form: &String| {
        let form = form.to_lowercase();
        // One letter is enough for a slip, but in a short name it weighs too much for the other measure.
        match strsim::osa_distance(&form, &word) {
            ..=1 => 1.0,
            _ => strsim::jaro_winkler(&form, &word),
        }
    };
    let forms = names.into_iter().flat_map(|name| shorter(name).collect::<Vec<_>>());
    let best = forms.max_by(|a, b| alike(a).total_cmp(&alike(b)))?;
    (alike(&best) >= ALIKE).then_some(best)
}

/// What else a machine is called: without parameters, and what is left of that without scheme, user and port.
fn shorter(name: &str) -> impl Iterator<Item = String> {
    let base = name.split('?').next().unwrap_or_default().to_owned();
    let mut forms = vec![base.clone()];
    if let Ok(StoreUri { destination, port, .. }) = StoreUri::parse(name)
        && !destination.is_empty()
    {
        let host = destination.rsplit_once('@').map_or(destination.as_str(), |(_, host)| host).to_owned();
        if let Some((_, rest)) = base.split_once("://") {
            // As it is written, with the brackets of an address.
            forms.push(rest.to_owned());
            forms.extend(rest.rsplit_once('@').map(|(_, rest)| rest.to_owned()));
        }
        if let Some(port) = port {
            forms.push(format!("{host}:{port}"));
        }
        forms.extend([host, destination]);
    }
    forms.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: [&str; 6] = [
        "ssh-ng://nix@mac",
        "ssh://mac:2222?ssh-key=/root/k",
        "ssh-ng://root@[2001:db8::1]:22",
        "ssh://mac-mini.example",
        "local:///srv/x",
        "auto",
    ];

    #[test]
    fn a_machine_has_many_names() {
        for (word, expected) in [
            ("mac", &LIST[..2]),
            ("MAC", &LIST[..2]),
            ("nix@mac", &LIST[..1]),
            ("mac:2222", &LIST[1..2]),
            ("ssh-ng://nix@mac", &LIST[..1]),
            ("ssh://mac:2222", &LIST[1..2]),
            ("ssh://mac:2222?ssh-key=/root/k", &LIST[1..2]),
            ("2001:db8::1", &LIST[2..3]),
            ("[2001:db8::1]:22", &LIST[2..3]),
            ("mac-mini.example", &LIST[3..4]),
            ("local:///srv/x", &LIST[4..5]),
            ("auto", &LIST[5..]),
        ] {
            assert_eq!(meant(word, LIST), expected, "{word}");
        }
        for word in
            ["", "ma", "mac-mini", "ssh-ng://mac", "ssh://mac", "nix", "22", "ssh://mac:2222?ssh-key=/k"]
        {
            assert_eq!(meant(word, LIST), [""; 0], "{word}");
        }
    }

    #[test]
    fn a_uri_is_the_same_in_another_form() {
        let rendered = "ssh://m?compress=true&ssh-key=/k%20y";
        assert_eq!(meant("ssh://m?ssh-key=/k%20y&compress=true", [rendered]), [rendered]);
    }

    #[test]
    fn what_is_nearly_a_name_is_offered() {
        assert_eq!(likeliest("mca", LIST).as_deref(), Some("mac"));
        assert_eq!(likeliest("mac-mini", LIST).as_deref(), Some("mac-mini.example"));
        assert_eq!(likeliest("zebra", LIST), None);
        assert_eq!(likeliest("x", []), None);
    }
}
