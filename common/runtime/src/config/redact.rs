//! Passwords kept out of what is shown.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What stands where a secret was.
const MASK: &str = "***";

/// A setting that is never shown: `Debug` and serialisation write `***`, or nothing for an empty
/// one.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The secret itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(if self.0.is_empty() { "" } else { MASK })
    }
}

/// Whether a key's name says that its value is a secret.
pub(super) fn is_secret_key(key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    ["password", "passphrase", "secret", "token", "private_key"].iter().any(|w| key.contains(w))
        && !["_file", "_path", "_dir"].iter().any(|end| key.ends_with(end))
}

/// `text` with the passwords of a URL in it masked; `None` if it holds none.
///
/// A URL may name several hosts, each with its user. Where the part before the last `@` is not
/// exactly `user:password@host,user:password` by the rules of URLs, all of it is masked: an
/// unescaped `/` or `,` in a password must not leak the rest of it.
pub(super) fn text(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once("://")?;
    let (users, tail) = rest.rsplit_once('@')?;
    match mask_users(users) {
        Some(Masked { any: false, .. }) => None,
        Some(Masked { shown, any: true }) => Some(format!("{scheme}://{shown}@{tail}")),
        None => Some(format!("{scheme}://{MASK}@{tail}")),
    }
}

struct Masked {
    shown: String,
    /// Whether there was a password.
    any: bool,
}

/// Masks `user:password[@host,user:password]…`. `None` if the text has another shape.
fn mask_users(users: &str) -> Option<Masked> {
    let mut masked = Masked { shown: String::new(), any: false };
    let mut parts = users.split(',').peekable();
    while let Some(part) = parts.next() {
        let user = if parts.peek().is_some() { part.split_once('@')?.0 } else { part };
        let host = &part[user.len()..];
        let (name, password) = user.split_once(':').unwrap_or((user, ""));
        if !is_plain(name) || !is_plain(password) || !host.strip_prefix('@').is_none_or(is_host) {
            return None;
        }
        masked.shown += name;
        if !password.is_empty() {
            masked.shown += ":";
            masked.shown += MASK;
            masked.any = true;
        }
        masked.shown += host;
        if parts.peek().is_some() {
            masked.shown.push(',');
        }
    }
    Some(masked)
}

/// Letters that need no escape in the user part of a URL.
fn is_plain(text: &str) -> bool {
    text.chars().all(|c| c.is_alphanumeric() || "-._~%!$&'()*+;=".contains(c))
}

/// `host` or `host:port`, the host perhaps in brackets.
fn is_host(text: &str) -> bool {
    text.chars().all(|c| c.is_alphanumeric() || "-._:[]".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_in_urls_are_masked_and_nothing_else_is() {
        for (plain, shown) in [
            ("rabbit://u:p@h:5672/v", Some("rabbit://u:***@h:5672/v")),
            ("rabbit://u:p@h1:1,w:q@h2:2/v", Some("rabbit://u:***@h1:1,w:***@h2:2/v")),
            ("rabbit://u:p@h1,h2/v", Some("rabbit://u:***@h1,h2/v")),
            ("rabbit://u@h/v", None),
            ("rabbit://u:@h/v", None),
            ("rabbit://h1:5672,h2/v", None),
            ("/var/lib/a@b", None),
            // Not properly escaped: everything before the last `@` goes.
            ("rabbit://u:p/x@h/v", Some("rabbit://***@h/v")),
            ("rabbit://u:p@x@h/v", Some("rabbit://***@h/v")),
            ("rabbit://u:p,x@h/v", Some("rabbit://***@h/v")),
            ("rabbit://u:1,x@h/v", Some("rabbit://***@h/v")),
        ] {
            assert_eq!(text(plain).as_deref(), shown, "{plain}");
        }
    }

    #[test]
    fn a_secret_shows_only_a_mask() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret:?}"), "***");
        assert_eq!(serde_json::to_string(&secret).unwrap(), "\"***\"");
        assert_eq!(secret.expose(), "hunter2");
    }

    #[test]
    fn key_names_tell_secrets_from_paths_to_them() {
        assert!(is_secret_key("chap_password"));
        assert!(!is_secret_key("password_file"));
        assert!(!is_secret_key("listen"));
    }
}
