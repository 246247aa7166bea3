//! An in-memory [`RouterNet`]: behaves like the kernel, and can be told to fail.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use smol_str::SmolStr;
use stackhand_kernel::KernelError;

use super::{Change, Entry, RouterNet, Seen, SeenNat, SeenRoute, SeenRouter};

/// Routers that exist only in memory.
#[derive(Debug, Default)]
pub struct FakeRouters {
    state: Mutex<Seen>,
    broken: Mutex<Vec<Change>>,
}

impl FakeRouters {
    /// What they have.
    #[must_use]
    pub fn seen(&self) -> Seen {
        lock(&self.state).clone()
    }

    /// Changes them behind the agent's back.
    pub fn meddle(&self, meddle: impl FnOnce(&mut Seen)) {
        meddle(&mut lock(&self.state));
    }

    /// Changes that fail with `EIO` from now on.
    pub fn set_broken(&self, changes: Vec<Change>) {
        *lock(&self.broken) = changes;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RouterNet for FakeRouters {
    async fn observe(&self, spaces: &BTreeSet<SmolStr>) -> Result<Seen, KernelError> {
        let mut seen = self.seen();
        seen.retain(|space, _| spaces.contains(space.as_str()));
        Ok(seen)
    }

    async fn apply(&self, change: &Change) -> Result<(), KernelError> {
        if lock(&self.broken).contains(change) {
            return Err(refused(nix::libc::EIO));
        }
        perform(&mut lock(&self.state), change)
    }
}

fn refused(errno: i32) -> KernelError {
    let source = io::Error::from_raw_os_error(errno);
    KernelError::Netlink { action: "be told to", object: "the fake".to_owned(), source }
}

/// Performs `change` as the kernel would.
fn perform(seen: &mut Seen, change: &Change) -> Result<(), KernelError> {
    match change {
        Change::Build { space, replace, entries } => {
            let router = Arc::make_mut(seen.entry(space.clone()).or_default());
            if (router.nat == SeenNat::Absent) == *replace {
                return Err(refused(nix::libc::EEXIST));
            }
            router.nat = SeenNat::Built(entries.clone());
        }
        Change::Translate { space, remove, add } => {
            let has = entries(seen, space)?;
            if !remove.is_subset(has) {
                return Err(refused(nix::libc::ENOENT));
            }
            let mut next: BTreeSet<Entry> = has.difference(remove).cloned().collect();
            for entry in add {
                let clashes = next.iter().any(|other| other.key() == entry.key() && other != entry);
                if clashes {
                    return Err(refused(nix::libc::EEXIST));
                }
                next.insert(entry.clone());
            }
            *has = next;
        }
        Change::Cut { space, cuts } => entries(seen, space)?.retain(|entry| !cuts.contains(entry)),
        Change::SetRoute { space, destination, hops } => {
            let route = SeenRoute { hops: hops.clone(), ours: true };
            router(seen, space)?.routes.insert(*destination, route);
        }
        Change::RemoveRoute { space, destination } => {
            router(seen, space)?.routes.remove(destination);
        }
    }
    Ok(())
}

fn router<'a>(seen: &'a mut Seen, space: &str) -> Result<&'a mut SeenRouter, KernelError> {
    seen.get_mut(space).map(Arc::make_mut).ok_or_else(|| refused(nix::libc::ENOENT))
}

fn entries<'a>(seen: &'a mut Seen, space: &str) -> Result<&'a mut BTreeSet<Entry>, KernelError> {
    match &mut router(seen, space)?.nat {
        SeenNat::Built(entries) => Ok(entries),
        SeenNat::Absent | SeenNat::Changed => Err(refused(nix::libc::ENOENT)),
    }
}
