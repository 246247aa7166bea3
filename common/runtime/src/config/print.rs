//! Settings as TOML, each with a comment that tells where it came from.

use std::fmt::Write;

use serde_json::{Map, Value as Json};

use super::tree::{Origin, Origins, join};
use super::{AgentSection, Settings, redact};

/// Column at which comments start, where the setting leaves room.
const COMMENT_COLUMN: usize = 44;

/// Prints `settings`; secrets are masked. The result is TOML.
pub(super) fn print<S: AgentSection>(settings: &Settings<S>, origins: &Origins) -> String {
    let root = whole(settings);
    let defaults = whole(&Settings::<S>::default());
    let mut out = format!("# Settings of the {} agent, with the source of each.\n", S::AGENT);
    table(&mut out, &root, &defaults, "", origins);
    out
}

/// All settings as one table.
fn whole<S: AgentSection>(settings: &Settings<S>) -> Map<String, Json> {
    let mut root = object(serde_json::to_value(&settings.common).unwrap_or_default());
    let own = object(serde_json::to_value(&settings.agent).unwrap_or_default());
    root.insert(S::AGENT.to_owned(), Json::Object(own));
    root
}

fn object(value: Json) -> Map<String, Json> {
    match value {
        Json::Object(map) => map,
        _ => Map::new(),
    }
}

fn table(
    out: &mut String,
    from: &Map<String, Json>,
    defaults: &Map<String, Json>,
    prefix: &str,
    origins: &Origins,
) {
    for (name, value) in from.iter().filter(|(_, value)| !value.is_object()) {
        let full = join(prefix, name);
        let setting = match render(value, redact::is_secret_key(name)) {
            Some(shown) => format!("{} = {shown}", key(name)),
            None => format!("# {} is not set", key(name)),
        };
        let origin = match origins.get(&full) {
            // The column helps in an error, not here.
            Some(Origin::File { path, line, .. }) => format!("{}:{line}", path.display()),
            Some(origin) => origin.to_string(),
            None if defaults.get(name).is_none_or(|default| default == value) => {
                Origin::Default.to_string()
            }
            // Some settings have a second name, such as that of oslo.messaging.
            None => "set under another name".to_owned(),
        };
        let _ = writeln!(out, "{setting:COMMENT_COLUMN$} # {origin}");
    }
    for (name, value) in from {
        if let Json::Object(inner) = value {
            let full = join(prefix, &key(name));
            let _ = writeln!(out, "\n[{full}]");
            let defaults = object(defaults.get(name).cloned().unwrap_or_default());
            table(out, inner, &defaults, &join(prefix, name), origins);
        }
    }
}

/// A value in TOML; `None` for one that is not set.
fn render(value: &Json, secret: bool) -> Option<String> {
    let masked = mask(value, secret)?;
    toml::Value::try_from(masked).ok().map(|value| value.to_string())
}

/// The same value with secrets masked. `None` for null, which TOML does not have.
fn mask(value: &Json, secret: bool) -> Option<Json> {
    Some(match value {
        Json::Null => return None,
        Json::String(text) if secret && !text.is_empty() => Json::String("***".into()),
        Json::String(text) => Json::String(redact::text(text).unwrap_or_else(|| text.clone())),
        Json::Array(items) => {
            Json::Array(items.iter().filter_map(|item| mask(item, secret)).collect())
        }
        Json::Object(map) => Json::Object(
            map.iter()
                .filter_map(|(name, value)| {
                    let masked = mask(value, secret || redact::is_secret_key(name))?;
                    Some((name.clone(), masked))
                })
                .collect(),
        ),
        other => other.clone(),
    })
}

/// A key as TOML wants it.
fn key(name: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !name.is_empty() && name.chars().all(bare) {
        name.to_owned()
    } else {
        toml::Value::String(name.to_owned()).to_string()
    }
}
