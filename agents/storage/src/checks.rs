//! Is this host fit for the storage agent.

use std::path::Path;

use stackhand_runtime::config::Loaded;
use stackhand_runtime::preflight::{Check, Finding};

use crate::config::{BackendSection, DEFAULT_BACKEND, StorageSection};

/// The agent's own checks: one for each configured folder.
#[must_use]
pub fn checks(loaded: &Loaded<StorageSection>) -> Vec<Check> {
    let backends = loaded.settings.agent.all_backends();
    vec![Check::blocking("backends", move || {
        backends.iter().map(|(name, backend)| folder(name, backend)).collect()
    })]
}

fn folder(name: &str, backend: &BackendSection) -> Finding {
    const CHECK: &str = "backends";
    let Some(path) = &backend.path else {
        return Finding::pass(CHECK, format!("{name} is kept in the state folder"));
    };
    if path.is_dir() {
        return writable(name, path);
    }
    if name == DEFAULT_BACKEND {
        return Finding::info(CHECK, format!("{} is made at its first use", path.display()));
    }
    Finding::failure(
        CHECK,
        format!("backend {name}: there is no folder {}", path.display()),
        format!("mkdir -p {}, or mount its file system", path.display()),
    )
}

fn writable(name: &str, path: &Path) -> Finding {
    const CHECK: &str = "backends";
    match nix::unistd::eaccess(path, nix::unistd::AccessFlags::W_OK) {
        Ok(()) => Finding::pass(CHECK, format!("{name} is kept in {}", path.display())),
        Err(errno) => Finding::failure(
            CHECK,
            format!("backend {name}: {} cannot be written to ({errno})", path.display()),
            format!("chown stackhand-storage {}", path.display()),
        ),
    }
}

#[cfg(test)]
mod tests {
    use stackhand_runtime::preflight::Severity;

    use super::*;

    #[test]
    fn a_missing_folder_is_a_failure_with_its_remedy() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &Path| BackendSection { path: Some(path.to_owned()), ..Default::default() };
        let found = folder("fast", &at(&root.path().join("none")));
        assert_eq!(found.severity, Severity::Failure);
        assert!(found.remedy.unwrap().starts_with("mkdir -p"));
        assert_eq!(folder("fast", &at(root.path())).severity, Severity::Pass);
        assert_eq!(folder("default", &BackendSection::default()).severity, Severity::Pass);
    }
}
