//! Values of all layers merged, each with the place it came from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Built in.
    Default,
    /// A file as a whole.
    WholeFile(Arc<Path>),
    /// A place in a file.
    File {
        /// The file.
        path: Arc<Path>,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
    },
    /// An environment variable.
    Environment(Arc<str>),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::WholeFile(path) => path.display().fmt(f),
            Self::File { path, line, column } => {
                write!(f, "{}:{line}:{column}", path.display())
            }
            Self::Environment(variable) => write!(f, "environment {variable}"),
        }
    }
}

/// The places of all keys, by full name.
pub(super) type Origins = BTreeMap<String, Origin>;

/// A value and where it came from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    pub(super) value: Value,
    pub(super) origin: Origin,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Table(BTreeMap<String, Entry>),
    Array(Vec<Node>),
    String(String),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    /// In TOML's form.
    Datetime(String),
    /// Text from the environment, whose type the reader decides.
    Environment(String),
}

/// A value under a key of a table.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    /// Where the key stands.
    pub(super) key: Origin,
    pub(super) node: Node,
}

/// Text of a file and the means to tell where in it a byte is.
#[derive(Debug)]
pub(super) struct Source<'a> {
    path: Arc<Path>,
    text: &'a str,
}

impl<'a> Source<'a> {
    pub(super) fn new(path: Arc<Path>, text: &'a str) -> Self {
        Self { path, text }
    }

    /// The place of the byte at `offset`.
    pub(super) fn at(&self, offset: usize) -> Origin {
        let before = &self.text[..self.text.floor_char_boundary(offset)];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Origin::File {
            path: Arc::clone(&self.path),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }
}

impl Node {
    pub(super) fn table(origin: Origin) -> Self {
        Self { value: Value::Table(BTreeMap::new()), origin }
    }

    pub(super) fn from_document(document: &Spanned<DeTable<'_>>, source: &Source<'_>) -> Self {
        let at = |offset| source.at(offset);
        Self { value: table(document.get_ref(), &at), origin: source.at(0) }
    }

    /// Reads text from the environment as a TOML value, such as an array.
    pub(super) fn from_environment(text: &str, origin: &Origin) -> Result<Self, toml::de::Error> {
        let parsed = DeValue::parse(text)?;
        Ok(convert(&parsed, &|_offset| origin.clone()))
    }

    /// Lays `upper` over this: tables are merged, anything else is replaced.
    pub(super) fn merge(&mut self, upper: Self) {
        match (&mut self.value, upper) {
            (Value::Table(lower), Self { value: Value::Table(upper), .. }) => {
                for (name, entry) in upper {
                    match lower.get_mut(&name) {
                        Some(under) => {
                            under.key = entry.key;
                            under.node.merge(entry.node);
                        }
                        None => {
                            lower.insert(name, entry);
                        }
                    }
                }
            }
            (_, upper) => *self = upper,
        }
    }

    /// Puts `node` at `path`, making the tables in between.
    pub(super) fn put(&mut self, path: &[&str], node: Self) {
        let origin = node.origin.clone();
        let branch = path.iter().rev().fold(node, |inner, &name| {
            let entry = Entry { key: origin.clone(), node: inner };
            Self {
                value: Value::Table(BTreeMap::from([(name.to_owned(), entry)])),
                origin: origin.clone(),
            }
        });
        self.merge(branch);
    }

    /// Takes the value at a key of this table out.
    pub(super) fn take(&mut self, name: &str) -> Option<Self> {
        match &mut self.value {
            Value::Table(table) => table.remove(name).map(|entry| entry.node),
            _ => None,
        }
    }

    /// Removes what is at `path`; an element of an array goes with the whole array. False if there
    /// is no such thing.
    pub(super) fn remove(&mut self, path: &[String]) -> bool {
        let Value::Table(table) = &mut self.value else { return false };
        let Some((first, rest)) = path.split_first() else { return false };
        let Some(entry) = table.get_mut(first) else { return false };
        (!rest.is_empty() && entry.node.remove(rest)) || table.remove(first).is_some()
    }

    /// The places of all keys below this, with `prefix` before them.
    pub(super) fn origins<'a>(
        &'a self,
        prefix: &str,
    ) -> Box<dyn Iterator<Item = (String, Origin)> + 'a> {
        let here = (!prefix.is_empty()).then(|| (prefix.to_owned(), self.origin.clone()));
        let Value::Table(table) = &self.value else { return Box::new(here.into_iter()) };
        let prefix = prefix.to_owned();
        let below =
            table.iter().flat_map(move |(name, entry)| entry.node.origins(&join(&prefix, name)));
        Box::new(here.into_iter().chain(below))
    }
}

/// `prefix.name`, or `name` at the top.
pub(super) fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

fn table(from: &DeTable<'_>, at: &dyn Fn(usize) -> Origin) -> Value {
    let entry = |(key, value): (&Spanned<std::borrow::Cow<'_, str>>, &Spanned<DeValue<'_>>)| {
        let node = convert(value, at);
        (key.get_ref().clone().into_owned(), Entry { key: at(key.span().start), node })
    };
    Value::Table(from.iter().map(entry).collect())
}

fn convert(from: &Spanned<DeValue<'_>>, at: &dyn Fn(usize) -> Origin) -> Node {
    let value = match from.get_ref() {
        DeValue::String(text) => Value::String(text.clone().into_owned()),
        DeValue::Boolean(value) => Value::Boolean(*value),
        DeValue::Datetime(value) => Value::Datetime(value.to_string()),
        // Numbers that do not fit stay text, and are refused as such by whoever wants a number.
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_or_else(|_| Value::String(number.as_str().to_owned()), Value::Integer),
        DeValue::Float(number) => number
            .as_str()
            .parse()
            .map_or_else(|_| Value::String(number.as_str().to_owned()), Value::Float),
        DeValue::Array(items) => Value::Array(items.iter().map(|item| convert(item, at)).collect()),
        DeValue::Table(inner) => table(inner, at),
    };
    Node { value, origin: at(from.span().start) }
}
