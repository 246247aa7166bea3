//! The programs that keep the tables: what they list, and what they are told.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use stackhand_kernel::exec::{ExecError, Program};
use stackhand_kernel::netlink::WriteCount;
use stackhand_kernel::{Chain, sysctl};

use super::super::FirewallError;
use super::super::ruleset::{Edit, Plan, Table, TableName};
use super::saved::{self, Saved};

/// Where the programs are.
const FOLDER: &str = "/usr/sbin";

/// How long one may take.
const LIMIT: Duration = Duration::from_secs(60);

/// The most that one may list.
const MOST_LISTED: usize = 64 << 20;

/// Tables of each program, in the order that they are changed in.
const PROGRAMS: [(&str, [TableName; 2]); 3] = [
    ("ebtables", [TableName::FramesFrom, TableName::FramesTo]),
    ("iptables", [TableName::Raw4, TableName::Filter4]),
    ("ip6tables", [TableName::Raw6, TableName::Filter6]),
];

/// Rules like ours, to have the programs look at.
const SAMPLE: &str = "*raw
:stackhand-probe - [0:0]
-A stackhand-probe -m physdev --physdev-in tap0 -m comment --comment \"a probe\" -j CT --zone 1
-A stackhand-probe -m mac --mac-source 02:00:00:00:00:01 -m u32 --u32 3&0xFF=58 -j RETURN
COMMIT
*filter
:stackhand-probe - [0:0]
-A stackhand-probe -p tcp -m multiport --dports 1,2:3 -j ACCEPT
-A stackhand-probe -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";

/// `iptables`, `ip6tables`, `ebtables` and `ipset` of the namespace that the agent is in.
#[derive(Debug)]
pub(in crate::firewall) struct Xtables {
    writes: WriteCount,
    /// What is put between the name of a program and what it is to do, once that is known: the ones
    /// that the host prefers, or the old ones.
    variant: Mutex<Option<&'static str>>,
    /// Whether tables of ours may be there.
    held: AtomicBool,
    /// What was listed last, until something is changed.
    listed: Mutex<Option<Listed>>,
}

/// What the programs keep.
type Listed = BTreeMap<TableName, Saved>;

impl Xtables {
    pub(in crate::firewall) fn new(writes: WriteCount) -> Self {
        let held = AtomicBool::new(true);
        Self { writes, variant: Mutex::default(), held, listed: Mutex::default() }
    }

    /// Finds out which programs work here, and uses them from now on. Changes nothing.
    pub(in crate::firewall) async fn probe(&self) -> Result<(), FirewallError> {
        if sysctl::read("net/bridge/bridge-nf-call-iptables").is_err() {
            return Err(FirewallError::Unable(
                "iptables sees no bridged packets; load the module br_netfilter".to_owned(),
            ));
        }
        let mut told = Vec::new();
        for variant in ["", "-legacy"] {
            match try_out(variant).await {
                Ok(()) => {
                    *self.variant.lock().unwrap_or_else(PoisonError::into_inner) = Some(variant);
                    self.held.store(true, Ordering::Release);
                    return Ok(());
                }
                Err(error) => told.push(Chain(&error).to_string()),
            }
        }
        Err(FirewallError::Unable(told.join("; ")))
    }

    fn variant(&self) -> Option<&'static str> {
        *self.variant.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what they hold is of interest: they are used, or have not been looked at.
    pub(in crate::firewall) fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// The tables with chains and sets of ours.
    pub(in crate::firewall) async fn read(
        &self,
    ) -> Result<BTreeMap<TableName, Table>, FirewallError> {
        let variant = self.variant();
        let mut tables = BTreeMap::new();
        match self.saved(variant.unwrap_or_default()).await {
            Ok(saved) => {
                for (name, table) in &saved {
                    tables.extend(table.ours(*name).map(|table| (*name, table)));
                }
                *self.listed.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
                let sets = saved::members(&listed("ipset", &["save"]).await?);
                tables.extend(sets.map(|sets| (TableName::Members, sets)));
            }
            Err(error) if variant.is_some() => return Err(error.into()),
            // Programs that do not work here, or are not there, hold nothing of ours.
            Err(_) => {}
        }
        if variant.is_none() && tables.is_empty() {
            self.held.store(false, Ordering::Release);
        }
        Ok(tables)
    }

    async fn saved(&self, variant: &str) -> Result<Listed, ExecError> {
        let mut all = BTreeMap::new();
        for (program, tables) in PROGRAMS {
            let saved = saved::saved(&save(program, variant, tables).await?);
            for name in tables {
                let (_, called) = name.place();
                let table = saved.iter().find(|table| table.name == called);
                all.insert(name, table.cloned().unwrap_or_default());
            }
        }
        Ok(all)
    }

    /// Makes the changes of a plan that are theirs.
    pub(in crate::firewall) async fn apply(&self, plan: &Plan) -> Result<(), FirewallError> {
        if plan.edits().all(|edit| edit.table().family().is_some()) {
            return Ok(());
        }
        self.held.store(true, Ordering::Release);
        // What rules use is there before them, and goes after them.
        self.change_sets(&plan.before).await?;
        self.change_rules(&plan.before).await?;
        self.change_sets(&plan.elements).await?;
        self.change_rules(&plan.after).await?;
        self.change_sets(&plan.after).await
    }

    async fn change_sets(&self, edits: &[Edit]) -> Result<(), FirewallError> {
        let edits = of(edits, TableName::Members);
        if edits.is_empty() {
            return Ok(());
        }
        let there = saved::members(&listed("ipset", &["save"]).await?);
        let script = saved::members_script(&edits, there.as_ref());
        if !script.is_empty() {
            program("ipset").args(["restore", "-exist"]).stdin(script).limit(LIMIT).run().await?;
            self.writes.add();
        }
        Ok(())
    }

    async fn change_rules(&self, edits: &[Edit]) -> Result<(), FirewallError> {
        if !edits.iter().any(|it| it.table().family().is_none() && it.table() != TableName::Members)
        {
            return Ok(());
        }
        let variant = self.variant().unwrap_or_default();
        // The plan was made from what was listed last. If somebody changed it since, a program refuses,
        // or the next look finds what is left to do.
        let listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner).take();
        let saved = match listed {
            Some(listed) => listed,
            None => self.saved(variant).await?,
        };
        for (name, tables) in PROGRAMS {
            let script: String = tables
                .iter()
                .map(|table| saved[table].script(*table, &of(edits, *table)))
                .collect();
            if !script.is_empty() {
                let restore = restore(name, variant).arg("--noflush");
                restore.stdin(script).limit(LIMIT).run().await?;
                self.writes.add();
            }
        }
        Ok(())
    }
}

/// The changes of one table.
fn of(edits: &[Edit], table: TableName) -> Vec<&Edit> {
    edits.iter().filter(|edit| edit.table() == table).collect()
}

fn program(name: &str) -> Program {
    Program::new(Path::new(FOLDER).join(name))
}

/// Loads rules. Whoever else changes those of the old programs is waited for.
fn restore(name: &str, variant: &str) -> Program {
    let restore = program(&format!("{name}{variant}-restore"));
    if name == "ebtables" { restore } else { restore.args(["-w", "10"]) }
}

async fn listed(name: &str, arguments: &[&str]) -> Result<String, ExecError> {
    let program = program(name).args(arguments.iter().copied());
    program.limit(LIMIT).most_output(MOST_LISTED).run().await.map(|output| output.text())
}

/// What a program keeps in its tables.
async fn save(name: &str, variant: &str, tables: [TableName; 2]) -> Result<String, ExecError> {
    if name != "ebtables" || variant.is_empty() {
        return listed(&format!("{name}{variant}-save"), &[]).await;
    }
    // Its script that saves asks whichever `ebtables` the host prefers.
    let mut all = String::new();
    for (_, table) in tables.map(TableName::place) {
        all += &listed(&format!("{name}{variant}"), &["-t", table, "-L"]).await?;
    }
    Ok(all)
}

/// Has each program do something that changes nothing.
async fn try_out(variant: &str) -> Result<(), ExecError> {
    for (name, tables) in PROGRAMS {
        if name == "ebtables" {
            save(name, variant, tables).await?;
        } else {
            let restore = restore(name, variant).args(["--noflush", "--test"]);
            restore.stdin(SAMPLE).limit(LIMIT).run().await?;
        }
    }
    listed("ipset", &["save"]).await?;
    Ok(())
}
