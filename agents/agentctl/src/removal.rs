//! Carrying deletions out: instances before their volumes, everything else after them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use stackhand_model::{Kind, ObjectRef, Spec};
use stackhand_runtime::api::Condition;

use crate::apply::client;
use crate::console::Console;
use crate::exit::NotWell;
use crate::manifest::held::{Held, Place};
use crate::objects::Gathered;
use crate::progress::{Target, watch};

/// Objects that go, by name.
pub(crate) type Wanted = BTreeMap<ObjectRef, String>;

/// Deletes objects wherever they are held. With `wait` it waits until the last is gone. Returns
/// whether all that was waited for went in time.
///
/// # Errors
///
/// An agent refuses or is away; instances are not gone in time, so that their volumes must stay.
pub(crate) async fn remove(
    gathered: &Gathered,
    wanted: &Wanted,
    limit: Duration,
    wait: bool,
    console: &mut Console,
) -> Result<bool> {
    let mut in_time = true;
    for stage in stages(wanted, &gathered.held) {
        let targets = ask(gathered, &stage.objects, wanted).await?;
        if stage.is_last && !wait {
            continue;
        }
        let outcome = watch(&gathered.members, targets, Condition::Gone, limit, console).await?;
        in_time &= outcome.late.is_empty();
        if !in_time && !stage.is_last {
            bail!(NotWell(
                "instances are not gone, so their volumes stay; do it again to go on".to_owned()
            ));
        }
    }
    Ok(in_time)
}

/// Takes copies of documents from agents that no longer need them.
///
/// # Errors
///
/// An agent refuses or is away.
pub(crate) async fn drop_copies(
    gathered: &Gathered,
    copies: BTreeMap<Place, Vec<ObjectRef>>,
) -> Result<()> {
    for (place, objects) in copies {
        client(&gathered.members, &place)?
            .delete(&objects)
            .await
            .with_context(|| format!("cannot take copies from {place}"))?;
    }
    Ok(())
}

struct Stage {
    objects: Vec<ObjectRef>,
    is_last: bool,
}

/// Instances that use volumes come first and alone, because a volume in use must not be taken
/// away; then everything else.
fn stages(wanted: &Wanted, held: &Held) -> Vec<Stage> {
    let storage = wanted.keys().any(|object| {
        matches!(object.kind, Kind::Attachment | Kind::Volume) && !held.holders(*object).is_empty()
    });
    let uses_volumes = |object: &ObjectRef| {
        held.newest(*object).is_some_and(
            |it| matches!(&it.spec, Spec::Instance(instance) if !instance.volumes.is_empty()),
        )
    };
    let reverse = || wanted.keys().rev().copied();
    let first: Vec<ObjectRef> = reverse().filter(|it| storage && uses_volumes(it)).collect();
    let done: BTreeSet<ObjectRef> = first.iter().copied().collect();
    let rest: Vec<ObjectRef> = reverse().filter(|it| !done.contains(it)).collect();
    let mut stages = Vec::new();
    if !first.is_empty() {
        stages.push(Stage { objects: first, is_last: rest.is_empty() });
    }
    if !rest.is_empty() {
        stages.push(Stage { objects: rest, is_last: true });
    }
    stages
}

/// Asks every holder to delete. Returns what to wait for.
async fn ask(gathered: &Gathered, objects: &[ObjectRef], names: &Wanted) -> Result<Vec<Target>> {
    let mut batches: BTreeMap<Place, Vec<ObjectRef>> = BTreeMap::new();
    for object in objects {
        for place in gathered.held.holders(*object) {
            batches.entry(place.clone()).or_default().push(*object);
        }
    }
    let mut targets = Vec::new();
    for (place, objects) in batches {
        client(&gathered.members, &place)?
            .delete(&objects)
            .await
            .with_context(|| format!("cannot delete at {place}"))?;
        targets.extend(objects.into_iter().map(|object| Target {
            place: place.clone(),
            object,
            name: names.get(&object).cloned().unwrap_or_default(),
        }));
    }
    Ok(targets)
}
