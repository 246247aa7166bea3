//! The document: a wish for one object.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use uuid::Uuid;

use crate::spec::compute::{ImageSpec, InstanceSpec};
use crate::spec::network::{
    FloatingIpSpec, HostSpec, NetworkSpec, PortSpec, QosPolicySpec, RouterSpec, SecurityGroupSpec,
};
use crate::spec::storage::{AttachmentSpec, SnapshotSpec, VolumeSpec};
use crate::suggest::nearest;
use crate::{DocumentError, Kind, ObjectRef};

/// A wish for one object, as controllers send it and agents keep it.
///
/// Written `{kind, id, name, generation, labels, spec}`; unknown fields are refused.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// Identifies the object among all of its kind.
    pub id: Uuid,
    /// What people call it.
    pub name: Name,
    /// Grows with every change of the wish. An older one never replaces a newer one.
    pub generation: u64,
    /// Free marks for grouping; `cloud` and `manifest` are set by agentctl.
    pub labels: Labels,
    /// What is wanted.
    pub spec: Spec,
}

/// Free marks on a document.
pub type Labels = BTreeMap<String, String>;

/// What is wanted of an object, by kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
#[expect(missing_docs, reason = "each variant is described by its kind and its type")]
pub enum Spec {
    Host(HostSpec),
    QosPolicy(QosPolicySpec),
    SecurityGroup(SecurityGroupSpec),
    Network(NetworkSpec),
    Port(PortSpec),
    Router(RouterSpec),
    FloatingIp(FloatingIpSpec),
    Image(ImageSpec),
    Volume(VolumeSpec),
    Snapshot(SnapshotSpec),
    Attachment(AttachmentSpec),
    Instance(Box<InstanceSpec>),
}

impl Spec {
    /// The kind this is a wish for.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Host(_) => Kind::Host,
            Self::QosPolicy(_) => Kind::QosPolicy,
            Self::SecurityGroup(_) => Kind::SecurityGroup,
            Self::Network(_) => Kind::Network,
            Self::Port(_) => Kind::Port,
            Self::Router(_) => Kind::Router,
            Self::FloatingIp(_) => Kind::FloatingIp,
            Self::Image(_) => Kind::Image,
            Self::Volume(_) => Kind::Volume,
            Self::Snapshot(_) => Kind::Snapshot,
            Self::Attachment(_) => Kind::Attachment,
            Self::Instance(_) => Kind::Instance,
        }
    }

    fn from_value(kind: Kind, value: &Value) -> Result<Self, (String, String)> {
        Ok(match kind {
            Kind::Host => Self::Host(read(value)?),
            Kind::QosPolicy => Self::QosPolicy(read(value)?),
            Kind::SecurityGroup => Self::SecurityGroup(read(value)?),
            Kind::Network => Self::Network(read(value)?),
            Kind::Port => Self::Port(read(value)?),
            Kind::Router => Self::Router(read(value)?),
            Kind::FloatingIp => Self::FloatingIp(read(value)?),
            Kind::Image => Self::Image(read(value)?),
            Kind::Volume => Self::Volume(read(value)?),
            Kind::Snapshot => Self::Snapshot(read(value)?),
            Kind::Attachment => Self::Attachment(read(value)?),
            Kind::Instance => Self::Instance(read(value)?),
        })
    }

    /// Rules that types cannot express. The field path is relative to the spec.
    fn check(&self) -> Result<(), (String, String)> {
        match self {
            Self::Host(spec) => spec.check(),
            Self::QosPolicy(spec) => spec.check(),
            Self::SecurityGroup(spec) => spec.check(),
            Self::Network(spec) => spec.check(),
            Self::Port(spec) => spec.check(),
            Self::Router(spec) => spec.check(),
            Self::FloatingIp(spec) => spec.check(),
            Self::Image(spec) => spec.check(),
            Self::Volume(spec) => spec.check(),
            Self::Snapshot(spec) => spec.check(),
            Self::Attachment(spec) => spec.check(),
            Self::Instance(spec) => spec.check(),
        }
    }
}

/// Deserialises with the path of the offending field in the error.
fn read<T: serde::de::DeserializeOwned>(value: &Value) -> Result<T, (String, String)> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = match error.path().to_string() {
            path if path == "." => String::new(),
            path => path,
        };
        (path, explain(&error.into_inner().to_string()))
    })
}

/// Adds the nearest known name to serde's complaint about an unknown one.
fn explain(complaint: &str) -> String {
    let mut quoted = complaint.split('`').skip(1).step_by(2);
    let unknown = ["unknown field", "unknown variant"];
    if unknown.iter().any(|prefix| complaint.starts_with(prefix))
        && let Some(found) = quoted.next()
        && let Some(name) = nearest(found, quoted)
    {
        return format!("{complaint}; did you mean `{name}`?");
    }
    complaint.to_owned()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Frame {
    #[serde(rename = "kind")]
    _kind: String,
    id: Uuid,
    name: Name,
    #[serde(default)]
    generation: u64,
    #[serde(default)]
    labels: Labels,
    spec: Value,
}

impl Document {
    /// The object this document is about.
    #[must_use]
    pub fn object(&self) -> ObjectRef {
        ObjectRef { kind: self.kind(), id: self.id }
    }

    /// The kind of the object.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.spec.kind()
    }

    /// Reads and validates one document.
    ///
    /// # Errors
    ///
    /// Names the document, the field and what was expected; suggests the nearest known name for
    /// an unknown one.
    pub fn from_value(value: &Value) -> Result<Self, DocumentError> {
        let text = |key: &str| value.get(key).and_then(Value::as_str);
        let label = match (text("kind"), text("name").or_else(|| text("id"))) {
            (Some(kind), Some(name)) => format!("{kind} {name}"),
            (Some(kind), None) => format!("{kind} without a name"),
            (None, Some(name)) => format!("document {name}"),
            (None, None) => "document".to_owned(),
        };
        let fail = |field: String, problem: String| DocumentError {
            document: label.clone(),
            field,
            problem,
            location: None,
        };
        // The kind first: a misspelt one explains whatever else is missing.
        let kind = text("kind").unwrap_or_default().parse::<Kind>();
        if let (Some(_), Err(unknown)) = (text("kind"), &kind) {
            return Err(fail("kind".into(), unknown.to_string()));
        }
        let frame: Frame = read(value).map_err(|(field, problem)| fail(field, problem))?;
        let kind = kind.map_err(|unknown| fail("kind".into(), unknown.to_string()))?;
        let within = |(field, problem): (String, String)| match field.as_str() {
            "" => fail("spec".into(), problem),
            field => fail(format!("spec.{field}"), problem),
        };
        let spec = Spec::from_value(kind, &frame.spec).map_err(within)?;
        spec.check().map_err(within)?;
        for (key, mark) in &frame.labels {
            if key.is_empty() || key.len() > 63 || mark.len() > 255 {
                return Err(fail(
                    format!("labels.{key}"),
                    "a label has a key of 1 to 63 bytes and a value of at most 255".into(),
                ));
            }
        }
        let Frame { id, name, generation, labels, .. } = frame;
        Ok(Self { id, name, generation, labels, spec })
    }

    /// The document as JSON.
    #[must_use]
    pub fn to_value(&self) -> Value {
        // Every spec is a plain tree of strings, numbers, lists and string-keyed maps.
        serde_json::to_value(self).unwrap_or(Value::Null)
    }
}

impl Serialize for Document {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Frame<'a> {
            kind: Kind,
            id: Uuid,
            name: &'a Name,
            generation: u64,
            #[serde(skip_serializing_if = "BTreeMap::is_empty")]
            labels: &'a Labels,
            spec: &'a Spec,
        }
        let Self { id, name, generation, labels, spec } = self;
        Frame { kind: spec.kind(), id: *id, name, generation: *generation, labels, spec }
            .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_value(&Value::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// What people call an object: 1 to 255 characters, none of them control characters, no blank at
/// either end and no `/`.
#[derive(
    Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("minLength" = 1, "maxLength" = 255))]
pub struct Name(String);

/// Which rule a name breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("name {name:?} {problem}")]
pub struct InvalidName {
    /// The name.
    pub name: String,
    /// The rule.
    pub problem: &'static str,
}

impl Name {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let problem = if text.is_empty() {
            "is empty"
        } else if text.chars().count() > 255 {
            "is longer than 255 characters"
        } else if text.chars().any(char::is_control) {
            "contains a control character"
        } else if text.contains('/') {
            "contains a slash"
        } else if text.trim() != text {
            "begins or ends with a blank"
        } else {
            return Ok(Self(text.to_owned()));
        };
        Err(InvalidName { name: text.chars().take(80).collect(), problem })
    }
}

impl TryFrom<String> for Name {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}
