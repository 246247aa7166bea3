use super::*;

fn plain() -> Blueprint {
    Blueprint {
        id: InstanceId(Uuid::from_u128(0x1234_5678_9abc_def0_1234_5678_9abc_def0)),
        engine: Engine::Qemu,
        machine: "q35".into(),
        vcpus: 2,
        memory_mib: 256,
        kernel: None,
        disks: vec![],
        nics: vec![],
        console_log: "/var/lib/stackhand/compute/instances/i/console.log".into(),
        vnc: false,
        disk_cache: "none".into(),
    }
}

fn full() -> Blueprint {
    let volume = VolumeId(Uuid::from_u128(7));
    Blueprint {
        engine: Engine::Kvm,
        disks: vec![
            Disk {
                target: "vda".into(),
                source: DiskSource::Overlay {
                    path: "/i/disk".into(),
                    base: "/images/abc".into(),
                    base_format: FileFormat::Raw,
                },
                boot: true,
                serial: None,
            },
            Disk {
                target: "vdb".into(),
                source: DiskSource::Volume(Connection::File {
                    path: "/volumes/volume-7".into(),
                    format: FileFormat::Raw,
                }),
                boot: false,
                serial: Some(volume),
            },
            Disk {
                target: "vdc".into(),
                source: DiskSource::Volume(Connection::Block { path: "/dev/vg/volume-8".into() }),
                boot: false,
                serial: None,
            },
        ],
        nics: vec![Nic {
            tap: "tap00000000-00".into(),
            mac: "fa:16:3e:00:00:01".parse().unwrap(),
            mtu: Some(1450),
        }],
        vnc: true,
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
    let mark = Mark { id: blueprint.id.0, generation: 3, definition: definition.clone() };
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
