//! The compute agent as the runtime sees it: look, plan, act, report.

mod actions;
mod capacity;
mod console;
mod probe;
mod snapshot;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use stackhand_model::{
    AgentKind, Connection, ImageId, InstanceId, IscsiClient, ObjectRef, VolumeId,
};
use stackhand_runtime::agent::{
    Action, Agent, Desired, Outcome, PassReport, PlannedStep, Refusal, Work,
};
use stackhand_runtime::wake::Wake;
use tokio::sync::OwnedMutexGuard;

use crate::config::{ComputeSection, VirtType};
use crate::desired::{Wanted, admit};
use crate::domain::{Engine, tap_name};
use crate::hypervisor::{DomainChange, HostFacts, Hypervisor, Power};
use crate::initiator::{HELPER, HostInitiator, Initiator, Question, by_host};
use crate::meter::Meter;
use crate::plan::{Fashion, Plan, Situation, Step, local_path, orphans};
use crate::store::Store;
use console::Consoles;
use probe::{Probe, Probed};
use stackhand_image::Fetches;
use stackhand_image::{ImageCache, ImageTool};

/// Instances that are worked on at once.
const AT_ONCE: usize = 6;

/// How long a guest has to let go of a device before it is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(20);

/// How often awaited taps are looked for.
const TAP_EVERY: Duration = Duration::from_millis(100);

/// The compute agent, on a hypervisor.
#[derive(Debug)]
pub struct ComputeAgent<H> {
    host: String,
    section: ComputeSection,
    hypervisor: Arc<H>,
    meter: Arc<Meter<H>>,
    initiator: Arc<dyn Initiator>,
    cache: ImageCache,
    images: PathBuf,
    store: Store,
    instances: PathBuf,
    snapshots: PathBuf,
    tool: ImageTool,
    consoles: Consoles,
    fetches: Fetches,
    wake: Wake,
    memory: Arc<Mutex<Memory>>,
    /// One lock per instance: an action and a pass do not work on it at once.
    locks: Mutex<BTreeMap<InstanceId, Arc<tokio::sync::Mutex<()>>>>,
    /// Taps that are looked for.
    awaited: Arc<Mutex<BTreeSet<String>>>,
}

/// What is remembered between passes, and may be lost.
#[derive(Debug, Default)]
struct Memory {
    /// Who executes guests' instructions, and why.
    engine: Option<(Engine, String)>,
    /// A probe is under way.
    probing: bool,
    /// Guests that were asked to shut down, and when.
    stopping: BTreeMap<InstanceId, Instant>,
    /// Devices that guests were asked to let go of, and when.
    detaching: BTreeMap<(InstanceId, String), Instant>,
    /// Instances whose crash, or stall, was told.
    crashed: BTreeSet<InstanceId>,
    /// What the host has, once it was asked.
    facts: Option<HostFacts>,
    troubles: Vec<String>,
}

impl<H: Hypervisor> ComputeAgent<H> {
    /// The agent of `host`, with its files in `state_dir`.
    #[must_use]
    pub fn new(
        host: &str,
        state_dir: &Path,
        section: &ComputeSection,
        hypervisor: H,
        wake: Wake,
    ) -> Self {
        let (images, instances) = (state_dir.join("images"), state_dir.join("instances"));
        let tool =
            ImageTool::new(&section.qemu_img, u64::from(section.convert_timeout_minutes) * 60);
        let cache = ImageCache::new(&images, section.max_image_gib << 30, tool.clone());
        let hypervisor = Arc::new(hypervisor);
        Self {
            host: host.to_owned(),
            section: section.clone(),
            meter: Arc::new(Meter::new(Arc::clone(&hypervisor))),
            hypervisor,
            initiator: Arc::new(HostInitiator::new(HELPER)),
            fetches: Fetches::new(cache.clone(), section.concurrent_fetches, wake.clone()),
            cache,
            images,
            store: Store::new(&instances, tool.clone()),
            instances,
            snapshots: state_dir.join("snapshots"),
            tool,
            consoles: Consoles::default(),
            wake,
            memory: Arc::default(),
            locks: Mutex::default(),
            awaited: Arc::default(),
        }
    }

    /// The same with another initiator.
    #[must_use]
    pub fn with_initiator(mut self, initiator: Arc<dyn Initiator>) -> Self {
        self.initiator = initiator;
        self
    }

    /// What runs its domains.
    #[must_use]
    pub fn hypervisor(&self) -> &H {
        &self.hypervisor
    }

    /// What counts what its instances use.
    #[must_use]
    pub fn meter(&self) -> &Arc<Meter<H>> {
        &self.meter
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_of(&self, id: InstanceId) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(locks.entry(id).or_default())
    }

    /// Who executes guests' instructions, or why that is not known yet. Where the settings leave it
    /// open a probe is started, which takes seconds where KVM hangs; nobody waits for it.
    fn engine(&self) -> Result<Engine, String> {
        let mut memory = self.memory();
        if let Some((engine, _)) = &memory.engine {
            return Ok(*engine);
        }
        let engine = match self.section.virt_type {
            VirtType::Kvm => Engine::Kvm,
            VirtType::Qemu => Engine::Qemu,
            VirtType::Auto => {
                if !std::mem::replace(&mut memory.probing, true) {
                    let probe = Probe {
                        hypervisor: Arc::clone(&self.hypervisor),
                        folder: self.instances.clone(),
                        note: self.instances.with_file_name("virt-type.json"),
                    };
                    let (memory, wake) = (Arc::clone(&self.memory), self.wake.clone());
                    tokio::spawn(async move {
                        let found = probe.run().await;
                        let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
                        memory.probing = false;
                        if let Some(Probed { engine, why, .. }) = found {
                            memory.engine = Some((engine, why));
                        }
                        wake.host_changed();
                    });
                }
                return Err("finding out whether KVM runs guests here".to_owned());
            }
        };
        memory.engine = Some((engine, "compute.virt_type says so".to_owned()));
        Ok(engine)
    }

    /// Looks at everything.
    async fn observe(&self, wanted: &Wanted) -> Result<Situation, String> {
        // Fetches first: one that ends in between is then seen both as running and in the cache.
        let fetches = self.fetches.states();
        let domains = match self.hypervisor.domains().await {
            Ok(domains) => Ok(domains.into_iter().map(|domain| (domain.uuid, domain)).collect()),
            Err(error) => Err(error.to_string()),
        };
        let fashion = match &domains {
            Ok(_) => self.engine().map(|engine| Fashion {
                engine,
                machine: self.section.machine.clone(),
                disk_cache: self.section.disk_cache.clone(),
                images: self.images.clone(),
                instances: self.instances.clone(),
                hotplug_slots: self.section.hotplug_slots,
            }),
            Err(reason) => Err(reason.clone()),
        };
        let capacity = self.capacity().await;
        let (cache, store) = (self.cache.clone(), self.store.clone());
        let taps: BTreeSet<String> = wanted
            .instances
            .values()
            .flat_map(|wish| wish.spec.ports.iter().map(|port| tap_name(port.port)))
            .collect();
        let paths: BTreeSet<PathBuf> = wanted
            .instances
            .values()
            .flat_map(|wish| &wish.spec.volumes)
            .filter_map(|volume| local_path(&volume.connection).map(Path::to_owned))
            .collect();
        let taken_in: BTreeMap<VolumeId, Connection> = wanted
            .instances
            .values()
            .flat_map(|wish| &wish.spec.volumes)
            .filter_map(|volume| Some((volume.volume, by_host(&volume.connection)?.clone())))
            .collect();
        let initiator = Arc::clone(&self.initiator);
        let looked = crate::blocking(move || {
            let attached = initiator.look(&taken_in);
            let links = taps.into_iter().filter(|tap| link_exists(tap)).collect();
            // What we may not look at, libvirt may.
            let there = |path: &PathBuf| path.try_exists().unwrap_or(true);
            let volumes = paths.into_iter().filter(there).collect();
            let (cache, store) = (cache.look()?, store.look()?);
            Ok::<_, crate::files::FileError>((cache, store, links, volumes, attached))
        });
        let (cache, store, links, volumes, attached) =
            looked.await.map_err(|error| crate::chain(&error))?;
        let limit = Duration::from_secs(u64::from(self.section.shutdown_timeout_seconds));
        let memory = self.memory();
        Ok(Situation {
            fashion,
            domains,
            cache,
            fetches,
            store,
            links,
            volumes,
            attached,
            stopping: memory
                .stopping
                .iter()
                .map(|(&id, since)| (id, since.elapsed() >= limit))
                .collect(),
            crashed: memory.crashed.clone(),
            detaching: memory
                .detaching
                .iter()
                .map(|(key, since)| (key.clone(), since.elapsed() >= ASK_AGAIN))
                .collect(),
            keep_unused: (
                u64::from(self.section.image_cache_hours) * 3600,
                self.section.image_cache_gib << 30,
            ),
            capacity,
            busy: BTreeSet::new(),
        })
    }

    /// Makes one change for an object.
    async fn perform(
        &self,
        object: Option<ObjectRef>,
        step: &Step,
        wanted: &Wanted,
    ) -> Result<(), String> {
        let chain = |error: crate::files::FileError| crate::chain(&error);
        let instance = object.map(|object| InstanceId(object.id));
        match (step.clone(), instance) {
            (Step::Fetch(id), _) => {
                if let Some(wish) = wanted.images.get(&id) {
                    self.fetches.start(id, wish.spec.clone());
                }
                Ok(())
            }
            (Step::CallOff(id), _) => {
                self.fetches.call_off(id);
                Ok(())
            }
            (Step::Forget(id), _) => {
                let cache = self.cache.clone();
                crate::blocking(move || cache.forget(id)).await.map_err(chain)
            }
            (Step::RemovePartial(id), _) => {
                let cache = self.cache.clone();
                crate::blocking(move || cache.remove_partial(id)).await.map_err(chain)
            }
            (Step::RemoveContents(contents), _) => {
                let cache = self.cache.clone();
                crate::blocking(move || cache.remove_contents(&contents)).await.map_err(chain)
            }
            (Step::RemoveFiles(id), _) => {
                let (store, cache) = (self.store.clone(), self.cache.clone());
                let work = move || {
                    if let Ok(Some(record)) = store.read(id) {
                        cache.touch(record.contents());
                    }
                    store.remove(id)
                };
                crate::blocking(work).await.map_err(chain)
            }
            (Step::Prepare(record), Some(id)) => {
                let store = self.store.clone();
                crate::blocking(move || store.prepare(id, &record)).await.map_err(chain)
            }
            (Step::MakeDisk { contents, format, bytes }, Some(id)) => {
                let base = self.cache.path(&contents);
                let made = self.store.make_disk(id, &base, format, bytes).await;
                made.map_err(|error| crate::chain(&error))
            }
            (Step::MakeBlank { part, bytes }, Some(id)) => {
                let made = self.store.make_blank(id, part, bytes).await;
                made.map_err(|error| crate::chain(&error))
            }
            (Step::WriteConfigDrive, Some(id)) => {
                let Some(wish) = wanted.instances.get(&id) else { return Ok(()) };
                let name = wish.document.name.as_str();
                let image = crate::config_drive::image(id, name, &wish.spec);
                let image = image.map_err(|error| crate::chain(&error))?;
                let written = self.store.write_config_drive(id, image).await;
                written.map_err(|error| crate::chain(&error))
            }
            (Step::RemovePart(part), Some(id)) => {
                let store = self.store.clone();
                crate::blocking(move || store.remove_part(id, part)).await.map_err(chain)
            }
            (Step::EndSnapshot, Some(id)) => {
                self.hypervisor.abort_copy(id).await.map_err(|error| error.to_string())?;
                let copy = self.store.copy(id);
                crate::blocking(move || stackhand_image::files::remove(&copy)).await.map_err(chain)
            }
            (Step::BeginLog, Some(id)) => {
                let store = self.store.clone();
                crate::blocking(move || store.begin_console(id)).await.map_err(chain)
            }
            (Step::Initiator(question), Some(id)) => {
                self.initiator.ask(question).await?;
                // What came is used, and what went is seen, by the next look.
                self.wake.object_changed(id.object());
                Ok(())
            }
            (Step::Domain(change), Some(id)) => {
                let stops = change == DomainChange::Shutdown;
                let detaches = match &change {
                    DomainChange::Detach { alias, .. } => Some(alias.clone()),
                    _ => None,
                };
                let attaches = matches!(change, DomainChange::Attach { .. });
                let done = self.hypervisor.perform(id, change).await;
                if attaches {
                    // It is told as plugged in once a look has seen it.
                    self.wake.object_changed(id.object());
                }
                if stops && done.is_ok() {
                    self.stop_later(id);
                }
                if let (Some(alias), Ok(())) = (detaches, &done) {
                    self.memory().detaching.insert((id, alias), Instant::now());
                    self.wake_later(id, ASK_AGAIN);
                }
                done.map_err(|error| error.to_string())
            }
            (step, None) => Err(format!("a step that belongs to an instance has none: {step}")),
        }
    }

    /// Notes that a guest was asked to shut down, and asks for a pass when its time is up.
    fn stop_later(&self, id: InstanceId) {
        self.memory().stopping.insert(id, Instant::now());
        self.wake_later(id, Duration::from_secs(u64::from(self.section.shutdown_timeout_seconds)));
    }

    /// Asks for a pass when so much time is gone.
    fn wake_later(&self, id: InstanceId, limit: Duration) {
        let wake = self.wake.clone();
        tokio::spawn(async move {
            tokio::time::sleep(limit + Duration::from_millis(10)).await;
            wake.object_changed(id.object());
        });
    }

    /// Looks for awaited taps until all are there, and asks for a pass for each that comes.
    fn await_taps(&self, taps: BTreeSet<String>) {
        let mut awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = awaited.is_empty();
        *awaited = taps;
        if !idle || awaited.is_empty() {
            return;
        }
        let (awaited, wake) = (Arc::clone(&self.awaited), self.wake.clone());
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(TAP_EVERY).await;
                let mut awaited = awaited.lock().unwrap_or_else(PoisonError::into_inner);
                let before = awaited.len();
                awaited.retain(|tap| !link_exists(tap));
                if awaited.len() < before {
                    wake.host_changed();
                }
                if awaited.is_empty() {
                    return;
                }
            }
        });
    }

    /// Remembers what the next pass needs to know, and what reports tell.
    fn remember(&self, wanted: &Wanted, situation: &Situation, due: &BTreeSet<ObjectRef>) {
        let mut memory = self.memory();
        if let Ok(domains) = &situation.domains {
            memory.stopping.retain(|id, _| {
                domains.get(&id.0).is_some_and(|domain| !matches!(domain.power, Power::Off(_)))
            });
            memory.detaching.retain(|(id, alias), _| {
                let devices = domains.get(&id.0).map(|domain| &domain.devices);
                devices.is_some_and(|devices| {
                    let mut plugged = devices.volumes.values().chain(devices.nics.values());
                    plugged.any(|device| device.alias == *alias)
                })
            });
            // Told by this pass if it was due; let go on by the next.
            let told: BTreeSet<InstanceId> = wanted
                .instances
                .keys()
                .filter(|id| domains.get(&id.0).is_some_and(|it| it.power.came_to_grief()))
                .filter(|id| {
                    let before = situation.crashed.contains(id);
                    if due.contains(&id.object()) { !before } else { before }
                })
                .copied()
                .collect();
            memory.crashed = told;
        }
        memory.troubles = Vec::new();
        if let Some((Engine::Qemu, why)) = &memory.engine
            && self.section.virt_type == VirtType::Auto
        {
            let trouble = format!("guests run without KVM, slowly: {why}");
            memory.troubles.push(trouble);
        }
        let left = orphans(wanted, situation);
        if let Some(first) = left.first() {
            memory.troubles.push(format!(
                "{} domains of ours have no document and are left as they are, such as {} ({}): apply \
                 their documents, or undefine them by hand",
                left.len(),
                first.name,
                first.uuid
            ));
        }
    }
}

impl<H: Hypervisor> Agent for ComputeAgent<H> {
    const KIND: AgentKind = AgentKind::Compute;

    fn admit(&self, wanted: &Desired, changed: &BTreeSet<ObjectRef>) -> Result<(), Refusal> {
        admit(&self.host, &Wanted::new(wanted), changed)
    }

    async fn plan(&self, desired: Arc<Desired>) -> Result<Vec<PlannedStep>, Refusal> {
        let wanted = Wanted::new(&desired);
        let situation = self
            .observe(&wanted)
            .await
            .map_err(|reason| Refusal::new(stackhand_model::ErrorCode::Unavailable, reason))?;
        let due = desired.objects.keys().copied().collect();
        let plan = Plan::new(&wanted, &situation, &due);
        let of_objects = plan
            .steps
            .iter()
            .flat_map(|(object, steps)| steps.iter().map(|step| (Some(*object), step)));
        Ok(of_objects
            .chain(plan.cleanup.iter().map(|step| (None, step)))
            .map(|(object, step)| PlannedStep { object, change: step.to_string() })
            .collect())
    }

    async fn pass(&self, work: Work) -> PassReport {
        let wanted = Wanted::new(&work.desired);
        // Before the look: what an action is in the middle of must not be taken for the end.
        let mut guards: BTreeMap<InstanceId, OwnedMutexGuard<()>> = BTreeMap::new();
        let mut busy = BTreeSet::new();
        for &id in wanted.instances.keys().filter(|id| work.due.contains(&id.object())) {
            match self.lock_of(id).try_lock_owned() {
                Ok(guard) => drop(guards.insert(id, guard)),
                Err(_) => drop(busy.insert(id)),
            }
        }
        let situation = match self.observe(&wanted).await {
            Ok(situation) => Situation { busy, ..situation },
            Err(reason) => {
                let failed = |object: &ObjectRef| (*object, Outcome::failed(reason.clone()));
                return PassReport { outcomes: work.due.iter().map(failed).collect(), writes: 0 };
            }
        };
        let plan = Plan::new(&wanted, &situation, &work.due);
        let mut report = PassReport { outcomes: plan.outcomes, writes: 0 };
        let frees = |step: &Step| matches!(step, Step::Forget(_) | Step::RemoveFiles(_));
        if plan.steps.values().flatten().any(frees) {
            // What nobody uses any more is seen by the next look.
            self.wake.host_changed();
        }
        let wishes = &wanted;
        let mut done = stream::iter(plan.steps)
            .map(|(object, steps)| async move {
                let mut writes = 0;
                for step in &steps {
                    tracing::info!(%object, %step, "applying");
                    if let Err(reason) = self.perform(Some(object), step, wishes).await {
                        return (object, writes, Err(reason));
                    }
                    writes += 1;
                }
                (object, writes, Ok(()))
            })
            .buffer_unordered(AT_ONCE);
        while let Some((object, writes, result)) = done.next().await {
            report.writes += writes;
            if let Err(reason) = result {
                report.outcomes.insert(object, Outcome::failed(reason));
            }
        }
        drop(done);
        for step in &plan.cleanup {
            match self.perform(None, step, &wanted).await {
                Ok(()) => report.writes += 1,
                Err(reason) => tracing::warn!(%step, reason, "clean-up failed"),
            }
        }
        // Their failure has been told now.
        self.fetches.forget(situation.fetches.iter().filter_map(|(&id, fetch)| {
            let told = fetch.failure.is_some() && work.due.contains(&id.object());
            told.then_some(id)
        }));
        self.await_taps(plan.awaited);
        self.consoles.expire();
        self.remember(&wanted, &situation, &work.due);
        drop(guards);
        report
    }

    async fn act(&self, action: Action) -> Result<Value, Refusal> {
        self.perform_action(action).await
    }

    async fn facts(&self) -> Value {
        let (host, capacity) = (self.hypervisor.host().await, self.capacity().await);
        let engine = self.memory().engine.clone();
        let cache = self.cache.clone();
        let images: Vec<ImageId> = crate::blocking(move || cache.look())
            .await
            .map(|seen| seen.images.into_keys().collect())
            .unwrap_or_default();
        let mut facts = match host {
            Ok(host) => json!(host),
            Err(error) => json!({"hypervisor": error.to_string()}),
        };
        facts["virt_type"] = json!(engine.as_ref().map(|(engine, _)| engine));
        facts["virt_type_reason"] = json!(engine.as_ref().map(|(_, why)| why));
        facts["images"] = json!(images);
        facts["capacity"] = json!(capacity);
        facts["connector"] = match self.section.iscsi_client {
            IscsiClient::Qemu => json!({"client": "qemu"}),
            IscsiClient::Host => match self.initiator.ask(Question::Name).await {
                Ok(name) => json!({"client": "host", "initiator": name}),
                Err(reason) => json!({"client": "host", "reason": reason}),
            },
        };
        facts["usage"] = self.meter.all().await.unwrap_or_else(|_away| json!({}));
        facts
    }

    fn troubles(&self) -> Vec<String> {
        let mut troubles = self.memory().troubles.clone();
        troubles.extend(self.hypervisor.trouble());
        troubles.extend(self.meter.troubles());
        troubles
    }
}

fn link_exists(name: &str) -> bool {
    nix::net::if_::if_nametoindex(name).is_ok()
}
