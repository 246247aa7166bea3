//! Packet rates and DSCP marks, by nftables on the bridges.
//!
//! One table holds the rules of all ports: a chain for each port and direction, entered by a map from
//! the link's name, so that a frame costs the same with one port as with a thousand. The table is
//! replaced as a whole when a rule changes, in one transaction. What `nft` makes of it is found out
//! in a namespace that nobody sees; that is what the host's table is compared with.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stackhand_kernel::exec::Program;
use stackhand_kernel::netfilter::{Family, Netfilter, NftChange, Structure, Table};
use stackhand_kernel::netlink::WriteCount;
use stackhand_kernel::{KernelError, netns};
use stackhand_model::{Direction, ObjectRef, QosPolicySpec};

/// The table's name.
pub const TABLE: &str = "stackhand_qos";

const NFT: &str = "/usr/sbin/nft";

/// How long `nft` may take.
const LIMIT: Duration = Duration::from_secs(20);

/// What is done to the packets of one port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketRules {
    /// The port.
    pub object: ObjectRef,
    /// Most packets a second to the guest.
    pub to_guest: Option<u32>,
    /// Most packets a second from the guest.
    pub from_guest: Option<u32>,
    /// The mark on what the guest sends.
    pub dscp: Option<u8>,
}

impl PacketRules {
    /// The rules of a policy; `None` if it has none.
    #[must_use]
    pub fn of(object: ObjectRef, policy: &QosPolicySpec) -> Option<Self> {
        let rate = |direction| {
            let limit = policy.packet_rate.iter().find(|limit| limit.direction == direction)?;
            Some(limit.max_kpps.saturating_mul(1000))
        };
        let rules = Self {
            object,
            to_guest: rate(Direction::Ingress),
            from_guest: rate(Direction::Egress),
            dscp: policy.dscp,
        };
        let any = rules.to_guest.is_some() || rules.from_guest.is_some() || rules.dscp.is_some();
        any.then_some(rules)
    }
}

/// The table in `nft`'s words, in place of the one of before. By link.
#[must_use]
pub fn script(rules: &BTreeMap<String, PacketRules>) -> Option<String> {
    if rules.is_empty() {
        return None;
    }
    let mut text =
        format!("table bridge {TABLE}\ndelete table bridge {TABLE}\ntable bridge {TABLE} {{\n");
    let (mut sent, mut received) = (Vec::new(), Vec::new());
    for (link, rules) in rules {
        let mut chain = |name: String, rate: Option<u32>, dscp: Option<u8>| {
            // Writing to a string does not fail.
            let _ = writeln!(text, "chain {name} {{");
            if let Some(rate) = rate {
                let burst = (rate / 10).max(5);
                let _ = writeln!(text, "limit rate over {rate}/second burst {burst} packets drop");
            }
            if let Some(dscp) = dscp {
                let _ = writeln!(text, "ip dscp set {dscp}\nip6 dscp set {dscp}");
            }
            text.push_str("}\n");
            format!("\"{link}\" : goto {name}")
        };
        if rules.from_guest.is_some() || rules.dscp.is_some() {
            sent.push(chain(format!("from-{link}"), rules.from_guest, rules.dscp));
        }
        if rules.to_guest.is_some() {
            received.push(chain(format!("to-{link}"), rules.to_guest, None));
        }
    }
    // Before and after everything that filters.
    for (name, hook, side, ports) in [
        ("sent", "prerouting priority -400", "iifname", sent),
        ("received", "postrouting priority 400", "oifname", received),
    ] {
        if !ports.is_empty() {
            let ports = ports.join(", ");
            let _ = writeln!(
                text,
                "chain {name} {{\ntype filter hook {hook}; policy accept;\n{side} vmap {{ {ports} }}\n}}"
            );
        }
    }
    text.push_str("}\n");
    Some(text)
}

/// Keeps the host's table equal to what is wanted.
#[derive(Debug, Default)]
pub struct PacketTable {
    netfilter: Mutex<Option<Netfilter>>,
    /// A script, and what `nft` makes of it.
    expected: Mutex<Option<(String, Structure)>>,
    /// Whether the host was seen without the table since it was wanted last.
    absent: Mutex<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PacketTable {
    /// What is to be done, in words; `None`: nothing.
    ///
    /// # Errors
    ///
    /// Passes on the refusal of the kernel or of `nft`.
    pub async fn plan(
        &self,
        rules: &BTreeMap<String, PacketRules>,
        writes: &WriteCount,
    ) -> Result<Option<String>, KernelError> {
        let script = script(rules);
        if script.is_none() && *lock(&self.absent) {
            return Ok(None);
        }
        let seen = self.netfilter(writes)?.structure(&table()).await?;
        *lock(&self.absent) = seen.is_none();
        let wanted = match script {
            Some(script) => Some(self.expect(script).await?),
            None => None,
        };
        Ok(match (&wanted, &seen) {
            (None, None) => None,
            (None, Some(_)) => Some(format!("delete table bridge {TABLE}")),
            (Some(wanted), Some(seen)) if wanted == seen => None,
            (Some(_), _) => {
                Some(format!("load table bridge {TABLE} with the rules of {} ports", rules.len()))
            }
        })
    }

    /// Makes the table what is wanted. Returns what was done, in words.
    ///
    /// # Errors
    ///
    /// Passes on the refusal of the kernel or of `nft`.
    pub async fn apply(
        &self,
        rules: &BTreeMap<String, PacketRules>,
        writes: &WriteCount,
    ) -> Result<Option<String>, KernelError> {
        let Some(todo) = self.plan(rules, writes).await? else { return Ok(None) };
        match script(rules) {
            Some(script) => {
                let nft = Program::new(NFT).args(["-f", "-"]).stdin(script).limit(LIMIT);
                nft.run().await.map_err(refused)?;
                writes.add();
            }
            None => self.netfilter(writes)?.commit(&table(), &[NftChange::DeleteTable]).await?,
        }
        Ok(Some(todo))
    }

    /// What `nft` makes of a script on this kernel.
    async fn expect(&self, script: String) -> Result<Structure, KernelError> {
        if let Some((known, structure)) = &*lock(&self.expected)
            && *known == script
        {
            return Ok(structure.clone());
        }
        let text = script.clone();
        let load = move || {
            let nft = Program::new(NFT).args(["-f", "-"]).stdin(text).limit(LIMIT);
            // The program starts in the namespace of this thread, which is a fresh one.
            tokio::runtime::Handle::current().block_on(nft.run()).map_err(io::Error::other)?;
            Netfilter::connect(WriteCount::default())
        };
        let netfilter = netns::in_a_scratch_netns(load).await?;
        let structure = netfilter.structure(&table()).await?;
        let structure =
            structure.ok_or_else(|| refused(io::Error::from(io::ErrorKind::NotFound)))?;
        *lock(&self.expected) = Some((script, structure.clone()));
        Ok(structure)
    }

    fn netfilter(&self, writes: &WriteCount) -> Result<Netfilter, KernelError> {
        let mut netfilter = lock(&self.netfilter);
        if let Some(netfilter) = netfilter.as_ref() {
            return Ok(netfilter.clone());
        }
        let opened = Netfilter::open(writes.clone())?;
        *netfilter = Some(opened.clone());
        Ok(opened)
    }
}

fn table() -> Table {
    Table { family: Family::Bridge, name: TABLE.to_owned() }
}

fn refused(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> KernelError {
    KernelError::Netlink {
        action: "load",
        object: format!("table bridge {TABLE}"),
        source: io::Error::other(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_costs_a_frame_of_another_nothing() {
        let object = stackhand_model::PortId(uuid::Uuid::from_u128(1)).object();
        let rules = |to_guest, from_guest, dscp| PacketRules { object, to_guest, from_guest, dscp };
        let all = BTreeMap::from([
            ("tapa".to_owned(), rules(Some(20), Some(3000), Some(46))),
            ("tapb".to_owned(), rules(None, None, Some(10))),
        ]);
        let wanted = "\
table bridge stackhand_qos
delete table bridge stackhand_qos
table bridge stackhand_qos {
chain from-tapa {
limit rate over 3000/second burst 300 packets drop
ip dscp set 46
ip6 dscp set 46
}
chain to-tapa {
limit rate over 20/second burst 5 packets drop
}
chain from-tapb {
ip dscp set 10
ip6 dscp set 10
}
chain sent {
type filter hook prerouting priority -400; policy accept;
iifname vmap { \"tapa\" : goto from-tapa, \"tapb\" : goto from-tapb }
}
chain received {
type filter hook postrouting priority 400; policy accept;
oifname vmap { \"tapa\" : goto to-tapa }
}
}
";
        assert_eq!(script(&all).unwrap(), wanted);
        assert_eq!(script(&BTreeMap::new()), None);
    }
}
