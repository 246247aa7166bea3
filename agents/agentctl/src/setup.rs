//! Setting a host up: from answers to the files that agents read.
//!
//! Pure: [`Answers`] come from flags, a file or questions, [`files`] says what each becomes. The
//! files are drop-ins, so that the default settings stay as the packages bring them.

pub(crate) mod packstack;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stackhand_runtime::config::BusUrl;
use toml::{Table, Value};

/// The name of the drop-ins.
pub(crate) const DROP_IN: &str = "50-init.toml";

/// What a host needs to be told. Absent: the default stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Answers {
    /// This host's name in the cloud.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) host: Option<String>,
    /// The cloud.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cloud: Option<String>,
    /// The availability zone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) zone: Option<String>,
    /// The broker's URL; none for a single host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) broker: Option<String>,
    /// Address that other hosts send overlay packets to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tunnel_address: Option<IpAddr>,
    /// LVM's volume group for volumes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) volume_group: Option<String>,
    /// Who executes guests' instructions: auto, kvm or qemu.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) virt_type: Option<String>,
    /// The controllers' public keys.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) trust: Vec<PathBuf>,
    /// Physical network to link.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) bridge_mappings: BTreeMap<String, String>,
}

impl Answers {
    /// Reads a file of answers.
    ///
    /// # Errors
    ///
    /// What is wrong, with file and line.
    pub(crate) fn parse(source: &str, text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| {
                1 + text.bytes().take(span.start).filter(|byte| *byte == b'\n').count()
            });
            format!("{source}:{line}: {}", error.message())
        })
    }

    /// These answers, and those of `weaker` where these have none.
    #[must_use]
    pub(crate) fn over(self, weaker: Self) -> Self {
        let mut bridge_mappings = weaker.bridge_mappings;
        bridge_mappings.extend(self.bridge_mappings);
        let trust = if self.trust.is_empty() { weaker.trust } else { self.trust };
        Self {
            host: self.host.or(weaker.host),
            cloud: self.cloud.or(weaker.cloud),
            zone: self.zone.or(weaker.zone),
            broker: self.broker.or(weaker.broker),
            tunnel_address: self.tunnel_address.or(weaker.tunnel_address),
            volume_group: self.volume_group.or(weaker.volume_group),
            virt_type: self.virt_type.or(weaker.virt_type),
            trust,
            bridge_mappings,
        }
    }

    /// Every answer that cannot be right.
    pub(crate) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Some(url) = &self.broker
            && let Err(error) = url.parse::<BusUrl>()
        {
            problems.push(format!("broker: {error}"));
        }
        for (physical, link) in &self.bridge_mappings {
            if physical.is_empty()
                || link.is_empty()
                || link.len() > 15
                || link.contains(['/', ' '])
            {
                problems.push(format!(
                    "bridge_mappings: {physical:?} to {link:?}: a link's name has 1 to 15 bytes, \
                     no blank and no slash"
                ));
            }
        }
        let texts = [("host", &self.host), ("cloud", &self.cloud), ("zone", &self.zone)];
        for (key, text) in texts {
            if text.as_ref().is_some_and(|it| it.trim() != it || it.is_empty()) {
                problems.push(format!("{key}: is empty, or has blanks at an end"));
            }
        }
        if let Some(kind) = &self.virt_type
            && !["auto", "kvm", "qemu"].contains(&kind.as_str())
        {
            problems.push(format!("virt_type: {kind:?} is not auto, kvm or qemu"));
        }
        problems
    }
}

/// A file to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Made {
    pub(crate) path: PathBuf,
    pub(crate) text: String,
}

impl Made {
    /// This file with what it held `earlier` and has no new answer.
    ///
    /// # Errors
    ///
    /// What was there is no TOML.
    pub(crate) fn over(self, earlier: &str) -> Result<Self, String> {
        let table = |text: &str| {
            text.parse::<Table>().map_err(|error| {
                format!(
                    "{}: {}; mend it or move it away",
                    self.path.display(),
                    error.message().trim_end()
                )
            })
        };
        let mut merged = table(earlier)?;
        merge(&mut merged, table(&self.text)?);
        Ok(Self { text: told(&merged), ..self })
    }
}

/// Puts what `new` says into `old`; sections of both are merged.
fn merge(old: &mut Table, new: Table) {
    for (key, value) in new {
        match (old.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            (_, value) => {
                old.insert(key, value);
            }
        }
    }
}

fn told(table: &Table) -> String {
    format!("# Written by `agentctl init`; run it again to change it.\n{table}")
}

/// The settings that answers become, below the configuration folder.
pub(crate) fn files(answers: &Answers, config_dir: &Path) -> Vec<Made> {
    let text = |value: &Option<String>| value.clone().map(Value::String);
    let mut shared = Table::new();
    for (key, value) in
        [("host", &answers.host), ("zone", &answers.zone), ("cloud", &answers.cloud)]
    {
        shared.extend(text(value).map(|value| (key.to_owned(), value)));
    }
    if let Some(url) = text(&answers.broker) {
        shared.insert("bus".into(), section([("url", url)]));
    }
    let mut network = Table::new();
    if let Some(address) = answers.tunnel_address {
        network.insert("tunnel_address".into(), address.to_string().into());
    }
    if !answers.bridge_mappings.is_empty() {
        let mappings = answers.bridge_mappings.iter();
        let mappings = mappings.map(|(name, link)| (name.clone(), Value::from(link.clone())));
        network.insert("bridge_mappings".into(), Value::Table(mappings.collect()));
    }
    let mut storage = Table::new();
    if let Some(group) = text(&answers.volume_group) {
        let backend = section([("type", "lvm".into()), ("volume_group", group)]);
        storage.insert("default_backend".into(), "lvm".into());
        storage.insert("backends".into(), section([("lvm", backend)]));
    }
    let mut compute = Table::new();
    compute.extend(text(&answers.virt_type).map(|kind| ("virt_type".to_owned(), kind)));

    let mut made = Vec::new();
    let mut add = |folder: &str, table: Table| {
        if !table.is_empty() {
            made.push(Made { path: config_dir.join(folder).join(DROP_IN), text: told(&table) });
        }
    };
    add("stackhand.d", shared);
    for (agent, table) in [("network", network), ("compute", compute), ("storage", storage)] {
        if !table.is_empty() {
            add(&format!("{agent}.d"), Table::from_iter([(agent.to_owned(), Value::Table(table))]));
        }
    }
    made
}

fn section<const N: usize>(fields: [(&str, Value); N]) -> Value {
    Value::Table(fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_become_drop_ins_of_the_agents_that_need_them() {
        let text = "broker = \"rabbit://u:p@c1/\"\nzone = \"north\"\ntunnel_address = \"192.0.2.7\"\nvolume_group = \"vg1\"\n[bridge_mappings]\nextnet = \"eth1\"\n";
        let answers = Answers::parse("a.toml", text).unwrap();
        assert_eq!(answers.problems(), [] as [&str; 0]);
        let made = files(&answers, Path::new("/etc/stackhand"));
        let told: Vec<(String, Value)> = made
            .iter()
            .map(|it| (it.path.display().to_string(), it.text.parse::<Table>().unwrap().into()))
            .collect();
        let expected = [
            ("stackhand", "zone = \"north\"\n[bus]\nurl = \"rabbit://u:p@c1/\""),
            (
                "network",
                "[network]\ntunnel_address = \"192.0.2.7\"\nbridge_mappings = {extnet = \"eth1\"}",
            ),
            (
                "storage",
                "[storage]\ndefault_backend = \"lvm\"\nbackends = {lvm = {type = \"lvm\", volume_group = \"vg1\"}}",
            ),
        ];
        let expected = expected.map(|(name, text)| {
            let path = format!("/etc/stackhand/{name}.d/50-init.toml");
            (path, Value::from(text.parse::<Table>().unwrap()))
        });
        assert_eq!(told, expected);
        assert!(files(&Answers::default(), Path::new("/")).is_empty());
    }

    #[test]
    fn what_was_answered_earlier_stays_until_it_is_answered_otherwise() {
        let made = |text: &str| {
            let answers = Answers::parse("a.toml", text).unwrap();
            files(&answers, Path::new("/etc/stackhand")).remove(0)
        };
        let first = made("[bridge_mappings]\nextnet = \"eth1\"\nlab = \"eth2\"\n");
        let second = made("tunnel_address = \"192.0.2.7\"\n[bridge_mappings]\nlab = \"eth3\"\n");
        let both = made(
            "tunnel_address = \"192.0.2.7\"\n[bridge_mappings]\nextnet = \"eth1\"\nlab = \"eth3\"\n",
        );
        let merged = second.over(&first.text).unwrap();
        assert_eq!(merged, both);
        assert_eq!(merged.over(&both.text).unwrap(), both, "given twice, it changes nothing");
        let problem = both.over("[network\n").unwrap_err();
        assert!(problem.starts_with("/etc/stackhand/network.d/50-init.toml: "), "{problem}");
    }

    #[test]
    fn wrong_answers_are_all_told() {
        let problem = Answers::parse("a.toml", "zone = \"x\"\nbrocker = 3\n").unwrap_err();
        assert!(problem.starts_with("a.toml:2: unknown field `brocker`"), "{problem}");
        let answers = Answers {
            broker: Some("http://x".into()),
            host: Some(" n1".into()),
            virt_type: Some("xen".into()),
            bridge_mappings: [("ext".to_owned(), "a-very-long-link-name".to_owned())].into(),
            ..Answers::default()
        };
        assert_eq!(answers.problems().len(), 4, "{:#?}", answers.problems());
    }

    #[test]
    fn flags_win_over_a_file() {
        let file = Answers { zone: Some("a".into()), host: Some("h".into()), ..<_>::default() };
        let flags = Answers { zone: Some("b".into()), ..<_>::default() };
        let both = flags.over(file);
        assert_eq!((both.zone.as_deref(), both.host.as_deref()), (Some("b"), Some("h")));
    }
}
