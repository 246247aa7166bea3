//! What guests are served by the agent itself: DHCP, DNS, router advertisements, metadata. One process for all networks.
//!
//! ```text
//! documents ──> Site: a link inside a namespace, and a table for each service there
//! Site ──watch──> one small task per socket ──> answer (pure) ──> guest
//! ```
//!
//! Every table follows from documents alone, so there is nothing to remember but the passwords that
//! guests leave: a restart opens the sockets again and goes on. Guests are hostile. What they send
//! is parsed by bounded code that never panics, and each server reads no faster than it is willing
//! to answer, so that one network's storm is its own.

pub mod dhcp;
pub mod dhcp6;
pub mod dns;
mod fleet;
pub mod metadata;
mod pace;
pub mod ra;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};
use stackhand_kernel::{Chain, NetnsId};
use stackhand_model::{MacAddr, ObjectRef};
use stackhand_runtime::metrics::Reading;

use crate::l2::At;
use fleet::Fleet;
use metadata::Passwords;

/// A link inside a namespace, and what is served there.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    /// The object that fails if a service cannot be given.
    pub object: ObjectRef,
    /// Who gets which IPv4 address.
    pub dhcp: Option<Arc<dhcp::Table>>,
    /// Who gets which IPv6 addresses and settings.
    pub dhcp6: Option<Arc<dhcp6::Table>>,
    /// Which names have which addresses.
    pub dns: Option<Arc<dns::Zone>>,
    /// Who may read which metadata.
    pub metadata: Option<Arc<metadata::Table>>,
    /// What a router says of itself.
    pub ra: Option<Arc<ra::Advert>>,
}

impl Site {
    /// A site that serves nothing.
    #[must_use]
    pub fn of(object: ObjectRef) -> Self {
        Self { object, dhcp: None, dhcp6: None, dns: None, metadata: None, ra: None }
    }

    /// What is served, for the network's status.
    #[must_use]
    pub fn facts(&self, space: &str) -> Value {
        let scopes = self.dhcp.iter().flat_map(|table| &table.scopes);
        let servers: Vec<String> = scopes.map(|scope| scope.server.to_string()).collect();
        json!({
            "namespace": space,
            "servers": servers,
            "leases": self.dhcp.as_ref().map_or(0, |table| table.clients.len()),
            "clients6": self.dhcp6.as_ref().map_or(0, |table| table.clients.len()),
        })
    }
}

/// The services of this host.
#[derive(Debug)]
pub struct Services {
    dhcp: Fleet<dhcp::Server>,
    dhcp6: Fleet<dhcp6::Server>,
    dns: Fleet<dns::Server>,
    metadata: Fleet<metadata::Server>,
    ra: Fleet<ra::Server>,
}

impl Services {
    /// No service yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            dhcp: Fleet::new(dhcp::Server::default()),
            dhcp6: Fleet::new(dhcp6::Server::default()),
            dns: Fleet::new(dns::Server::default()),
            metadata: Fleet::new(metadata::Server::default()),
            ra: Fleet::new(ra::Server::default()),
        }
    }

    /// Takes passwords of guests from now on, and keeps them there.
    pub fn keep_passwords(&self, passwords: Passwords) {
        // There is one place for them, given at the start.
        let _given = self.metadata.shared().passwords().set(Arc::new(passwords));
    }

    /// The passwords of guests, if they are kept.
    #[must_use]
    pub fn passwords(&self) -> Option<Arc<Passwords>> {
        self.metadata.shared().passwords().get().cloned()
    }

    /// Stops what is not wanted any more: a socket would keep its namespace.
    pub fn retain(&mut self, wanted: &BTreeMap<At, Site>) {
        self.dhcp.retain(|at| wanted.get(at).is_some_and(|site| site.dhcp.is_some()));
        self.dhcp6.retain(|at| wanted.get(at).is_some_and(|site| site.dhcp6.is_some()));
        self.dns.retain(|at| wanted.get(at).is_some_and(|site| site.dns.is_some()));
        self.metadata.retain(|at| wanted.get(at).is_some_and(|site| site.metadata.is_some()));
        self.ra.retain(|at| wanted.get(at).is_some_and(|site| site.ra.is_some()));
    }

    /// Hands servers their tables and starts those that do not run. `find` tells the namespace of a link, its
    /// number and its Ethernet address; what has none yet is left for a later pass. Returns what
    /// could not be served, by object.
    pub async fn serve(
        &mut self,
        wanted: &BTreeMap<At, Site>,
        find: impl Fn(&At) -> Option<(NetnsId, u32, MacAddr)>,
    ) -> BTreeMap<ObjectRef, String> {
        let mut troubled = BTreeMap::new();
        for (at, site) in wanted {
            let Some(link) = find(at) else { continue };
            let served = [
                self.dhcp.serve(at, link, site.dhcp.as_ref()).await,
                self.dhcp6.serve(at, link, site.dhcp6.as_ref()).await,
                self.dns.serve(at, link, site.dns.as_ref()).await,
                self.metadata.serve(at, link, site.metadata.as_ref()).await,
                self.ra.serve(at, link, site.ra.as_ref()).await,
            ];
            for error in served.into_iter().filter_map(Result::err) {
                troubled.entry(site.object).or_insert_with(|| Chain(&error).to_string());
            }
        }
        troubled
    }

    /// What the services did, for `facts`.
    #[must_use]
    pub fn facts(&self) -> Value {
        json!({
            "dhcp": self.dhcp.shared().facts(self.dhcp.len()),
            "dhcp6": self.dhcp6.shared().facts(self.dhcp6.len()),
            "dns": self.dns.shared().facts(self.dns.len()),
            "metadata": self.metadata.shared().facts(self.metadata.len()),
            "router_advertisements": self.ra.shared().facts(self.ra.len()),
        })
    }

    /// Numbers for `/metrics`.
    #[must_use]
    pub fn readings(&self) -> Vec<Reading> {
        let mut readings = dhcp::Server::readings(self.dhcp.shared());
        readings.extend(dhcp6::Server::readings(self.dhcp6.shared()));
        readings.extend(dns::Server::readings(self.dns.shared()));
        readings.extend(metadata::Server::readings(self.metadata.shared()));
        readings.extend(ra::Server::readings(self.ra.shared()));
        readings
    }
}

impl Default for Services {
    fn default() -> Self {
        Self::new()
    }
}
