//! Volumes that this host's kernel takes in by iSCSI, for guests that are given its block device.
//!
//! The agent has no rights for that: it looks, and asks a helper that has them, see decision 16.
//! A device is believed only when it tells the volume's id as its serial number, each time before
//! a guest gets it, and is named by its target ever after, so that a name never leads to the
//! device of another tenant.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
pub use stackhand_attach::helper::Question;
use stackhand_attach::{helper, is_attached};
use stackhand_model::{Connection, IscsiClient, VolumeId};

/// Where the helper listens unless a test says otherwise.
pub const HELPER: &str = "/run/stackhand/initiator.sock";

/// Volumes that this host takes in by itself, as far as they are attached: whether each is, or
/// what is wrong with its device.
pub type Attached = BTreeMap<VolumeId, Result<bool, String>>;

/// This host's initiator.
pub trait Initiator: Send + Sync + fmt::Debug {
    /// Looks at the devices of volumes. Blocks, and changes nothing.
    fn look(&self, volumes: &BTreeMap<VolumeId, Connection>) -> Attached;

    /// Asks for something; the answer is text.
    fn ask(&self, question: Question) -> BoxFuture<'_, Result<String, String>>;
}

/// The kernel's, by the helper.
#[derive(Clone, Debug)]
pub struct HostInitiator {
    helper: PathBuf,
}

impl HostInitiator {
    /// The initiator whose helper listens at `helper`.
    #[must_use]
    pub fn new(helper: impl Into<PathBuf>) -> Self {
        Self { helper: helper.into() }
    }
}

impl Initiator for HostInitiator {
    fn look(&self, volumes: &BTreeMap<VolumeId, Connection>) -> Attached {
        let look = |(&volume, connection): (&VolumeId, &Connection)| {
            (volume, is_attached(connection, volume).map_err(|error| crate::chain(&error)))
        };
        volumes.iter().map(look).collect()
    }

    fn ask(&self, question: Question) -> BoxFuture<'_, Result<String, String>> {
        async move {
            helper::ask(&self.helper, &question).await.map_err(|error| match error {
                helper::AskError::Away { .. } => format!(
                    "{}: systemctl enable --now compute-initiator.socket",
                    crate::chain(&error)
                ),
                error => crate::chain(&error),
            })
        }
        .boxed()
    }
}

/// The connection, if a volume is for this host's own initiator.
#[must_use]
pub fn by_host(connection: &Connection) -> Option<&Connection> {
    matches!(connection, Connection::Iscsi { client: IscsiClient::Host, .. }).then_some(connection)
}

/// A connection as it is kept for letting go of its volume: without what logs in.
#[must_use]
pub fn without_password(connection: &Connection) -> Connection {
    let mut kept = connection.clone();
    if let Connection::Iscsi { username, password, .. } = &mut kept {
        (*username, *password) = (None, None);
    }
    kept
}

/// Tells what a question is about, for people.
#[must_use]
pub fn words(question: &Question) -> String {
    match question {
        Question::Name => "ask for the name of this host's initiator".to_owned(),
        Question::Attach { volume, .. } => {
            format!("attach volume {volume} by this host's initiator")
        }
        Question::Detach { volume, .. } => {
            format!("detach volume {volume} from this host's initiator")
        }
        Question::Rescan { volume, .. } => {
            format!("have this host see the size of volume {volume}")
        }
    }
}
