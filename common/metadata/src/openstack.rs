//! OpenStack's layout: a few JSON documents a version, newer versions with more.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use crate::network_data::network_data;
use crate::{Guest, Page};

/// Random bytes that a guest is given for its generator.
pub const SEED_BYTES: usize = 512;

pub(crate) const VERSIONS: [&str; 10] = [
    "2012-08-10",
    "2013-04-04",
    "2013-10-17",
    "2015-10-15",
    "2016-06-30",
    "2016-10-06",
    "2017-02-22",
    "2018-08-27",
    "2020-10-14",
    "latest",
];

/// Where a guest leaves a password.
pub(crate) const PASSWORD: &str = "password";

// Dates compare as text, and `latest` is after all of them.
const RANDOM_SEED: &str = "2013-04-04";
const PASSWORD_SINCE: &str = "2013-04-04";
const VENDOR_DATA: &str = "2013-10-17";
const NETWORK_DATA: &str = "2015-10-15";
const PROJECT: &str = "2015-10-15";
const DEVICES: &str = "2016-06-30";
const VENDOR_DATA_2: &str = "2016-10-06";
const DEDICATED_CPUS: &str = "2020-10-14";

/// What stands in one version's folder.
pub(crate) fn page(guest: &Guest<'_>, version: &str, path: &[&str]) -> Option<Page> {
    let version = VERSIONS.into_iter().find(|known| *known == version)?;
    match path {
        [] => {
            let password = has_password(version).then_some(PASSWORD);
            Some(Page::list(names(guest, version).into_iter().chain(password)))
        }
        [PASSWORD] if has_password(version) => Some(Page::text(guest.password.unwrap_or_default())),
        [name] if names(guest, version).contains(name) => file(guest, version, name),
        _ => None,
    }
}

/// Whether a version knows of passwords.
pub(crate) fn has_password(version: &str) -> bool {
    VERSIONS.contains(&version) && version >= PASSWORD_SINCE
}

/// The files of a config drive.
pub(crate) fn files(guest: &Guest<'_>) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for version in VERSIONS {
        for name in names(guest, version) {
            if let Some(page) = file(guest, version, name) {
                files.insert(format!("openstack/{version}/{name}"), page.body);
            }
        }
    }
    files
}

fn names(guest: &Guest<'_>, version: &str) -> Vec<&'static str> {
    let mut names = vec!["meta_data.json"];
    if guest.data.user_data.is_some() {
        names.push("user_data");
    }
    if version >= VENDOR_DATA {
        names.push("vendor_data.json");
    }
    if version >= NETWORK_DATA {
        names.push("network_data.json");
    }
    if version >= VENDOR_DATA_2 {
        names.push("vendor_data2.json");
    }
    names
}

fn file(guest: &Guest<'_>, version: &str, name: &str) -> Option<Page> {
    match name {
        "meta_data.json" => Some(Page::json(&meta_data(guest, version))),
        "user_data" => guest.data.user_data_bytes().map(Page::bytes),
        "network_data.json" => Some(Page::json(&network_data(guest.ports))),
        "vendor_data.json" => Some(Page::json(&guest.data.vendor_data.clone().into())),
        // What is the same for every guest stands under `static`, as Nova has it.
        "vendor_data2.json" if guest.data.vendor_data.is_empty() => Some(Page::json(&json!({}))),
        "vendor_data2.json" => Some(Page::json(&json!({"static": guest.data.vendor_data}))),
        _ => None,
    }
}

fn meta_data(guest: &Guest<'_>, version: &str) -> Value {
    let mut data = Map::new();
    let mut put = |name: &str, value: Value| {
        data.insert(name.to_owned(), value);
    };
    put("uuid", guest.id.to_string().into());
    put("name", guest.name().into());
    put("hostname", guest.host_name().into());
    put("launch_index", guest.data.launch_index.into());
    put("availability_zone", guest.data.availability_zone.clone().into());
    if !guest.data.metadata.is_empty() {
        put("meta", json!(guest.data.metadata));
    }
    if !guest.data.keys.is_empty() {
        put("public_keys", json!(guest.data.keys));
        let keys = guest.data.keys.iter();
        let keys = keys.map(|(name, key)| json!({"name": name, "type": "ssh", "data": key}));
        put("keys", keys.collect());
    }
    if version >= RANDOM_SEED && !guest.seed.is_empty() {
        put("random_seed", STANDARD.encode(guest.seed).into());
    }
    if version >= PROJECT {
        put("project_id", guest.data.project.clone().into());
    }
    if version >= DEVICES {
        put("devices", json!([]));
    }
    if version >= DEDICATED_CPUS {
        put("dedicated_cpus", json!([]));
    }
    Value::Object(data)
}
