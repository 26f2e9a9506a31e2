//! Derivations of the local store: reading one, what it asks of a machine, and what its inputs weigh.
//!
//! Must never choose a machine, nor know of one.

use crate::plan::Request;
use crate::plan::chain::{self, Step};
use crate::plan::outputs::{self, OutputError, Wanted};
use crate::store::{DatabaseError, DrvId, Location, Query};
use nix_derivation::{Derivation, StorePath};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How many inputs are looked up, at most.
const MOST_INPUTS: usize = 100;

/// How many derivations that wait for another one are looked at, and how many of each one's direct dependents. Chains are
/// found first, then what is beside them.
const MOST_DEPENDENTS: usize = 4096;
const MOST_OF_ONE: usize = 256;

/// How long they are looked for.
const LONGEST_LOOK: Duration = Duration::from_millis(50);

/// Why a derivation is not for us.
#[derive(Debug, Error)]
pub enum Unfit {
    /// The path is none of the local store's, or not that of a derivation.
    #[error("'{0}' is no path of a derivation in the local store")]
    NoDrvPath(String),
    /// Its file cannot be read.
    #[error("the derivation cannot be read from the local store")]
    Unreadable(#[source] io::Error),
    /// Its file says something that we do not understand.
    #[error("the derivation cannot be parsed")]
    Unparsable(#[source] nix_derivation::Error),
    /// An output of it is of a kind that we do not know.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// It depends on what another build decides.
    #[error(
        "the derivation has an input that is itself built by a build (an experimental kind of derivation)"
    )]
    Dynamic,
}

impl Unfit {
    /// Whether it is of a kind that Nix's own hook may know how to build.
    pub fn is_for_stock(&self) -> bool {
        matches!(
            self,
            Self::Dynamic
                | Self::Unparsable(_)
                | Self::Output(OutputError::UnknownPath(_) | OutputError::Experimental(..))
        )
    }
}

/// What is to be built.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Its path.
    pub path: StorePath,
    /// What its file says.
    pub drv: Derivation,
    /// What its outputs are to be.
    pub outputs: BTreeMap<String, Wanted>,
}

/// Reads a derivation that is to be built.
///
/// # Errors
/// If it is not for us.
pub fn subject(location: &Location, drv_path: &str) -> Result<Subject, Unfit> {
    let no_path = || Unfit::NoDrvPath(drv_path.to_owned());
    let path = location.store_dir.parse_path(drv_path.as_bytes()).map_err(|_| no_path())?;
    let drv = read(location, &path)?.ok_or_else(no_path)?;
    if drv.input_derivations().values().any(|input| input.is_dynamic()) {
        return Err(Unfit::Dynamic);
    }
    let outputs = outputs::output_paths(&drv, &location.store_dir)?;
    outputs::check_kinds(&outputs)?;
    Ok(Subject { path, drv, outputs })
}

/// A derivation of the local store; none if the path is not that of one.
///
/// # Errors
/// If it cannot be read.
pub fn read(location: &Location, path: &StorePath) -> Result<Option<Derivation>, Unfit> {
    let Some(name) = path.name().strip_suffix(".drv") else { return Ok(None) };
    let aterm = fs::read(location.real_path(path)).map_err(Unfit::Unreadable)?;
    Derivation::from_aterm_bytes_in(&aterm, name, location.store_dir.clone())
        .map(Some)
        .map_err(Unfit::Unparsable)
}

/// What Nix asks its hook about a derivation of which all outputs have known paths.
///
/// Source: `getStringsAttr` and `getRequiredSystemFeatures` in Nix 2.8 `src/libstore/parsed-derivations.cc`: what is in
/// the structured attributes counts alone, where there are any.
pub fn request(drv: &Derivation, drv_path: &str, am_willing: bool) -> Request {
    const NAME: &str = "requiredSystemFeatures";
    let required_features = match (drv.structured_attrs(), drv.environment().get(NAME)) {
        (Some(attributes), _) => {
            let list = attributes.get(NAME).and_then(|list| list.as_array());
            list.into_iter().flatten().filter_map(|word| word.as_str()).map(str::to_owned).collect()
        }
        (None, Some(words)) => {
            let words = String::from_utf8_lossy(words);
            words.split([' ', '\t', '\n', '\r']).filter(|word| !word.is_empty()).map(str::to_owned).collect()
        }
        (None, None) => BTreeSet::new(),
    };
    Request { am_willing, system: drv.system().to_owned(), drv_path: drv_path.to_owned(), required_features }
}

/// Whether Nix builds it here without asking, wherever it can (`getBoolAttr` and `willBuildLocally` in the same file).
pub fn prefers_local(drv: &Derivation) -> bool {
    const NAME: &str = "preferLocalBuild";
    match drv.structured_attrs() {
        Some(attributes) => attributes.get(NAME).and_then(|flag| flag.as_bool()).unwrap_or(false),
        None => drv.environment().get(NAME).is_some_and(|flag| flag == b"1"),
    }
}

/// The paths that a derivation names itself, whose closure are all its inputs. None if they cannot be told.
pub fn direct_inputs(location: &Location, drv: &Derivation) -> Option<Vec<StorePath>> {
    let mut direct: BTreeSet<StorePath> = drv.input_sources().iter().cloned().collect();
    for (path, wanted) in drv.input_derivations() {
        let input = read(location, path).ok()??;
        let outputs = outputs::output_paths(&input, &location.store_dir).ok()?;
        for name in wanted.outputs() {
            direct.insert(outputs.get(name)?.path.clone());
        }
    }
    Some(direct.into_iter().collect())
}

/// The same with the sizes of their NARs in bytes. None also if there are very many.
pub fn weighed_inputs(location: &Location, drv: &Derivation) -> Option<Vec<(StorePath, u64)>> {
    // Before their derivations are read, each of which is a file.
    if drv.input_sources().len() + drv.input_derivations().len() > MOST_INPUTS {
        return None;
    }
    let direct = direct_inputs(location, drv)?;
    if direct.len() > MOST_INPUTS {
        return None;
    }
    if direct.is_empty() {
        return Some(Vec::new());
    }
    let query = Query::open(location).ok()?;
    // What is not valid yet is not known to be large.
    let weigh = |path: StorePath| {
        let size = query.nar_size(&path).ok().flatten().unwrap_or(0);
        (path, size)
    };
    Some(direct.into_iter().map(weigh).collect())
}

/// Seconds of the longest chain of builds that wait for this one, its own included, on idle machines of speed factor 1.
///
/// `history` says for many names of derivations how long they take, where it is known; `typical` is for the others. The chains
/// are those in the local store, as far as they are still to be built, whoever wants them. Where there are very many
/// only a part of them is looked at.
///
/// # Errors
/// If the store's database cannot be read.
pub fn chain(
    location: &Location,
    drv_path: &StorePath,
    history: impl FnOnce(&[&str]) -> Vec<Option<f64>>,
    typical: f64,
) -> Result<f64, DatabaseError> {
    let (names, dependents) = dependents(location, drv_path)?;
    let names: Vec<&str> = names.iter().map(|path| name_in(path)).collect();
    let seconds = history(&names).into_iter().chain(std::iter::repeat(None));
    let steps: Vec<Step> =
        seconds.zip(dependents).map(|(seconds, dependents)| Step { seconds, dependents }).collect();
    Ok(chain::tails(&steps, typical).first().copied().unwrap_or(typical))
}

/// The paths of a derivation, the first, and of those that wait for it, and for each the places of its dependents.
fn dependents(
    location: &Location,
    drv_path: &StorePath,
) -> Result<(Vec<String>, Vec<Vec<usize>>), DatabaseError> {
    let begin = Instant::now();
    let query = Query::open(location)?;
    let mut paths = vec![drv_path.name().to_string()];
    let mut dependents = vec![Vec::new()];
    let Some(root) = query.drv_id(drv_path)? else { return Ok((paths, dependents)) };
    let mut places: HashMap<DrvId, usize> = HashMap::from([(root, 0)]);
    let mut to_do = vec![root];
    while let Some(id) = to_do.pop() {
        if paths.len() >= MOST_DEPENDENTS || begin.elapsed() >= LONGEST_LOOK {
            break;
        }
        let place = places[&id];
        for (dependent, path) in query.unbuilt_dependents(id, MOST_OF_ONE)? {
            let known = *places.entry(dependent).or_insert_with(|| {
                to_do.push(dependent);
                paths.push(path);
                dependents.push(Vec::new());
                paths.len() - 1
            });
            dependents[place].push(known);
        }
    }
    Ok((paths, dependents))
}

/// The name of a derivation without the directory, the hash and the suffix.
pub fn name_in(path: &str) -> &str {
    let base =
        path.rsplit_once('/').map_or(path, |(_, base)| base.split_once('-').map_or(base, |(_, name)| name));
    base.strip_suffix(".drv").unwrap_or(base)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn required(attributes: &str) -> Vec<String> {
        let aterm = format!(
            "Derive([(\"out\",\"/nix/store/{0}-x\",\"\",\"\")],[],[],\"x86_64-linux\",\"/bin/sh\",[],\
             [{attributes}(\"out\",\"/nix/store/{0}-x\")])",
            "0".repeat(32)
        );
        let drv = Derivation::from_aterm_bytes(aterm.as_bytes(), "x").unwrap();
        let request = request(&drv, "/d", true);
        assert_eq!((request.system.as_str(), request.drv_path.as_str()), ("x86_64-linux", "/d"));
        request.required_features.into_iter().collect()
    }

    #[test]
    fn features_are_words_or_a_list_in_the_structured_attributes() {
        assert_eq!(required(""), [""; 0]);
        assert_eq!(
            required("(\"requiredSystemFeatures\",\" kvm\\n big-parallel\"),"),
            ["big-parallel", "kvm"]
        );
        let structured = r#"("__json","{\"requiredSystemFeatures\":[\"a\",\"b c\"]}"),"#;
        assert_eq!(required(structured), ["a", "b c"]);
        let both = format!("{structured}(\"requiredSystemFeatures\",\"kvm\"),");
        assert_eq!(required(&both), ["a", "b c"]);
        assert_eq!(required(r#"("__json","{}"),("requiredSystemFeatures","kvm"),"#), [""; 0]);
    }
}
