//! iSCSI by LIO, the kernel's target, written straight to configfs.
//!
//! ```text
//! <root>/core/iblock_<n>/volume-<id>          the bytes (fileio_<n> for files)
//! <root>/iscsi/<target>/tpgt_1/lun/lun_0      which bytes
//!                             /np/<portal>    where it listens
//!                             /acls/<name>    who may log in, with which password
//! ```
//!
//! A target is enabled last and disabled first, so a half-built one cannot be reached; each step
//! is left out if its result is there, so one that was cut off is finished by the next call. Every
//! session is the kernel's: the agent may go and come.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use stackhand_model::{Secret, VolumeId};

use super::{
    Admission, ExportError, Exporter, SeenAdmission, SeenTarget, Target, target_name, volume_of,
};

/// Where the kernel has its targets.
pub const ROOT: &str = "/sys/kernel/config/target";

/// Number of a volume at its target.
const LUN: u32 = 0;

/// Name of our links; the kernel does not mind which.
const LINK: &str = "volume";

/// Only who is named gets in, and only with a password. Without that, nothing is told to anybody.
const RULES: [(&str, &str); 5] = [
    ("authentication", "1"),
    ("generate_node_acls", "0"),
    ("cache_dynamic_acls", "0"),
    ("demo_mode_write_protect", "1"),
    ("demo_mode_discovery", "0"),
];

/// The kernel's targets.
#[derive(Debug)]
pub struct Lio {
    root: PathBuf,
    portals: Vec<SocketAddr>,
    /// Numbers of stores are chosen by looking: one change at a time.
    turn: Mutex<()>,
}

/// A backing store.
#[derive(Debug)]
struct Store {
    folder: PathBuf,
    path: Option<PathBuf>,
    fixed_bytes: Option<u64>,
    enabled: bool,
}

impl Lio {
    /// The targets under `root`. Each listens on all `portals`.
    #[must_use]
    pub fn new(root: &Path, portals: Vec<SocketAddr>) -> Self {
        Self { root: root.to_owned(), portals, turn: Mutex::new(()) }
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn core(&self) -> PathBuf {
        self.root.join("core")
    }

    fn target(&self, volume: VolumeId) -> PathBuf {
        self.root.join("iscsi").join(target_name(volume))
    }

    /// Makes sure that the kernel's parts are there.
    fn enter(&self) -> Result<(), ExportError> {
        if !self.core().is_dir() {
            let reason = format!(
                "{} is not there: modprobe -a target_core_mod target_core_iblock target_core_file \
                 iscsi_target_mod, and mount configfs",
                self.core().display()
            );
            return Err(ExportError::Away { reason });
        }
        Ok(())
    }

    /// The store of a volume, by its name.
    fn store(&self, volume: VolumeId) -> Result<Option<Store>, ExportError> {
        let name = format!("volume-{volume}");
        for plugin in list(&self.core())? {
            let folder = self.core().join(&plugin).join(&name);
            if folder.is_dir() {
                return read_store(folder).map(Some);
            }
        }
        Ok(None)
    }

    fn make_store(&self, target: &Target) -> Result<PathBuf, ExportError> {
        let (volume, path) = (target.volume, target.path.display().to_string());
        let store = match self.store(volume)? {
            Some(store) if store.fits(target) => store,
            Some(store) => {
                // It gives other bytes, or not enough: nothing may use it, so the target goes too.
                self.remove_target(volume)?;
                remove_store(&store.folder)?;
                self.add_store(target)?
            }
            None => self.add_store(target)?,
        };
        if !store.enabled {
            let control = if target.is_device {
                format!("udev_path={path}")
            } else {
                format!("fd_dev_name={path},fd_dev_size={}", target.bytes)
            };
            write(&store.folder.join("control"), &control)?;
            write(&store.folder.join("udev_path"), &path)?;
            write(&store.folder.join("enable"), "1")?;
        }
        if !self.target(volume).join("tpgt_1/lun").join(format!("lun_{LUN}")).join(LINK).exists() {
            write(&store.folder.join("wwn/vpd_unit_serial"), &volume.to_string())?;
            // No copying from LUN to LUN behind the backs of those who may see only one.
            write(&store.folder.join("attrib/emulate_3pc"), "0")?;
            for name in ["emulate_tpu", "emulate_tpws"] {
                // Refused by devices that cannot discard.
                if let Err(error) = write(&store.folder.join("attrib").join(name), "1") {
                    tracing::debug!(%volume, %error, "discards are not passed on");
                }
            }
        }
        Ok(store.folder)
    }

    fn add_store(&self, target: &Target) -> Result<Store, ExportError> {
        let taken: BTreeSet<u32> = list(&self.core())?
            .iter()
            .filter_map(|plugin| plugin.rsplit_once('_')?.1.parse().ok())
            .collect();
        let free = (0..).find(|number| !taken.contains(number)).unwrap_or(0);
        let kind = if target.is_device { "iblock" } else { "fileio" };
        let plugin = self.core().join(format!("{kind}_{free}"));
        make_folder(&plugin)?;
        let folder = plugin.join(format!("volume-{}", target.volume));
        make_folder(&folder)?;
        Ok(Store { folder, path: None, fixed_bytes: None, enabled: false })
    }

    fn admit(&self, group: &Path, name: &str, admission: &Admission) -> Result<(), ExportError> {
        let acl = group.join("acls").join(name);
        make_folder(&acl)?;
        for (file, value) in [("userid", &admission.user), ("password", &admission.password.0)] {
            let path = acl.join("auth").join(file);
            if read(&path)? != *value {
                write(&path, value)?;
            }
        }
        let unit = acl.join(format!("lun_{LUN}"));
        make_folder(&unit)?;
        if !has_link(&unit)? {
            link(&group.join("lun").join(format!("lun_{LUN}")), &unit.join(LINK))?;
        }
        let protect = if admission.read_only { "1" } else { "0" };
        let path = unit.join("write_protect");
        if read(&path)? == protect { Ok(()) } else { write(&path, protect) }
    }

    /// Ends an initiator's session, too.
    fn expel(acl: &Path) -> Result<(), ExportError> {
        for unit in list(acl)?.iter().filter(|name| name.starts_with("lun_")) {
            unlink_all(&acl.join(unit))?;
            remove_folder(&acl.join(unit))?;
        }
        remove_folder(acl)
    }

    fn remove_target(&self, volume: VolumeId) -> Result<(), ExportError> {
        let target = self.target(volume);
        if !target.exists() {
            return Ok(());
        }
        let group = target.join("tpgt_1");
        if group.exists() {
            if read(&group.join("enable"))? != "0" {
                write(&group.join("enable"), "0")?;
            }
            for name in list(&group.join("acls"))? {
                Self::expel(&group.join("acls").join(name))?;
            }
            for unit in list(&group.join("lun"))? {
                unlink_all(&group.join("lun").join(&unit))?;
                remove_folder(&group.join("lun").join(&unit))?;
            }
            for portal in list(&group.join("np"))? {
                remove_folder(&group.join("np").join(portal))?;
            }
            remove_folder(&group)?;
        }
        remove_folder(&target)
    }

    fn look(&self, volume: VolumeId, store: Option<&Store>) -> Result<SeenTarget, ExportError> {
        let group = self.target(volume).join("tpgt_1");
        if !group.exists() {
            return Ok(SeenTarget::default());
        }
        let unit = group.join("lun").join(format!("lun_{LUN}"));
        let linked = store.filter(|_| unit.exists()).filter(|store| {
            list(&unit).is_ok_and(|names| {
                names.iter().any(|name| leads_to(&unit.join(name), &store.folder))
            })
        });
        let mut seen = SeenTarget {
            path: linked.and_then(|store| store.path.clone()),
            fixed_bytes: linked.and_then(|store| store.fixed_bytes),
            ..SeenTarget::default()
        };
        let mut complete = linked.is_some_and(|store| store.enabled);
        for name in list(&group.join("acls"))? {
            let acl = group.join("acls").join(&name);
            let unit = acl.join(format!("lun_{LUN}"));
            complete &= unit.exists() && has_link(&unit)?;
            let write_protect = unit.join("write_protect");
            let read_only = write_protect.exists() && read(&write_protect)? == "1";
            if !read(&acl.join("info"))?.starts_with("No active") {
                seen.sessions.insert(name.clone());
            }
            let admission = SeenAdmission {
                user: Some(read(&acl.join("auth/userid"))?),
                password: Some(Secret(read(&acl.join("auth/password"))?)),
                read_only,
            };
            seen.admitted.insert(name, admission);
        }
        let listening = list(&group.join("np"))?;
        let wanted = self.portals.iter().map(SocketAddr::to_string);
        complete &= wanted.eq(listening.iter().cloned()) || {
            let listening: BTreeSet<String> = listening.into_iter().collect();
            listening == self.portals.iter().map(SocketAddr::to_string).collect()
        };
        for (name, value) in RULES {
            complete &= read(&group.join("attrib").join(name))? == value;
        }
        seen.complete = complete && read(&group.join("enable"))? == "1";
        Ok(seen)
    }
}

impl Store {
    /// Whether it gives the bytes that the target is to give.
    fn fits(&self, target: &Target) -> bool {
        let right_path = self.path.as_ref().is_none_or(|path| *path == target.path);
        right_path && self.fixed_bytes.is_none_or(|bytes| bytes >= target.bytes)
    }
}

impl Exporter for Lio {
    fn observe(&self) -> Result<BTreeMap<VolumeId, SeenTarget>, ExportError> {
        self.enter()?;
        let mut stores = BTreeMap::new();
        for plugin in list(&self.core())? {
            let plugin = self.core().join(plugin);
            for name in list(&plugin)? {
                let Some(volume) = name.strip_prefix("volume-").and_then(|id| id.parse().ok())
                else {
                    continue;
                };
                stores.insert(volume, read_store(plugin.join(&name))?);
            }
        }
        let iscsi = self.root.join("iscsi");
        let mut targets = BTreeMap::new();
        if iscsi.exists() {
            for volume in list(&iscsi)?.iter().filter_map(|name| volume_of(name)) {
                targets.insert(volume, self.look(volume, stores.get(&volume))?);
            }
        }
        // A store without a target was left by a call that was cut off.
        for &volume in stores.keys() {
            targets.entry(volume).or_default();
        }
        Ok(targets)
    }

    fn publish(&self, target: &Target) -> Result<(), ExportError> {
        let _turn = self.turn();
        self.enter()?;
        let store = self.make_store(target)?;
        // The kernel loads its iSCSI part when this is made.
        make_folder(&self.root.join("iscsi"))?;
        let folder = self.target(target.volume);
        make_folder(&folder)?;
        let group = folder.join("tpgt_1");
        make_folder(&group)?;
        for (name, value) in RULES {
            let path = group.join("attrib").join(name);
            if read(&path)? != value {
                write(&path, value)?;
            }
        }
        for name in list(&group.join("acls"))? {
            if !target.admitted.contains_key(&name) {
                Self::expel(&group.join("acls").join(name))?;
            }
        }
        let unit = group.join("lun").join(format!("lun_{LUN}"));
        make_folder(&unit)?;
        if !has_link(&unit)? {
            link(&store, &unit.join(LINK))?;
        }
        for portal in &self.portals {
            make_folder(&group.join("np").join(portal.to_string()))?;
        }
        for (name, admission) in &target.admitted {
            self.admit(&group, name, admission)?;
        }
        if read(&group.join("enable"))? == "1" { Ok(()) } else { write(&group.join("enable"), "1") }
    }

    fn withdraw(&self, volume: VolumeId) -> Result<(), ExportError> {
        let _turn = self.turn();
        self.enter()?;
        self.remove_target(volume)?;
        self.store(volume)?.map_or(Ok(()), |store| remove_store(&store.folder))
    }

    fn portals(&self) -> &[SocketAddr] {
        &self.portals
    }

    fn lun(&self) -> u32 {
        LUN
    }
}

fn read_store(folder: PathBuf) -> Result<Store, ExportError> {
    let path = read(&folder.join("udev_path"))?;
    let enabled = read(&folder.join("enable"))? == "1";
    let is_file = folder
        .parent()
        .and_then(Path::file_name)
        .is_some_and(|plugin| plugin.to_string_lossy().starts_with("fileio_"));
    let fixed_bytes = if is_file && enabled {
        // "… File: <path>  Size: <bytes>  Mode: …"
        let info = read(&folder.join("info"))?;
        info.split("Size: ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok())
    } else {
        None
    };
    let path = (!path.is_empty()).then(|| path.into());
    Ok(Store { folder, path, fixed_bytes, enabled })
}

fn remove_store(folder: &Path) -> Result<(), ExportError> {
    remove_folder(folder)?;
    // The kernel keeps one folder for each store.
    folder.parent().map_or(Ok(()), remove_folder)
}

// configfs: folders, links and single writes are its whole language. ---------------------------

fn failed<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> ExportError + use<'a> {
    move |source| ExportError::Io { action, path: path.to_owned(), source }
}

fn make_folder(path: &Path) -> Result<(), ExportError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map_err(failed("make", path)),
    }
}

fn remove_folder(path: &Path) -> Result<(), ExportError> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(failed("remove", path)),
    }
}

fn link(to: &Path, path: &Path) -> Result<(), ExportError> {
    symlink(to, path).map_err(failed("link", path))
}

/// Names of the folders and links in a folder; attributes, which are files, left out.
fn list(folder: &Path) -> Result<Vec<String>, ExportError> {
    let names = || {
        let mut names = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if !entry.file_type()?.is_file()
                && let Ok(name) = entry.file_name().into_string()
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    };
    names().map_err(failed("list", folder))
}

fn links(folder: &Path) -> Result<Vec<PathBuf>, ExportError> {
    let names = list(folder)?;
    Ok(names.iter().map(|name| folder.join(name)).filter(|path| path.is_symlink()).collect())
}

fn has_link(folder: &Path) -> Result<bool, ExportError> {
    Ok(!links(folder)?.is_empty())
}

fn unlink_all(folder: &Path) -> Result<(), ExportError> {
    links(folder)?.iter().try_for_each(|path| fs::remove_file(path).map_err(failed("unlink", path)))
}

fn leads_to(link: &Path, folder: &Path) -> bool {
    match (fs::canonicalize(link), fs::canonicalize(folder)) {
        (Ok(found), Ok(wanted)) => found == wanted,
        _ => false,
    }
}

/// An attribute's value, without the line end.
fn read(path: &Path) -> Result<String, ExportError> {
    let text = fs::read(path).map_err(failed("read", path))?;
    Ok(String::from_utf8_lossy(&text).trim().to_owned())
}

/// One write, as configfs wants it. Without a line end: it would become part of a password.
fn write(path: &Path, value: &str) -> Result<(), ExportError> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(failed("write", path))
}
