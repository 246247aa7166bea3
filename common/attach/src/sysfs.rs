//! Sessions and their devices as the kernel shows them.

use std::fs;
use std::path::{Path, PathBuf};

use stackhand_model::VolumeId;

use super::{AttachError, failed};

/// The kernel's tree.
#[derive(Debug)]
pub(super) struct Sysfs {
    root: PathBuf,
}

/// A session with a target.
#[derive(Debug)]
pub(super) struct Session {
    /// Its folder; below it are its targets and devices.
    folder: PathBuf,
    /// Number of the host adapter that it is.
    host: u32,
}

/// A SCSI device: one LUN of a session.
#[derive(Debug)]
pub(super) struct Device {
    folder: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self { root: "/sys".into() }
    }
}

impl Sysfs {
    /// The session with a target, if there is one.
    pub(super) fn session(&self, target: &str) -> Result<Option<Session>, AttachError> {
        let sessions = self.root.join("class/iscsi_session");
        for name in names(&sessions)? {
            let session = sessions.join(&name);
            let found = fs::read_to_string(session.join("targetname")).unwrap_or_default();
            if found.trim() != target {
                continue;
            }
            let folder = session.join("device");
            let folder = fs::canonicalize(&folder).map_err(failed("find", &folder))?;
            let host = folder
                .ancestors()
                .filter_map(|it| it.file_name()?.to_str()?.strip_prefix("host")?.parse().ok())
                .next();
            return match host {
                Some(host) => Ok(Some(Session { folder, host })),
                None => Err(AttachError::Refused(format!(
                    "{} belongs to no host adapter",
                    folder.display()
                ))),
            };
        }
        Ok(None)
    }

    /// Folders of the devices of a session.
    fn devices(session: &Session) -> Result<Vec<PathBuf>, AttachError> {
        let mut found = Vec::new();
        for target in names(&session.folder)?.iter().filter(|name| name.starts_with("target")) {
            let target = session.folder.join(target);
            found.extend(
                names(&target)?
                    .iter()
                    .filter(|name| name.split(':').count() == 4)
                    .map(|name| target.join(name))
                    .filter(|device| device.join("block").exists()),
            );
        }
        Ok(found)
    }

    pub(super) fn has_devices(&self, session: &Session) -> Result<bool, AttachError> {
        Ok(!Self::devices(session)?.is_empty())
    }

    /// The device of a LUN, if it is there.
    pub(super) fn device(
        &self,
        session: &Session,
        lun: u32,
    ) -> Result<Option<Device>, AttachError> {
        let number = format!(":{lun}");
        let device = Self::devices(session)?
            .into_iter()
            .find(|device| device.to_string_lossy().ends_with(&number));
        Ok(device.map(|folder| Device { folder }))
    }

    /// Asks the kernel to look for one LUN of one session.
    pub(super) fn scan(&self, session: &Session, lun: u32) -> Result<(), AttachError> {
        let path = self.root.join(format!("class/scsi_host/host{}/scan", session.host));
        fs::write(&path, format!("0 0 {lun}")).map_err(failed("write", &path))
    }

    /// The path of a device that says it is the volume.
    pub(super) fn verified(
        &self,
        device: &Device,
        volume: VolumeId,
    ) -> Result<PathBuf, AttachError> {
        let page = device.folder.join("vpd_pg80");
        let serial = fs::read(&page).map_err(failed("read", &page))?;
        let serial = serial_of(&serial);
        if serial != volume.to_string() {
            return Err(AttachError::Refused(format!(
                "{} says that it is {serial:?} and not volume {volume}: it is not touched; log out \
                 of its target, then try again",
                device.folder.display()
            )));
        }
        let block = device.folder.join("block");
        match names(&block)?.first() {
            Some(name) => Ok(Path::new("/dev").join(name)),
            None => Err(AttachError::Refused(format!("{} has no device", block.display()))),
        }
    }

    pub(super) fn remove(&self, device: &Device) -> Result<(), AttachError> {
        let path = device.folder.join("delete");
        fs::write(&path, "1").map_err(failed("write", &path))
    }

    pub(super) fn rescan(&self, device: &Device) -> Result<(), AttachError> {
        let path = device.folder.join("rescan");
        fs::write(&path, "1").map_err(failed("write", &path))
    }
}

/// The serial number in SCSI's page 0x80: four bytes of head, then text.
fn serial_of(page: &[u8]) -> String {
    let length = page.get(2..4).map_or(0, |it| usize::from(it[0]) << 8 | usize::from(it[1]));
    let text = page.get(4..).unwrap_or_default();
    String::from_utf8_lossy(&text[..length.min(text.len())])
        .trim_matches(|letter: char| letter == '\0' || letter.is_whitespace())
        .to_owned()
}

/// Names in a folder; none if it is not there.
fn names(folder: &Path) -> Result<Vec<String>, AttachError> {
    match fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(vec![]),
        Err(source) => Err(failed("list", folder)(source)),
        Ok(entries) => {
            let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
            let mut names: Vec<String> = names.collect();
            names.sort();
            Ok(names)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOLUME: &str = "00000000-0000-0000-0000-000000000001";

    /// A kernel with one session of one LUN.
    fn tree(serial: &str) -> (tempfile::TempDir, Sysfs) {
        let root = tempfile::tempdir().unwrap();
        let device = root.path().join("devices/host3/session1/target3:0:0/3:0:0:1");
        fs::create_dir_all(device.join("block/sdc")).unwrap();
        let length = u8::try_from(serial.len()).unwrap();
        fs::write(device.join("vpd_pg80"), [&[0, 0x80, 0, length], serial.as_bytes()].concat())
            .unwrap();
        let class = root.path().join("class/iscsi_session/session1");
        fs::create_dir_all(&class).unwrap();
        fs::write(class.join("targetname"), "iqn.x:volume-1\n").unwrap();
        std::os::unix::fs::symlink(
            root.path().join("devices/host3/session1"),
            class.join("device"),
        )
        .unwrap();
        let sysfs = Sysfs { root: root.path().to_owned() };
        (root, sysfs)
    }

    #[test]
    fn a_device_is_found_by_its_target_and_lun_and_believed_by_its_serial() {
        let (_root, sysfs) = tree(VOLUME);
        assert!(sysfs.session("iqn.x:volume-2").unwrap().is_none());
        let session = sysfs.session("iqn.x:volume-1").unwrap().unwrap();
        assert_eq!(session.host, 3);
        assert!(sysfs.device(&session, 0).unwrap().is_none());
        let device = sysfs.device(&session, 1).unwrap().unwrap();
        let path = sysfs.verified(&device, VOLUME.parse().unwrap()).unwrap();
        assert_eq!(path, Path::new("/dev/sdc"));
    }

    #[test]
    fn a_device_of_another_volume_is_refused() {
        let (_root, sysfs) = tree("somebody-elses");
        let session = sysfs.session("iqn.x:volume-1").unwrap().unwrap();
        let device = sysfs.device(&session, 1).unwrap().unwrap();
        let refused = sysfs.verified(&device, VOLUME.parse().unwrap()).unwrap_err().to_string();
        assert!(refused.contains("\"somebody-elses\" and not volume"), "{refused}");
    }

    #[test]
    fn a_damaged_page_is_no_serial() {
        assert_eq!(serial_of(&[]), "");
        assert_eq!(serial_of(&[0, 0x80, 0xff, 0xff, b'a']), "a");
    }
}
