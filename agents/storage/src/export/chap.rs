//! CHAP users and passwords of attachments: made from the host's key and the attachment's id.
//!
//! Nothing is stored for an attachment, so nothing can be lost or left behind: after a crash the
//! same attachment has the same password, and another one never has it. The user's name depends
//! on the key, too: a target that hides its passwords tells by it which key they were made with.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use stackhand_model::{AttachmentId, Secret};

const KEY_BYTES: usize = 32;

/// Letters of passwords: one for five bits, so that every byte of a digest gives one.
const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// The host's key.
#[derive(Debug)]
pub struct Key {
    key: hmac::Key,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the key {}", .path.display())]
pub struct KeyError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl Key {
    /// The key in the agent's state folder; made at the first time.
    ///
    /// # Errors
    ///
    /// Fails if it can be neither read nor made. A new one is never made in place of one that
    /// cannot be read: guests log in again with the old passwords.
    pub fn open(state_dir: &Path) -> Result<Self, KeyError> {
        let path = state_dir.join("chap.key");
        let fail = |action, source| KeyError { action, path: path.clone(), source };
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut bytes = vec![0; KEY_BYTES];
                SystemRandom::new()
                    .fill(&mut bytes)
                    .map_err(|_| fail("make", io::Error::other("no random numbers")))?;
                write(&path, &bytes).map_err(|error| fail("write", error))?;
                bytes
            }
            Err(error) => return Err(fail("read", error)),
        };
        if bytes.len() != KEY_BYTES {
            let what =
                format!("it has {} bytes, not {KEY_BYTES}: put the right one back", bytes.len());
            return Err(fail("use", io::Error::other(what)));
        }
        Ok(Self::from_bytes(&bytes))
    }

    /// A key of these bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self { key: hmac::Key::new(hmac::HMAC_SHA256, bytes) }
    }

    fn letters(&self, purpose: &str, id: AttachmentId, count: usize) -> String {
        let tag = hmac::sign(&self.key, format!("{purpose}:{id}").as_bytes());
        let letter = |&byte: &u8| char::from(LETTERS[usize::from(byte % 32)]);
        tag.as_ref().iter().take(count).map(letter).collect()
    }

    /// The user of an attachment.
    #[must_use]
    pub fn user(&self, id: AttachmentId) -> String {
        format!("sh-{}", self.letters("user", id, 16))
    }

    /// The password of an attachment: 16 letters, the most that every initiator takes; 80 bits.
    #[must_use]
    pub fn password(&self, id: AttachmentId) -> Secret {
        Secret(self.letters("password", id, 16))
    }
}

/// Writes a file as a whole, for its owner alone.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file =
        File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use uuid::Uuid;

    use super::*;

    fn id(id: u128) -> AttachmentId {
        AttachmentId(Uuid::from_u128(id))
    }

    #[test]
    fn passwords_stay_and_differ_by_attachment_and_by_host() {
        let root = tempfile::tempdir().unwrap();
        let key = Key::open(root.path()).unwrap();
        let again = Key::open(root.path()).unwrap();
        assert_eq!(key.password(id(1)), again.password(id(1)));
        assert_eq!(key.user(id(1)), again.user(id(1)));
        assert_ne!(key.password(id(1)), key.password(id(2)));
        let other = Key::from_bytes(&[1; KEY_BYTES]);
        assert_ne!(key.password(id(1)), other.password(id(1)));
        assert_ne!(key.user(id(1)), other.user(id(1)));
        assert_eq!(key.password(id(1)).0.len(), 16);
        assert!(!format!("{key:?}").contains(&key.password(id(1)).0));
    }

    #[test]
    fn the_key_is_its_owners_alone_and_a_damaged_one_is_not_replaced() {
        let root = tempfile::tempdir().unwrap();
        Key::open(root.path()).unwrap();
        let path = root.path().join("chap.key");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&path, b"short").unwrap();
        let error = stackhand_runtime::chain(&Key::open(root.path()).unwrap_err());
        assert!(error.contains("it has 5 bytes"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"short");
    }
}
