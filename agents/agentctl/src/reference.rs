//! The reference of documents and commands as Markdown, made from the types and from clap, so that
//! it cannot say anything else than the programs do.

use std::collections::{BTreeMap, BTreeSet};

use clap::Command;
use serde_json::{Map, Value};
use stackhand_model::{Kind, schema};

/// What no schema tells: the forms that manifests have besides.
const FORMS: &str = include_str!("reference/forms.md");

/// The reference of documents.
pub(crate) fn documents() -> String {
    let mut out = FORMS.to_owned();
    for kind in Kind::ALL {
        out.push_str(&document(kind, &schema(kind)));
    }
    out
}

fn document(kind: Kind, schema: &Value) -> String {
    let definitions = &schema["$defs"];
    let spec = resolve(&schema["properties"]["spec"], definitions);
    let mut out = format!("\n## {kind}\n\n{}", describe(spec));
    out.push_str(&format!(" Goes to `{}`.\n\n", kind.agent().binary()));
    let mut open = vec![(String::new(), spec)];
    let mut told = BTreeSet::new();
    while let Some((name, definition)) = open.pop() {
        if !name.is_empty() {
            out.push_str(&format!("\n**{name}**: {}\n\n", describe(definition)));
        }
        let mut inner = BTreeMap::new();
        out.push_str(&body(definition, definitions, &mut inner));
        for (name, definition) in inner.into_iter().rev() {
            if told.insert(name.clone()) {
                open.push((name, definition));
            }
        }
    }
    out
}

/// A definition's fields or values as a table. Adds the definitions that it names.
fn body<'a>(
    definition: &'a Value,
    all: &'a Value,
    inner: &mut BTreeMap<String, &'a Value>,
) -> String {
    if let Some(choices) = definition.get("oneOf").and_then(Value::as_array) {
        let mut out = "| value | what |\n|---|---|\n".to_owned();
        for choice in choices {
            out.push_str(&choice_row(choice, all, inner));
        }
        return out;
    }
    let Some(fields) = definition.get("properties").and_then(Value::as_object) else {
        return String::new();
    };
    if fields.is_empty() {
        return "It has no fields.\n".to_owned();
    }
    let required: BTreeSet<&str> =
        definition["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let mut out = "| field | type | default | what |\n|---|---|---|---|\n".to_owned();
    for (name, field) in fields {
        let default = match (required.contains(&**name), field.get("default")) {
            (true, _) => "needed".to_owned(),
            (false, Some(value)) if !value.is_null() && !is_empty(value) => format!("`{value}`"),
            _ => String::new(),
        };
        let (kind, what) = (type_of(field, all, inner), describe(field));
        out.push_str(&format!("| `{name}` | {kind} | {default} | {what} |\n"));
    }
    out
}

fn choice_row<'a>(
    choice: &'a Value,
    all: &'a Value,
    inner: &mut BTreeMap<String, &'a Value>,
) -> String {
    let what = describe(choice);
    if let Some(word) = choice.get("const").and_then(Value::as_str) {
        return format!("| `{word}` | {what} |\n");
    }
    // A choice that carries fields: told by them.
    let fields = choice.get("properties").and_then(Value::as_object);
    let fields: Vec<String> = fields
        .into_iter()
        .flatten()
        .map(|(name, field)| match field.get("const").and_then(Value::as_str) {
            Some(word) => format!("`{name}: {word}`"),
            None => format!("`{name}`: {}", type_of(field, all, inner)),
        })
        .collect();
    format!("| {} | {what} |\n", fields.join(", "))
}

fn type_of<'a>(
    field: &'a Value,
    all: &'a Value,
    inner: &mut BTreeMap<String, &'a Value>,
) -> String {
    if let Some(name) = reference(field) {
        let definition = &all[name];
        if definition.get("properties").is_some() || definition.get("oneOf").is_some() {
            inner.insert(name.to_owned(), definition);
            return name.to_owned();
        }
        if let Some(kind) = name.strip_suffix("Id").and_then(|kind| kind.parse::<Kind>().ok()) {
            return format!("name or id of a {kind}");
        }
        return type_of(definition, all, inner);
    }
    if let Some(choices) = field.get("anyOf").and_then(Value::as_array) {
        let real = choices.iter().filter(|it| it["type"] != "null");
        return real.map(|it| type_of(it, all, inner)).collect::<Vec<_>>().join(" or ");
    }
    if let Some(words) = field.get("enum").and_then(Value::as_array) {
        let words: Vec<String> = words.iter().map(|it| format!("`{it}`")).collect();
        return words.join(", ");
    }
    let kinds: Vec<&str> = match &field["type"] {
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
        Value::String(kind) => vec![kind],
        _ => Vec::new(),
    };
    let kind = kinds.into_iter().find(|kind| *kind != "null").unwrap_or("anything");
    match kind {
        "array" => format!("list of {}", type_of(&field["items"], all, inner)),
        "object" => match field.get("additionalProperties") {
            Some(values @ Value::Object(_)) => {
                format!("text to {}", type_of(values, all, inner))
            }
            _ => "object".to_owned(),
        },
        "string" => match field.get("format").and_then(Value::as_str) {
            Some("ip") => "IP address".to_owned(),
            Some("uuid") => "UUID".to_owned(),
            _ => "text".to_owned(),
        },
        other => other.to_owned(),
    }
}

fn resolve<'a>(value: &'a Value, all: &'a Value) -> &'a Value {
    reference(value).map_or(value, |name| &all[name])
}

fn reference(value: &Value) -> Option<&str> {
    value.get("$ref")?.as_str()?.strip_prefix("#/$defs/")
}

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty)
}

/// A description on one line that no table breaks at.
fn describe(value: &Value) -> String {
    let text = value.get("description").and_then(Value::as_str).unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

/// The reference of commands: what `--help` says of each.
pub(crate) fn commands(mut command: Command) -> String {
    let mut out = "# Commands of agentctl\n\nMade by `make reference` from the program; what \
                   `agentctl COMMAND --help` prints.\n"
        .to_owned();
    // Build first, so that the options that all commands take are known.
    command.build();
    let names: Vec<String> = command
        .get_subcommands()
        .filter(|it| !it.is_hide_set() && it.get_name() != "help")
        .map(|it| it.get_name().to_owned())
        .collect();
    out.push_str(&page(&mut command, "agentctl"));
    for name in names {
        if let Some(inner) = command.find_subcommand_mut(&name) {
            out.push_str(&page(inner, &format!("agentctl {name}")));
        }
    }
    out
}

fn page(command: &mut Command, title: &str) -> String {
    let help = command.render_long_help().to_string();
    let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
    format!("\n## {title}\n\n```text\n{}\n```\n", lines.join("\n").trim())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_field_of_every_kind_is_told_with_its_type() {
        let text = documents();
        for kind in Kind::ALL {
            assert!(text.contains(&format!("\n## {kind}\n")), "{kind}");
        }
        for row in [
            "| `snat` | boolean | `true` |",
            "| `interfaces` | list of name or id of a Port |",
            "| `cidr` | text | needed |",
            "| `bridge_mappings` | text to text |",
            "| `vxlan` | In UDP, RFC 7348. |",
        ] {
            assert!(text.contains(row), "{row}");
        }
    }

    #[test]
    fn every_command_that_is_shown_has_its_page() {
        let text = commands(crate::cli::Cli::command());
        for name in ["agentctl apply", "agentctl init", "agentctl host"] {
            assert!(text.contains(&format!("\n## {name}\n")), "{name}");
        }
        assert!(!text.contains("## agentctl man"));
    }
}
