//! Flavors and key pairs: documents of the manifest alone, written out where instances name them.
//!
//! Agents never see them. A flavor gives an instance its size, where the instance does not; a key
//! pair is a public key by name.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use stackhand_model::nearest;

use super::source::Piece;
use super::spots::Origin;

/// The kinds that only manifests have.
pub(crate) const KINDS: [&str; 2] = ["Flavor", "KeyPair"];

/// A size of instances.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Flavor {
    vcpus: u32,
    memory_mib: u64,
    #[serde(default)]
    root_disk_gib: Option<u64>,
}

/// A public key.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyPair {
    public_key: String,
}

/// What instances of a manifest may name.
#[derive(Debug, Default)]
pub(crate) struct Shelf {
    flavors: BTreeMap<String, Flavor>,
    key_pairs: BTreeMap<String, KeyPair>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Frame {
    #[serde(rename = "kind")]
    _kind: String,
    name: String,
    #[serde(default, rename = "labels")]
    _labels: BTreeMap<String, String>,
    spec: Value,
}

impl Shelf {
    /// Takes flavors and key pairs out of a manifest.
    ///
    /// # Errors
    ///
    /// Every one that is wrong or there twice.
    pub(crate) fn take(pieces: &mut Vec<Piece>) -> Result<Self, Vec<String>> {
        let mut shelf = Self::default();
        let mut problems = Vec::new();
        pieces.retain(|piece| {
            let Some(kind) = piece.value["kind"].as_str().and_then(kind) else { return true };
            problems.extend(shelf.add(kind, piece).err());
            false
        });
        if problems.is_empty() { Ok(shelf) } else { Err(problems) }
    }

    fn add(&mut self, kind: &str, piece: &Piece) -> Result<(), String> {
        let name = piece.value["name"].as_str().unwrap_or("without a name");
        let label = format!("{kind} {name}");
        let frame: Frame = read(&piece.value, "", &label, &piece.origin)?;
        let twice = match kind {
            "Flavor" => {
                let flavor = read(&frame.spec, "spec", &label, &piece.origin)?;
                self.flavors.insert(frame.name, flavor).is_some()
            }
            _ => {
                let pair: KeyPair = read(&frame.spec, "spec", &label, &piece.origin)?;
                if !is_public_key(&pair.public_key) {
                    return Err(format!(
                        "{}: {label}: spec.public_key: is not one line of the form `ssh-ed25519 \
                         AAAA… comment`; give the contents of a .pub file",
                        piece.origin.of("spec.public_key")
                    ));
                }
                self.key_pairs.insert(frame.name, pair).is_some()
            }
        };
        if twice {
            return Err(format!(
                "{}: {label}: name: is already used by another",
                piece.origin.of("name")
            ));
        }
        Ok(())
    }

    /// Writes out what an instance names.
    ///
    /// # Errors
    ///
    /// Names of nothing: the field and the problem.
    pub(crate) fn fill(&self, spec: &mut Map<String, Value>) -> Result<(), (String, String)> {
        if let Some(flavor) = spec.remove("flavor") {
            let name = flavor.as_str().unwrap_or_default();
            tell(spec, "flavor", name);
            let flavor = self.flavors.get(name).ok_or_else(|| {
                unknown("flavor", "Flavor", name, self.flavors.keys().map(String::as_str))
            })?;
            spec.entry("vcpus").or_insert_with(|| flavor.vcpus.into());
            spec.entry("memory_mib").or_insert_with(|| flavor.memory_mib.into());
            if let Some(size) = flavor.root_disk_gib {
                spec.entry("root_disk_gib").or_insert_with(|| size.into());
            }
        }
        if let Some(Value::Array(names)) = spec.get("key_pairs").cloned() {
            let mut pairs = Map::new();
            spec.remove("key_pairs");
            for (index, name) in names.iter().enumerate() {
                let name = name.as_str().unwrap_or_default();
                let pair = self.key_pairs.get(name).ok_or_else(|| {
                    let field = format!("key_pairs[{index}]");
                    unknown(&field, "KeyPair", name, self.key_pairs.keys().map(String::as_str))
                })?;
                pairs.insert(name.to_owned(), json!(pair.public_key.trim()));
            }
            tell(spec, "keys", pairs);
        }
        for field in ["user_data", "metadata"] {
            if let Some(value) = spec.remove(field) {
                tell(spec, field, value);
            }
        }
        Ok(())
    }
}

/// Adds to what an instance's guest is told. Anything but an object there is refused later.
fn tell(spec: &mut Map<String, Value>, key: &str, value: impl Into<Value>) {
    let guest = spec.entry("guest").or_insert_with(|| Map::new().into());
    if let Value::Object(guest) = guest {
        guest.entry(key).or_insert_with(|| value.into());
    }
}

/// The kind of a document that is for the manifest alone, as people write it.
fn kind(text: &str) -> Option<&'static str> {
    let plain: String =
        text.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_lowercase();
    let plain = plain.strip_suffix('s').unwrap_or(&plain);
    KINDS.into_iter().find(|kind| kind.to_lowercase() == plain)
}

fn unknown<'a>(
    field: &str,
    kind: &str,
    name: &str,
    known: impl Iterator<Item = &'a str>,
) -> (String, String) {
    let hint = nearest(name, known).map(|near| format!("; did you mean {near:?}?"));
    let hint = hint.unwrap_or_default();
    (format!("spec.{field}"), format!("there is no {kind} {name:?} in the manifest{hint}"))
}

fn read<T: DeserializeOwned>(
    value: &Value,
    at: &str,
    label: &str,
    origin: &Origin,
) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let field = match (at, error.path().to_string().as_str()) {
            (at, ".") => at.to_owned(),
            ("", path) => path.to_owned(),
            (at, path) => format!("{at}.{path}"),
        };
        let colon = if field.is_empty() { "" } else { ": " };
        format!("{}: {label}: {field}{colon}{}", origin.of(&field), error.inner())
    })
}

/// Whether a text looks like a public key in OpenSSH's form.
fn is_public_key(text: &str) -> bool {
    let mut words = text.split_whitespace();
    let kind = words.next().is_some_and(|kind| {
        ["ssh-", "ecdsa-sha2-", "sk-"].iter().any(|prefix| kind.starts_with(prefix))
    });
    let base64 = |c: char| c.is_ascii_alphanumeric() || "+/=".contains(c);
    let data = words.next().is_some_and(|data| data.len() >= 16 && data.chars().all(base64));
    kind && data && !text.trim().contains(['\n', '\r'])
}

#[cfg(test)]
mod tests {
    use super::super::source::{Values, parse};
    use super::*;

    const TEXT: &str = "
kind: Flavor
name: a.nano
spec: {vcpus: 1, memory_mib: 128}
---
kind: key-pair
name: me
spec: {public_key: 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ me@here'}
---
kind: Network
name: net
spec: {type: local}
";

    fn taken(text: &str) -> Result<(Shelf, Vec<Piece>), Vec<String>> {
        let mut pieces = parse("m.yaml", text, &Values::new()).unwrap();
        Shelf::take(&mut pieces).map(|shelf| (shelf, pieces))
    }

    fn filled(spec: &Value) -> Result<Value, (String, String)> {
        let (shelf, _) = taken(TEXT).unwrap();
        let Value::Object(mut fields) = spec.clone() else { panic!() };
        shelf.fill(&mut fields).map(|()| Value::Object(fields))
    }

    #[test]
    fn an_instance_gets_the_size_and_the_keys_that_it_names() {
        let (_, rest) = taken(TEXT).unwrap();
        assert_eq!(rest.len(), 1);
        let spec = filled(&json!({"flavor": "a.nano", "memory_mib": 256, "key_pairs": ["me"]}));
        let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ me@here";
        assert_eq!(
            spec.unwrap(),
            json!({
                "vcpus": 1,
                "memory_mib": 256,
                "guest": {"flavor": "a.nano", "keys": {"me": key}},
            })
        );
    }

    #[test]
    fn a_name_of_nothing_is_told_with_the_nearest_one() {
        let problem = filled(&json!({"flavor": "a.nan"})).unwrap_err();
        assert_eq!(problem.0, "spec.flavor");
        assert!(problem.1.ends_with("did you mean \"a.nano\"?"), "{problem:?}");
        assert_eq!(filled(&json!({"key_pairs": ["x"]})).unwrap_err().0, "spec.key_pairs[0]");
        assert_eq!(filled(&json!({"flavor": 7})).unwrap_err().0, "spec.flavor");
    }

    #[test]
    fn a_wrong_flavor_or_key_is_told_by_its_place() {
        let text = "kind: Flavor\nname: f\nspec: {vcpus: 1, memory_mb: 3}\n---\nkind: KeyPair\nname: k\nspec: {public_key: nonsense}\n---\nkind: Flavor\nspec: {}\n";
        let problems = taken(text).unwrap_err();
        assert_eq!(problems.len(), 3, "{problems:#?}");
        assert!(problems[0].starts_with("m.yaml:3:"), "{problems:#?}");
        assert!(problems[0].contains("memory_mb"), "{problems:#?}");
        assert!(problems[1].starts_with("m.yaml:7:20: KeyPair k: spec.public_key: "));
        assert!(problems[2].contains("missing field `name`"), "{problems:#?}");
        assert!(taken(&format!("{TEXT}---\n{TEXT}")).is_err());
    }
}
