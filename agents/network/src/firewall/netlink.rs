//! The firewall of the real kernel.
//!
//! Rules and empty sets are loaded by `nft`, which knows how to write them; elements go by netlink,
//! because `nft` would read every element of a table before it changed one. What was read is kept
//! for as long as the kernel's generation says that nobody changed anything.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stackhand_kernel::exec::Program;
use stackhand_kernel::netfilter::{
    Element, Flow, ListedChain, Listing, Netfilter, NftChange, Table,
};
use stackhand_kernel::netlink::WriteCount;
use stackhand_kernel::{KernelError, sysctl};

use super::render;
use super::ruleset::{self, Base, Chain, Edit, Plan, Rule, Ruleset, Set, Shape, TableName};
use super::{FirewallError, FirewallHost, Tracking};

/// The program that loads rules.
const NFT: &str = "/usr/sbin/nft";

/// How long it may take: a cold start of a big host loads tens of thousands of rules.
const LIMIT: Duration = Duration::from_secs(120);

/// How often the tables are read until nobody changes them meanwhile.
const READS: usize = 5;

/// The firewall of the namespace that it was opened in.
#[derive(Debug)]
pub struct KernelFirewall {
    netfilter: Netfilter,
    writes: WriteCount,
    /// What was read last, and in which generation.
    known: Mutex<Option<(u32, Arc<Ruleset>)>>,
}

impl KernelFirewall {
    /// Opens it in the calling thread's namespace. Must be called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// Fails if netfilter is out of reach.
    pub fn open(writes: WriteCount) -> Result<Self, KernelError> {
        let netfilter = Netfilter::open(writes.clone())?;
        Ok(Self { netfilter, writes, known: Mutex::default() })
    }

    /// Finds out where flows of bridged packets can be tracked, by having the kernel check the very
    /// rules that would be used. Changes nothing.
    ///
    /// # Errors
    ///
    /// Says what is missing if they can be tracked nowhere.
    pub async fn probe(&self) -> Result<Tracking, FirewallError> {
        let bridge = match check(Tracking::Bridge).await {
            Ok(()) => return Ok(Tracking::Bridge),
            Err(error) => error,
        };
        if sysctl::read("net/bridge/bridge-nf-call-iptables").is_err() {
            return Err(FirewallError::Unable(format!(
                "this kernel tracks no flows of bridged packets; load the module \
                 nf_conntrack_bridge (kernel 5.3 and later) or br_netfilter ({bridge})"
            )));
        }
        match check(Tracking::BrNetfilter).await {
            Ok(()) => Ok(Tracking::BrNetfilter),
            Err(error) => {
                Err(FirewallError::Unable(format!("the firewall cannot be built: {error}")))
            }
        }
    }

    /// Finds out whether packets can be limited and marked. Changes nothing.
    ///
    /// # Errors
    ///
    /// Passes on what `nft` says if they cannot.
    pub async fn probe_packets(&self) -> Result<(), FirewallError> {
        let plan = render::sample_packets().plan(&Ruleset::default(), &BTreeSet::new());
        nft(&["--check"], ruleset::script(&plan.before)).await
    }

    fn known(&self) -> MutexGuard<'_, Option<(u32, Arc<Ruleset>)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn read(&self) -> Result<Ruleset, KernelError> {
        let mut ruleset = Ruleset::default();
        for name in TableName::ALL {
            let table = table(name);
            let Some(Listing { dormant, chains, sets }) = self.netfilter.listing(&table).await?
            else {
                continue;
            };
            let mut read = ruleset::Table { dormant, ..ruleset::Table::default() };
            read.chains.extend(chains.into_iter().map(|(name, chain)| (name, listed(&chain))));
            for set in sets {
                let shape = render::shape_of(&set);
                let elements = self.netfilter.elements(&table, &set).await?;
                read.sets.insert(set, Set { shape, elements: folded(shape, elements) });
            }
            ruleset.tables.insert(name, read);
        }
        Ok(ruleset)
    }

    /// Runs one script; returns whether there was anything to do.
    async fn load(&self, edits: &[Edit]) -> Result<bool, FirewallError> {
        let script = ruleset::script(edits);
        if script.is_empty() {
            return Ok(false);
        }
        nft(&[], script).await?;
        self.writes.add();
        Ok(true)
    }

    /// Changes elements; returns how many transactions that took.
    async fn change_elements(&self, edits: &[Edit]) -> Result<u32, FirewallError> {
        let mut transactions = 0;
        for name in TableName::ALL {
            let mut changes = Vec::new();
            for edit in edits {
                match edit {
                    Edit::Add(table, set, shape, elements) if *table == name => {
                        let elements = unfolded(*shape, elements);
                        changes.push(NftChange::Add { set: set.clone(), elements });
                    }
                    Edit::Remove(table, set, shape, elements) if *table == name => {
                        let elements = unfolded(*shape, elements);
                        changes.push(NftChange::Remove { set: set.clone(), elements });
                    }
                    _ => {}
                }
            }
            if !changes.is_empty() {
                self.netfilter.commit(&table(name), &changes).await?;
                transactions += 1;
            }
        }
        Ok(transactions)
    }

    async fn make(&self, plan: &Plan) -> Result<u32, FirewallError> {
        let before = self.load(&plan.before).await?;
        let elements = self.change_elements(&plan.elements).await?;
        let after = self.load(&plan.after).await?;
        Ok(u32::from(before) + elements + u32::from(after))
    }
}

impl FirewallHost for KernelFirewall {
    async fn observe(&self) -> Result<Arc<Ruleset>, FirewallError> {
        for _ in 0..READS {
            let generation = self.netfilter.generation().await?;
            if let Some((known, ruleset)) = &*self.known()
                && *known == generation
            {
                return Ok(Arc::clone(ruleset));
            }
            let ruleset = match self.read().await {
                Ok(ruleset) => Arc::new(ruleset),
                // A set that went while the tables were read.
                Err(error) if error.is_absent() => continue,
                Err(error) => return Err(error.into()),
            };
            if self.netfilter.generation().await? == generation {
                *self.known() = Some((generation, Arc::clone(&ruleset)));
                return Ok(ruleset);
            }
        }
        Err(FirewallError::Unable(
            "somebody changes nftables all the time; it could not be read in peace".to_owned(),
        ))
    }

    async fn apply(&self, plan: &Plan) -> Result<Option<Arc<Ruleset>>, FirewallError> {
        let known = self.known().take();
        let transactions = self.make(plan).await?;
        let Some((generation, ruleset)) = known else { return Ok(None) };
        // Each transaction is one generation: if there were others, somebody else's are among them,
        // and the tables are read anew.
        let now = self.netfilter.generation().await?;
        if now != generation.wrapping_add(transactions) {
            return Ok(None);
        }
        let mut changed = Arc::unwrap_or_clone(ruleset);
        plan.edits().for_each(|edit| changed.change(edit));
        let changed = Arc::new(changed);
        *self.known() = Some((now, Arc::clone(&changed)));
        Ok(Some(changed))
    }

    async fn flows(&self, zones: &BTreeSet<u16>) -> Result<Vec<Flow>, FirewallError> {
        let mut flows = self.netfilter.flows().await?;
        flows.retain(|flow| zones.contains(&flow.zone));
        Ok(flows)
    }

    async fn cut(&self, flow: &Flow) -> Result<(), FirewallError> {
        Ok(self.netfilter.forget(flow).await?)
    }
}

fn table(name: TableName) -> Table {
    Table { family: name.family(), name: name.name().to_owned() }
}

fn listed(chain: &ListedChain) -> Chain {
    let base = chain.base.map(|base| Base {
        hook: base.hook,
        priority: base.priority,
        accepts: base.policy == 1,
    });
    let rules = chain.rules.iter().map(|comment| Rule::seen(comment.as_deref())).collect();
    Chain { base, rules: Arc::new(rules) }
}

fn is_tree(shape: Shape) -> bool {
    matches!(shape, Shape::Addresses { ranges: true, .. })
}

/// Ranges as the kernel's tree has them, the first key and the first one behind, as one element each.
fn folded(shape: Shape, elements: Vec<Element>) -> BTreeSet<Element> {
    if !is_tree(shape) {
        return elements.into_iter().collect();
    }
    let mut folded = BTreeSet::new();
    let mut open: Option<Element> = None;
    // By key; of two with one key, that which ends a range comes first.
    let mut sorted = elements;
    sorted.sort_by_key(|element| (element.key.clone(), !element.closes));
    for element in sorted {
        match (element.closes, open.take()) {
            (true, Some(first)) => {
                let end = Some(render::before(&element.key));
                folded.insert(Element { end, ..first });
            }
            (true, None) => {}
            (false, before) => {
                folded.extend(before);
                open = Some(element);
            }
        }
    }
    // A range without an end goes up to the last address.
    folded.extend(open.map(|first| Element { end: Some(vec![0xff; first.key.len()]), ..first }));
    folded
}

/// The reverse.
fn unfolded(shape: Shape, elements: &[Element]) -> Vec<Element> {
    if !is_tree(shape) {
        return elements.to_vec();
    }
    let mut unfolded = Vec::new();
    for element in elements {
        unfolded.push(Element::new(element.key.clone()));
        if let Some(behind) = element.end.as_deref().and_then(render::behind) {
            unfolded.push(Element { closes: true, ..Element::new(behind) });
        }
    }
    unfolded
}

async fn nft(arguments: &[&str], script: String) -> Result<(), FirewallError> {
    let program = Program::new(NFT).args(arguments.iter().copied()).args(["-f", "-"]);
    let loaded = program.stdin(script).limit(LIMIT).run().await;
    loaded.map(drop).map_err(|error| FirewallError::Nft(Box::new(error)))
}

/// Has the kernel check the rules of a small firewall, without loading them.
async fn check(tracking: Tracking) -> Result<(), FirewallError> {
    let plan = render::sample(tracking).plan(&Ruleset::default(), &BTreeSet::new());
    nft(&["--check"], ruleset::script(&plan.before)).await
}
