//! Packstack's answer files: which of their answers mean something here.
//!
//! `KEY=value` a line. Passwords of services that Stackhand does not have are never repeated, not
//! even as ignored.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::Answers;

/// What an answer file of Packstack's gives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Imported {
    pub(crate) answers: Answers,
    /// What was taken: the key and what it became.
    pub(crate) taken: Vec<(String, String)>,
    /// What is to be done by hand, or differs from what one may expect.
    pub(crate) notes: Vec<String>,
    /// Keys with a value that mean nothing here, by the service they are for.
    pub(crate) ignored: BTreeMap<String, usize>,
}

/// Reads an answer file. `address_of` tells the address of a link of this host.
///
/// # Errors
///
/// Lines that are no answers, each with its number.
pub(crate) fn import(
    source: &str,
    text: &str,
    address_of: impl Fn(&str) -> Option<IpAddr>,
) -> Result<Imported, Vec<String>> {
    let mut file = File::parse(source, text)?;
    let mut imported = Imported::default();
    broker(&mut file, &mut imported);
    network(&mut file, &mut imported, address_of);
    storage(&mut file, &mut imported);
    if let Some(kind) = file.take("CONFIG_NOVA_LIBVIRT_VIRT_TYPE") {
        // Packstack's default is a word of Puppet's.
        if ["kvm", "qemu"].contains(&kind.as_str()) {
            imported.take("CONFIG_NOVA_LIBVIRT_VIRT_TYPE", &format!("virt_type = {kind}"));
            imported.answers.virt_type = Some(kind);
        }
    }
    hosts(&mut file, &mut imported);
    if file.take("CONFIG_NTP_SERVERS").is_some() {
        imported.notes.push(
            "CONFIG_NTP_SERVERS: Stackhand does not set clocks; put the servers into chrony's \
             settings"
                .to_owned(),
        );
    }
    imported.ignored = file.rest();
    Ok(imported)
}

struct File {
    values: BTreeMap<String, String>,
    used: BTreeSet<&'static str>,
}

impl File {
    fn parse(source: &str, text: &str) -> Result<Self, Vec<String>> {
        let mut values = BTreeMap::new();
        let mut problems = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with(['#', ';', '[']) {
                continue;
            }
            match line.split_once('=') {
                Some((key, value)) if key.trim().starts_with("CONFIG_") => {
                    values.insert(key.trim().to_owned(), value.trim().to_owned());
                }
                _ => problems.push(format!(
                    "{source}:{}: is not of the form CONFIG_NAME=value: is it an answer file of \
                     Packstack's?",
                    number + 1
                )),
            }
        }
        if values.is_empty() && problems.is_empty() {
            problems.push(format!("{source}: holds no answers"));
        }
        problems.truncate(5);
        if problems.is_empty() { Ok(Self { values, used: BTreeSet::new() }) } else { Err(problems) }
    }

    /// An answer, if it was given.
    fn take(&mut self, key: &'static str) -> Option<String> {
        self.used.insert(key);
        self.values.get(key).filter(|value| !value.is_empty()).cloned()
    }

    /// How many other answers there are, by the first word of their keys.
    fn rest(self) -> BTreeMap<String, usize> {
        let mut rest = BTreeMap::new();
        let answered = |value: &str| !value.is_empty() && value != "n";
        for (key, value) in self.values {
            if !self.used.contains(key.as_str()) && answered(&value) {
                let service = key.trim_start_matches("CONFIG_").split('_').next();
                *rest.entry(service.unwrap_or_default().to_owned()).or_insert(0) += 1;
            }
        }
        rest
    }
}

impl Imported {
    fn take(&mut self, key: &str, became: &str) {
        self.taken.push((key.to_owned(), became.to_owned()));
    }
}

fn broker(file: &mut File, imported: &mut Imported) {
    let user = file.take("CONFIG_AMQP_AUTH_USER");
    let password = file.take("CONFIG_AMQP_AUTH_PASSWORD");
    let enabled = file.take("CONFIG_AMQP_ENABLE_AUTH").is_some_and(|it| it == "y");
    let tls = file.take("CONFIG_AMQP_ENABLE_SSL").is_some_and(|it| it == "y");
    let Some(host) = file.take("CONFIG_AMQP_HOST") else { return };
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    let login = match (enabled, user, password) {
        (true, Some(user), Some(password)) => format!("{}:{}", encode(&user), encode(&password)),
        // RabbitMQ's own, which Packstack leaves when authentication is off.
        _ => "guest:guest".to_owned(),
    };
    let (scheme, port) = if tls { ("rabbits", 5671) } else { ("rabbit", 5672) };
    imported.take("CONFIG_AMQP_HOST", &format!("broker = {scheme}://…@{host}:{port}/"));
    imported.answers.broker = Some(format!("{scheme}://{login}@{host}:{port}/"));
}

fn network(file: &mut File, imported: &mut Imported, address_of: impl Fn(&str) -> Option<IpAddr>) {
    for (name, link) in pairs(file.take("CONFIG_NEUTRON_LB_INTERFACE_MAPPINGS")) {
        imported
            .take("CONFIG_NEUTRON_LB_INTERFACE_MAPPINGS", &format!("{name} is reached by {link}"));
        imported.answers.bridge_mappings.insert(name, link);
    }
    // Open vSwitch has a bridge between the network and the link.
    let links: BTreeMap<String, String> =
        pairs(file.take("CONFIG_NEUTRON_OVS_BRIDGE_IFACES")).into_iter().collect();
    for (name, bridge) in pairs(file.take("CONFIG_NEUTRON_OVS_BRIDGE_MAPPINGS")) {
        match links.get(&bridge) {
            Some(link) => {
                let became = format!("{name} is reached by {link}, without {bridge}");
                imported.take("CONFIG_NEUTRON_OVS_BRIDGE_MAPPINGS", &became);
                imported.answers.bridge_mappings.entry(name).or_insert_with(|| link.clone());
            }
            None => imported.notes.push(format!(
                "CONFIG_NEUTRON_OVS_BRIDGE_MAPPINGS: {name} is on {bridge}, of which \
                 CONFIG_NEUTRON_OVS_BRIDGE_IFACES names no link; give --bridge-mapping {name}=LINK"
            )),
        }
    }
    if let Some(link) = file.take("CONFIG_NEUTRON_OVS_TUNNEL_IF") {
        match address_of(&link) {
            Some(address) => {
                imported
                    .take("CONFIG_NEUTRON_OVS_TUNNEL_IF", &format!("tunnel_address = {address}"));
                imported.answers.tunnel_address = Some(address);
            }
            None => imported.notes.push(format!(
                "CONFIG_NEUTRON_OVS_TUNNEL_IF: this host has no address on {link}; give \
                 --tunnel-address"
            )),
        }
    }
}

fn storage(file: &mut File, imported: &mut Imported) {
    let backend = file.take("CONFIG_CINDER_BACKEND");
    let installed = file.take("CONFIG_CINDER_INSTALL").is_none_or(|it| it == "y");
    let group = file.take("CONFIG_CINDER_VOLUME_NAME");
    match backend.as_deref() {
        Some("lvm") if installed => {
            let group = group.unwrap_or_else(|| "cinder-volumes".to_owned());
            imported.take("CONFIG_CINDER_VOLUME_NAME", &format!("volume_group = {group}"));
            imported.answers.volume_group = Some(group);
        }
        Some(other) if installed => imported.notes.push(format!(
            "CONFIG_CINDER_BACKEND: {other} is not known here; volumes are kept in files until \
             a backend is set"
        )),
        _ => {}
    }
}

fn hosts(file: &mut File, imported: &mut Imported) {
    for (key, agents) in [
        ("CONFIG_COMPUTE_HOSTS", "compute-agent and network-agent"),
        ("CONFIG_NETWORK_HOSTS", "network-agent"),
        ("CONFIG_STORAGE_HOST", "storage-agent"),
    ] {
        if let Some(hosts) = file.take(key) {
            imported.notes.push(format!("{key}: install {agents} on {hosts}"));
        }
    }
}

/// Reads `a:b,c:d`.
fn pairs(text: Option<String>) -> Vec<(String, String)> {
    let text = text.unwrap_or_default();
    let each = text.split(',').filter_map(|pair| pair.trim().split_once(':'));
    each.map(|(one, other)| (one.trim().to_owned(), other.trim().to_owned())).collect()
}

/// Writes what a URL gives a meaning of its own as %XX.
fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "[general]
# Comment
CONFIG_SSH_KEY=/root/.ssh/id_rsa.pub
CONFIG_DEFAULT_PASSWORD=hunter2
CONFIG_COMPUTE_HOSTS=192.0.2.11,192.0.2.12
CONFIG_AMQP_BACKEND=rabbitmq
CONFIG_AMQP_HOST=192.0.2.10
CONFIG_AMQP_ENABLE_SSL=n
CONFIG_AMQP_ENABLE_AUTH=y
CONFIG_AMQP_AUTH_USER=amqp_user
CONFIG_AMQP_AUTH_PASSWORD=pa/ss
CONFIG_CINDER_BACKEND=lvm
CONFIG_CINDER_VOLUME_NAME=
CONFIG_CINDER_DB_PW=hunter2
CONFIG_NOVA_LIBVIRT_VIRT_TYPE=%{::default_hypervisor}
CONFIG_NEUTRON_OVS_BRIDGE_MAPPINGS=extnet:br-ex,other:br-oth
CONFIG_NEUTRON_OVS_BRIDGE_IFACES=br-ex:eth1
CONFIG_NEUTRON_OVS_TUNNEL_IF=eth2
CONFIG_NTP_SERVERS=ntp.example.org
CONFIG_HEAT_INSTALL=n
";

    #[test]
    fn what_applies_is_taken_and_the_rest_is_told_without_its_passwords() {
        let address = |link: &str| (link == "eth2").then(|| "192.0.2.7".parse().unwrap());
        let imported = import("p.txt", TEXT, address).unwrap();
        let answers = &imported.answers;
        let broker = "rabbit://amqp_user:pa%2Fss@192.0.2.10:5672/";
        assert_eq!(answers.broker.as_deref(), Some(broker));
        assert_eq!(answers.problems(), [] as [&str; 0]);
        assert_eq!(answers.volume_group.as_deref(), Some("cinder-volumes"));
        assert_eq!(answers.tunnel_address, Some("192.0.2.7".parse().unwrap()));
        assert_eq!(answers.bridge_mappings, [("extnet".into(), "eth1".into())].into());
        assert_eq!(answers.virt_type, None);
        let ignored = ["AMQP", "CINDER", "DEFAULT", "SSH"].map(|key| (key.to_owned(), 1));
        assert_eq!(imported.ignored, ignored.into());
        assert!(imported.notes.iter().any(|it| it.contains("other is on br-oth")), "{imported:#?}");
        let told = format!("{:?}{:?}{:?}", imported.taken, imported.notes, imported.ignored);
        assert!(!told.contains("hunter2") && !told.contains("pa/ss"), "{told}");
    }

    #[test]
    fn another_file_is_told_by_its_lines() {
        let problems = import("x.txt", "CONFIG_A=1\nhello\n", |_| None).unwrap_err();
        assert!(problems[0].starts_with("x.txt:2: is not of the form"), "{problems:?}");
        assert!(import("x.txt", "", |_| None).is_err());
    }
}
