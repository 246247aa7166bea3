//! EC2's layout: one value a file, and a listing for every folder.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::{Guest, Page};

pub(crate) const VERSIONS: [&str; 10] = [
    "1.0",
    "2007-01-19",
    "2007-03-01",
    "2007-08-29",
    "2007-10-10",
    "2007-12-15",
    "2008-02-01",
    "2008-09-01",
    "2009-04-04",
    "latest",
];

/// What stands in one version's folder.
pub(crate) fn page(guest: &Guest<'_>, version: &str, path: &[&str]) -> Option<Page> {
    if !VERSIONS.contains(&version) {
        return None;
    }
    let user_data = guest.data.user_data_bytes();
    match path {
        [] => {
            let names = [Some("meta-data/"), user_data.map(|_| "user-data")];
            Some(Page::list(names.into_iter().flatten()))
        }
        ["user-data"] => user_data.map(Page::bytes),
        ["meta-data", rest @ ..] => meta_data_page(guest, rest),
        _ => None,
    }
}

fn meta_data_page(guest: &Guest<'_>, path: &[&str]) -> Option<Page> {
    let tree = Value::Object(meta_data(guest));
    // The keys' listing is the one that tells a name beside the number.
    if path == ["public-keys"] && !guest.data.keys.is_empty() {
        let listed = guest.data.keys.keys().enumerate();
        return Some(Page::list(listed.map(|(index, name)| format!("{index}={name}"))));
    }
    let found = path.iter().try_fold(&tree, |at, step| at.get(*step))?;
    match found {
        Value::Object(folder) => Some(Page::list(folder.iter().map(|(name, value)| {
            if value.is_object() { format!("{name}/") } else { name.clone() }
        }))),
        Value::String(text) => Some(Page::text(text.clone())),
        _ => None,
    }
}

/// The tree below `meta-data`; folders are objects, files strings.
fn meta_data(guest: &Guest<'_>) -> Map<String, Value> {
    let host = guest.host_name();
    let (high, ..) = guest.id.0.as_fields();
    let number = format!("{high:08x}");
    let address = guest.first_v4().map(|address| address.to_string()).unwrap_or_default();
    let mut tree = Map::new();
    let mut put = |name: &str, value: Value| {
        tree.insert(name.to_owned(), value);
    };
    put("ami-launch-index", guest.data.launch_index.to_string().into());
    put("block-device-mapping", json!({"ami": "vda", "root": "/dev/vda"}));
    put("hostname", host.clone().into());
    put("instance-action", "none".into());
    put("instance-id", format!("i-{number}").into());
    put("instance-type", guest.data.flavor.clone().unwrap_or_default().into());
    put("local-hostname", host.clone().into());
    put("local-ipv4", address.into());
    if let Some(mac) = guest.ports.first().map(|port| port.mac) {
        put("mac", mac.to_string().into());
    }
    let zone = guest.data.availability_zone.clone().unwrap_or_default();
    put("placement", json!({"availability-zone": zone}));
    put("public-hostname", host.into());
    put("public-ipv4", "".into());
    if !guest.data.keys.is_empty() {
        let numbered = guest.data.keys.values().enumerate();
        let keys = numbered.map(|(index, key)| (index.to_string(), json!({"openssh-key": key})));
        put("public-keys", keys.collect::<Map<_, _>>().into());
    }
    put("reservation-id", format!("r-{number}").into());
    tree
}

/// The files of a config drive.
pub(crate) fn files(guest: &Guest<'_>) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for version in ["2009-04-04", "latest"] {
        let json = Value::Object(meta_data(guest)).to_string();
        files.insert(format!("ec2/{version}/meta-data.json"), json.into_bytes());
        if let Some(data) = guest.data.user_data_bytes() {
            files.insert(format!("ec2/{version}/user-data"), data);
        }
    }
    files
}
