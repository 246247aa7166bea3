//! What is wrong with settings, and where.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::Path;

use super::tree::{Origin, Origins};

/// One thing that is wrong or doubtful.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where the value, key or file stands.
    pub origin: Origin,
    /// The key in full, such as `bus.url`; empty if it is about a file as a whole.
    pub key: String,
    /// What is wrong and what is expected, with the key where there is one.
    pub message: String,
    /// The command that puts it right, where there is one.
    pub remedy: Option<String>,
}

impl Problem {
    pub(super) fn new(origin: Origin, key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { origin, key: key.into(), message: message.into(), remedy: None }
    }

    pub(super) fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.message)?;
        match &self.remedy {
            Some(remedy) => write!(f, "; remedy: {remedy}"),
            None => Ok(()),
        }
    }
}

/// Every problem that keeps an agent from using its settings; at least one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ConfigErrors {
    /// What must be put right.
    pub problems: Vec<Problem>,
    /// What is doubtful besides.
    pub warnings: Vec<Problem>,
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, problem) in self.problems.iter().enumerate() {
            write!(f, "{}{problem}", if n == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

/// Collects what is wrong with values, and finds where each stands.
#[derive(Debug, Default)]
pub struct Problems {
    origins: Origins,
    found: Vec<Problem>,
}

impl Problems {
    pub(super) fn new(origins: Origins) -> Self {
        Self { origins, found: Vec::new() }
    }

    pub(super) fn into_parts(self) -> (Origins, Vec<Problem>) {
        (self.origins, self.found)
    }

    /// Reports that `key` (in full) is wrong. `what` goes on after the key: `must be set`.
    pub fn add(&mut self, key: &str, what: impl fmt::Display) {
        let origin = self.origins.get(key).cloned().unwrap_or(Origin::Default);
        self.found.push(Problem::new(origin, key, format!("`{key}` {what}")));
    }

    /// Reports `key` if `value` is outside `limits`.
    pub fn range<T: Copy + PartialOrd + fmt::Display>(
        &mut self,
        key: &str,
        value: T,
        limits: RangeInclusive<T>,
    ) {
        if !limits.contains(&value) {
            self.add(
                key,
                format!("must be from {} to {}, not {value}", limits.start(), limits.end()),
            );
        }
    }

    /// Reports `key` if `path` does not start with a slash.
    pub fn absolute(&mut self, key: &str, path: &Path) {
        if !path.is_absolute() {
            self.add(key, format!("must be an absolute path, not {path:?}"));
        }
    }

    /// What was reported so far, for the tests of sections.
    #[must_use]
    pub fn found(&self) -> &[Problem] {
        &self.found
    }
}

/// Most names listed where none is near.
const MOST_NAMES: usize = 20;

/// A suffix that suggests the one of `known` that is nearest to `name`, or lists them if they are
/// few. A name without its unit or other ending is near to the whole one.
pub(super) fn suggestion<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let known: BTreeSet<&str> = known.into_iter().collect();
    let distance = |candidate: &str| {
        let begins = name.len() >= 3 && candidate.starts_with(name);
        let distance = if begins { 1 } else { strsim::damerau_levenshtein(name, candidate) };
        (distance <= 1 + candidate.len().min(name.len()) / 4).then_some(distance)
    };
    let near = known.iter().filter_map(|candidate| Some((distance(candidate)?, candidate))).min();
    match near {
        Some((_distance, nearest)) => format!("; did you mean `{nearest}`?"),
        None if known.is_empty() => String::new(),
        None if known.len() > MOST_NAMES => {
            format!("; none of the {} known ones is like it", known.len())
        }
        None => {
            let list: Vec<String> = known.iter().map(|name| format!("`{name}`")).collect();
            format!("; known here: {}", list.join(", "))
        }
    }
}
