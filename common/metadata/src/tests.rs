use proptest::prelude::*;
use serde_json::{Value, json};
use stackhand_model::{AddressSource, GuestAddress, MacAddr, PortId, Route};
use uuid::Uuid;

use super::*;

fn id() -> InstanceId {
    InstanceId(Uuid::from_u128(0xdead_beef_0000_4000_8000_0000_0000_0001))
}

fn data() -> GuestData {
    GuestData {
        hostname: None,
        availability_zone: Some("az1".into()),
        flavor: Some("m1.small".into()),
        keys: [("me".into(), "ssh-ed25519 AAAA me".into())].into(),
        // "#!/bin/sh\n"
        user_data: Some("IyEvYmluL3NoCg==".into()),
        metadata: [("role".into(), "web".into())].into(),
        vendor_data: json!({"site": "lab"}).as_object().unwrap().clone(),
        ..GuestData::default()
    }
}

fn ports() -> Vec<InstancePort> {
    let address = |text: &str, by, gateway: &str| GuestAddress {
        address: text.parse().unwrap(),
        by,
        gateway: Some(gateway.parse().unwrap()),
        dns_servers: vec!["192.0.2.53".parse().unwrap()],
        routes: vec![Route {
            destination: "10.99.0.0/16".parse().unwrap(),
            next_hop: "10.0.0.9".parse().unwrap(),
        }],
    };
    vec![InstancePort {
        port: PortId(Uuid::from_u128(0xabcd_ef01_2345_4000_8000_0000_0000_0002)),
        mac: MacAddr([0xfa, 0x16, 0x3e, 0, 0, 1]),
        mtu: Some(1450),
        queues: 1,
        network: None,
        addresses: vec![
            address("10.0.0.7/24", AddressSource::Dhcp, "10.0.0.1"),
            address("192.168.4.7/22", AddressSource::Static, "192.168.4.1"),
            address("2001:db8::7/64", AddressSource::Slaac, "fe80::1"),
        ],
    }]
}

fn with<T>(look: impl FnOnce(&Guest<'_>) -> T) -> T {
    let (data, ports) = (data(), ports());
    look(&Guest {
        id: id(),
        name: "Web Server 1",
        data: &data,
        ports: &ports,
        domain: Some("int.example.org"),
        seed: &[7; SEED_BYTES],
        password: Some("secret="),
    })
}

fn text(path: &str) -> String {
    let page = with(|guest| page(guest, path)).unwrap_or_else(|| panic!("nothing at {path}"));
    String::from_utf8(page.body).unwrap()
}

fn json_at(path: &str) -> Value {
    serde_json::from_str(&text(path)).unwrap()
}

#[test]
fn ec2_paths_list_folders_and_tell_values() {
    assert!(text("/").ends_with("2009-04-04\nlatest"));
    assert_eq!(text("/latest/"), "meta-data/\nuser-data");
    assert_eq!(text("/2009-04-04/user-data"), "#!/bin/sh\n");
    assert_eq!(text("/latest/meta-data/hostname"), "web-server-1.int.example.org");
    assert_eq!(text("/latest/meta-data/instance-id"), "i-deadbeef");
    assert_eq!(text("/latest/meta-data/local-ipv4"), "10.0.0.7");
    assert_eq!(text("/latest/meta-data/public-keys/"), "0=me");
    assert_eq!(text("/latest/meta-data/public-keys/0/"), "openssh-key");
    assert_eq!(text("/latest/meta-data/public-keys/0/openssh-key"), "ssh-ed25519 AAAA me");
    assert_eq!(text("/latest/meta-data/placement/availability-zone"), "az1");
    let listing = text("/latest/meta-data");
    assert!(listing.lines().any(|line| line == "public-keys/"), "{listing}");
    assert!(listing.lines().any(|line| line == "hostname"), "{listing}");
}

#[test]
fn openstack_versions_know_what_they_knew_then() {
    assert_eq!(text("/openstack/2012-08-10"), "meta_data.json\nuser_data");
    assert!(text("/openstack/latest/").contains("vendor_data2.json"));
    let old = json_at("/openstack/2012-08-10/meta_data.json");
    assert_eq!(old.get("random_seed"), None);
    let new = json_at("/openstack/latest/meta_data.json");
    assert_eq!(new["uuid"], id().to_string());
    assert_eq!((&new["name"], &new["meta"]["role"]), (&json!("Web Server 1"), &json!("web")));
    assert_eq!(new["public_keys"]["me"], "ssh-ed25519 AAAA me");
    assert_eq!(new["random_seed"].as_str().unwrap().len(), SEED_BYTES.div_ceil(3) * 4);
    assert_eq!(json_at("/openstack/latest/vendor_data.json"), json!({"site": "lab"}));
    assert_eq!(json_at("/openstack/latest/vendor_data2.json"), json!({"static": {"site": "lab"}}));
    assert_eq!(with(|guest| page(guest, "/openstack/2012-08-10/network_data.json")), None);
}

#[test]
fn a_password_is_left_and_read_where_nova_has_it_and_is_on_no_drive() {
    assert!(text("/openstack/2013-04-04").ends_with("\npassword"));
    assert_eq!(text("/openstack/latest/password"), "secret=");
    assert_eq!(with(|guest| page(guest, "/openstack/2012-08-10/password")), None);
    assert!(takes_password("/openstack/latest/password"));
    assert!(takes_password("//openstack//2013-10-17/password/"));
    for path in ["/latest/password", "/openstack/2012-08-10/password", "/openstack/x/password"] {
        assert!(!takes_password(path), "{path}");
    }
    assert!(!takes_password("/openstack/latest/password/more"));
    let files = with(config_drive_files);
    assert!(!files.keys().any(|path| path.ends_with("password")));
}

#[test]
fn network_data_tells_what_the_guest_has_to_set_itself_and_no_more() {
    let data = json_at("/openstack/latest/network_data.json");
    assert_eq!(data["links"][0]["ethernet_mac_address"], "fa:16:3e:00:00:01");
    assert_eq!(data["links"][0]["mtu"], 1450);
    let networks = data["networks"].as_array().unwrap();
    let types: Vec<&str> = networks.iter().map(|one| one["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["ipv4_dhcp", "ipv4", "ipv6_slaac"]);
    assert_eq!(networks[0].get("ip_address"), None);
    assert_eq!(networks[1]["netmask"], "255.255.252.0");
    assert_eq!(networks[1]["routes"][0]["gateway"], "192.168.4.1");
    assert_eq!(networks[1]["routes"][1]["netmask"], "255.255.0.0");
    assert_eq!(data["services"], json!([{"type": "dns", "address": "192.0.2.53"}]));
}

#[test]
fn drives_hold_what_the_service_tells() {
    let drive = with(config_drive_files);
    let served = with(|guest| page(guest, "openstack/latest/meta_data.json")).unwrap();
    assert_eq!(drive["openstack/latest/meta_data.json"], served.body);
    assert_eq!(drive["ec2/latest/user-data"], b"#!/bin/sh\n");
    let cidata = with(nocloud_files);
    let meta: Value = serde_json::from_slice(&cidata["meta-data"]).unwrap();
    assert_eq!(meta["local-hostname"], "web-server-1.int.example.org");
    let config: Value = serde_json::from_slice(&cidata["network-config"]).unwrap();
    let first = &config["ethernets"]["interface0"];
    assert_eq!((&first["dhcp4"], &first["dhcp6"]), (&json!(true), &json!(false)));
    assert_eq!(first["addresses"], json!(["192.168.4.7/22"]));
}

#[test]
fn host_names_are_made_of_names() {
    for (name, host) in [
        ("web", Some("web")),
        ("Web  Server_1", Some("web-server-1")),
        ("-a-", Some("a")),
        ("Größe", Some("gr-e")),
        ("???", None),
    ] {
        assert_eq!(host_name_of(name).as_deref(), host, "{name}");
    }
    let bare = GuestData::default();
    let guest = Guest {
        id: id(),
        name: "???",
        data: &bare,
        ports: &[],
        domain: None,
        seed: &[],
        password: None,
    };
    assert_eq!(guest.host_name(), format!("host-{}", id().short()));
}

proptest! {
    #[test]
    fn any_path_is_a_page_or_nothing(path in "\\PC{0,60}") {
        drop(with(|guest| page(guest, &path)));
    }

    #[test]
    fn any_walk_down_the_tree_is_a_page_or_nothing(
        steps in prop::collection::vec(prop::sample::select(vec![
            "openstack", "latest", "2009-04-04", "2018-08-27", "meta-data", "user-data",
            "public-keys", "0", "openssh-key", "placement", "meta_data.json", "..", "",
        ]), 0..6),
    ) {
        drop(with(|guest| page(guest, &steps.join("/"))));
    }

    #[test]
    fn a_host_name_has_letters_digits_and_single_inner_hyphens(name in "\\PC{0,90}") {
        if let Some(host) = host_name_of(&name) {
            prop_assert!((1..=63).contains(&host.len()) && !host.contains("--"));
            prop_assert!(!host.starts_with('-') && !host.ends_with('-'));
        }
    }
}
