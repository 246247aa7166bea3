//! Doing work inside a network namespace without moving the whole process.
//!
//! The namespace is a property of a *thread*, and runtime threads are shared, so nothing here ever
//! calls `setns` on one. A short-lived thread enters the namespace and opens the socket. A
//! socket stays in the namespace it was opened in; afterwards any task may use it.
//!
//! A socket that is held keeps a deleted namespace alive: drop sockets before [`Netns::delete`].

use std::collections::BTreeMap;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use tokio::sync::oneshot;

use crate::KernelError;

/// Where named namespaces live, for `ip netns` as for us.
pub const NETNS_DIR: &str = "/run/netns";

/// The namespace of the calling thread.
const OWN: &str = "/proc/thread-self/ns/net";

/// A network namespace with a name, as listed by `ip netns`. It may or may not exist.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Netns {
    path: PathBuf,
}

/// Which namespace a name stood for at a moment. Differs once a namespace was made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetnsId {
    device: u64,
    inode: u64,
}

/// What a file in a folder of names stands for: a namespace is on a device of its own kind.
fn identity(path: &Path, folder: &Metadata) -> Option<NetnsId> {
    let file = std::fs::metadata(path).ok()?;
    (file.dev() != folder.dev()).then(|| NetnsId { device: file.dev(), inode: file.ino() })
}

impl Netns {
    /// The namespace called `name`.
    ///
    /// # Errors
    ///
    /// Fails if the name could be taken for a path.
    pub fn named(name: &str) -> Result<Self, KernelError> {
        let bad = name.is_empty()
            || name.len() > 255
            || name.starts_with('.')
            || name.contains(['/', '\0', '\n']);
        if bad {
            return Err(KernelError::BadName { name: name.to_owned(), what: "namespace name" });
        }
        Ok(Self { path: Path::new(NETNS_DIR).join(name) })
    }

    /// The namespace behind a file, such as `/proc/42/ns/net`.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Names of the namespaces of this host, in order.
    ///
    /// # Errors
    ///
    /// Fails if the folder of names cannot be read. A missing folder means there are none.
    pub fn list() -> Result<Vec<String>, KernelError> {
        let fail = |source| KernelError::Namespace {
            action: "list names",
            namespace: NETNS_DIR.to_owned(),
            source,
        };
        let entries = match std::fs::read_dir(NETNS_DIR) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(fail)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            if let Ok(name) = entry.map_err(fail)?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// The namespaces of this host, by name, as [`Netns::id`] tells each.
    ///
    /// # Errors
    ///
    /// Fails if the folder of names cannot be read. A missing folder means there are none.
    pub fn ids() -> Result<BTreeMap<String, NetnsId>, KernelError> {
        let names = Self::list()?;
        let folder = std::fs::metadata(NETNS_DIR).ok();
        let id = |name: String| {
            let id = identity(&Path::new(NETNS_DIR).join(&name), folder.as_ref()?)?;
            Some((name, id))
        };
        Ok(names.into_iter().filter_map(id).collect())
    }

    /// The last part of its path.
    #[must_use]
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Which namespace the name stands for now; `None` if there is none, or only the empty file
    /// that a crash left.
    #[must_use]
    pub fn id(&self) -> Option<NetnsId> {
        identity(&self.path, &std::fs::metadata(self.path.parent()?).ok()?)
    }

    /// Creates it, with its loopback link down. Does nothing if it exists.
    ///
    /// # Errors
    ///
    /// Fails without `CAP_SYS_ADMIN`, or if the folder of names cannot be made a shared mount.
    pub async fn create(&self) -> Result<(), KernelError> {
        if self.id().is_some() {
            return Ok(());
        }
        let fail = |source| self.error("create it", source);
        let path = self.path.clone();
        on_a_thread(&self.name(), move || {
            share_folder(path.parent().unwrap_or(Path::new("/")))?;
            OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
            unshare(CloneFlags::CLONE_NEWNET)?;
            // The mount keeps the namespace alive after this thread.
            mount(Some(OWN), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            Ok(())
        })
        .await
        .map_err(fail)
    }

    /// Deletes its name. The namespace itself goes when nobody is in it and no socket is left.
    ///
    /// # Errors
    ///
    /// Fails without `CAP_SYS_ADMIN`. A missing one is fine.
    pub fn delete(&self) -> Result<(), KernelError> {
        match umount2(&self.path, MntFlags::MNT_DETACH) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(errno) => return Err(self.error("unmount it", errno.into())),
        }
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(self.error("remove its name", error))
            }
            _ => Ok(()),
        }
    }

    /// Opens its file, to hand links to it.
    ///
    /// # Errors
    ///
    /// Fails if it does not exist.
    pub fn open(&self) -> Result<File, KernelError> {
        File::open(&self.path).map_err(|source| self.error("open it", source))
    }

    /// Runs `work` on a fresh thread that has entered the namespace, inside the calling runtime's
    /// context, so that sockets of tokio can be made there.
    ///
    /// `work` should only open things: it blocks its thread, not the runtime, but the caller
    /// waits.
    ///
    /// # Errors
    ///
    /// Fails if the namespace does not exist, without `CAP_SYS_ADMIN`, or if `work` fails; the
    /// error then says `action`.
    pub async fn inside<T, F>(&self, action: &'static str, work: F) -> Result<T, KernelError>
    where
        F: FnOnce() -> io::Result<T> + Send + 'static,
        T: Send + 'static,
    {
        let file = self.open()?;
        on_a_thread(&self.name(), move || {
            enter(&file)?;
            work()
        })
        .await
        .map_err(|source| self.error(action, source))
    }

    fn error(&self, action: &'static str, source: io::Error) -> KernelError {
        let namespace = if self.path.starts_with(NETNS_DIR) {
            self.name()
        } else {
            self.path.display().to_string()
        };
        KernelError::Namespace { action, namespace, source }
    }
}

/// Runs `work` on a fresh thread in a namespace without a name, which lasts as long as what
/// `work` returns. For trying out what the kernel can do.
///
/// # Errors
///
/// Fails without `CAP_SYS_ADMIN`, or if `work` fails.
pub async fn in_a_scratch_netns<T, F>(work: F) -> Result<T, KernelError>
where
    F: FnOnce() -> io::Result<T> + Send + 'static,
    T: Send + 'static,
{
    on_a_thread("scratch", move || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        work()
    })
    .await
    .map_err(|source| KernelError::Namespace {
        action: "work",
        namespace: "of its own".to_owned(),
        source,
    })
}

#[expect(clippy::disallowed_methods, reason = "only ever on a thread that ends with its work")]
fn enter(namespace: &File) -> io::Result<()> {
    Ok(setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?)
}

async fn on_a_thread<T, F>(name: &str, work: F) -> io::Result<T>
where
    F: FnOnce() -> io::Result<T> + Send + 'static,
    T: Send + 'static,
{
    let runtime = tokio::runtime::Handle::current();
    let (result_tx, result_rx) = oneshot::channel();
    thread::Builder::new().name(format!("netns {name}")).spawn(move || {
        let _registers_sockets_with = runtime.enter();
        drop(result_tx.send(work()));
    })?;
    // The sender is dropped unused only if `work` panicked.
    result_rx.await.map_err(|_| io::Error::other("the work panicked"))?
}

/// Makes the folder of names a shared mount of its own, as `ip netns` does, so that names made
/// here show up in other mount namespaces.
fn share_folder(folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let share = || {
        mount(
            None::<&str>,
            folder,
            None::<&str>,
            MsFlags::MS_SHARED | MsFlags::MS_REC,
            None::<&str>,
        )
    };
    match share() {
        Err(Errno::EINVAL) => {
            mount(
                Some(folder),
                folder,
                None::<&str>,
                MsFlags::MS_BIND | MsFlags::MS_REC,
                None::<&str>,
            )?;
            Ok(share()?)
        }
        result => Ok(result?),
    }
}
