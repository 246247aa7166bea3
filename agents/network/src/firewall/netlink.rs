//! The firewall of the real kernel: tables of nftables, and those of the second renderer.
//!
//! Rules and empty sets are loaded by `nft`, which knows how to write them; elements go by netlink,
//! because `nft` would read every element of a table before it changed one. What was read is kept
//! for as long as the kernel's generation says that nobody changed anything.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::libc::{EINVAL, EOPNOTSUPP};
use stackhand_kernel::exec::Program;
use stackhand_kernel::netfilter::{
    Element, Flow, ListedChain, Listing, Netfilter, NftChange, Table,
};
use stackhand_kernel::netlink::WriteCount;
use stackhand_kernel::{self as kernel, KernelError, sysctl};

use super::render;
use super::ruleset::{self, Base, Chain, Edit, Plan, Rule, Ruleset, Set, Shape, TableName};
use super::xtables::Xtables;
use super::{FirewallError, FirewallHost, Means, Tracking};
use crate::settings::Renderer;

/// The program that loads rules.
const NFT: &str = "/usr/sbin/nft";

/// How long it may take: a cold start of a big host loads tens of thousands of rules.
const LIMIT: Duration = Duration::from_secs(120);

/// How often the tables are read until nobody changes them meanwhile.
const READS: usize = 5;

/// Tables, and the generation of nftables that they are of.
type Known = Option<(Option<u32>, Arc<Ruleset>)>;

/// The firewall of the namespace that it was opened in.
#[derive(Debug)]
pub struct KernelFirewall {
    netfilter: Netfilter,
    writes: WriteCount,
    xtables: Xtables,
    wanted: Renderer,
    /// What was read last, and in which generation of nftables.
    known: Mutex<Known>,
}

impl KernelFirewall {
    /// Opens it in the calling thread's namespace. Must be called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// Fails if netfilter is out of reach.
    pub fn open(writes: WriteCount, wanted: Renderer) -> Result<Self, KernelError> {
        let netfilter = Netfilter::open(writes.clone())?;
        let xtables = Xtables::new(writes.clone());
        Ok(Self { netfilter, writes, xtables, wanted, known: Mutex::default() })
    }

    /// Finds out what can enforce the rules here: nftables' bridge family, or else iptables. Changes
    /// nothing.
    ///
    /// # Errors
    ///
    /// Says what is missing if nothing can.
    pub async fn probe(&self) -> Result<Means, FirewallError> {
        let nftables = match self.wanted {
            Renderer::Iptables => None,
            Renderer::Auto | Renderer::Nftables => match self.probe_tracking().await {
                Ok(tracking) => return Ok(Means::Nftables(tracking)),
                Err(error) => Some(error),
            },
        };
        match (nftables, self.wanted) {
            (Some(error), Renderer::Nftables) => Err(error),
            (nftables, _) => match (self.xtables.probe().await, nftables) {
                (Ok(()), _) => Ok(Means::Iptables),
                (Err(error), None) => Err(error),
                (Err(iptables), Some(nftables)) => Err(FirewallError::Unable(format!(
                    "{}; nor will iptables do: {}",
                    kernel::Chain(&nftables),
                    kernel::Chain(&iptables)
                ))),
            },
        }
    }

    /// Finds out where flows of bridged packets can be tracked, by having the kernel check the very
    /// rules that would be used.
    async fn probe_tracking(&self) -> Result<Tracking, FirewallError> {
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

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The generation of nftables; `None` where the kernel has none.
    async fn generation(&self) -> Result<Option<u32>, KernelError> {
        match self.netfilter.generation().await {
            Ok(generation) => Ok(Some(generation)),
            Err(error) if matches!(error.errno(), Some(EINVAL | EOPNOTSUPP)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads the tables of nftables, where there is a generation of any.
    async fn read(&self, generation: Option<u32>) -> Result<Ruleset, KernelError> {
        let mut ruleset = Ruleset::default();
        if generation.is_none() {
            return Ok(ruleset);
        }
        for (name, table) in tables() {
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
        for (name, nft) in tables() {
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
                self.netfilter.commit(&nft, &changes).await?;
                transactions += 1;
            }
        }
        Ok(transactions)
    }

    async fn make(&self, plan: &Plan) -> Result<u32, FirewallError> {
        let before = self.load(&plan.before).await?;
        let elements = self.change_elements(&plan.elements).await?;
        // Between what comes and what goes of nftables: where one renderer follows another, both hold.
        self.xtables.apply(plan).await?;
        let after = self.load(&plan.after).await?;
        Ok(u32::from(before) + elements + u32::from(after))
    }
}

impl FirewallHost for KernelFirewall {
    async fn observe(&self) -> Result<Arc<Ruleset>, FirewallError> {
        for _ in 0..READS {
            let generation = self.generation().await?;
            // What the second renderer keeps has no generation: it is read each time.
            let known = self.known().clone().filter(|(known, _)| *known == generation);
            if let Some((_, ruleset)) = &known
                && !self.xtables.is_held()
            {
                return Ok(Arc::clone(ruleset));
            }
            let mut ruleset = match self.read(generation).await {
                Ok(ruleset) => ruleset,
                // A set that went while the tables were read.
                Err(error) if error.is_absent() => continue,
                Err(error) => return Err(error.into()),
            };
            if self.xtables.is_held() {
                ruleset.tables.extend(self.xtables.read().await?);
            }
            let ruleset = match known {
                Some((_, known)) if *known == ruleset => known,
                _ => Arc::new(ruleset),
            };
            if self.generation().await? == generation {
                *self.known() = Some((generation, Arc::clone(&ruleset)));
                return Ok(ruleset);
            }
        }
        Err(FirewallError::Unable(
            "somebody changes nftables all the time; it could not be read in peace".to_owned(),
        ))
    }

    async fn is_current(&self, tables: &Arc<Ruleset>) -> bool {
        let Ok(generation) = self.generation().await else { return false };
        let known = self.known();
        let same = |(of, known): &(_, _)| *of == generation && Arc::ptr_eq(known, tables);
        known.as_ref().is_some_and(same)
    }

    async fn apply(&self, plan: &Plan) -> Result<Option<Arc<Ruleset>>, FirewallError> {
        let known = self.known().take();
        let transactions = self.make(plan).await?;
        let Some((generation, ruleset)) = known else { return Ok(None) };
        let mut changed = Arc::unwrap_or_clone(ruleset);
        plan.edits().for_each(|edit| changed.change(edit));
        if self.xtables.is_held() {
            return Ok(Some(self.observe().await?).filter(|seen| **seen == changed));
        }
        // Each transaction is one generation: if there were others, somebody else's are among them,
        // and the tables are read anew.
        let now = self.generation().await?;
        if now != generation.map(|it| it.wrapping_add(transactions)) {
            return Ok(None);
        }
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

/// The tables of nftables.
fn tables() -> impl Iterator<Item = (TableName, Table)> {
    TableName::ALL.into_iter().filter_map(|name| {
        let (_, called) = name.place();
        Some((name, Table { family: name.family()?, name: called.to_owned() }))
    })
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
