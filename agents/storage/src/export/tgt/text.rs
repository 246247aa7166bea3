//! Reading what tgtd shows of its targets: indented text made for people.

use std::collections::BTreeSet;
use std::path::PathBuf;

use stackhand_model::VolumeId;

use super::LUN;

/// One target as tgtd shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) id: i32,
    pub(super) name: String,
    /// Initiators that are logged in.
    pub(super) sessions: BTreeSet<String>,
    /// The LUN that we use.
    pub(super) unit: Option<Unit>,
    pub(super) users: BTreeSet<String>,
    pub(super) initiators: BTreeSet<String>,
}

/// A LUN with bytes behind it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) path: PathBuf,
    serial: String,
    /// In millions of bytes, rounded down.
    megabytes: u64,
    pub(super) online: bool,
    pub(super) read_only: bool,
}

impl Unit {
    /// Whether it tells initiators that it is this volume.
    pub(super) fn is_ours(&self, volume: VolumeId) -> bool {
        self.serial == volume.to_string()
    }

    /// The most bytes that it can have, as far as is shown.
    pub(super) fn most_bytes(&self) -> u64 {
        self.megabytes.saturating_mul(1_000_000).saturating_add(999_999)
    }
}

/// Reads the list. What is not understood is passed over: an incomplete target is made anew.
pub(super) fn parse(text: &str) -> Vec<Shown> {
    let mut targets: Vec<Shown> = Vec::new();
    let mut section = "";
    let mut unit: Option<u32> = None;
    for line in text.lines() {
        let indent = line.len() - line.trim_start().len();
        let line = line.trim();
        if indent == 0 {
            if let Some((id, name)) =
                line.strip_prefix("Target ").and_then(|line| line.split_once(": "))
            {
                let id = id.parse().unwrap_or_default();
                targets.push(Shown { id, name: name.to_owned(), ..Shown::default() });
                (section, unit) = ("", None);
            }
            continue;
        }
        let Some(target) = targets.last_mut() else { continue };
        if indent == 4 {
            section = line;
            continue;
        }
        let value = |key: &str| line.strip_prefix(key).map(str::trim);
        match section {
            "I_T nexus information:" => {
                if let Some(initiator) = value("Initiator:") {
                    let name = initiator.split(" alias:").next().unwrap_or(initiator);
                    target.sessions.insert(name.to_owned());
                }
            }
            "LUN information:" => {
                if let Some(number) = value("LUN:") {
                    unit = number.parse().ok();
                    if unit == Some(LUN) {
                        target.unit = Some(Unit::default());
                    }
                }
                let Some(found) = target.unit.as_mut().filter(|_| unit == Some(LUN)) else {
                    continue;
                };
                if let Some(serial) = value("SCSI SN:") {
                    serial.clone_into(&mut found.serial);
                } else if let Some(path) = value("Backing store path:") {
                    found.path = path.into();
                } else if let Some(online) = value("Online:") {
                    found.online = online == "Yes";
                } else if let Some(read_only) = value("Readonly:") {
                    found.read_only = read_only == "Yes";
                } else if let Some(size) = value("Size:") {
                    let number = size.split(' ').next().and_then(|number| number.parse().ok());
                    found.megabytes = number.unwrap_or(0);
                }
            }
            "Account information:" => drop(target.users.insert(line.to_owned())),
            "ACL information:" => drop(target.initiators.insert(line.to_owned())),
            _ => {}
        }
    }
    targets
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As tgtd 1.0.85 shows it.
    const SHOWN: &str = "\
Target 1: iqn.2026-11.org.stackhand:volume-00000000-0000-0000-0000-000000000001
    System information:
        Driver: iscsi
        State: ready
    I_T nexus information:
        I_T nexus: 2
            Initiator: iqn.x:good alias: none
            Connection: 0
                IP Address: 127.0.0.1
    LUN information:
        LUN: 0
            Type: controller
            SCSI SN: beaf10
            Size: 0 MB, Block size: 1
            Online: Yes
            Readonly: No
            Backing store path: None
        LUN: 1
            Type: disk
            SCSI ID: 00000000-0000-0000-0000-000000000001
            SCSI SN: 00000000-0000-0000-0000-000000000001
            Size: 67 MB, Block size: 512
            Online: Yes
            Readonly: Yes
            Backing store type: rdwr
            Backing store path: /srv/volumes/volume-1
            Backing store flags: 
    Account information:
        u1
        u2
    ACL information:
        iqn.x:good
Target 4: iqn.2010-10.org.openstack:volume-2
    System information:
        Driver: iscsi
";

    #[test]
    fn targets_are_read_with_their_lun_sessions_and_who_may_log_in() {
        let targets = parse(SHOWN);
        assert_eq!(targets.len(), 2);
        let one = &targets[0];
        assert_eq!((one.id, one.name.len()), (1, 69));
        assert_eq!(one.sessions, ["iqn.x:good".to_owned()].into());
        assert_eq!(one.users, ["u1", "u2"].map(str::to_owned).into());
        assert_eq!(one.initiators, ["iqn.x:good".to_owned()].into());
        let unit = one.unit.as_ref().unwrap();
        assert_eq!(unit.path, PathBuf::from("/srv/volumes/volume-1"));
        assert!(unit.online && unit.read_only);
        assert!(unit.is_ours(VolumeId(uuid::Uuid::from_u128(1))));
        assert_eq!(unit.most_bytes(), 67_999_999);
        assert_eq!(targets[1], Shown { id: 4, name: targets[1].name.clone(), ..Shown::default() });
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn any_text_is_read_without_a_panic(text in "(\\PC|\n|    |Target 1: |LUN: 1|Size:){0,60}") {
            parse(&text);
        }
    }
}
