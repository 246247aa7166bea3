//! Files of a local socket: taking its path without taking it from anybody, and locks beside it.
//!
//! A new socket is made under a name of its own, given its mode and group, and then renamed over
//! the path: nobody can connect before the file is as strict as it should be, and the path never
//! has no socket. A file lock keeps two starting servers from judging the same path at once.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use nix::unistd::{Gid, chown};
use tokio::net::{UnixListener, UnixStream};

use super::LocalOptions;
use super::peer::group_id;
use crate::BusError;

/// Longest path of a socket, set by the kernel, less what the name while binding adds.
const MAX_PATH: usize = 107 - 4;

/// A socket that listens.
#[derive(Debug)]
pub(super) struct Bound {
    pub(super) listener: UnixListener,
    pub(super) file: SocketFile,
    /// The group whose members may ask.
    pub(super) group: Option<Gid>,
}

/// The socket's file; removed when dropped, unless another server has taken the path.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|file| (file.dev(), file.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

pub(super) async fn bind(path: &Path, options: &LocalOptions) -> Result<Bound, BusError> {
    if path.as_os_str().len() > MAX_PATH {
        let length = path.as_os_str().len();
        let what =
            format!("socket path {} is {length} bytes, more than {MAX_PATH}", path.display());
        return Err(BusError::Config(what));
    }
    let config = |action: &str, error: io::Error| {
        let remedy = match error.kind() {
            io::ErrorKind::NotFound => "; make its folder first",
            io::ErrorKind::PermissionDenied => "; its folder must belong to the agent's user",
            _ => "",
        };
        BusError::Config(format!("cannot {action} socket {}: {error}{remedy}", path.display()))
    };
    let refused = |reason: String| BusError::Refused { peer: path.display().to_string(), reason };

    let lock = lock_path(path, "bind")?;
    let Some(_starting) = try_lock(&lock)? else {
        return Err(refused("another process is just binding it".to_owned()));
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(config("look at", error)),
        Ok(file) if !file.file_type().is_socket() => {
            let what = "there is a file that is no socket; move it away or set another path";
            return Err(refused(what.to_owned()));
        }
        Ok(_) if answers(path).await => {
            let what = "another process answers on it; stop that one first";
            return Err(refused(what.to_owned()));
        }
        Ok(_) => tracing::info!(path = %path.display(), "replacing a socket left behind"),
    }

    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(config("clear the way for", error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&new).map_err(|error| config("bind", error))?;
    let group = options.group.as_deref().and_then(group_id);
    // In a folder with set-group-id it has its group already, and a unit may forbid the call.
    let given = fs::symlink_metadata(&new).map_err(|error| config("look at", error))?.gid();
    if let Some(group) = group
        && group.as_raw() != given
        && let Err(error) = chown(&new, None, Some(group))
    {
        // Not a member: the group's people cannot reach us, but root can and we run.
        tracing::warn!(path = %path.display(), %error, "cannot give the socket to its group");
    }
    fs::set_permissions(&new, Permissions::from_mode(options.mode))
        .map_err(|error| config("set the mode of", error))?;
    let made = fs::symlink_metadata(&new).map_err(|error| config("look at", error))?;
    fs::rename(&new, path).map_err(|error| config("put in place", error))?;
    let file = SocketFile { path: path.to_owned(), identity: (made.dev(), made.ino()) };
    Ok(Bound { listener, file, group })
}

/// Whether somebody listens. A connect that neither works nor fails has a listener with a full
/// queue.
async fn answers(path: &Path) -> bool {
    match tokio::time::timeout(Duration::from_secs(2), UnixStream::connect(path)).await {
        Ok(Ok(_)) | Err(_) => true,
        Ok(Err(error)) => {
            !matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
        }
    }
}

/// Where the lock called `name` lies.
pub(super) fn lock_path(socket: &Path, name: &str) -> Result<PathBuf, BusError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > 100 || !name.chars().all(plain) {
        let what = format!("lock name {name:?} must be 1 to 100 letters, digits, `.`, `_` or `-`");
        return Err(BusError::Config(what));
    }
    let mut path = socket.as_os_str().to_owned();
    path.push(format!(".{name}.lock"));
    Ok(PathBuf::from(path))
}

/// Takes the file lock if it is free. The file stays for ever: removing it would let two hold
/// locks on two files of one name.
pub(super) fn try_lock(path: &Path) -> Result<Option<Flock<File>>, BusError> {
    let peer = || path.display().to_string();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o660)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(|error| BusError::Refused {
            peer: peer(),
            reason: match error.kind() {
                io::ErrorKind::NotFound => "its folder does not exist; make it first".to_owned(),
                io::ErrorKind::PermissionDenied => {
                    "permission denied; be root or in group stackhand".to_owned()
                }
                _ => error.to_string(),
            },
        })?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(held) => Ok(Some(held)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(BusError::Refused { peer: peer(), reason: errno.to_string() }),
    }
}
