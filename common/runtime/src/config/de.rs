//! Reads typed settings from the merged tree, and tells which key at which place is wrong.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeSeed, EnumAccess, Expected, IntoDeserializer, MapAccess, SeqAccess,
    Unexpected, VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;

use super::problem::{Problem, suggestion};
use super::redact;
use super::tree::{Entry, Node, Origin, Value};

/// Why the tree is not of the wanted type.
#[derive(Debug)]
pub(super) struct DeError {
    kind: Box<Kind>,
    /// Names of the keys that lead to the place.
    pub(super) path: Vec<String>,
    origin: Option<Origin>,
}

#[derive(Debug)]
enum Kind {
    UnknownKey { name: String, known: &'static [&'static str] },
    UnknownVariant { name: String, known: &'static [&'static str] },
    WrongType { found: String, found_kind: &'static str, expected: String },
    MissingKey(&'static str),
    Other(String),
}

impl DeError {
    fn new(kind: Kind) -> Self {
        Self { kind: Box::new(kind), path: Vec::new(), origin: None }
    }

    /// The same, below the key `name`; its place is `origin` if nothing below knew better.
    fn under(mut self, name: String, origin: &Origin) -> Self {
        self.path.insert(0, name);
        self.origin.get_or_insert_with(|| origin.clone());
        self
    }

    /// The same; its place is `origin` if nothing below knew better.
    pub(super) fn or_at(mut self, origin: &Origin) -> Self {
        self.origin.get_or_insert_with(|| origin.clone());
        self
    }

    /// What to tell the operator; `section` stands before the path.
    pub(super) fn into_problem(self, section: &str) -> Problem {
        let mut names: Vec<&str> = self.path.iter().map(String::as_str).collect();
        if !section.is_empty() {
            names.insert(0, section);
        }
        let key = names.join(".");
        let secret = names.iter().any(|name| redact::is_secret_key(name));
        let message = match *self.kind {
            Kind::UnknownKey { name, known } => {
                let what = if known_sections(known) && names.len() == 1 {
                    "key or section"
                } else {
                    "key"
                };
                let agents: &[&str] = if known_sections(known) { &super::AGENTS } else { &[] };
                let hint = suggestion(&name, known.iter().chain(agents).copied());
                format!("unknown {what} `{key}`{hint}")
            }
            Kind::UnknownVariant { name, known } => {
                let list: Vec<String> = known.iter().map(|name| format!("{name:?}")).collect();
                let shown = if secret { "this".into() } else { format!("{name:?}") };
                format!("`{key}` must be one of {}, not {shown}", list.join(", "))
            }
            Kind::WrongType { found_kind, expected, .. } if secret => {
                format!("`{key}` must be {expected}, not {found_kind}")
            }
            Kind::WrongType { found, expected, .. } => {
                format!("`{key}` must be {expected}, not {found}")
            }
            Kind::MissingKey(name) => format!("`{}` must be set", super::tree::join(&key, name)),
            Kind::Other(what) => format!("`{key}` {what}"),
        };
        Problem::new(self.origin.unwrap_or(Origin::Default), key, message)
    }
}

/// Whether these are the keys at the top of a file.
fn known_sections(known: &[&str]) -> bool {
    known.contains(&"bus") && known.contains(&"signing")
}

impl fmt::Display for DeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.kind)
    }
}

impl std::error::Error for DeError {}

impl de::Error for DeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(Kind::Other(message.to_string()))
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::new(Kind::WrongType {
            found: describe(found),
            found_kind: kind_of(found),
            expected: plain_words(&expected.to_string()),
        })
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(found, expected)
    }

    fn unknown_variant(name: &str, known: &'static [&'static str]) -> Self {
        Self::new(Kind::UnknownVariant { name: name.to_owned(), known })
    }

    fn unknown_field(name: &str, known: &'static [&'static str]) -> Self {
        Self::new(Kind::UnknownKey { name: name.to_owned(), known })
    }

    fn missing_field(name: &'static str) -> Self {
        Self::new(Kind::MissingKey(name))
    }
}

fn kind_of(found: Unexpected<'_>) -> &'static str {
    match found {
        Unexpected::Bool(_) => "a boolean",
        Unexpected::Unsigned(_) | Unexpected::Signed(_) | Unexpected::Float(_) => "a number",
        Unexpected::Str(_) | Unexpected::Char(_) => "a string",
        Unexpected::Seq => "an array",
        Unexpected::Map => "a table",
        _ => "a value of another type",
    }
}

fn describe(found: Unexpected<'_>) -> String {
    match found {
        Unexpected::Bool(value) => format!("the boolean {value}"),
        Unexpected::Unsigned(value) => value.to_string(),
        Unexpected::Signed(value) => value.to_string(),
        Unexpected::Float(value) => format!("the number {value:?}"),
        Unexpected::Str(text) => {
            let shown = redact::text(text).unwrap_or_else(|| text.to_owned());
            let short: String = shown.chars().take(60).collect();
            let dots = if short.len() < shown.len() { "…" } else { "" };
            format!("the string {short:?}{dots}")
        }
        other => kind_of(other).to_owned(),
    }
}

/// Serde's names of types in words for people who do not write Rust.
fn plain_words(expected: &str) -> String {
    let limits = match expected {
        "u8" => Some((0, i128::from(u8::MAX))),
        "u16" => Some((0, i128::from(u16::MAX))),
        "u32" => Some((0, i128::from(u32::MAX))),
        "i32" => Some((i128::from(i32::MIN), i128::from(i32::MAX))),
        _ => None,
    };
    if let Some((low, high)) = limits {
        return format!("an integer from {low} to {high}");
    }
    match expected {
        "u64" | "usize" | "nonzero u64" => "an integer from 0 up".into(),
        "i64" | "isize" => "an integer".into(),
        "f32" | "f64" => "a number".into(),
        "path string" => "a path".into(),
        "a boolean" => "true or false".into(),
        "a sequence" => "an array".into(),
        "a map" => "a table".into(),
        other if other.starts_with("struct ") => "a table".into(),
        other if other.starts_with("enum ") => "a string".into(),
        other => other.to_owned(),
    }
}

/// Reads from a node.
#[derive(Clone, Copy, Debug)]
pub(super) struct NodeDeserializer<'a>(pub(super) &'a Node);

/// What a value from the environment is wanted as.
enum Wanted {
    Integer,
    Float,
    Boolean,
}

impl<'a> NodeDeserializer<'a> {
    /// Reads a number or boolean; text from the environment is parsed for it.
    fn scalar<'de, V: Visitor<'de>>(
        self,
        wanted: &Wanted,
        visitor: V,
    ) -> Result<V::Value, DeError> {
        let Value::Environment(text) = &self.0.value else { return self.visit(visitor) };
        let text = text.trim();
        match wanted {
            Wanted::Integer => match (text.parse::<i64>(), text.parse::<u64>()) {
                (Ok(number), _) => visitor.visit_i64(number),
                (_, Ok(number)) => visitor.visit_u64(number),
                _ => Err(de::Error::invalid_type(Unexpected::Str(text), &visitor)),
            },
            Wanted::Float => match text.parse() {
                Ok(number) => visitor.visit_f64(number),
                Err(_) => Err(de::Error::invalid_type(Unexpected::Str(text), &visitor)),
            },
            Wanted::Boolean => match text.parse() {
                Ok(value) => visitor.visit_bool(value),
                Err(_) => Err(de::Error::invalid_type(Unexpected::Str(text), &visitor)),
            },
        }
    }

    /// Reads an array or table; text from the environment is parsed as TOML for it.
    fn compound<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        let Value::Environment(text) = &self.0.value else { return self.visit(visitor) };
        match Node::from_environment(text, &self.0.origin) {
            Ok(node) => NodeDeserializer(&node).visit(visitor),
            Err(_) => Err(de::Error::invalid_type(Unexpected::Str(text), &visitor)),
        }
    }

    fn visit<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.0.value {
            Value::Table(table) => {
                let mut entries = table.iter();
                visitor.visit_map(Entries { rest: &mut entries, value: None })
            }
            Value::Array(items) => visitor.visit_seq(Items { rest: items.iter().enumerate() }),
            Value::String(text) | Value::Datetime(text) | Value::Environment(text) => {
                visitor.visit_str(text)
            }
            Value::Integer(number) => visitor.visit_i64(*number),
            Value::Float(number) => visitor.visit_f64(*number),
            Value::Boolean(value) => visitor.visit_bool(*value),
        }
    }
}

macro_rules! scalars {
    ($($method:ident $wanted:ident,)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
            self.scalar(&Wanted::$wanted, visitor)
        }
    )*};
}

impl<'de> de::Deserializer<'de> for NodeDeserializer<'_> {
    type Error = DeError;

    /// Where any type will do, text from the environment is TOML if it can be, else a string.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.0.value {
            Value::Environment(text) => match Node::from_environment(text, &self.0.origin) {
                Ok(node) => NodeDeserializer(&node).visit(visitor),
                Err(_) => visitor.visit_str(text),
            },
            _ => self.visit(visitor),
        }
    }

    scalars! {
        deserialize_i8 Integer, deserialize_i16 Integer, deserialize_i32 Integer,
        deserialize_i64 Integer, deserialize_i128 Integer, deserialize_u8 Integer,
        deserialize_u16 Integer, deserialize_u32 Integer, deserialize_u64 Integer,
        deserialize_u128 Integer, deserialize_f32 Float, deserialize_f64 Float,
        deserialize_bool Boolean,
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.visit(visitor)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.visit(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.0.value {
            Value::Environment(text) if text.is_empty() => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DeError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.compound(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.compound(visitor)
    }

    fn deserialize_tuple<V: Visitor<'de>>(
        self,
        _length: usize,
        visitor: V,
    ) -> Result<V::Value, DeError> {
        self.compound(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        self.compound(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        match &self.0.value {
            Value::String(text) | Value::Environment(text) => {
                let name: StrDeserializer<'_, DeError> = text.as_str().into_deserializer();
                visitor.visit_enum(name)
            }
            Value::Table(table) if table.len() == 1 => match table.iter().next() {
                Some((name, entry)) => visitor.visit_enum(Variant { name, entry }),
                None => self.visit(visitor),
            },
            _ => self.visit(visitor),
        }
    }

    forward_to_deserialize_any! {
        char bytes byte_buf unit unit_struct tuple_struct identifier ignored_any
    }
}

/// The entries of a table.
struct Entries<'a, I> {
    rest: &'a mut I,
    value: Option<(&'a String, &'a Entry)>,
}

impl<'de, 'a, I: Iterator<Item = (&'a String, &'a Entry)>> MapAccess<'de> for Entries<'a, I> {
    type Error = DeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, DeError> {
        let Some((name, entry)) = self.rest.next() else { return Ok(None) };
        self.value = Some((name, entry));
        let key: StrDeserializer<'_, DeError> = name.as_str().into_deserializer();
        seed.deserialize(key).map(Some).map_err(|error| error.under(name.clone(), &entry.key))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, DeError> {
        let Some((name, entry)) = self.value.take() else {
            return Err(de::Error::custom("was read out of order"));
        };
        let value = seed.deserialize(NodeDeserializer(&entry.node));
        value.map_err(|error| error.under(name.clone(), &entry.node.origin))
    }
}

/// The elements of an array.
struct Items<I> {
    rest: I,
}

impl<'de, 'a, I: Iterator<Item = (usize, &'a Node)>> SeqAccess<'de> for Items<I> {
    type Error = DeError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, DeError> {
        let Some((index, node)) = self.rest.next() else { return Ok(None) };
        let value = seed.deserialize(NodeDeserializer(node)).map(Some);
        value.map_err(|error| error.under(index.to_string(), &node.origin))
    }
}

/// An enum's variant with contents: a table with one key.
struct Variant<'a> {
    name: &'a str,
    entry: &'a Entry,
}

impl<'de> EnumAccess<'de> for Variant<'_> {
    type Error = DeError;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), DeError> {
        let name: StrDeserializer<'_, DeError> = self.name.into_deserializer();
        let variant = seed.deserialize(name);
        match variant {
            Ok(variant) => Ok((variant, self)),
            Err(error) => Err(error.under(self.name.to_owned(), &self.entry.key)),
        }
    }
}

impl Variant<'_> {
    fn locate(&self, error: DeError) -> DeError {
        error.under(self.name.to_owned(), &self.entry.node.origin)
    }
}

impl<'de> VariantAccess<'de> for Variant<'_> {
    type Error = DeError;

    fn unit_variant(self) -> Result<(), DeError> {
        let error = de::Error::custom("must stand alone, without a value");
        Err(self.locate(error))
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, DeError> {
        seed.deserialize(NodeDeserializer(&self.entry.node)).map_err(|error| self.locate(error))
    }

    fn tuple_variant<V: Visitor<'de>>(
        self,
        _length: usize,
        visitor: V,
    ) -> Result<V::Value, DeError> {
        NodeDeserializer(&self.entry.node).visit(visitor).map_err(|error| self.locate(error))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        NodeDeserializer(&self.entry.node).visit(visitor).map_err(|error| self.locate(error))
    }
}
