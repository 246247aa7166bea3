//! Decides what to change, by comparing documents with what the host has. Pure: no I/O, no clock.
//!
//! Every due object gets its steps, in order, and an outcome that holds if they succeed. Objects
//! do not wait for one another's steps: an instance whose image is not in the cache yet says so
//! and is looked at again when the image is.
//!
//! ```text
//! image      absent ──fetch──> fetching ──> cached            (contents shared, by hash)
//! instance   absent ──record──> folder ──disk──> files ──define──> off ──start──> running
//! ```

mod blueprint;
mod claims;
mod instance;
mod live;
mod ready;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;

use serde_json::json;
use stackhand_model::{FileFormat, ImageId, InstanceId, ObjectRef};
use stackhand_runtime::agent::{Observed, Outcome};
use uuid::Uuid;

use crate::desired::Wanted;
use crate::domain::Engine;
use crate::hypervisor::{DomainChange, DomainSeen};
use crate::initiator::{self, Attached, Question};
use crate::store::{Part, Record, StoreSeen};
pub(crate) use blueprint::root_target;
pub use claims::Capacity;
use claims::Claims;
pub(crate) use instance::is_ours;
pub(crate) use ready::local_path;
use stackhand_image::{CacheSeen, FetchState};

/// One change to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Begins to fetch an image in the background.
    Fetch(ImageId),
    /// Calls a fetch off.
    CallOff(ImageId),
    /// Forgets an image.
    Forget(ImageId),
    /// Removes what is left of a fetch.
    RemovePartial(ImageId),
    /// Removes cached contents that nobody uses.
    RemoveContents(String),
    /// Makes an instance's folder, or writes its record anew.
    Prepare(Box<Record>),
    /// Makes the root disk.
    MakeDisk {
        /// Contents that it lies over.
        contents: String,
        /// Their format.
        format: FileFormat,
        /// Size of the disk.
        bytes: u64,
    },
    /// Makes an empty disk.
    MakeBlank {
        /// Which.
        part: Part,
        /// Its size.
        bytes: u64,
    },
    /// Writes the config drive.
    WriteConfigDrive,
    /// Removes a disk.
    RemovePart(Part),
    /// Ends a snapshot that a crash left half done.
    EndSnapshot,
    /// Begins the console log anew, for a guest that is about to start.
    BeginLog,
    /// Changes the domain.
    Domain(DomainChange),
    /// Has this host's initiator take a volume in, or let go of it.
    Initiator(Question),
    /// Removes the folder of an instance.
    RemoveFiles(InstanceId),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fetch(id) => write!(f, "fetch image {id}"),
            Self::CallOff(id) => write!(f, "call off the fetch of image {id}"),
            Self::Forget(id) => write!(f, "forget image {id}"),
            Self::RemovePartial(id) => write!(f, "remove the unfinished fetch of image {id}"),
            Self::RemoveContents(contents) => write!(f, "remove unused contents {contents}"),
            Self::Prepare(_) => write!(f, "write the instance's record"),
            Self::MakeDisk { contents, bytes, .. } => {
                write!(f, "make a root disk of {bytes} bytes over {contents}")
            }
            Self::MakeBlank { part, bytes } => {
                write!(f, "make an empty {} of {bytes} bytes", part.name())
            }
            Self::WriteConfigDrive => write!(f, "write the config drive"),
            Self::RemovePart(part) => write!(f, "remove the {}", part.name()),
            Self::EndSnapshot => write!(f, "end the snapshot that was under way"),
            Self::BeginLog => write!(f, "begin the console log"),
            Self::Domain(change) => write!(f, "{change}"),
            Self::Initiator(question) => f.write_str(&initiator::words(question)),
            Self::RemoveFiles(id) => write!(f, "remove the files of instance {id}"),
        }
    }
}

/// How new domains are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fashion {
    /// Who executes guests' instructions.
    pub engine: Engine,
    /// Machine type.
    pub machine: String,
    /// How disks are cached.
    pub disk_cache: String,
    /// Folder of cached contents.
    pub images: PathBuf,
    /// Folder of instances.
    pub instances: PathBuf,
    /// Devices that can be plugged into each while it runs.
    pub hotplug_slots: u32,
}

/// Why an object cannot go on.
enum Stop {
    Waits(String),
    Fails(String),
}

/// Everything the planner knows of the host.
#[derive(Clone, Debug)]
pub struct Situation {
    /// How new domains are made; absent, with the reason, as long as that is not known.
    pub fashion: Result<Fashion, String>,
    /// Domains by UUID, or why nobody knows.
    pub domains: Result<BTreeMap<Uuid, DomainSeen>, String>,
    /// The image cache.
    pub cache: CacheSeen,
    /// Fetches under way, and failed ones that were not told yet.
    pub fetches: BTreeMap<ImageId, FetchState>,
    /// Instances' files.
    pub store: StoreSeen,
    /// Links of those that instances ask for that are there.
    pub links: BTreeSet<String>,
    /// Files and devices of volumes that are there.
    pub volumes: BTreeSet<PathBuf>,
    /// Volumes that instances have by this host's own initiator.
    pub attached: Attached,
    /// Guests that were asked to shut down, and whether their time is up.
    pub stopping: BTreeMap<InstanceId, bool>,
    /// Instances whose grief was told; the next attempt lets them go on.
    pub crashed: BTreeSet<InstanceId>,
    /// Devices that guests were asked to let go of, and whether it is time to ask again.
    pub detaching: BTreeMap<(InstanceId, String), bool>,
    /// How many seconds contents are kept that nobody uses, and how many bytes of them.
    pub keep_unused: (u64, u64),
    /// What the host may give to guests; absent as long as that is not known.
    pub capacity: Option<Capacity>,
    /// Instances that an action works on.
    pub busy: BTreeSet<InstanceId>,
}

/// What to do, and how each due object comes out if it succeeds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Changes by object, each list in order.
    pub steps: BTreeMap<ObjectRef, Vec<Step>>,
    /// Clean-up that belongs to no object.
    pub cleanup: Vec<Step>,
    /// Outcomes of due objects.
    pub outcomes: BTreeMap<ObjectRef, Outcome>,
    /// Taps that instances wait for.
    pub awaited: BTreeSet<String>,
}

impl Plan {
    /// Compares what is wanted with what is there. Objects that are not `due` stay as they are.
    #[must_use]
    pub fn new(wanted: &Wanted, situation: &Situation, due: &BTreeSet<ObjectRef>) -> Self {
        let mut plan = Self::default();
        for &id in wanted.images.keys().filter(|id| due.contains(&id.object())) {
            let mut steps = Vec::new();
            let outcome = image(wanted, situation, id, &mut steps);
            plan.add(id.object(), steps, outcome);
        }
        let mut claims = Claims::new(wanted, situation);
        for (&id, wish) in &wanted.instances {
            if due.contains(&id.object()) {
                let mut steps = Vec::new();
                let outcome = instance::plan(wanted, situation, id, wish, &mut steps, &mut claims);
                plan.add(id.object(), steps, outcome);
            }
        }
        plan.awaited = claims.awaited;
        plan.clean_up(wanted, situation);
        plan
    }

    fn add(&mut self, object: ObjectRef, steps: Vec<Step>, outcome: Outcome) {
        if !steps.is_empty() {
            self.steps.insert(object, steps);
        }
        self.outcomes.insert(object, outcome);
    }

    fn clean_up(&mut self, wanted: &Wanted, situation: &Situation) {
        for &id in &situation.store.deleted {
            self.cleanup.push(Step::RemoveFiles(id));
        }
        for &id in &situation.cache.partials {
            // One that is still wanted is taken up by its next fetch.
            let wanted = wanted.images.get(&id).is_some_and(|wish| !wish.deleting);
            if !wanted && !running(situation, id) {
                self.cleanup.push(Step::RemovePartial(id));
            }
        }
        // A fetch has contents before it has a record; what is written now may need any.
        let quiet = situation.fetches.values().all(|fetch| fetch.failure.is_some());
        let preparing = self.steps.values().flatten().any(|step| matches!(step, Step::Prepare(_)));
        if quiet && !preparing {
            let mut used: BTreeSet<&str> =
                situation.cache.images.values().map(|image| image.contents.as_str()).collect();
            for folder in situation.store.folders.values() {
                used.extend(folder.record.iter().flat_map(Record::contents));
            }
            self.cleanup.extend(too_much(situation, &used).into_iter().map(Step::RemoveContents));
        }
    }
}

/// Contents that nobody uses and that are too old to be kept, or too many: the oldest go first.
fn too_much(situation: &Situation, used: &BTreeSet<&str>) -> Vec<String> {
    let (most_seconds, mut room) = situation.keep_unused;
    let unused = situation.cache.contents.iter().filter(|name| !used.contains(name.as_str()));
    let age = |name: &String| situation.cache.ages.get(name).copied().unwrap_or((0, u64::MAX));
    let mut unused: Vec<(u64, u64, &String)> =
        unused.map(|name| (age(name).1, age(name).0, name)).collect();
    unused.sort_unstable();
    let mut doomed = Vec::new();
    for (seconds, bytes, name) in unused {
        if seconds >= most_seconds || bytes > room {
            doomed.push(name.clone());
        } else {
            room -= bytes;
        }
    }
    doomed
}

fn running(situation: &Situation, id: ImageId) -> bool {
    situation.fetches.get(&id).is_some_and(|fetch| fetch.failure.is_none())
}

fn image(wanted: &Wanted, situation: &Situation, id: ImageId, steps: &mut Vec<Step>) -> Outcome {
    let Some(wish) = wanted.images.get(&id) else { return Outcome::Gone };
    let fetch = situation.fetches.get(&id);
    let cached = situation.cache.images.get(&id);
    if wish.deleting {
        if running(situation, id) {
            steps.push(Step::CallOff(id));
            return pending("waits for its fetch to end");
        }
        if cached.is_some() {
            steps.push(Step::Forget(id));
        }
        return Outcome::Gone;
    }
    if let Some(cached) = cached.filter(|cached| cached.is_of(&wish.spec)) {
        return Outcome::Active {
            observed: json!({
                "contents": format!("sha256:{}", cached.contents),
                "bytes": cached.bytes,
                "virtual_bytes": cached.virtual_bytes,
            })
            .into(),
        };
    }
    match fetch {
        Some(FetchState { failure: Some(failure), .. }) => Outcome::failed(failure.clone()),
        Some(fetch) => Outcome::Pending {
            reason: progress(fetch),
            observed: json!({"progress_percent": fetch.percent}).into(),
        },
        None => {
            steps.push(Step::Fetch(id));
            pending("fetching has begun")
        }
    }
}

/// How far a fetch is, in words.
fn progress(fetch: &FetchState) -> String {
    if fetch.converting {
        format!("fetched, being converted, {} % done", fetch.percent)
    } else {
        format!("fetching, {} % done", fetch.percent)
    }
}

/// Domains with our mark for which there is no document. They are told and left running.
#[must_use]
pub fn orphans<'a>(wanted: &Wanted, situation: &'a Situation) -> Vec<&'a DomainSeen> {
    let known = |id: Uuid| wanted.instances.contains_key(&InstanceId(id));
    let domains = situation.domains.as_ref().map(BTreeMap::values);
    domains
        .into_iter()
        .flatten()
        .filter(|domain| {
            let mark = domain.mark.as_ref().or(domain.running_mark.as_ref());
            mark.is_some_and(|mark| !known(mark.id))
        })
        .collect()
}

fn pending(reason: impl Into<String>) -> Outcome {
    Outcome::Pending { reason: reason.into(), observed: Observed::default() }
}
