//! The storage agent as the runtime sees it: look, plan, act, report.

mod actions;
mod build;
mod report;
#[cfg(test)]
mod tests;

pub use build::StartError;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use stackhand_model::{AgentKind, ObjectRef, VolumeId};
use stackhand_runtime::agent::{
    Action, Agent, Cause, Desired, Outcome, PassReport, PlannedStep, Refusal, Work,
};
use stackhand_runtime::chain;
use stackhand_runtime::ledger::Journal;

use crate::backend::{Backend, BackendError, Item, Observed};
use crate::config::BackendKind;
use crate::desired::{Wanted, admit};
use crate::export::chap::Key;
use crate::export::{ExportError, Exporter};
use crate::plan::{Change, Exports, Limits, Plan, Situation, Step, View};
use crate::works::{self, Works};

/// A backend with its settings.
#[derive(Clone, Debug)]
pub struct Configured {
    /// The backend.
    pub backend: Arc<dyn Backend>,
    /// How it keeps volumes, for people.
    pub kind: BackendKind,
    /// How much may be promised.
    pub limits: Limits,
}

/// An exporter with what it needs to know.
#[derive(Clone, Debug)]
pub struct Exporting {
    /// What exports.
    pub exporter: Arc<dyn Exporter>,
    /// What passwords are made from.
    pub key: Arc<Key>,
}

/// The storage agent.
#[derive(Debug)]
pub struct StorageAgent {
    host: String,
    default_backend: String,
    backends: BTreeMap<String, Configured>,
    exporting: Option<Exporting>,
    works: Works,
    journal: Journal,
    /// What was wanted and seen at the last pass, for judging changes and for reports.
    last: Mutex<Last>,
}

#[derive(Debug, Default)]
struct Last {
    wanted: Arc<Wanted>,
    troubles: Vec<String>,
}

impl StorageAgent {
    /// The agent of `host` with these backends and this exporter.
    #[must_use]
    pub fn with_parts(
        host: &str,
        default_backend: &str,
        backends: BTreeMap<String, Configured>,
        exporting: Option<Exporting>,
        works: Works,
        journal: Journal,
    ) -> Self {
        Self {
            host: host.to_owned(),
            default_backend: default_backend.to_owned(),
            backends,
            exporting,
            works,
            journal,
            last: Mutex::default(),
        }
    }

    /// Looks at all backends and exports.
    async fn observe(&self) -> Situation {
        self.look(|backend, _limits| backend.observe()).await
    }

    /// The same, but with backends as they are remembered, which costs less. Not those that get
    /// full, for guests fill them all the while.
    async fn recall(&self) -> Situation {
        self.look(|backend, limits| match backend.recall() {
            Ok(recalled) if limits.nears_stop(recalled.fill) => backend.observe(),
            recalled => recalled,
        })
        .await
    }

    async fn look(
        &self,
        look: fn(&dyn Backend, Limits) -> Result<Observed, BackendError>,
    ) -> Situation {
        // Work first: what ends in between is then seen both as running and as complete, never as
        // neither.
        let (mut works, mut wipes) = (BTreeMap::new(), BTreeMap::new());
        for (key, state) in self.works.states() {
            match key {
                works::Key::Item(item) => drop(works.insert(item, state)),
                works::Key::Leftover { backend, name } => {
                    wipes.insert((backend, name), state);
                }
            }
        }
        let reverts = self.works.reverts();
        // Exports before backends: what they have open is then known when it is seen open.
        let exports = self.observe_exports().await;
        let mut backends = BTreeMap::new();
        for (name, configured) in &self.backends {
            let limits = configured.limits;
            let observed =
                blocking(&configured.backend, move |backend| look(backend, limits)).await;
            let observed = observed.map_err(|error| match &error {
                BackendError::Away { reason, .. } => reason.clone(),
                error => chain(error),
            });
            backends.insert(name.clone(), View { observed, limits });
        }
        Situation {
            host: self.host.clone(),
            default_backend: self.default_backend.clone(),
            backends,
            works,
            wipes,
            reverts,
            fenced: self.fenced(),
            exports,
        }
    }

    async fn observe_exports(&self) -> Option<Exports> {
        let Exporting { exporter, key } = self.exporting.as_ref()?;
        let observed = on_thread(exporter, |exporter| exporter.observe()).await;
        Some(Exports {
            observed: observed.map_err(|error| chain(&error)),
            portal: *exporter.portals().first()?,
            lun: exporter.lun(),
            key: Arc::clone(key),
        })
    }

    /// Makes one change.
    async fn perform(&self, step: &Step) -> Result<(), String> {
        match &step.change {
            Change::Publish { target } => {
                let target = target.clone();
                return self.export(move |exporter| exporter.publish(&target)).await;
            }
            &Change::Withdraw { volume } => {
                return self.export(move |exporter| exporter.withdraw(volume)).await;
            }
            _ => {}
        }
        let name = &step.backend;
        let Some(Configured { backend, .. }) = self.backends.get(name) else {
            return Err(format!("there is no backend {name:?}"));
        };
        let done = match step.change.clone() {
            Change::Create { item, bytes } => {
                blocking(backend, move |b| b.create(item, bytes)).await
            }
            Change::Clone { item, source, bytes } => {
                blocking(backend, move |b| b.clone_item(item, source, bytes)).await
            }
            Change::Extend { item, bytes } => {
                blocking(backend, move |b| b.extend(item, bytes)).await
            }
            Change::Activate { item } => blocking(backend, move |b| b.activate(item)).await,
            Change::Delete { item } => blocking(backend, move |b| b.delete(item)).await,
            Change::Discard { item } => blocking(backend, move |b| b.discard(item)).await,
            Change::Sweep { name } => blocking(backend, move |b| b.sweep(&name)).await,
            Change::CallOff { item } => {
                self.works.call_off(item);
                Ok(())
            }
            Change::Begin(task) => {
                self.works.start(name, Arc::clone(backend), task);
                Ok(())
            }
            Change::Publish { .. } | Change::Withdraw { .. } => Ok(()),
        };
        done.map_err(|error| chain(&error))
    }

    async fn export(
        &self,
        call: impl FnOnce(&dyn Exporter) -> Result<(), ExportError> + Send + 'static,
    ) -> Result<(), String> {
        let Some(Exporting { exporter, .. }) = &self.exporting else {
            return Err("storage.export.type is none".to_owned());
        };
        on_thread(exporter, call).await.map_err(|error| chain(&error))
    }
}

impl Agent for StorageAgent {
    const KIND: AgentKind = AgentKind::Storage;

    fn admit(&self, wanted: &Desired, changed: &BTreeSet<ObjectRef>) -> Result<(), Refusal> {
        let before = {
            let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(&last.wanted)
        };
        let backends = self.backends.keys().cloned().collect();
        admit(&self.host, &backends, &before, &Wanted::new(wanted), changed)
    }

    async fn plan(&self, wanted: Arc<Desired>) -> Result<Vec<PlannedStep>, Refusal> {
        let situation = self.observe().await;
        let due = wanted.objects.keys().copied().collect();
        let plan = Plan::new(&Wanted::new(&wanted), &situation, &due);
        Ok(plan
            .steps
            .iter()
            .map(|step| PlannedStep { object: step.object, change: step.to_string() })
            .collect())
    }

    async fn pass(&self, work: Work) -> PassReport {
        let wanted = Arc::new(Wanted::new(&work.desired));
        let adds_only = work.cause == Cause::Change && wanted.only_adds_to(&self.wanted());
        let situation = if adds_only { self.recall().await } else { self.observe().await };
        let Plan { steps, mut outcomes, relies_on } = Plan::new(&wanted, &situation, &work.due);
        let mut writes = 0;
        let mut failed: BTreeMap<ObjectRef, String> = BTreeMap::new();
        for step in &steps {
            // What failed may be the object itself, or what it is made from.
            let broken = step
                .object
                .iter()
                .chain(&step.needs)
                .find_map(|object| failed.get(object).map(|reason| (*object, reason.clone())));
            let result = match broken {
                Some((object, reason)) if Some(object) == step.object => Err(reason),
                Some((object, reason)) => Err(format!("waits for {object}: {reason}")),
                None => {
                    tracing::info!(step = %step, "applying");
                    self.perform(step).await.inspect(|()| writes += 1)
                }
            };
            if let Err(reason) = result {
                for &object in &step.also {
                    failed.insert(object, reason.clone());
                }
                match step.object {
                    Some(object) => drop(failed.insert(object, reason)),
                    None => tracing::warn!(step = %step, reason, "clean-up failed"),
                }
            }
        }
        for (object, on) in relies_on {
            let Some(reason) = failed.get(&on) else { continue };
            // A volume that is there and could not grow can be attached all the same.
            let item = Item::Volume(VolumeId(on.id));
            let there = situation
                .backends
                .values()
                .filter_map(|view| view.observed.as_ref().ok())
                .any(|observed| observed.items.contains_key(&item));
            if !there {
                let reason = format!("waits for {on}: {reason}");
                outcomes.insert(object, Outcome::Pending { reason, observed: Value::Null.into() });
            }
        }
        for (object, reason) in failed {
            outcomes.insert(object, Outcome::failed(reason));
        }
        // Their failure has been told now.
        self.works.forget(situation.works.iter().filter_map(|(&item, state)| {
            (state.failure.is_some() && work.due.contains(&item.object()))
                .then_some(works::Key::Item(item))
        }));
        if work.cause == Cause::Timer {
            self.works.forget(situation.wipes.keys().map(|(backend, name)| works::Key::Leftover {
                backend: backend.clone(),
                name: name.clone(),
            }));
        }
        self.forget_notes(&wanted).await;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if work.cause == Cause::Start {
            tracing::info!(steps = steps.len(), "first look at the backends is done");
        }
        last.troubles = report::troubles(&wanted, &situation);
        last.wanted = wanted;
        drop(last);
        PassReport { outcomes, writes }
    }

    async fn act(&self, action: Action) -> Result<Value, Refusal> {
        self.do_act(action).await
    }

    async fn facts(&self) -> Value {
        let situation = self.observe().await;
        report::facts(&situation, |name| self.backends.get(name).map(|it| it.kind))
    }

    fn troubles(&self) -> Vec<String> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).troubles.clone()
    }
}

/// Makes a call to a backend on a thread that may block.
async fn blocking<T: Send + 'static>(
    backend: &Arc<dyn Backend>,
    call: impl FnOnce(&dyn Backend) -> Result<T, BackendError> + Send + 'static,
) -> Result<T, BackendError> {
    let backend = Arc::clone(backend);
    tokio::task::spawn_blocking(move || call(backend.as_ref())).await.unwrap_or_else(|error| {
        Err(BackendError::Away {
            backend: String::new(),
            reason: format!("a call broke off: {error}"),
        })
    })
}

/// The same for an exporter.
async fn on_thread<T: Send + 'static>(
    exporter: &Arc<dyn Exporter>,
    call: impl FnOnce(&dyn Exporter) -> Result<T, ExportError> + Send + 'static,
) -> Result<T, ExportError> {
    let exporter = Arc::clone(exporter);
    tokio::task::spawn_blocking(move || call(exporter.as_ref())).await.unwrap_or_else(|error| {
        Err(ExportError::Away { reason: format!("a call broke off: {error}") })
    })
}
