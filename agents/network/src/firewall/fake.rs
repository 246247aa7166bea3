//! A firewall in memory.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use stackhand_kernel::netfilter::Flow;

use super::ruleset::{Edit, Plan, Ruleset};
use super::{FirewallError, FirewallHost};

/// What a kernel would hold.
#[derive(Debug, Default)]
pub struct FakeFirewall(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    ruleset: Arc<Ruleset>,
    /// Transactions so far.
    transactions: usize,
    /// After how many stages the next apply breaks off.
    fault: Option<usize>,
}

impl FakeFirewall {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it holds.
    #[must_use]
    pub fn ruleset(&self) -> Arc<Ruleset> {
        Arc::clone(&self.state().ruleset)
    }

    /// How many transactions were made.
    #[must_use]
    pub fn transactions(&self) -> usize {
        self.state().transactions
    }

    /// Somebody else changes something.
    pub fn meddle(&self, with: impl FnOnce(&mut Ruleset)) {
        let mut state = self.state();
        let mut ruleset = (*state.ruleset).clone();
        with(&mut ruleset);
        state.ruleset = Arc::new(ruleset);
    }

    /// Breaks the next apply off after so many stages.
    pub fn break_off_after(&self, stages: usize) {
        self.state().fault = Some(stages);
    }
}

impl FirewallHost for FakeFirewall {
    async fn observe(&self) -> Result<Arc<Ruleset>, FirewallError> {
        Ok(self.ruleset())
    }

    async fn is_current(&self, tables: &Arc<Ruleset>) -> bool {
        Arc::ptr_eq(&self.state().ruleset, tables)
    }

    async fn apply(&self, plan: &Plan) -> Result<Option<Arc<Ruleset>>, FirewallError> {
        let mut state = self.state();
        let fault = state.fault.take();
        let mut ruleset = (*state.ruleset).clone();
        for (number, stage) in [&plan.before, &plan.elements, &plan.after].into_iter().enumerate() {
            if fault == Some(number) {
                state.ruleset = Arc::new(ruleset);
                return Err(FirewallError::Unable("broken off".to_owned()));
            }
            if stage.is_empty() {
                continue;
            }
            for edit in stage {
                refuse(&ruleset, edit)?;
                ruleset.change(edit);
            }
            state.transactions += 1;
        }
        state.ruleset = Arc::new(ruleset);
        Ok(Some(Arc::clone(&state.ruleset)))
    }

    async fn flows(&self, _zones: &BTreeSet<u16>) -> Result<Vec<Flow>, FirewallError> {
        Ok(Vec::new())
    }

    async fn cut(&self, _flow: &Flow) -> Result<(), FirewallError> {
        Ok(())
    }
}

/// What a kernel refuses: making what is there, and changing or deleting what is not, or is in use.
fn refuse(ruleset: &Ruleset, edit: &Edit) -> Result<(), FirewallError> {
    let table = |name| ruleset.tables.get(name);
    let has_set = |name, set: &String| table(name).is_some_and(|it| it.sets.contains_key(set));
    let has_chain =
        |name, chain: &String| table(name).is_some_and(|it| it.chains.contains_key(chain));
    let fine = match edit {
        Edit::DropTable(name) => table(name).is_some(),
        Edit::MakeTable(name) => table(name).is_none(),
        Edit::MakeSet(name, set, _) => table(name).is_some() && !has_set(name, set),
        Edit::MakeChain(name, chain, _) => table(name).is_some() && !has_chain(name, chain),
        Edit::Fill(name, chain, _) => has_chain(name, chain),
        Edit::DropChain(name, chain) => has_chain(name, chain) && !is_led_to(ruleset, chain),
        Edit::DropSet(name, set, _) => has_set(name, set),
        Edit::Add(name, set, ..) => has_set(name, set),
        Edit::Remove(name, set, _, elements) => table(name)
            .and_then(|it| it.sets.get(set))
            .is_some_and(|set| elements.iter().all(|element| set.elements.contains(element))),
    };
    if fine { Ok(()) } else { Err(FirewallError::Unable(format!("refused: {edit:?}"))) }
}

/// Whether an element of a map leads to the chain.
fn is_led_to(ruleset: &Ruleset, chain: &str) -> bool {
    use stackhand_kernel::netfilter::{Data, Judgement};
    let leads = |data: &Option<Data>| matches!(data, Some(Data::Verdict(Judgement::Jump(to))) if to == chain);
    ruleset
        .tables
        .values()
        .flat_map(|table| table.sets.values())
        .any(|set| set.elements.iter().any(|element| leads(&element.data)))
}
