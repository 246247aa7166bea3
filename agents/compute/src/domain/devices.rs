//! The elements of disks and network devices: in a domain, or alone to be plugged in.

use std::path::Path;

use serde::Serialize;
use stackhand_image::driver;
use stackhand_model::Connection;

use super::xml::{Empty, ModelType};
use super::{Blueprint, Disk, DiskSource, Nic, secret_id};

#[derive(Serialize)]
#[serde(rename = "disk")]
pub(super) struct DiskElement {
    #[serde(rename = "@type")]
    kind: &'static str,
    #[serde(rename = "@device")]
    device: &'static str,
    driver: Driver,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<Source>,
    #[serde(rename = "backingStore", skip_serializing_if = "Option::is_none")]
    backing: Option<Backing>,
    target: DiskTarget,
    #[serde(skip_serializing_if = "Option::is_none")]
    readonly: Option<Empty>,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    boot: Option<Boot>,
}

#[derive(Serialize)]
struct Driver {
    #[serde(rename = "@name")]
    name: &'static str,
    #[serde(rename = "@type")]
    format: &'static str,
    #[serde(rename = "@cache", skip_serializing_if = "Option::is_none")]
    cache: Option<String>,
    #[serde(rename = "@discard", skip_serializing_if = "Option::is_none")]
    discard: Option<&'static str>,
}

#[derive(Serialize, Default)]
struct Source {
    #[serde(rename = "@file", skip_serializing_if = "Option::is_none")]
    file: Option<String>,
    #[serde(rename = "@dev", skip_serializing_if = "Option::is_none")]
    dev: Option<String>,
    #[serde(rename = "@protocol", skip_serializing_if = "Option::is_none")]
    protocol: Option<&'static str>,
    #[serde(rename = "@name", skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<Host>,
    #[serde(skip_serializing_if = "Option::is_none")]
    auth: Option<Auth>,
    #[serde(skip_serializing_if = "Option::is_none")]
    initiator: Option<Initiator>,
}

#[derive(Serialize)]
struct Host {
    #[serde(rename = "@name")]
    name: String,
    #[serde(rename = "@port")]
    port: String,
}

#[derive(Serialize)]
struct Auth {
    #[serde(rename = "@username")]
    username: String,
    secret: SecretReference,
}

#[derive(Serialize)]
struct SecretReference {
    #[serde(rename = "@type")]
    kind: &'static str,
    #[serde(rename = "@uuid")]
    uuid: String,
}

#[derive(Serialize)]
struct Initiator {
    iqn: Named,
}

#[derive(Serialize)]
struct Named {
    #[serde(rename = "@name")]
    name: String,
}

/// What lies below an overlay, told so that nobody guesses formats.
#[derive(Serialize)]
struct Backing {
    #[serde(rename = "@type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<Format>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<Source>,
    /// An empty one says that the chain ends.
    #[serde(rename = "backingStore", skip_serializing_if = "Option::is_none")]
    end: Option<Empty>,
}

#[derive(Serialize)]
struct Format {
    #[serde(rename = "@type")]
    kind: &'static str,
}

#[derive(Serialize)]
struct DiskTarget {
    #[serde(rename = "@dev")]
    dev: String,
    #[serde(rename = "@bus")]
    bus: &'static str,
}

#[derive(Serialize)]
struct Boot {
    #[serde(rename = "@order")]
    order: u32,
}

#[derive(Serialize)]
#[serde(rename = "interface")]
pub(super) struct Interface {
    #[serde(rename = "@type")]
    kind: &'static str,
    mac: Mac,
    target: Tap,
    model: ModelType,
    #[serde(skip_serializing_if = "Option::is_none")]
    driver: Option<Queues>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<Mtu>,
}

#[derive(Serialize)]
struct Mac {
    #[serde(rename = "@address")]
    address: String,
}

#[derive(Serialize)]
struct Tap {
    #[serde(rename = "@dev")]
    dev: String,
    #[serde(rename = "@managed")]
    managed: &'static str,
}

#[derive(Serialize)]
struct Queues {
    #[serde(rename = "@queues")]
    queues: u16,
}

#[derive(Serialize)]
struct Mtu {
    #[serde(rename = "@size")]
    size: u32,
}

impl Source {
    fn file(path: &Path) -> Self {
        Self { file: Some(path.to_string_lossy().into_owned()), ..Self::default() }
    }
}

impl DiskElement {
    pub(super) fn new(disk: &Disk, blueprint: &Blueprint) -> Self {
        let mut backing = None;
        let (kind, format, source) = match &disk.source {
            DiskSource::Overlay { path, base, base_format } => {
                backing = Some(Backing {
                    kind: Some("file"),
                    format: Some(Format { kind: driver(*base_format) }),
                    source: Some(Source::file(base)),
                    end: Some(Empty {}),
                });
                ("file", "qcow2", Source::file(path))
            }
            DiskSource::File(path) | DiskSource::Cd(path) | DiskSource::VirtioCd(path) => {
                ("file", "raw", Source::file(path))
            }
            DiskSource::Volume(Connection::File { path, format }) => {
                ("file", driver(*format), Source::file(path))
            }
            DiskSource::Volume(Connection::Block { path }) => {
                let dev = Some(path.to_string_lossy().into_owned());
                ("block", "raw", Source { dev, ..Source::default() })
            }
            DiskSource::Volume(iscsi @ Connection::Iscsi { .. }) => {
                ("network", "raw", Self::iscsi(disk, iscsi))
            }
        };
        let (device, bus) = match disk.source {
            DiskSource::Cd(_) => ("cdrom", "sata"),
            DiskSource::VirtioCd(_) => ("cdrom", "scsi"),
            _ => ("disk", "virtio"),
        };
        let is_disk = device == "disk";
        Self {
            kind,
            device,
            driver: Driver {
                name: "qemu",
                format,
                cache: is_disk.then(|| blueprint.disk_cache.clone()),
                discard: is_disk.then_some("unmap"),
            },
            source: Some(source),
            backing,
            target: DiskTarget { dev: disk.target.clone(), bus },
            readonly: (disk.read_only || !is_disk).then_some(Empty {}),
            serial: disk.serial.map(|volume| volume.to_string()),
            boot: disk.boot.map(|order| Boot { order }),
        }
    }

    fn iscsi(disk: &Disk, connection: &Connection) -> Source {
        let Connection::Iscsi { portal, iqn, lun, initiator, username, password, .. } = connection
        else {
            return Source::default();
        };
        let (host, port) = portal.rsplit_once(':').unwrap_or((portal.as_str(), "3260"));
        let secret = disk.serial.filter(|_| password.is_some());
        Source {
            protocol: Some("iscsi"),
            name: Some(format!("{iqn}/{lun}")),
            host: Some(Host {
                name: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
                port: port.to_owned(),
            }),
            auth: username.clone().zip(secret).map(|(username, volume)| Auth {
                username,
                secret: SecretReference { kind: "iscsi", uuid: secret_id(volume).to_string() },
            }),
            initiator: initiator.clone().map(|name| Initiator { iqn: Named { name } }),
            ..Source::default()
        }
    }
}

impl Interface {
    pub(super) fn new(nic: &Nic) -> Self {
        Self {
            kind: "ethernet",
            mac: Mac { address: nic.mac.to_string() },
            target: Tap { dev: nic.tap.clone(), managed: "no" },
            model: ModelType { kind: "virtio" },
            driver: (nic.queues > 1).then_some(Queues { queues: nic.queues }),
            mtu: nic.mtu.map(|size| Mtu { size }),
        }
    }
}
