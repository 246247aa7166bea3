//! Keys of controllers: the private half in a file only its owner reads, the public half as one
//! line that can be copied by hand.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};

/// What precedes the 32 bytes of the seed in PKCS#8 version 1, the form every program reads.
const PKCS8_PREFIX: [u8; 16] =
    [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
const PEM_BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
const PEM_END: &str = "-----END PRIVATE KEY-----";
/// First word of a public key's line.
const PUBLIC_TAG: &str = "stackhand-ed25519";
/// Key files are tiny; anything bigger is no key.
pub(super) const MAX_FILE: u64 = 64 * 1024;

/// Why a key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read or written.
    #[error("cannot {action} key {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// Which file or folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Others than the owner can read the private key.
    #[error("key {} is open to others (mode {mode:04o}); `chmod 600` it, or make a new key", path.display())]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The file holds no Ed25519 private key.
    #[error("{} is no Ed25519 private key in PKCS#8 PEM form", path.display())]
    NotAKey {
        /// Which file.
        path: PathBuf,
    },
    /// Text that is no public key.
    #[error("a public key is `{PUBLIC_TAG} <base64 of 32 bytes> [comment]`, not {0:?}")]
    NotAPublicKey(String),
    /// The system gives no random bytes.
    #[error("the system gives no random bytes")]
    NoRandomness,
}

/// Names a key: the first 16 hex digits of SHA-256 over the public bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(String);

impl KeyId {
    fn of(public: &[u8]) -> Self {
        let hash = digest(&SHA256, public);
        Self(hash.as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The private half of a controller's key.
pub struct SigningKey {
    pair: Ed25519KeyPair,
    pem: String,
    id: KeyId,
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey").field("id", &self.id).finish_non_exhaustive()
    }
}

impl SigningKey {
    /// Makes a new key.
    ///
    /// # Errors
    ///
    /// [`KeyError::NoRandomness`].
    pub fn generate() -> Result<Self, KeyError> {
        let mut seed = [0; 32];
        SystemRandom::new().fill(&mut seed).map_err(|_| KeyError::NoRandomness)?;
        let der = [&PKCS8_PREFIX[..], &seed].concat();
        Self::from_der(&der).ok_or(KeyError::NoRandomness)
    }

    fn from_der(der: &[u8]) -> Option<Self> {
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der).ok()?;
        let body = BASE64.encode(der);
        let mut pem = format!("{PEM_BEGIN}\n");
        let mut rest = body.as_str();
        while !rest.is_empty() {
            let (line, more) = rest.split_at(rest.len().min(64));
            pem.push_str(line);
            pem.push('\n');
            rest = more;
        }
        pem.push_str(PEM_END);
        pem.push('\n');
        let id = KeyId::of(pair.public_key().as_ref());
        Some(Self { pair, pem, id })
    }

    pub(super) fn from_pem(pem: &str) -> Option<Self> {
        let body = pem.trim().strip_prefix(PEM_BEGIN)?.strip_suffix(PEM_END)?;
        let body: String = body.split_whitespace().collect();
        Self::from_der(&BASE64.decode(body).ok()?)
    }

    /// Reads a key file that [`save`](Self::save) or `openssl genpkey` wrote.
    ///
    /// # Errors
    ///
    /// [`KeyError::Exposed`] when group or others may read it, and when it is no key or cannot
    /// be read.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let failed = |source| KeyError::File { action: "read", path: path.to_owned(), source };
        let file = OpenOptions::new().read(true).open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Exposed { path: path.to_owned(), mode });
        }
        let not_a_key = || KeyError::NotAKey { path: path.to_owned() };
        let mut text = String::new();
        match file.take(MAX_FILE).read_to_string(&mut text) {
            Ok(_) => Self::from_pem(&text).ok_or_else(not_a_key),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(not_a_key()),
            Err(error) => Err(failed(error)),
        }
    }

    /// Writes the key to a new file that only its owner can read.
    ///
    /// # Errors
    ///
    /// When the file exists already or cannot be written whole and to the disk.
    pub fn save(&self, path: &Path) -> Result<(), KeyError> {
        let failed = |source| KeyError::File { action: "write", path: path.to_owned(), source };
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(failed)?;
        file.write_all(self.pem.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)
    }

    /// The id of the key.
    #[must_use]
    pub fn id(&self) -> &KeyId {
        &self.id
    }

    /// The public half. `comment` tells people whose it is.
    #[must_use]
    pub fn public(&self, comment: &str) -> PublicKey {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.pair.public_key().as_ref());
        let comment = comment.split_whitespace().collect::<Vec<_>>().join(" ");
        PublicKey { bytes, id: self.id.clone(), comment }
    }

    pub(super) fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.pair.sign(message).as_ref().to_vec()
    }
}

/// The public half of a controller's key: `stackhand-ed25519 <base64> <comment>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    bytes: [u8; 32],
    id: KeyId,
    comment: String,
}

impl PublicKey {
    /// The id of the key.
    #[must_use]
    pub fn id(&self) -> &KeyId {
        &self.id
    }

    /// Whose key it is, for people; may be empty.
    #[must_use]
    pub fn comment(&self) -> &str {
        &self.comment
    }

    pub(super) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, &self.bytes).verify(message, signature).is_ok()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PUBLIC_TAG} {}", BASE64.encode(self.bytes))?;
        if self.comment.is_empty() { Ok(()) } else { write!(f, " {}", self.comment) }
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let wrong = || KeyError::NotAPublicKey(line.chars().take(100).collect());
        let mut words = line.split_whitespace();
        if words.next() != Some(PUBLIC_TAG) {
            return Err(wrong());
        }
        let bytes = words.next().and_then(|word| BASE64.decode(word).ok()).ok_or_else(wrong)?;
        let bytes: [u8; 32] = bytes.try_into().map_err(|_| wrong())?;
        let comment = words.collect::<Vec<_>>().join(" ");
        Ok(Self { bytes, id: KeyId::of(&bytes), comment })
    }
}
