//! Transport URLs: `rabbit://user:password@host1:5672,user:password@host2/vhost?option=value`.

use std::fmt;
use std::str::FromStr;

use crate::BusError;

/// Where the brokers of one cluster are and who we are to them.
///
/// `Debug` and `Display` never show a password.
#[derive(Clone, PartialEq, Eq)]
pub struct AmqpUrl {
    /// Speak TLS (`rabbits://`).
    pub tls: bool,
    /// The brokers, at least one; any of them will do.
    pub hosts: Vec<Broker>,
    /// The virtual host; `/` when the URL names none.
    pub vhost: String,
    /// Options after the `?`, decoded, in the order given.
    pub query: Vec<(String, String)>,
}

/// One broker of a URL.
#[derive(Clone, PartialEq, Eq)]
pub struct Broker {
    /// User name.
    pub user: String,
    /// Password.
    pub password: String,
    /// Host name or address, IPv6 without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl Broker {
    /// `host:port`, for messages.
    #[must_use]
    pub fn address(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for AmqpUrl {
    type Err = BusError;

    fn from_str(text: &str) -> Result<Self, BusError> {
        // The text may hold a password: errors must not repeat it.
        let invalid = |what: &str| {
            let form = "rabbit://user:password@host:5672,user:password@host2:5672/vhost";
            BusError::Config(format!("transport URL: {what}; expected the form {form}"))
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| invalid("it has no scheme"))?;
        let tls = match scheme {
            "rabbit" | "amqp" => false,
            "rabbits" | "amqps" => true,
            other => return Err(invalid(&format!("scheme {other:?} is not rabbit or rabbits"))),
        };
        if rest.contains('#') {
            return Err(invalid("`#` must be written %23"));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let default_port = if tls { 5671 } else { 5672 };
        let hosts = authority
            .split(',')
            .map(|part| broker(part, default_port).map_err(|what| invalid(&what)))
            .collect::<Result<Vec<_>, _>>()?;
        let vhost = decode(path).map_err(|what| invalid(&format!("vhost: {what}")))?;
        let query = query
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (key, value) = pair.split_once('=').ok_or("option without `=`")?;
                Ok((decode(key)?, decode(value)?))
            })
            .collect::<Result<Vec<_>, &str>>()
            .map_err(invalid)?;
        let vhost = if vhost.is_empty() { "/".to_owned() } else { vhost };
        Ok(Self { tls, hosts, vhost, query })
    }
}

fn broker(part: &str, default_port: u16) -> Result<Broker, String> {
    // A password may hold a bare `@`; a host cannot.
    let (credentials, address) = match part.rsplit_once('@') {
        Some((credentials, address)) => (Some(credentials), address),
        None => (None, part),
    };
    let (user, password) = match credentials {
        Some(credentials) => {
            let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
            let user = decode(user).map_err(|what| format!("user: {what}"))?;
            (user, decode(password).map_err(|what| format!("password: {what}"))?)
        }
        None => ("guest".to_owned(), "guest".to_owned()),
    };
    let (host, port) = if let Some(bracketed) = address.strip_prefix('[') {
        let (host, after) = bracketed.split_once(']').ok_or("an IPv6 address lacks its `]`")?;
        (host, after.strip_prefix(':').or_else(|| after.is_empty().then_some("")))
    } else if let Some((host, port)) = address.split_once(':') {
        (host, Some(port))
    } else {
        (address, Some(""))
    };
    let port = match port {
        Some("") => default_port,
        Some(digits) => match digits.parse() {
            Ok(0) | Err(_) => return Err(format!("port {digits:?} is not within 1..=65535")),
            Ok(port) => port,
        },
        None => return Err("an IPv6 address is followed by something that is no port".into()),
    };
    let host = if host.is_empty() { "localhost" } else { host };
    Ok(Broker { user, password, host: host.to_owned(), port })
}

/// Undoes percent encoding.
fn decode(text: &str) -> Result<String, &'static str> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let digits = rest.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        let value = digits.and_then(|two| u8::from_str_radix(two, 16).ok());
        bytes.push(value.ok_or("`%` is not followed by two hexadecimal digits")?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).map_err(|_| "not UTF-8 once decoded")
}

impl fmt::Display for AmqpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rabbit{}://", if self.tls { "s" } else { "" })?;
        for (position, broker) in self.hosts.iter().enumerate() {
            let comma = if position == 0 { "" } else { "," };
            write!(f, "{comma}{}@{}", broker.user, broker.address())?;
        }
        write!(f, "/{}", self.vhost.strip_prefix('/').unwrap_or(&self.vhost))
    }
}

impl fmt::Debug for AmqpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AmqpUrl({self})")
    }
}

impl fmt::Debug for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Broker({}@{})", self.user, self.address())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> AmqpUrl {
        text.parse().unwrap()
    }

    #[test]
    fn every_part_of_a_url_is_found() {
        let url = url("rabbit://u1:p%40ss@h1:5673,u2:p2@[fd00::1]:5674,h3/cloud%2Fa?x=1&y=%26");
        let parts: Vec<_> = url
            .hosts
            .iter()
            .map(|b| (b.user.as_str(), b.password.as_str(), b.host.as_str(), b.port))
            .collect();
        assert_eq!(
            parts,
            [
                ("u1", "p@ss", "h1", 5673),
                ("u2", "p2", "fd00::1", 5674),
                ("guest", "guest", "h3", 5672)
            ]
        );
        assert_eq!(url.vhost, "cloud/a");
        assert_eq!(url.query, [("x".into(), "1".into()), ("y".into(), "&".into())]);
    }

    #[test]
    fn what_a_url_leaves_out_has_a_default() {
        for (text, host, port, vhost) in [
            ("rabbit://", "localhost", 5672, "/"),
            ("rabbit:///", "localhost", 5672, "/"),
            ("rabbits://h", "h", 5671, "/"),
            ("rabbit://h//", "h", 5672, "/"),
            ("rabbit://u:p@[::1]/v", "::1", 5672, "v"),
        ] {
            let url = url(text);
            let broker = &url.hosts[0];
            assert_eq!(
                (broker.host.as_str(), broker.port, url.vhost.as_str()),
                (host, port, vhost)
            );
        }
    }

    #[test]
    fn a_password_is_never_shown() {
        let url = url("rabbit://agent:s3cret@h1,agent:s3cret@h2/v");
        let shown = format!("{url} {url:?} {:?}", url.hosts);
        assert!(!shown.contains("s3cret"), "{shown}");
        assert!(shown.contains("agent@h1:5672,agent@h2:5672/v"), "{shown}");
    }

    #[test]
    fn a_bad_url_is_refused_without_repeating_the_password() {
        for text in [
            "h1:5672",
            "http://agent:s3cret@h",
            "rabbit://agent:s3cret@h:0",
            "rabbit://agent:s3cret@h:99999",
            "rabbit://agent:s3cret@h:x",
            "rabbit://agent:s3cret%zz@h",
            "rabbit://agent:s3cret%ff@h",
            "rabbit://agent:s3cret@[::1",
            "rabbit://agent:s3cret@[::1]x",
            "rabbit://agent:s3cret@h/v?x",
            "rabbit://agent:s3cret@h/#v",
        ] {
            let said = text.parse::<AmqpUrl>().unwrap_err().to_string();
            assert!(said.contains("expected the form") && !said.contains("s3cret"), "{said}");
        }
    }
}
