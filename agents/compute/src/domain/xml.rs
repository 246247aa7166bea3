//! The elements of libvirt's domain XML that we use. Field order is element order.

use serde::Serialize;
use stackhand_model::{Connection, FileFormat};

use super::{Blueprint, Disk, DiskSource, Engine, Mark, NAMESPACE, Nic, domain_name};

#[derive(Serialize)]
#[serde(rename = "domain")]
pub(super) struct Domain {
    #[serde(rename = "@type")]
    engine: &'static str,
    name: String,
    uuid: String,
    metadata: Metadata,
    memory: Memory,
    vcpu: u32,
    os: Os,
    features: Features,
    cpu: Cpu,
    clock: Clock,
    on_poweroff: &'static str,
    on_reboot: &'static str,
    on_crash: &'static str,
    devices: Devices,
}

#[derive(Serialize)]
struct Metadata {
    #[serde(rename = "stackhand:instance")]
    instance: MarkElement,
}

#[derive(Serialize)]
struct MarkElement {
    #[serde(rename = "@xmlns:stackhand")]
    namespace: &'static str,
    #[serde(rename = "@id")]
    id: String,
    #[serde(rename = "@generation")]
    generation: u64,
    #[serde(rename = "@definition")]
    definition: String,
}

#[derive(Serialize)]
struct Memory {
    #[serde(rename = "@unit")]
    unit: &'static str,
    #[serde(rename = "$text")]
    amount: u64,
}

#[derive(Serialize)]
struct Os {
    #[serde(rename = "type")]
    kind: OsType,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    initrd: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cmdline: Option<String>,
}

#[derive(Serialize)]
struct OsType {
    #[serde(rename = "@arch")]
    arch: &'static str,
    #[serde(rename = "@machine")]
    machine: String,
    #[serde(rename = "$text")]
    kind: &'static str,
}

/// An element without contents.
#[derive(Serialize)]
struct Empty {}

#[derive(Serialize)]
struct Features {
    acpi: Empty,
    apic: Empty,
}

#[derive(Serialize)]
struct Cpu {
    #[serde(rename = "@mode")]
    mode: &'static str,
    topology: Topology,
}

#[derive(Serialize)]
struct Topology {
    #[serde(rename = "@sockets")]
    sockets: u32,
    #[serde(rename = "@cores")]
    cores: u32,
    #[serde(rename = "@threads")]
    threads: u32,
}

#[derive(Serialize)]
struct Clock {
    #[serde(rename = "@offset")]
    offset: &'static str,
}

#[derive(Serialize)]
struct Devices {
    disk: Vec<DiskElement>,
    controller: Vec<Controller>,
    interface: Vec<Interface>,
    serial: Serial,
    console: Console,
    #[serde(skip_serializing_if = "Option::is_none")]
    input: Option<Input>,
    #[serde(skip_serializing_if = "Option::is_none")]
    graphics: Option<Graphics>,
    video: Video,
    memballoon: Model,
    rng: Rng,
}

#[derive(Serialize)]
struct DiskElement {
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
    #[serde(rename = "@cache")]
    cache: String,
    #[serde(rename = "@discard")]
    discard: &'static str,
}

#[derive(Serialize, Default)]
struct Source {
    #[serde(rename = "@file", skip_serializing_if = "Option::is_none")]
    file: Option<String>,
    #[serde(rename = "@dev", skip_serializing_if = "Option::is_none")]
    dev: Option<String>,
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
struct Controller {
    #[serde(rename = "@type")]
    kind: &'static str,
    #[serde(rename = "@model")]
    model: &'static str,
}

#[derive(Serialize)]
struct Interface {
    #[serde(rename = "@type")]
    kind: &'static str,
    mac: Mac,
    target: Tap,
    model: ModelType,
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
struct ModelType {
    #[serde(rename = "@type")]
    kind: &'static str,
}

#[derive(Serialize)]
struct Mtu {
    #[serde(rename = "@size")]
    size: u32,
}

#[derive(Serialize)]
struct Serial {
    #[serde(rename = "@type")]
    kind: &'static str,
    log: Log,
    target: SerialTarget,
}

#[derive(Serialize)]
struct Log {
    #[serde(rename = "@file")]
    file: String,
    #[serde(rename = "@append")]
    append: &'static str,
}

#[derive(Serialize)]
struct SerialTarget {
    #[serde(rename = "@type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    #[serde(rename = "@port")]
    port: u32,
}

#[derive(Serialize)]
struct Console {
    #[serde(rename = "@type")]
    kind: &'static str,
    target: SerialTarget,
}

#[derive(Serialize)]
struct Input {
    #[serde(rename = "@type")]
    kind: &'static str,
    #[serde(rename = "@bus")]
    bus: &'static str,
}

#[derive(Serialize)]
struct Graphics {
    #[serde(rename = "@type")]
    kind: &'static str,
    #[serde(rename = "@autoport")]
    autoport: &'static str,
    #[serde(rename = "@listen")]
    listen: &'static str,
}

#[derive(Serialize)]
struct Video {
    model: ModelType,
}

#[derive(Serialize)]
struct Model {
    #[serde(rename = "@model")]
    model: &'static str,
}

#[derive(Serialize)]
struct Rng {
    #[serde(rename = "@model")]
    model: &'static str,
    backend: RngBackend,
}

#[derive(Serialize)]
struct RngBackend {
    #[serde(rename = "@model")]
    model: &'static str,
    #[serde(rename = "$text")]
    device: &'static str,
}

impl Domain {
    pub(super) fn new(blueprint: &Blueprint, mark: &Mark) -> Self {
        let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
        let kernel = blueprint.kernel.as_ref();
        Self {
            engine: blueprint.engine.as_str(),
            name: domain_name(blueprint.id),
            uuid: blueprint.id.to_string(),
            metadata: Metadata {
                instance: MarkElement {
                    namespace: NAMESPACE,
                    id: mark.id.to_string(),
                    generation: mark.generation,
                    definition: mark.definition.clone(),
                },
            },
            memory: Memory { unit: "MiB", amount: blueprint.memory_mib },
            vcpu: blueprint.vcpus,
            os: Os {
                kind: OsType {
                    arch: std::env::consts::ARCH,
                    machine: blueprint.machine.clone(),
                    kind: "hvm",
                },
                kernel: kernel.map(|boot| path(&boot.kernel)),
                initrd: kernel.and_then(|boot| boot.ramdisk.as_deref().map(path)),
                cmdline: kernel.and_then(|boot| boot.command_line.clone()),
            },
            features: Features { acpi: Empty {}, apic: Empty {} },
            cpu: Cpu {
                mode: match blueprint.engine {
                    Engine::Kvm => "host-model",
                    Engine::Qemu => "maximum",
                },
                topology: Topology { sockets: blueprint.vcpus, cores: 1, threads: 1 },
            },
            clock: Clock { offset: "utc" },
            on_poweroff: "destroy",
            on_reboot: "restart",
            on_crash: "destroy",
            devices: Devices {
                disk: blueprint
                    .disks
                    .iter()
                    .map(|disk| DiskElement::new(disk, blueprint))
                    .collect(),
                controller: if blueprint.vnc {
                    vec![]
                } else {
                    vec![Controller { kind: "usb", model: "none" }]
                },
                interface: blueprint.nics.iter().map(Interface::new).collect(),
                serial: Serial {
                    kind: "pty",
                    log: Log { file: path(&blueprint.console_log), append: "off" },
                    target: SerialTarget { kind: Some("isa-serial"), port: 0 },
                },
                console: Console {
                    kind: "pty",
                    target: SerialTarget { kind: Some("serial"), port: 0 },
                },
                input: blueprint.vnc.then_some(Input { kind: "tablet", bus: "usb" }),
                graphics: blueprint.vnc.then_some(Graphics {
                    kind: "vnc",
                    autoport: "yes",
                    listen: "127.0.0.1",
                }),
                video: Video {
                    model: ModelType { kind: if blueprint.vnc { "vga" } else { "none" } },
                },
                memballoon: Model { model: "virtio" },
                rng: Rng {
                    model: "virtio",
                    backend: RngBackend { model: "random", device: "/dev/urandom" },
                },
            },
        }
    }
}

impl DiskElement {
    fn new(disk: &Disk, blueprint: &Blueprint) -> Self {
        let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
        let file = |path| Source { file: Some(text(path)), dev: None };
        let (kind, format, source, backing) = match &disk.source {
            DiskSource::Overlay { path, base, base_format } => {
                let backing = Backing {
                    kind: Some("file"),
                    format: Some(Format { kind: format_name(*base_format) }),
                    source: Some(file(base)),
                    end: Some(Empty {}),
                };
                ("file", "qcow2", Some(file(path)), Some(backing))
            }
            DiskSource::Volume(Connection::File { path, format }) => {
                ("file", format_name(*format), Some(file(path)), None)
            }
            DiskSource::Volume(Connection::Block { path }) => {
                ("block", "raw", Some(Source { file: None, dev: Some(text(path)) }), None)
            }
            // Refused before a blueprint is made; an empty disk is refused by libvirt.
            DiskSource::Volume(Connection::Iscsi { .. }) => ("network", "raw", None, None),
        };
        Self {
            kind,
            device: "disk",
            driver: Driver {
                name: "qemu",
                format,
                cache: blueprint.disk_cache.clone(),
                discard: "unmap",
            },
            source,
            backing,
            target: DiskTarget { dev: disk.target.clone(), bus: "virtio" },
            serial: disk.serial.map(|volume| volume.to_string()),
            boot: disk.boot.then_some(Boot { order: 1 }),
        }
    }
}

impl Interface {
    fn new(nic: &Nic) -> Self {
        Self {
            kind: "ethernet",
            mac: Mac { address: nic.mac.to_string() },
            target: Tap { dev: nic.tap.clone(), managed: "no" },
            model: ModelType { kind: "virtio" },
            mtu: nic.mtu.map(|size| Mtu { size }),
        }
    }
}

fn format_name(format: FileFormat) -> &'static str {
    match format {
        FileFormat::Raw => "raw",
        FileFormat::Qcow2 => "qcow2",
    }
}
