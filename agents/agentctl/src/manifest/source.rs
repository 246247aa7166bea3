//! Manifests as text: which files, `${NAME}` replaced, parsed into plain values.
//!
//! Only `${NAME}` is replaced, and only from `--set` and `--values`: neither the environment nor
//! commands are looked at, so a manifest means the same everywhere. `$${` stands for `${`.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde_json::Value;
use stackhand_model::{nearest, parse_values};

use super::spots::Origin;
use crate::exit::Usage;

/// One document as written, and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Piece {
    /// Where it was written.
    pub(crate) origin: Origin,
    /// The document.
    pub(crate) value: Value,
}

/// What `${NAME}`s stand for.
pub(crate) type Values = BTreeMap<String, String>;

/// Reads `K=V` as clap gives it.
///
/// # Errors
///
/// Text without `=` or with an odd name.
pub(crate) fn parse_set(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("must be of the form NAME=VALUE")?;
    check_value(name, value)?;
    Ok((name.to_owned(), value.to_owned()))
}

fn check_value(name: &str, value: &str) -> Result<(), String> {
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err(format!("{name:?} is not a name of letters, digits and underscores"));
    }
    // It is put into the text, where a further line would be a further field.
    if value.chars().any(char::is_control) {
        return Err(format!("the value of {name} has more than one line or control characters"));
    }
    Ok(())
}

/// All values: those of the files of `--values`, and over them those of `--set`.
///
/// # Errors
///
/// As [`read_values`].
pub(crate) fn values(files: &[PathBuf], set: &[(String, String)]) -> Result<Values, Usage> {
    let mut values = read_values(files)?;
    values.extend(set.iter().cloned());
    Ok(values)
}

/// Reads the files of `--values`, each a list of `NAME: value` in YAML or JSON. Later ones win.
///
/// # Errors
///
/// Every problem of all files.
fn read_values(paths: &[PathBuf]) -> Result<Values, Usage> {
    let mut values = Values::new();
    let mut problems = Vec::new();
    for path in paths {
        let source = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => match parse_settings(&source, &text) {
                Ok(more) => values.extend(more),
                Err(more) => problems.extend(more),
            },
            Err(error) => problems.push(format!("cannot read {source}: {error}")),
        }
    }
    if problems.is_empty() { Ok(values) } else { Err(Usage::several(problems)) }
}

fn parse_settings(source: &str, text: &str) -> Result<Values, Vec<String>> {
    let documents = parse_values(source, text).map_err(|error| vec![error.to_string()])?;
    let origins = Origin::of_text(source, text, documents.len());
    let mut values = Values::new();
    let mut problems = Vec::new();
    for (document, origin) in documents.into_iter().zip(origins) {
        let Value::Object(fields) = document else {
            problems.push(format!("{origin}: must be a list of NAME: value"));
            continue;
        };
        for (name, value) in fields {
            let value = match value {
                Value::String(text) => text,
                Value::Number(number) => number.to_string(),
                Value::Bool(yes) => yes.to_string(),
                _ => {
                    problems.push(format!("{}: {name}: must be text", origin.of(&name)));
                    continue;
                }
            };
            match check_value(&name, &value) {
                Ok(()) => {
                    values.insert(name, value);
                }
                Err(problem) => problems.push(format!("{}: {problem}", origin.of(&name))),
            }
        }
    }
    if problems.is_empty() { Ok(values) } else { Err(problems) }
}

/// Reads every document of the files, folders (their `.yaml`, `.yml` and `.json` files, by name)
/// and `-` (standard input).
///
/// # Errors
///
/// Every file that cannot be read and every text that is not YAML or JSON.
pub(crate) fn read(paths: &[PathBuf], values: &Values) -> Result<Vec<Piece>, Usage> {
    let mut pieces = Vec::new();
    let mut problems = Vec::new();
    for path in paths {
        match texts(path) {
            Ok(texts) => {
                for (source, text) in texts {
                    match parse(&source, &text, values) {
                        Ok(more) => pieces.extend(more),
                        Err(more) => problems.extend(more),
                    }
                }
            }
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() && pieces.is_empty() {
        problems.push("the manifest holds no documents".to_owned());
    }
    if problems.is_empty() { Ok(pieces) } else { Err(Usage::several(problems)) }
}

/// Reads the documents of one text.
///
/// # Errors
///
/// Unknown `${NAME}`s, each with its line; text that is neither YAML nor JSON.
pub(crate) fn parse(source: &str, text: &str, values: &Values) -> Result<Vec<Piece>, Vec<String>> {
    let text = substitute(source, text, values)?;
    let values = parse_values(source, &text).map_err(|error| vec![error.to_string()])?;
    let origins = Origin::of_text(source, &text, values.len());
    Ok(values.into_iter().zip(origins).map(|(value, origin)| Piece { origin, value }).collect())
}

fn texts(path: &Path) -> Result<Vec<(String, String)>, String> {
    let cannot =
        |path: &Path, error: std::io::Error| format!("cannot read {}: {error}", path.display());
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .map_err(|error| format!("cannot read standard input: {error}"))?;
        return Ok(vec![("standard input".to_owned(), text)]);
    }
    if !path.is_dir() {
        let text = std::fs::read_to_string(path).map_err(|error| cannot(path, error))?;
        return Ok(vec![(path.display().to_string(), text)]);
    }
    let mut files: Vec<PathBuf> = std::fs::read_dir(path)
        .map_err(|error| cannot(path, error))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|file| {
            file.extension().is_some_and(|it| it == "yaml" || it == "yml" || it == "json")
        })
        .collect();
    files.sort();
    if files.is_empty() {
        return Err(format!("{} holds no .yaml, .yml or .json files", path.display()));
    }
    files
        .into_iter()
        .map(|file| {
            let text = std::fs::read_to_string(&file).map_err(|error| cannot(&file, error))?;
            Ok((file.display().to_string(), text))
        })
        .collect()
}

/// Replaces every `${NAME}` outside of comment lines.
fn substitute(source: &str, text: &str, values: &Values) -> Result<String, Vec<String>> {
    let mut out = String::with_capacity(text.len());
    let mut problems = Vec::new();
    for (number, line) in text.split_inclusive('\n').enumerate() {
        if line.trim_start().starts_with('#') {
            out.push_str(line);
            continue;
        }
        let mut rest = line;
        while let Some(at) = rest.find("${") {
            let (before, after) = (&rest[..at], &rest[at + 2..]);
            if let Some(literal) = before.strip_suffix('$') {
                out.push_str(literal);
                out.push_str("${");
                rest = after;
                continue;
            }
            out.push_str(before);
            let Some(end) = after.find('}') else {
                problems.push(format!("{source}:{}: `${{` without `}}`", number + 1));
                rest = "";
                break;
            };
            let name = &after[..end];
            match values.get(name) {
                Some(value) => out.push_str(value),
                None => {
                    let hint = nearest(name, values.keys().map(String::as_str))
                        .map(|near| format!("; did you mean ${{{near}}}?"))
                        .unwrap_or_default();
                    problems.push(format!(
                        "{source}:{}: ${{{name}}} has no value; give one with --set {name}=… or --values{hint}",
                        number + 1
                    ));
                }
            }
            rest = &after[end + 1..];
        }
        out.push_str(rest);
    }
    if problems.is_empty() { Ok(out) } else { Err(problems) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(pairs: &[(&str, &str)]) -> Values {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn values_are_replaced_where_they_are_named_and_nowhere_else() {
        let text = "# ${NOT} here\nhost: ${HOST}-${N}\nraw: $${HOST} $HOST $5\n";
        let replaced = substitute("m", text, &values(&[("HOST", "node1"), ("N", "2")])).unwrap();
        assert_eq!(replaced, "# ${NOT} here\nhost: node1-2\nraw: ${HOST} $HOST $5\n");
    }

    #[test]
    fn every_value_that_is_missing_is_told_with_its_line() {
        let problems = substitute("m.yaml", "a: 1\nb: ${HOTS}\nc: ${", &values(&[("HOST", "x")]));
        assert_eq!(
            problems.unwrap_err(),
            [
                "m.yaml:2: ${HOTS} has no value; give one with --set HOTS=… or --values; did you mean ${HOST}?",
                "m.yaml:3: `${` without `}`",
            ]
        );
    }

    #[test]
    fn a_folder_is_read_by_name_and_other_files_are_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("b.yaml", "name: two\n---\nname: three");
        write("a.json", "{\"name\": \"one\"}");
        write("README.md", "# not a manifest");
        let pieces = read(&[folder.path().to_owned()], &Values::new()).unwrap();
        let names: Vec<&Value> = pieces.iter().map(|piece| &piece.value["name"]).collect();
        assert_eq!(names, ["one", "two", "three"]);
        assert!(pieces[2].origin.of("name").ends_with("b.yaml:3:7"), "{}", pieces[2].origin);
    }

    #[test]
    fn an_empty_manifest_and_a_missing_file_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let empty = folder.path().join("empty.yaml");
        std::fs::write(&empty, "---\n").unwrap();
        let problem = |path: &Path| read(&[path.to_owned()], &Values::new()).unwrap_err();
        assert_eq!(problem(&empty).to_string(), "the manifest holds no documents");
        assert!(problem(&folder.path().join("no.yaml")).to_string().starts_with("cannot read "));
        assert!(!problem(folder.path()).to_string().contains("README"));
    }

    #[test]
    fn a_setting_has_a_name_and_a_value() {
        assert_eq!(parse_set("A_1=b=c"), Ok(("A_1".into(), "b=c".into())));
        assert!(parse_set("A").is_err() && parse_set("=x").is_err() && parse_set("a-b=x").is_err());
        assert!(parse_set("A=1\nadmin: yes").is_err());
    }

    #[test]
    fn a_file_of_values_holds_plain_text_numbers_and_booleans() {
        let read = parse_settings("v.yaml", "HOST: node1\nN: 2\nON: true\n").unwrap();
        assert_eq!(read, values(&[("HOST", "node1"), ("N", "2"), ("ON", "true")]));
        let problems = parse_settings("v.yaml", "HOST: [a]\nA-B: x\nL: |\n  a\n  b\n");
        assert_eq!(
            problems.unwrap_err(),
            [
                "v.yaml:2:6: \"A-B\" is not a name of letters, digits and underscores",
                "v.yaml:1:1: HOST: must be text",
                "v.yaml:4:3: the value of L has more than one line or control characters",
            ]
        );
        assert!(parse_settings("v.yaml", "7").is_err());
    }

    proptest! {
        #[test]
        fn text_without_references_stays_as_it_is(text in "[^$]{0,80}") {
            prop_assert_eq!(substitute("m", &text, &Values::new()), Ok(text));
        }

        #[test]
        fn any_text_is_replaced_or_refused(text in "[${}#a\\n]{0,40}") {
            let _outcome = substitute("m", &text, &values(&[("a", "b")]));
        }
    }
}
