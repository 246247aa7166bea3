use super::*;

#[test]
fn a_link_local_address_follows_from_the_ethernet_address() {
    let mac = MacAddr([0xfa, 0x16, 0x3e, 0x12, 0x34, 0x56]);
    assert_eq!(link_local(mac).to_string(), "fe80::f816:3eff:fe12:3456");
}

#[test]
fn a_guest_reads_its_own_pages() {
    let data = GuestData {
        hostname: Some("web".into()),
        metadata: [("role".into(), "front".into())].into(),
        ..GuestData::default()
    };
    let known = Known {
        port: PortId(uuid::Uuid::from_u128(1)),
        id: InstanceId(uuid::Uuid::from_u128(2)),
        name: "web".into(),
        data: Arc::new(data),
        interfaces: Vec::new(),
        domain: "int.example.org".into(),
    };
    let page = known.page("/latest/meta-data/hostname", &[]).unwrap();
    assert_eq!(page.body, b"web.int.example.org");
    assert_eq!(known.page("/etc/passwd", &[]), None);
}
