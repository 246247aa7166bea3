//! What a guest reads about itself, as EC2, OpenStack and NoCloud lay it out. Pure.
//!
//! The same tree is served over HTTP by the network agent ([`page`]) and written to a config drive
//! by the compute agent ([`config_drive_files`], [`nocloud_files`]). Everything comes from the
//! documents of the instance and its ports; nothing is kept.
//!
//! Names and versions are those that Nova serves, because guests look for them.

mod ec2;
mod network_data;
mod nocloud;
mod openstack;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;

use stackhand_model::{GuestData, InstanceId, InstancePort};

pub use openstack::SEED_BYTES;

/// A guest, with all it may be told.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// The instance.
    pub id: InstanceId,
    /// Its name, where its data does not say one.
    pub name: &'a str,
    /// What it is told.
    pub data: &'a GuestData,
    /// Its interfaces, in the order of its network devices.
    pub ports: &'a [InstancePort],
    /// The domain that its host name is completed with.
    pub domain: Option<&'a str>,
    /// Fresh random bytes for its random generator, [`SEED_BYTES`] long; empty: none are told.
    pub seed: &'a [u8],
    /// The password that it made for itself and left at [`takes_password`]'s path, encrypted with
    /// its owner's key.
    pub password: Option<&'a str>,
}

/// A file or a folder's listing, as it goes over HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// MIME type.
    pub content_type: &'static str,
    /// Its bytes.
    pub body: Vec<u8>,
}

impl Page {
    fn text(body: impl Into<String>) -> Self {
        Self { content_type: "text/plain; charset=utf-8", body: body.into().into_bytes() }
    }

    fn json(value: &serde_json::Value) -> Self {
        Self { content_type: "application/json", body: value.to_string().into_bytes() }
    }

    fn bytes(body: Vec<u8>) -> Self {
        Self { content_type: "application/octet-stream", body }
    }

    fn list(names: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        let names: Vec<String> = names.into_iter().map(|name| name.as_ref().to_owned()).collect();
        Self::text(names.join("\n"))
    }
}

/// What stands at `path`, or `None` if nothing does. Slashes may be doubled and trail.
#[must_use]
pub fn page(guest: &Guest<'_>, path: &str) -> Option<Page> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    match parts.as_slice() {
        [] => Some(Page::list(ec2::VERSIONS)),
        ["openstack"] => Some(Page::list(openstack::VERSIONS)),
        ["openstack", version, rest @ ..] => openstack::page(guest, version, rest),
        [version, rest @ ..] => ec2::page(guest, version, rest),
    }
}

/// Whether `path` is where a guest leaves the password that it made for itself, once and over HTTP
/// alone.
#[must_use]
pub fn takes_password(path: &str) -> bool {
    let mut parts = path.split('/').filter(|part| !part.is_empty());
    parts.next() == Some("openstack")
        && parts.next().is_some_and(openstack::has_password)
        && parts.next() == Some(openstack::PASSWORD)
        && parts.next().is_none()
}

/// The files of a config drive (label `config-2`), by path.
#[must_use]
pub fn config_drive_files(guest: &Guest<'_>) -> BTreeMap<String, Vec<u8>> {
    let mut files = openstack::files(guest);
    files.extend(ec2::files(guest));
    files
}

/// The files of a NoCloud drive (label `cidata`), by path.
#[must_use]
pub fn nocloud_files(guest: &Guest<'_>) -> BTreeMap<String, Vec<u8>> {
    nocloud::files(guest)
}

impl Guest<'_> {
    fn name(&self) -> &str {
        self.data.name.as_ref().map_or(self.name, |name| name.as_str())
    }

    /// The host name, completed with the network's domain if it has none of its own.
    fn host_name(&self) -> String {
        let given = match &self.data.hostname {
            Some(hostname) => Cow::from(hostname),
            None => Cow::from(host_name_of(self.name()).unwrap_or_else(|| {
                // A name of signs alone says nothing.
                format!("host-{}", self.id.short())
            })),
        };
        match self.domain {
            Some(domain) if !given.contains('.') && !domain.is_empty() => {
                format!("{given}.{domain}")
            }
            _ => given.into_owned(),
        }
    }

    fn first_v4(&self) -> Option<IpAddr> {
        let all = self.ports.iter().flat_map(|port| &port.addresses);
        all.map(|given| given.address.addr()).find(IpAddr::is_ipv4)
    }
}

/// A host name made from an instance's name: lower case, everything else a hyphen. `None` if
/// nothing is left of it.
#[must_use]
pub fn host_name_of(name: &str) -> Option<String> {
    let mut host = String::new();
    for sign in name.chars() {
        let sign = if sign.is_ascii_alphanumeric() { sign.to_ascii_lowercase() } else { '-' };
        if sign != '-' || !host.ends_with('-') {
            host.push(sign);
        }
    }
    let cut = host.trim_start_matches('-');
    let cut = cut[..cut.len().min(63)].trim_end_matches('-');
    (!cut.is_empty()).then(|| cut.to_owned())
}
