//! The other end of an export: this host's kernel logs in to a target, for hosts without a
//! hypervisor of ours (`storage-agent attach`) and for guests that are given a block device of
//! their host. Guests whose QEMU logs in itself need none of it.
//!
//! ```text
//! record, password, login ──> scan for one LUN ──> device ──> is it really that volume?
//! nobody has it open? ──> flush ──> device removed ──> log out ──> record removed
//! ```
//!
//! A device is believed only if it tells the volume's id as its serial number: a session that
//! was left behind by another volume, or a LUN number that went to somebody else, is an error and
//! never handed out. Scans ask for one LUN of one session, so nothing else appears by the way.

pub mod helper;
mod sysfs;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use stackhand_kernel::exec::{ExecError, Program};
use stackhand_model::{Connection, IscsiClient, Secret, VolumeId, is_iscsi_name};
use tokio::time::{Instant, sleep};

use sysfs::Sysfs;

const ISCSIADM: &str = "/usr/sbin/iscsiadm";

/// Where open-iscsi keeps its records.
const RECORDS: &str = "/etc/iscsi/nodes";

/// Where this host's initiator has its name.
const INITIATOR: &str = "/etc/iscsi/initiatorname.iscsi";

/// How long a device may take to come or go.
const PATIENCE: Duration = Duration::from_secs(30);

/// iscsiadm's status for "there is no such record or session", and for "is logged in already".
const NOTHING_FOUND: i32 = 21;
const LOGGED_IN: i32 = 15;

/// Why a volume could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The program failed.
    #[error("cannot {action} {target}")]
    Program {
        /// What was tried.
        action: &'static str,
        /// At which target.
        target: String,
        /// Why not.
        source: Box<ExecError>,
    },
    /// A file could not be used.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// It cannot be, as things are.
    #[error("{0}")]
    Refused(String),
}

/// What is needed to log in.
#[derive(Debug)]
struct Login<'a> {
    portal: &'a str,
    target: &'a str,
    lun: u32,
    chap: Option<(&'a str, &'a Secret)>,
}

fn failed<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(std::io::Error) -> AttachError + use<'a> {
    move |source| AttachError::Io { action, path: path.to_owned(), source }
}

/// The name by which a volume's device is found on this host for as long as it is attached, and
/// nothing otherwise: it names the target, so no other volume's device ever has it. `None` if the
/// connection is not for this host's initiator.
#[must_use]
pub fn stable_path(connection: &Connection) -> Option<PathBuf> {
    let Connection::Iscsi { portal, iqn, lun, client: IscsiClient::Host, .. } = connection else {
        return None;
    };
    // As udev has it: without the brackets of IPv6.
    let portal = portal.replace(['[', ']'], "");
    Some(format!("/dev/disk/by-path/ip-{portal}-iscsi-{iqn}-lun-{lun}").into())
}

/// Whether a volume is attached and its device is what [`stable_path`] leads to. Only looks, and
/// needs no rights.
///
/// # Errors
///
/// Fails if the device says that it is another volume.
pub fn is_attached(connection: &Connection, volume: VolumeId) -> Result<bool, AttachError> {
    let (Ok(login), Some(stable)) = (Login::new(connection), stable_path(connection)) else {
        return Ok(false);
    };
    let sysfs = Sysfs::default();
    let Some(session) = sysfs.session(login.target)? else { return Ok(false) };
    let Some(device) = sysfs.device(&session, login.lun)? else { return Ok(false) };
    let path = sysfs.verified(&device, volume)?;
    Ok(fs::canonicalize(stable).is_ok_and(|found| found == path))
}

/// The name under which this host's kernel logs in.
///
/// # Errors
///
/// Fails if it has none, or may not be known.
pub fn initiator() -> Result<String, AttachError> {
    let path = Path::new(INITIATOR);
    let text = fs::read_to_string(path).map_err(failed("read", path))?;
    let name = text.lines().find_map(|line| line.trim().strip_prefix("InitiatorName="));
    name.map(|name| name.trim().to_owned()).ok_or_else(|| {
        AttachError::Refused(format!("{INITIATOR} has no line InitiatorName=: install open-iscsi"))
    })
}

/// Makes a volume's device appear on this host; answers its path. What is attached stays so.
///
/// # Errors
///
/// Fails if the target cannot be reached, does not let this host in, or shows another volume.
pub async fn attach(connection: &Connection, volume: VolumeId) -> Result<PathBuf, AttachError> {
    let login = match connection {
        Connection::File { path, .. } | Connection::Block { path } => return Ok(path.clone()),
        Connection::Iscsi { initiator, .. } => {
            if let Some(wanted) = initiator {
                check_initiator(wanted)?;
            }
            Login::new(connection)?
        }
    };
    let sysfs = Sysfs::default();
    let session = match sysfs.session(login.target)? {
        Some(session) => session,
        None => {
            login.log_in().await?;
            within("the session to appear", || sysfs.session(login.target)).await?
        }
    };
    let device = match sysfs.device(&session, login.lun)? {
        Some(device) => device,
        None => {
            sysfs.scan(&session, login.lun)?;
            within("the device to appear", || sysfs.device(&session, login.lun)).await?
        }
    };
    let path = sysfs.verified(&device, volume)?;
    within(&format!("{} to open", path.display()), || opens(&path)).await?;
    Ok(path)
}

/// Whether a device can be opened. It is seen in sysfs before, and its node is in /dev.
fn opens(path: &Path) -> Result<Option<()>, AttachError> {
    match File::open(path) {
        Ok(_closed_again) => Ok(Some(())),
        Err(error) => match error.raw_os_error() {
            Some(nix::libc::ENOENT | nix::libc::ENXIO | nix::libc::ENODEV) => Ok(None),
            _ => Err(failed("open", path)(error)),
        },
    }
}

/// Takes a volume's device away from this host, in the order that loses nothing. What is detached
/// stays so.
///
/// # Errors
///
/// Fails if somebody has the device open, or it is another volume's; nothing is changed then.
pub async fn detach(connection: &Connection, volume: VolumeId) -> Result<(), AttachError> {
    let login = match connection {
        Connection::File { .. } | Connection::Block { .. } => return Ok(()),
        Connection::Iscsi { .. } => Login::new(connection)?,
    };
    let sysfs = Sysfs::default();
    if let Some(session) = sysfs.session(login.target)? {
        if let Some(device) = sysfs.device(&session, login.lun)? {
            let path = sysfs.verified(&device, volume)?;
            flush(&path)?;
            sysfs.remove(&device)?;
            within("the device to go", || {
                Ok(sysfs.device(&session, login.lun)?.is_none().then_some(()))
            })
            .await?;
        }
        if sysfs.has_devices(&session)? {
            return Err(AttachError::Refused(format!(
                "target {} gives other devices, too: they are not ours to take away",
                login.target
            )));
        }
        login.iscsiadm("log out of", &["--logout"], NOTHING_FOUND).await?;
        // The kernel ends it behind iscsiadm's back, which then would not forget its record.
        within("the session to end", || Ok(sysfs.session(login.target)?.is_none().then_some(())))
            .await?;
    }
    login.iscsiadm("forget", &["-o", "delete"], NOTHING_FOUND).await
}

/// Has this host see a volume's new size; answers it in bytes.
///
/// # Errors
///
/// Fails if the volume is not attached.
pub async fn rescan(connection: &Connection, volume: VolumeId) -> Result<u64, AttachError> {
    let path = attach(connection, volume).await?;
    let sysfs = Sysfs::default();
    if let Connection::Iscsi { iqn, lun, .. } = connection
        && let Some(session) = sysfs.session(iqn)?
        && let Some(device) = sysfs.device(&session, *lun)?
    {
        sysfs.rescan(&device)?;
    }
    let mut file = File::open(&path).map_err(failed("open", &path))?;
    std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).map_err(failed("measure", &path))
}

/// The kernel logs in under one name; the target lets in another one.
fn check_initiator(wanted: &str) -> Result<(), AttachError> {
    let name = initiator()?;
    if name == wanted {
        return Ok(());
    }
    Err(AttachError::Refused(format!(
        "the target lets in {wanted}, and this host is {name} ({INITIATOR}): put that into \
         spec.connector.initiator of the attachment"
    )))
}

/// Writes out what the kernel holds for the device, which nobody may have open.
fn flush(path: &Path) -> Result<(), AttachError> {
    let open = OpenOptions::new().write(true).custom_flags(nix::libc::O_EXCL).open(path);
    let file = open.map_err(|source| match source.raw_os_error() {
        Some(nix::libc::EBUSY) => AttachError::Refused(format!(
            "{} is in use: unmount it, or stop what has it open",
            path.display()
        )),
        _ => failed("open", path)(source),
    })?;
    file.sync_all().map_err(failed("flush", path))
}

async fn within<T>(
    what: &str,
    mut look: impl FnMut() -> Result<Option<T>, AttachError>,
) -> Result<T, AttachError> {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > end {
            let seconds = PATIENCE.as_secs();
            return Err(AttachError::Refused(format!("waited {seconds} s for {what}")));
        }
        sleep(Duration::from_millis(50)).await;
    }
}

impl<'a> Login<'a> {
    fn new(connection: &'a Connection) -> Result<Self, AttachError> {
        match connection {
            // Both become part of paths and arguments.
            Connection::Iscsi { portal, .. } if portal.parse::<SocketAddr>().is_err() => {
                Err(AttachError::Refused(format!("{portal:?} is no address:port")))
            }
            Connection::Iscsi { iqn, .. } if !is_iscsi_name(iqn) => {
                Err(AttachError::Refused(format!("{iqn:?} is no iSCSI name")))
            }
            Connection::Iscsi { portal, iqn, lun, username, password, .. } => Ok(Self {
                portal,
                target: iqn,
                lun: *lun,
                chap: username.as_deref().zip(password.as_ref()),
            }),
            _ => Err(AttachError::Refused("it is no iSCSI connection".into())),
        }
    }

    /// Runs iscsiadm on the record; one status is as good as 0.
    async fn iscsiadm(
        &self,
        action: &'static str,
        args: &[&str],
        fine: i32,
    ) -> Result<(), AttachError> {
        let program = Program::new(ISCSIADM)
            .args(["-m", "node", "-T", self.target, "-p", self.portal])
            .args(args.iter().copied())
            .limit(Duration::from_secs(120));
        match program.run().await {
            Err(ExecError::Failed { status, .. }) if status.code() == Some(fine) => Ok(()),
            Err(source) => Err(AttachError::Program {
                action,
                target: self.target.to_owned(),
                source: Box::new(source),
            }),
            Ok(_) => Ok(()),
        }
    }

    async fn log_in(&self) -> Result<(), AttachError> {
        self.iscsiadm("make a record of", &["-o", "new"], 0).await?;
        let set = |name: &'static str, value: &'static str| async move {
            let args = ["-o", "update", "-n", name, "-v", value];
            self.iscsiadm("set up the record of", &args, 0).await
        };
        // Nothing appears but what is asked for, now or after a reboot.
        set("node.session.scan", "manual").await?;
        set("node.startup", "manual").await?;
        if let Some((user, password)) = self.chap {
            set("node.session.auth.authmethod", "CHAP").await?;
            self.keep_password(user, password)?;
        }
        self.iscsiadm("log in to", &["--login"], LOGGED_IN).await
    }

    /// Puts the password into open-iscsi's record by file: as an argument, all could read it.
    fn keep_password(&self, user: &str, password: &Secret) -> Result<(), AttachError> {
        let folder = Path::new(RECORDS).join(self.target);
        for record in records(&folder)? {
            let text = fs::read_to_string(&record).map_err(failed("read", &record))?;
            let kept = text
                .lines()
                .filter(|line| {
                    !line.starts_with("node.session.auth.username")
                        && !line.starts_with("node.session.auth.password")
                        && *line != "# END RECORD"
                })
                .collect::<Vec<_>>()
                .join("\n");
            let text = format!(
                "{kept}\nnode.session.auth.username = {user}\nnode.session.auth.password = {}\n\
                 # END RECORD\n",
                password.0
            );
            let fresh = record.with_extension("new");
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&fresh)
                .and_then(|mut file| {
                    file.set_permissions(fs::Permissions::from_mode(0o600))?;
                    file.write_all(text.as_bytes())
                })
                .map_err(failed("write", &fresh))?;
            fs::rename(&fresh, &record).map_err(failed("rename to", &record))?;
        }
        Ok(())
    }
}

/// The record files of one target: `<portal>` or `<portal>/<interface>`.
fn records(folder: &Path) -> Result<Vec<PathBuf>, AttachError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed("list", folder))?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(records(&path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(portal: &str, iqn: &str, client: IscsiClient) -> Connection {
        Connection::Iscsi {
            portal: portal.into(),
            iqn: iqn.into(),
            lun: 0,
            initiator: None,
            client,
            username: None,
            password: None,
        }
    }

    #[test]
    fn a_node_whose_device_is_not_there_yet_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node");
        assert_eq!(opens(&path).unwrap(), None);
        // As a node without a device, a socket says ENXIO.
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(File::open(&path).unwrap_err().raw_os_error(), Some(nix::libc::ENXIO));
        assert_eq!(opens(&path).unwrap(), None);
        assert_eq!(opens(folder.path()).unwrap(), Some(()));
        let error = opens(&folder.path().join("node/beneath")).unwrap_err().to_string();
        assert!(error.contains("cannot open"), "{error}");
    }

    #[test]
    fn a_device_has_a_name_that_only_its_target_gives() {
        let path = |portal| stable_path(&connection(portal, "iqn.x:v", IscsiClient::Host)).unwrap();
        let name = "/dev/disk/by-path/ip-192.0.2.1:3260-iscsi-iqn.x:v-lun-0";
        assert_eq!(path("192.0.2.1:3260"), Path::new(name));
        let name = "/dev/disk/by-path/ip-fd00::1:3260-iscsi-iqn.x:v-lun-0";
        assert_eq!(path("[fd00::1]:3260"), Path::new(name));
        let by_qemu = connection("192.0.2.1:3260", "iqn.x:v", IscsiClient::Qemu);
        assert_eq!(stable_path(&by_qemu), None);
    }

    #[test]
    fn what_would_lead_elsewhere_as_a_path_or_an_argument_is_refused() {
        for (portal, iqn) in [
            ("192.0.2.1:3260", "iqn.x/../../passwd"),
            ("192.0.2.1:3260", "--logout"),
            ("../192.0.2.1:3260", "iqn.x:v"),
            ("target.example:3260", "iqn.x:v"),
        ] {
            let connection = connection(portal, iqn, IscsiClient::Host);
            let refused = Login::new(&connection);
            assert!(matches!(refused, Err(AttachError::Refused(_))), "{portal} {iqn}");
        }
    }
}
