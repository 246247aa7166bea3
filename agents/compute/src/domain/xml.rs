//! The elements of libvirt's domain XML that we use. Field order is element order.

use serde::Serialize;
use stackhand_model::{CpuMode, Firmware};

use super::devices::{DiskElement, Interface};
use super::{Blueprint, Disk, DiskSource, Engine, Mark, NAMESPACE, domain_name};

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
    sysinfo: Sysinfo,
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
    #[serde(rename = "@core")]
    core: String,
}

#[derive(Serialize)]
struct Memory {
    #[serde(rename = "@unit")]
    unit: &'static str,
    #[serde(rename = "$text")]
    amount: u64,
}

/// What the firmware tells a guest of its machine.
#[derive(Serialize)]
struct Sysinfo {
    #[serde(rename = "@type")]
    kind: &'static str,
    system: SysinfoSystem,
}

#[derive(Serialize)]
struct SysinfoSystem {
    entry: Vec<SysinfoEntry>,
}

#[derive(Serialize)]
struct SysinfoEntry {
    #[serde(rename = "@name")]
    name: &'static str,
    #[serde(rename = "$text")]
    value: String,
}

#[derive(Serialize)]
struct Smbios {
    #[serde(rename = "@mode")]
    mode: &'static str,
}

#[derive(Serialize)]
struct Os {
    #[serde(rename = "@firmware", skip_serializing_if = "Option::is_none")]
    firmware: Option<&'static str>,
    #[serde(rename = "type")]
    kind: OsType,
    #[serde(rename = "firmware", skip_serializing_if = "Option::is_none")]
    features: Option<FirmwareFeatures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    initrd: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cmdline: Option<String>,
    smbios: Smbios,
}

#[derive(Serialize)]
struct FirmwareFeatures {
    feature: FirmwareFeature,
}

#[derive(Serialize)]
struct FirmwareFeature {
    #[serde(rename = "@enabled")]
    enabled: &'static str,
    #[serde(rename = "@name")]
    name: &'static str,
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
pub(super) struct Empty {}

#[derive(Serialize)]
struct Features {
    acpi: Empty,
    apic: Empty,
}

#[derive(Serialize)]
struct Cpu {
    #[serde(rename = "@mode")]
    mode: &'static str,
    #[serde(rename = "@match", skip_serializing_if = "Option::is_none")]
    matches: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<CpuModel>,
    topology: Topology,
}

#[derive(Serialize)]
struct CpuModel {
    /// One that the host cannot give is refused, not replaced.
    #[serde(rename = "@fallback")]
    fallback: &'static str,
    #[serde(rename = "$text")]
    name: String,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    channel: Option<Channel>,
    #[serde(skip_serializing_if = "Option::is_none")]
    watchdog: Option<Watchdog>,
    memballoon: Balloon,
    rng: Rng,
}

#[derive(Serialize)]
struct Controller {
    #[serde(rename = "@type")]
    kind: &'static str,
    #[serde(rename = "@index", skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    #[serde(rename = "@model")]
    model: &'static str,
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
pub(super) struct ModelType {
    #[serde(rename = "@type")]
    pub(super) kind: &'static str,
}

#[derive(Serialize)]
struct Video {
    model: ModelType,
}

#[derive(Serialize)]
struct Channel {
    #[serde(rename = "@type")]
    kind: &'static str,
    target: ChannelTarget,
}

#[derive(Serialize)]
struct ChannelTarget {
    #[serde(rename = "@type")]
    kind: &'static str,
    #[serde(rename = "@name")]
    name: &'static str,
}

#[derive(Serialize)]
struct Watchdog {
    #[serde(rename = "@model")]
    model: &'static str,
    #[serde(rename = "@action")]
    action: &'static str,
}

#[derive(Serialize)]
struct Balloon {
    #[serde(rename = "@model")]
    model: &'static str,
    stats: BalloonStats,
}

#[derive(Serialize)]
struct BalloonStats {
    #[serde(rename = "@period")]
    period_seconds: u32,
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
        let uefi = blueprint.firmware == Firmware::Uefi;
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
                    core: mark.core.clone(),
                },
            },
            memory: Memory { unit: "MiB", amount: blueprint.memory_mib },
            vcpu: blueprint.vcpus,
            sysinfo: sysinfo(blueprint),
            os: Os {
                firmware: uefi.then_some("efi"),
                features: uefi.then_some(FirmwareFeatures {
                    feature: FirmwareFeature { enabled: "no", name: "secure-boot" },
                }),
                kind: OsType {
                    arch: std::env::consts::ARCH,
                    machine: blueprint.machine.clone(),
                    kind: "hvm",
                },
                kernel: kernel.map(|boot| path(&boot.kernel)),
                initrd: kernel.and_then(|boot| boot.ramdisk.as_deref().map(path)),
                cmdline: kernel.and_then(|boot| boot.command_line.clone()),
                smbios: Smbios { mode: "sysinfo" },
            },
            features: Features { acpi: Empty {}, apic: Empty {} },
            cpu: Cpu {
                mode: match (blueprint.cpu.mode, blueprint.engine) {
                    (CpuMode::Default, Engine::Kvm) => CpuMode::HostModel.as_str(),
                    (CpuMode::Default, Engine::Qemu) => CpuMode::Maximum.as_str(),
                    (mode, _) => mode.as_str(),
                },
                matches: blueprint.cpu.model.as_ref().map(|_| "exact"),
                model: blueprint
                    .cpu
                    .model
                    .clone()
                    .map(|name| CpuModel { fallback: "forbid", name }),
                topology: Topology { sockets: blueprint.vcpus, cores: 1, threads: 1 },
            },
            clock: Clock { offset: "utc" },
            on_poweroff: "destroy",
            on_reboot: "restart",
            on_crash: "destroy",
            devices: Devices {
                disk: disks(blueprint)
                    .into_iter()
                    .map(|disk| DiskElement::new(disk, blueprint))
                    .collect(),
                controller: controllers(blueprint),
                interface: blueprint.nics.iter().map(Interface::new).collect(),
                serial: Serial {
                    kind: "pty",
                    log: Log { file: path(&blueprint.console_log), append: "on" },
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
                channel: blueprint.guest_agent.then_some(Channel {
                    kind: "unix",
                    target: ChannelTarget { kind: "virtio", name: "org.qemu.guest_agent.0" },
                }),
                watchdog: blueprint
                    .watchdog
                    .map(|action| Watchdog { model: "i6300esb", action: action.as_str() }),
                memballoon: Balloon { model: "virtio", stats: BalloonStats { period_seconds: 10 } },
                rng: Rng {
                    model: "virtio",
                    backend: RngBackend { model: "random", device: "/dev/urandom" },
                },
            },
        }
    }
}

/// The product is what guests such as cloud-init look for before they ask the metadata service.
fn sysinfo(blueprint: &Blueprint) -> Sysinfo {
    let id = blueprint.id.to_string();
    let entries = [
        ("manufacturer", "Stackhand".to_owned()),
        ("product", "OpenStack Compute".to_owned()),
        ("serial", id.clone()),
        ("uuid", id),
        ("family", "Virtual Machine".to_owned()),
    ];
    let entry = entries.into_iter().map(|(name, value)| SysinfoEntry { name, value }).collect();
    Sysinfo { kind: "smbios", system: SysinfoSystem { entry } }
}

/// All disks, in the order in which a guest's kernel names them.
fn disks(blueprint: &Blueprint) -> Vec<&Disk> {
    let mut disks: Vec<&Disk> = blueprint.disks.iter().chain(&blueprint.volumes).collect();
    // CDs (`sd…`) before disks (`vd…`), which is of no matter to either.
    disks.sort_by_key(|disk| (disk.target.len(), &disk.target));
    disks
}

/// Controllers that libvirt would not add by itself.
fn controllers(blueprint: &Blueprint) -> Vec<Controller> {
    let mut controllers = Vec::new();
    if !blueprint.vnc {
        controllers.push(Controller { kind: "usb", index: None, model: "none" });
    }
    let on_virtio = |source: &DiskSource| matches!(source, DiskSource::VirtioCd(_));
    let has_scsi = blueprint.disks.iter().any(|disk| on_virtio(&disk.source));
    if has_scsi {
        controllers.push(Controller { kind: "scsi", index: None, model: "virtio-scsi" });
    }
    // On PCI Express each virtio device takes a port of its own, and one that is plugged in later
    // needs a port that is free.
    if blueprint.machine.starts_with("q35") || blueprint.machine.starts_with("pc-q35") {
        let is_cd =
            |source: &DiskSource| matches!(source, DiskSource::Cd(_) | DiskSource::VirtioCd(_));
        let disks = blueprint.disks.iter().filter(|disk| !is_cd(&disk.source)).count();
        let devices = disks + blueprint.volumes.len() + blueprint.nics.len();
        // The balloon and the random generator; what else is asked for.
        let others = 2
            + usize::from(has_scsi)
            + usize::from(blueprint.guest_agent)
            // On the old bus, behind a bridge.
            + usize::from(blueprint.watchdog.is_some())
            + usize::from(blueprint.vnc);
        let spare = usize::try_from(blueprint.spare_slots).unwrap_or(0);
        // Numbered, because libvirt takes the first for the root otherwise.
        let pci = |index, model| Controller { kind: "pci", index: Some(index), model };
        controllers.push(pci(0, "pcie-root"));
        controllers
            .extend((1..=devices + others + spare).map(|index| pci(index, "pcie-root-port")));
    }
    controllers
}
