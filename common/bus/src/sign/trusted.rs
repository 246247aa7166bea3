//! The keys a host trusts: every `*.pub` file of one folder.
//!
//! Several keys may be trusted at once, which is how keys are changed: add the new one
//! everywhere, let the controllers sign with it, take the old one away. The folder may come after
//! the agent: until then nobody is trusted, and [`TrustedKeys::problems`] says why.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::key::{KeyId, MAX_FILE, PublicKey};

/// How often the folder is looked at, at most.
const RECHECK: Duration = Duration::from_secs(1);

/// Public keys of a folder, read again when the folder changes.
#[derive(Debug)]
pub struct TrustedKeys {
    folder: PathBuf,
    loaded: Mutex<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    keys: BTreeMap<KeyId, PublicKey>,
    problems: Vec<String>,
    /// What the files looked like when they were read; `None` where the folder cannot be listed.
    seen: Option<Vec<Seen>>,
    checked: Instant,
}

/// A file's name and what changes with its content.
type Seen = (PathBuf, u64, i64, i64, u64);

impl TrustedKeys {
    /// The keys of `folder`. A file that is no key is warned about and passed over.
    #[must_use]
    pub fn of(folder: &Path) -> Self {
        let loaded = Loaded {
            keys: BTreeMap::new(),
            problems: Vec::new(),
            seen: None,
            checked: Instant::now(),
        };
        let trusted = Self { folder: folder.to_owned(), loaded: Mutex::new(loaded) };
        trusted.refresh();
        trusted
    }

    /// The key called `id`, if it is trusted now.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<PublicKey> {
        self.fresh().keys.values().find(|key| key.id().as_str() == id).cloned()
    }

    /// Every trusted key, by id.
    #[must_use]
    pub fn all(&self) -> Vec<PublicKey> {
        self.fresh().keys.values().cloned().collect()
    }

    /// What is wrong with the folder and its files, for preflight and heartbeat.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        self.fresh().problems.clone()
    }

    /// Looks at the folder now, whenever it was looked at last.
    pub fn refresh(&self) {
        refresh(&self.folder, &mut self.lock());
    }

    fn fresh(&self) -> MutexGuard<'_, Loaded> {
        let mut loaded = self.lock();
        if loaded.checked.elapsed() >= RECHECK {
            refresh(&self.folder, &mut loaded);
        }
        loaded
    }

    fn lock(&self) -> MutexGuard<'_, Loaded> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refresh(folder: &Path, loaded: &mut Loaded) {
    loaded.checked = Instant::now();
    match look(folder) {
        Ok(seen) if loaded.seen.as_ref() == Some(&seen) => {}
        Ok(seen) => {
            *loaded = read(seen);
            tracing::info!(keys = loaded.keys.len(), "trusted controller keys read");
        }
        Err(error) => {
            // Without the folder nobody is known to be trusted.
            let folder = folder.display();
            let problem = format!(
                "cannot list {folder}: {error}; no command over the broker is obeyed until it is \
                 there, with the public keys of the controllers"
            );
            if loaded.problems.first() != Some(&problem) {
                tracing::warn!(problem, "no controller is trusted");
            }
            loaded.keys.clear();
            loaded.seen = None;
            loaded.problems = vec![problem];
        }
    }
}

fn look(folder: &Path) -> io::Result<Vec<Seen>> {
    let mut seen = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "pub") {
            continue;
        }
        match fs::metadata(&path) {
            Ok(file) => {
                seen.push((path, file.ino(), file.mtime(), file.mtime_nsec(), file.size()));
            }
            // A dangling link, or gone meanwhile; reading it says which.
            Err(_) => seen.push((path, 0, 0, 0, 0)),
        }
    }
    seen.sort();
    Ok(seen)
}

fn read(seen: Vec<Seen>) -> Loaded {
    let mut keys = BTreeMap::new();
    let mut problems = Vec::new();
    for (path, ..) in &seen {
        match read_file(path) {
            Ok(found) => keys.extend(found.into_iter().map(|key| (key.id().clone(), key))),
            Err(problem) => {
                tracing::warn!(problem, "key file passed over");
                problems.push(problem);
            }
        }
    }
    Loaded { keys, problems, seen: Some(seen), checked: Instant::now() }
}

/// The keys of one file: one a line, `#` begins a comment line.
fn read_file(path: &Path) -> Result<Vec<PublicKey>, String> {
    let cannot = |error: &dyn std::fmt::Display| format!("cannot use {}: {error}", path.display());
    // Looked at first: opening a pipe would wait for its writer.
    let file = fs::metadata(path).map_err(|error| cannot(&error))?;
    if !file.is_file() {
        return Err(cannot(&"it is no file"));
    }
    let file = fs::File::open(path).map_err(|error| cannot(&error))?;
    let mut text = String::new();
    file.take(MAX_FILE).read_to_string(&mut text).map_err(|error| cannot(&error))?;
    let lines = text.lines().map(str::trim).enumerate();
    let keys: Vec<PublicKey> = lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(at, line)| {
            line.parse().map_err(|error| cannot(&format!("line {}: {error}", at + 1)))
        })
        .collect::<Result<_, _>>()?;
    if keys.is_empty() { Err(cannot(&"it holds no key")) } else { Ok(keys) }
}
