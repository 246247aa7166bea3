//! Where a request goes, and which version of the interface it asks for.

use std::fmt;
use std::str::FromStr;

/// Addresses a request: an exchange, a topic, and maybe one server of that topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Scope of the topic, for example `stackhand`, `neutron` or `nova` (oslo: control exchange).
    pub exchange: String,
    /// Name shared by all servers that offer the same interface.
    pub topic: String,
    /// One server of the topic, usually a host name. `None` lets the broker choose any.
    pub server: Option<String>,
    /// Send to every server of the topic. Only for casts.
    pub fanout: bool,
    /// Interface namespace; `None` is the default one.
    pub namespace: Option<String>,
    /// The interface version asked for.
    pub version: Version,
}

impl Target {
    /// Addresses any server of `topic`, at version 1.0, in the default namespace.
    #[must_use]
    pub fn topic(exchange: &str, topic: &str) -> Self {
        Self {
            exchange: exchange.to_owned(),
            topic: topic.to_owned(),
            server: None,
            fanout: false,
            namespace: None,
            version: Version::V1_0,
        }
    }

    /// Addresses one server of the topic.
    #[must_use]
    pub fn on_server(mut self, server: &str) -> Self {
        self.server = Some(server.to_owned());
        self
    }

    /// Addresses every server of the topic.
    #[must_use]
    pub fn to_all(mut self) -> Self {
        self.fanout = true;
        self
    }

    /// Asks for an interface version.
    #[must_use]
    pub fn at_version(mut self, version: Version) -> Self {
        self.version = version;
        self
    }

    /// Asks for an interface namespace.
    #[must_use]
    pub fn in_namespace(mut self, namespace: &str) -> Self {
        self.namespace = Some(namespace.to_owned());
        self
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.exchange, self.topic)?;
        if let Some(server) = &self.server {
            write!(f, ".{server}")?;
        }
        if self.fanout {
            write!(f, " (fanout)")?;
        }
        Ok(())
    }
}

/// An interface version `major.minor`, compared as oslo.messaging does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Changes when callers must change.
    pub major: u32,
    /// Grows with every addition.
    pub minor: u32,
    /// Optional third part; zero when absent.
    pub revision: u32,
}

/// Text that is not a version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("version {0:?} is not of the form `major.minor`")]
pub struct InvalidVersion(pub String);

impl Version {
    /// What a request without a version asks for.
    pub const V1_0: Self = Self::new(1, 0);

    /// Makes a version without a revision.
    #[must_use]
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor, revision: 0 }
    }

    /// Whether an implementation at this version can serve a request for `asked`.
    ///
    /// The majors must be equal and the minor asked for not newer; the revision matters only
    /// between equal minors.
    #[must_use]
    pub fn serves(self, asked: Self) -> bool {
        self.major == asked.major
            && (asked.minor < self.minor
                || asked.minor == self.minor && asked.revision <= self.revision)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        if self.revision > 0 {
            write!(f, ".{}", self.revision)?;
        }
        Ok(())
    }
}

impl FromStr for Version {
    type Err = InvalidVersion;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidVersion(text.to_owned());
        let mut parts = text.split('.');
        let mut number = || parts.next().map(|part| part.parse::<u32>().map_err(|_| invalid()));
        let major = number().ok_or_else(invalid)??;
        let minor = number().ok_or_else(invalid)??;
        let revision = number().transpose()?.unwrap_or(0);
        if parts.next().is_some() {
            return Err(invalid());
        }
        Ok(Self { major, minor, revision })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        text.parse().unwrap()
    }

    #[test]
    fn an_older_minor_of_the_same_major_is_served() {
        for (ours, asked, serves) in [
            ("1.3", "1.3", true),
            ("1.3", "1.0", true),
            ("1.3", "1.4", false),
            ("2.0", "1.0", false),
            ("1.0", "2.0", false),
            ("1.3.1", "1.3.2", false),
            ("1.3.1", "1.2.9", true),
        ] {
            assert_eq!(version(ours).serves(version(asked)), serves, "{ours} serves {asked}");
        }
    }

    #[test]
    fn text_that_is_not_a_version_is_refused() {
        for text in ["", "1", "1.", "a.b", "1.2.3.4", "-1.0", "1.0 "] {
            assert!(text.parse::<Version>().is_err(), "{text:?}");
        }
    }
}
