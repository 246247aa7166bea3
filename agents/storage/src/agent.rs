//! The storage agent as the runtime sees it: look, plan, act, report.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use stackhand_model::{AgentKind, ErrorCode, ObjectRef, Spec, VolumeId};
use stackhand_runtime::agent::{
    Action, Agent, Cause, Desired, Outcome, PassReport, PlannedStep, Refusal, Work,
};
use stackhand_runtime::wake::Wake;

use crate::backend::file::FileBackend;
use crate::backend::{Backend, BackendError, Item, Presence};
use crate::chain;
use crate::config::{BackendKind, DEFAULT_BACKEND, StorageSection};
use crate::copies::{Copies, Job};
use crate::desired::{Wanted, admit};
use crate::plan::{Budget, Change, Limits, Plan, Situation, Step, View, orphans};

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

/// The storage agent.
#[derive(Debug)]
pub struct StorageAgent {
    host: String,
    default_backend: String,
    backends: BTreeMap<String, Configured>,
    copies: Copies,
    /// What was wanted and seen at the last pass, for judging changes and for reports.
    last: Mutex<Last>,
}

#[derive(Debug, Default)]
struct Last {
    wanted: Arc<Wanted>,
    troubles: Vec<String>,
}

impl StorageAgent {
    /// The agent of `host` with the backends that the settings name.
    #[must_use]
    pub fn new(host: &str, state_dir: &Path, section: &StorageSection, wake: Wake) -> Self {
        let backends = section
            .all_backends()
            .into_iter()
            .map(|(name, settings)| {
                let folder = settings.path.clone().unwrap_or_else(|| state_dir.join("volumes"));
                let backend: Arc<dyn Backend> = match settings.kind {
                    BackendKind::File => Arc::new(FileBackend::new(
                        &name,
                        &folder,
                        state_dir,
                        name == DEFAULT_BACKEND,
                    )),
                };
                let limits = Limits {
                    overcommit_percent: settings.overcommit_percent,
                    reserved_percent: settings.reserved_percent,
                };
                (name, Configured { backend, kind: settings.kind, limits })
            })
            .collect();
        let copies = Copies::new(section.concurrent_copies, wake);
        Self::with_backends(host, &section.default_backend, backends, copies)
    }

    /// The agent of `host` with these backends.
    #[must_use]
    pub fn with_backends(
        host: &str,
        default_backend: &str,
        backends: BTreeMap<String, Configured>,
        copies: Copies,
    ) -> Self {
        Self {
            host: host.to_owned(),
            default_backend: default_backend.to_owned(),
            backends,
            copies,
            last: Mutex::default(),
        }
    }

    /// Looks at all backends.
    async fn observe(&self) -> Situation {
        // Copies first: one that ends in between is then seen both as running and as complete,
        // never as neither.
        let copies = self.copies.states();
        let mut backends = BTreeMap::new();
        for (name, configured) in &self.backends {
            let observed = blocking(&configured.backend, |backend| backend.observe()).await;
            let observed = observed.map_err(|error| match &error {
                BackendError::Away { reason, .. } => reason.clone(),
                error => chain(error),
            });
            backends.insert(name.clone(), View { observed, limits: configured.limits });
        }
        Situation {
            host: self.host.clone(),
            default_backend: self.default_backend.clone(),
            backends,
            copies,
        }
    }

    /// Makes one change.
    async fn perform(&self, step: &Step, situation: &Situation) -> Result<(), String> {
        let Some(Configured { backend, .. }) = self.backends.get(&step.backend) else {
            return Err(format!("there is no backend {:?}", step.backend));
        };
        let change = step.change.clone();
        let done = match change {
            Change::Create { item, bytes } => {
                blocking(backend, move |b| b.create(item, bytes)).await
            }
            Change::Clone { item, source, bytes } => {
                blocking(backend, move |b| b.clone_item(item, source, bytes)).await
            }
            Change::Extend { item, bytes } => {
                blocking(backend, move |b| b.extend(item, bytes)).await
            }
            Change::Delete { item } => blocking(backend, move |b| b.delete(item)).await,
            Change::Discard { item } => blocking(backend, move |b| b.discard(item)).await,
            Change::Sweep { name } => blocking(backend, move |b| b.sweep(&name)).await,
            Change::CallOff { item } => {
                self.copies.call_off(item);
                Ok(())
            }
            Change::Copy { item, source, from, bytes } => {
                let observed = situation.backends.get(&from).map(|view| &view.observed);
                let Some(Ok(observed)) = observed else {
                    return Err(format!("backend {from} is away"));
                };
                let path = observed.place.path(source);
                let job = Job { item, backend: step.backend.clone(), source, path, bytes };
                self.copies.start(Arc::clone(backend), job);
                Ok(())
            }
        };
        done.map_err(|error| chain(&error))
    }

    fn troubles_of(wanted: &Wanted, situation: &Situation) -> Vec<String> {
        let mut troubles = Vec::new();
        for (name, view) in &situation.backends {
            match &view.observed {
                Err(reason) => troubles.push(format!("storage backend {name} is away: {reason}")),
                Ok(observed) => {
                    let budget = Budget::new(observed, &view.limits);
                    if budget.claims > budget.limit {
                        troubles.push(format!(
                            "storage backend {name} has promised {} bytes and can keep {}: free space",
                            budget.claims, budget.limit
                        ));
                    }
                }
            }
        }
        let left = orphans(wanted, situation);
        if let Some((backend, first)) = left.first() {
            troubles.push(format!(
                "{} items without a document are kept, such as {first} on backend {backend}: apply \
                 their documents, or delete them by hand",
                left.len()
            ));
        }
        troubles
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
        let situation = self.observe().await;
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
                    self.perform(step, &situation).await.inspect(|()| writes += 1)
                }
            };
            if let Err(reason) = result {
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
                outcomes.insert(object, Outcome::Pending { reason, observed: Value::Null });
            }
        }
        for (object, reason) in failed {
            outcomes.insert(object, Outcome::Failed { reason, observed: Value::Null });
        }
        // Their failure has been told now.
        self.copies.forget(situation.copies.iter().filter_map(|(&item, copy)| {
            (copy.failure.is_some() && work.due.contains(&item.object())).then_some(item)
        }));
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if work.cause == Cause::Start {
            tracing::info!(steps = steps.len(), "first look at the backends is done");
        }
        last.troubles = Self::troubles_of(&wanted, &situation);
        last.wanted = wanted;
        drop(last);
        PassReport { outcomes, writes }
    }

    async fn act(&self, action: Action) -> Result<Value, Refusal> {
        let (item, spec) = match &action.document.spec {
            Spec::Volume(spec) => (Item::Volume(VolumeId(action.object.id)), spec),
            _ => {
                return Err(Refusal::new(
                    ErrorCode::Unsupported,
                    format!("{} has no actions; a Volume has: adopt", action.object),
                )
                .about(action.object));
            }
        };
        if action.name != "adopt" {
            return Err(Refusal::new(
                ErrorCode::Unsupported,
                format!("a Volume has no action {:?}; it has: adopt", action.name),
            )
            .about(action.object));
        }
        let name = spec.backend.as_deref().unwrap_or(&self.default_backend);
        let Some(Configured { backend, .. }) = self.backends.get(name) else {
            let refusal =
                Refusal::new(ErrorCode::NotFound, format!("there is no backend {name:?}"));
            return Err(refusal.about(action.object));
        };
        let adopted = blocking(backend, move |backend| {
            let seen = backend.observe()?.items.remove(&item);
            let foreign = |seen: &crate::backend::Seen| !matches!(seen.presence, Presence::Ready);
            if seen.as_ref().is_none_or(foreign) {
                backend.adopt(item).map(|()| true)
            } else {
                Ok(false)
            }
        });
        match adopted.await {
            Ok(adopted) => Ok(json!({ "adopted": adopted })),
            Err(error) => {
                Err(Refusal::new(ErrorCode::WrongState, chain(&error)).about(action.object))
            }
        }
    }

    async fn facts(&self) -> Value {
        let situation = self.observe().await;
        let backends: serde_json::Map<String, Value> = situation
            .backends
            .iter()
            .map(|(name, view)| {
                let kind = self.backends.get(name).map(|configured| configured.kind);
                let facts = match &view.observed {
                    Err(reason) => json!({"type": kind, "state": "down", "reason": reason}),
                    Ok(observed) => {
                        let budget = Budget::new(observed, &view.limits);
                        let count = |volumes: bool| {
                            observed
                                .items
                                .keys()
                                .filter(|item| matches!(item, Item::Volume(_)) == volumes)
                                .count()
                        };
                        json!({
                            "type": kind,
                            "state": "up",
                            "place": match &observed.place {
                                crate::backend::Place::Folder(folder) => folder,
                            },
                            "total_bytes": observed.total_bytes,
                            "free_bytes": observed.free_bytes,
                            "promised_bytes": budget.claims,
                            "promisable_bytes": budget.left(),
                            "overcommit_percent": view.limits.overcommit_percent,
                            "instant_copies": observed.instant_copies,
                            "volumes": count(true),
                            "snapshots": count(false),
                        })
                    }
                };
                (name.clone(), facts)
            })
            .collect();
        json!({"backends": backends, "default_backend": self.default_backend})
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
