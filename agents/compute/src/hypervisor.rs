//! What we need from a hypervisor: a narrow seam, so that everything else runs without one.

use std::future::Future;

use serde::Serialize;
use stackhand_model::InstanceId;
use uuid::Uuid;

use crate::domain::Mark;

pub mod fake;

/// A domain as it is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainSeen {
    /// Its UUID.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Whether it runs.
    pub power: Power,
    /// Our mark on what it will be at its next start. Without one it is foreign.
    pub mark: Option<Mark>,
    /// Our mark on what runs.
    pub running_mark: Option<Mark>,
    /// Port of its VNC console on the loopback, while it runs.
    pub vnc_port: Option<u16>,
}

/// Whether a domain runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    /// It runs.
    Running,
    /// It is in memory and does not run.
    Paused,
    /// It is off.
    Off(OffReason),
}

/// Why a domain is off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OffReason {
    /// Nobody knows: it was never started, or the host was down.
    Unknown,
    /// The guest shut itself down, asked to or by its own will.
    Shutdown,
    /// Somebody pulled the plug.
    Destroyed,
    /// It crashed or could not start.
    Crashed,
}

/// One change to a domain. Each is harmless if its effect is in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DomainChange {
    /// Defines it, or defines it anew for its next start.
    Define {
        /// Its XML.
        xml: String,
    },
    /// Starts it.
    Start {
        /// Its processors stand still.
        paused: bool,
    },
    /// Stops its processors.
    Pause,
    /// Lets its processors go on.
    Resume,
    /// Asks the guest to shut itself down.
    Shutdown,
    /// Pulls the plug.
    Destroy,
    /// Forgets its definition.
    Undefine,
}

/// Facts about the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostFacts {
    /// Version of the hypervisor, such as `7.2.22`.
    pub hypervisor_version: String,
    /// Version of libvirt.
    pub libvirt_version: String,
    /// Processors.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// Why the hypervisor did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HypervisorError {
    /// It cannot be reached now.
    #[error("libvirt at {uri} is away: {reason}")]
    Away {
        /// Where it should be.
        uri: String,
        /// Why it cannot be reached.
        reason: String,
    },
    /// It refused.
    #[error("cannot {action}: {reason}")]
    Refused {
        /// What was tried, on which domain.
        action: String,
        /// What it said.
        reason: String,
    },
}

/// Runs domains.
pub trait Hypervisor: Send + Sync + 'static {
    /// Every domain there is, foreign ones included.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away; nothing may be concluded about domains then.
    fn domains(&self) -> impl Future<Output = Result<Vec<DomainSeen>, HypervisorError>> + Send;

    /// Makes one change.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away or refuses.
    fn perform(
        &self,
        id: InstanceId,
        change: DomainChange,
    ) -> impl Future<Output = Result<(), HypervisorError>> + Send;

    /// Facts about the host.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away.
    fn host(&self) -> impl Future<Output = Result<HostFacts, HypervisorError>> + Send;

    /// Whether KVM really runs a guest here, by running one for some seconds. `folder` takes its
    /// files.
    ///
    /// # Errors
    ///
    /// Tells why KVM is of no use; [`HypervisorError::Away`] if that cannot be known now.
    fn probe_kvm(
        &self,
        folder: &std::path::Path,
    ) -> impl Future<Output = Result<(), HypervisorError>> + Send;

    /// Whether it can be reached, as far as is known without asking.
    fn trouble(&self) -> Option<String> {
        None
    }
}
