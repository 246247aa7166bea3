use super::*;

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
    let page = known.page("/latest/meta-data/hostname", &[], None).unwrap();
    assert_eq!(page.body, b"web.int.example.org");
    assert_eq!(known.page("/etc/passwd", &[], None), None);
}
