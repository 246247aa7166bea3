//! What the agent tells of its backends and exports.

use serde_json::{Value, json};

use crate::backend::{Item, Place};
use crate::config::BackendKind;
use crate::desired::Wanted;
use crate::plan::{Budget, Situation, View, orphans};

/// Why the agent is not well.
pub(super) fn troubles(wanted: &Wanted, situation: &Situation) -> Vec<String> {
    let mut troubles = Vec::new();
    for (name, view) in &situation.backends {
        let observed = match &view.observed {
            Ok(observed) => observed,
            Err(reason) => {
                troubles.push(format!("storage backend {name} is away: {reason}"));
                continue;
            }
        };
        troubles.extend(observed.troubles.iter().map(|it| format!("storage backend {name}: {it}")));
        if let Some(reason) = view.limits.warns(observed.fill) {
            troubles.push(format!("storage backend {name}: {reason}"));
        }
        let budget = Budget::new(observed, &view.limits);
        if budget.claims > budget.limit {
            troubles.push(format!(
                "storage backend {name} has promised {} bytes and can keep {}: free space",
                budget.claims, budget.limit
            ));
        }
    }
    if let Some(exports) = &situation.exports {
        match &exports.observed {
            Err(reason) => troubles.push(reason.clone()),
            Ok(observed) => {
                let known = |volume| wanted.attachments.values().any(|it| it.spec.volume == volume);
                let left = observed
                    .iter()
                    .filter(|(volume, seen)| !known(**volume) && !seen.sessions.is_empty());
                troubles.extend(left.map(|(volume, seen)| {
                    format!(
                        "volume {volume} is exported to {} hosts that are logged in, and has no \
                         attachment: log them out, or apply their attachments",
                        seen.sessions.len()
                    )
                }));
            }
        }
    }
    for ((backend, name), wipe) in &situation.wipes {
        if let Some(failure) = &wipe.failure {
            troubles.push(format!("storage backend {backend} cannot wipe {name}: {failure}"));
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

/// What the host has to offer.
pub(super) fn facts(situation: &Situation, kind: impl Fn(&str) -> Option<BackendKind>) -> Value {
    let backends: serde_json::Map<String, Value> = situation
        .backends
        .iter()
        .map(|(name, view)| (name.clone(), backend(situation, name, view, kind(name))))
        .collect();
    let mut facts = json!({"backends": backends, "default_backend": situation.default_backend});
    if let Some(exports) = &situation.exports {
        facts["exports"] = match &exports.observed {
            Err(reason) => json!({"state": "down", "reason": reason}),
            Ok(observed) => json!({
                "state": "up",
                "portal": exports.portal,
                "volumes": observed.len(),
                "sessions": observed.values().map(|seen| seen.sessions.len()).sum::<usize>(),
            }),
        };
    }
    facts
}

fn backend(situation: &Situation, name: &str, view: &View, kind: Option<BackendKind>) -> Value {
    let observed = match &view.observed {
        Err(reason) => return json!({"type": kind, "state": "down", "reason": reason}),
        Ok(observed) => observed,
    };
    let budget = Budget::new(observed, &view.limits);
    let volumes = observed.items.keys().filter(|item| matches!(item, Item::Volume(_))).count();
    let stopped = view.limits.stops(observed.fill);
    let mut facts = json!({
        "type": kind,
        "state": "up",
        "place": match &observed.place {
            Place::Folder(folder) => json!(folder),
            Place::Group(group) => json!(group),
        },
        "total_bytes": observed.total_bytes,
        "free_bytes": observed.free_bytes,
        "promised_bytes": budget.claims,
        "promisable_bytes": if stopped.is_some() { 0 } else { budget.left() },
        "overcommit_percent": view.limits.overcommit_percent,
        "instant_snapshots": observed.instant.snapshots,
        "instant_clones": observed.instant.clones,
        "volumes": volumes,
        "snapshots": observed.items.len() - volumes,
    });
    if let Some(fill) = observed.fill {
        facts["data_percent"] = (f64::from(fill.data) / 100.0).into();
        facts["metadata_percent"] = (f64::from(fill.metadata) / 100.0).into();
        facts["warn_percent"] = view.limits.warn_percent.into();
        facts["stop_percent"] = view.limits.stop_percent.into();
    }
    let wiping = situation.wipes.iter().filter(|((backend, _), _)| backend == name);
    let wiping: Vec<u64> = wiping.map(|(_, wipe)| wipe.percent).collect();
    if !wiping.is_empty() {
        facts["wiping_percent"] = json!(wiping);
    }
    facts
}
