use stackhand_model::{CpuMode, IscsiClient, Secret};

use super::*;

fn plain() -> Blueprint {
    Blueprint {
        id: InstanceId(Uuid::from_u128(0x1234_5678_9abc_def0_1234_5678_9abc_def0)),
        engine: Engine::Qemu,
        machine: "q35".into(),
        vcpus: 2,
        cpu: CpuSpec::default(),
        memory_mib: 256,
        firmware: Firmware::Bios,
        kernel: None,
        disks: vec![],
        volumes: vec![],
        nics: vec![],
        console_log: "/var/lib/stackhand/compute/instances/i/console.log".into(),
        vnc: false,
        watchdog: None,
        guest_agent: false,
        disk_cache: "none".into(),
        spare_slots: 2,
    }
}

fn disk(target: &str, source: DiskSource) -> Disk {
    Disk { target: target.into(), source, boot: None, serial: None, read_only: false }
}

fn full() -> Blueprint {
    let volume = VolumeId(Uuid::from_u128(7));
    let iscsi = Connection::Iscsi {
        portal: "[fd00::1]:3260".into(),
        iqn: "iqn.2026-11.org.stackhand:volume-9".into(),
        lun: 1,
        initiator: Some("iqn.2026-11.org.stackhand:host-a".into()),
        client: IscsiClient::Qemu,
        username: Some("user".into()),
        password: Some(Secret("never in the XML".into())),
    };
    Blueprint {
        engine: Engine::Kvm,
        cpu: CpuSpec { mode: CpuMode::Custom, model: Some("Haswell-noTSX".into()) },
        firmware: Firmware::Uefi,
        disks: vec![
            Disk {
                boot: Some(1),
                ..disk(
                    "vda",
                    DiskSource::Overlay {
                        path: "/i/disk".into(),
                        base: "/images/abc".into(),
                        base_format: FileFormat::Raw,
                    },
                )
            },
            Disk { boot: Some(2), ..disk("sda", DiskSource::Cd("/images/iso".into())) },
            disk("sdb", DiskSource::VirtioCd("/i/disk.config".into())),
        ],
        volumes: vec![
            Disk {
                serial: Some(volume),
                ..disk(
                    "vdb",
                    DiskSource::Volume(Connection::File {
                        path: "/volumes/volume-7".into(),
                        format: FileFormat::Raw,
                    }),
                )
            },
            Disk {
                read_only: true,
                ..disk(
                    "vdc",
                    DiskSource::Volume(Connection::Block { path: "/dev/vg/volume-8".into() }),
                )
            },
            Disk {
                serial: Some(VolumeId(Uuid::from_u128(9))),
                ..disk("vdd", DiskSource::Volume(iscsi))
            },
        ],
        nics: vec![Nic {
            tap: "tap00000000-00".into(),
            mac: "fa:16:3e:00:00:01".parse().unwrap(),
            mtu: Some(1450),
            queues: 2,
        }],
        vnc: true,
        watchdog: Some(WatchdogAction::Reset),
        guest_agent: true,
        ..plain()
    }
}

fn direct() -> Blueprint {
    Blueprint {
        kernel: Some(KernelBoot {
            kernel: "/images/k".into(),
            ramdisk: Some("/images/r".into()),
            command_line: Some("console=ttyS0 quote=\"<&>'\"".into()),
        }),
        ..plain()
    }
}

/// Compares with a file in `golden/`; `STACKHAND_BLESS=1` writes it anew.
fn golden(name: &str, text: &str) {
    let path = format!("{}/src/domain/golden/{name}.xml", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("STACKHAND_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text, expected, "{path} differs; see it, then run with STACKHAND_BLESS=1");
}

#[test]
fn the_xml_is_as_recorded() {
    golden("full", &full().xml(3).unwrap());
    golden("kernel", &direct().xml(1).unwrap());
}

#[test]
fn the_mark_is_read_back_and_the_generation_does_not_change_the_definition() {
    let blueprint = full();
    let described = read(&blueprint.xml(3).unwrap()).unwrap();
    let definition = blueprint.definition().unwrap();
    let core = blueprint.core().unwrap();
    let mark = Mark { id: blueprint.id.0, generation: 3, definition: definition.clone(), core };
    assert_eq!(described.mark, Some(mark));
    let later = read(&blueprint.xml(4).unwrap()).unwrap().mark.unwrap();
    assert_eq!(later.definition, definition);
    assert_ne!(plain().definition().unwrap(), definition);
}

#[test]
fn another_prefix_for_our_namespace_is_ours_and_our_prefix_for_another_is_not() {
    let id = Uuid::from_u128(1);
    let with = |prefix: &str, namespace: &str| {
        format!(
            "<domain><metadata><{prefix}:instance xmlns:{prefix}='{namespace}' id='{id}' \
             generation='2' definition='d'/></metadata></domain>"
        )
    };
    assert!(read(&with("x", NAMESPACE)).unwrap().mark.is_some());
    assert_eq!(read(&with("stackhand", "http://openstack.org/x")).unwrap().mark, None);
    let garbled = with("x", NAMESPACE).replace("generation='2'", "generation='two'");
    assert_eq!(read(&garbled).unwrap().mark, None);
}

#[test]
fn the_vnc_port_is_known_once_it_is_chosen() {
    let with = |port: &str| {
        format!("<domain><devices><graphics type='vnc' port='{port}'/></devices></domain>")
    };
    assert_eq!(read(&with("5901")).unwrap().vnc_port, Some(5901));
    assert_eq!(read(&with("-1")).unwrap().vnc_port, None);
    assert!(read("<domain><devices>&").is_err());
}

#[test]
fn names_are_openstacks() {
    assert_eq!(domain_name(plain().id), "instance-12345678");
    let port = PortId("6f0c8a8e-0d1b-4f0e-9a43-2f9a2f0c5a11".parse().unwrap());
    assert_eq!(tap_name(port), "tap6f0c8a8e-0d");
}

#[test]
fn what_can_be_plugged_in_is_read_back_and_is_not_in_the_core() {
    let blueprint = full();
    let text = blueprint.xml(1).unwrap();
    assert!(!text.contains("never in the XML"));
    let devices = read(&text).unwrap().devices;
    let targets: Vec<&str> = devices.volumes.values().map(|it| it.guest.as_str()).collect();
    assert_eq!(targets, ["vdb", "vdd"]);
    assert_eq!(devices.nics["tap00000000-00"].guest, "fa:16:3e:00:00:01");
    let less = Blueprint { volumes: vec![], nics: vec![], ..blueprint.clone() };
    assert_eq!(less.core().unwrap(), blueprint.core().unwrap());
    assert_ne!(less.definition().unwrap(), blueprint.definition().unwrap());
    // Alone, as it is plugged in.
    let alone = read_device(&blueprint.volume_xml(&blueprint.volumes[2]).unwrap()).unwrap();
    assert_eq!(alone.volumes.keys().next(), Some(&VolumeId(Uuid::from_u128(9))));
    let alone = read_device(&blueprint.nic_xml(&blueprint.nics[0]).unwrap()).unwrap();
    assert_eq!(alone.nics.len(), 1);
    let secret = secret_xml(VolumeId(Uuid::from_u128(9)));
    assert!(text.contains(&secret_id(VolumeId(Uuid::from_u128(9))).to_string()));
    assert!(secret.contains("private='yes'"));
}
