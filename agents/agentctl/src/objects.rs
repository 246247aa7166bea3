//! Objects as agents hold them: one row per object, whoever holds copies of its document.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use stackhand_model::{
    Connection, Document, Kind, ObjectRef, Secret, Spec, State, id_from_name, nearest,
};
use stackhand_runtime::api::Entry;
use uuid::Uuid;

use crate::exit::{Usage, chain};
use crate::fleet::{Filter, Fleet, Member, ask_all};
use crate::manifest::held::{Held, Place, Seat};
use crate::manifest::hosts::host_of;
use crate::table::{Cell, Table, Tone};

mod columns;

/// Stands for what is not shown.
const HIDDEN: &str = "<secret>";

/// One object.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct ObjectRow {
    pub(crate) kind: Kind,
    pub(crate) id: Uuid,
    pub(crate) name: String,
    /// The worst state that any holder tells.
    pub(crate) state: State,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
    /// The newest document.
    pub(crate) document: Document,
    /// Who holds it.
    pub(crate) held_by: Vec<Holding>,
}

/// One agent's copy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Holding {
    pub(crate) host: String,
    pub(crate) state: State,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
    /// The generation that the state is about.
    pub(crate) generation: u64,
    pub(crate) accepted: Timestamp,
    pub(crate) request_id: String,
    #[serde(skip_serializing_if = "Value::is_null")]
    pub(crate) observed: Value,
}

/// What was gathered, and from whom not.
#[derive(Debug)]
pub(crate) struct Gathered {
    pub(crate) held: Held,
    pub(crate) members: Vec<Member>,
    /// Agents that did not answer, with the reason.
    pub(crate) silent: Vec<String>,
}

/// Asks all agents that a filter admits for what they hold.
///
/// # Errors
///
/// Nobody is there to ask.
pub(crate) async fn gather(
    fleet: &Fleet,
    filter: &Filter,
    kinds: impl Fn(&Member) -> Option<Option<Kind>>,
) -> Result<Gathered> {
    let (living, down) = fleet.living(filter).await?;
    let mut gathered = Gathered { held: Held::default(), members: living, silent: Vec::new() };
    for member in &down {
        let reason = member.row.reasons.join("; ");
        gathered.silent.push(format!("{} is down: {reason}", member.label()));
        let place = Place::new(member.row.agent, &member.row.host);
        let holds = known_objects(member);
        let zone = member.row.zone.clone();
        let seat = Seat { alive: false, enabled: false, zone, reason, holds };
        gathered.held.seats.insert(place, seat);
    }
    let asked: Vec<Member> =
        gathered.members.iter().filter(|member| kinds(member).is_some()).cloned().collect();
    let kind_of: BTreeMap<Uuid, Option<Kind>> =
        asked.iter().filter_map(|it| kinds(it).map(|kind| (it.row.id, kind))).collect();
    let ask = |member: Member| {
        let kind = kind_of.get(&member.row.id).copied().flatten();
        async move { member.client.get(kind, None).await }
    };
    for (member, answer) in ask_all(&asked, ask).await {
        let place = Place::new(member.row.agent, &member.row.host);
        let reason = member.row.reasons.join("; ");
        let holds = known_objects(&member);
        let (enabled, zone) = (member.row.enabled, member.row.zone.clone());
        let mut seat = Seat { alive: true, enabled, zone, reason, holds };
        match answer {
            Ok(entries) => gathered.held.add(place.clone(), entries),
            Err(error) => {
                seat.alive = false;
                seat.reason = chain(&error.into());
                gathered.silent.push(format!("{}: {}", member.label(), seat.reason));
            }
        }
        gathered.held.seats.insert(place, seat);
    }
    Ok(gathered)
}

/// How many objects of each kind an agent holds, where its last word tells. The last report of
/// one that was killed does not: it may have accepted documents since.
fn known_objects(member: &Member) -> Option<BTreeMap<Kind, u64>> {
    let objects = member.row.objects.as_ref().filter(|_| member.row.stopped)?;
    Some(objects.iter().map(|(kind, states)| (*kind, states.values().sum())).collect())
}

/// Asks for everything that agents hold.
pub(crate) async fn gather_all(fleet: &Fleet, filter: &Filter) -> Result<Gathered> {
    gather(fleet, filter, |_| Some(None)).await
}

/// One row per object, in the order of application and then by name.
pub(crate) fn rows(held: &Held) -> Vec<ObjectRow> {
    let mut by_object: BTreeMap<ObjectRef, Vec<(&Place, &Entry)>> = BTreeMap::new();
    for (place, entries) in &held.entries {
        for (object, entry) in entries {
            by_object.entry(*object).or_default().push((place, entry));
        }
    }
    let mut rows: Vec<ObjectRow> = by_object
        .into_values()
        .filter_map(|entries| {
            let newest =
                entries.iter().map(|(_, it)| &it.document).max_by_key(|it| it.generation)?;
            let worst = entries.iter().max_by_key(|(_, entry)| badness(entry.status.state))?;
            Some(ObjectRow {
                kind: newest.kind(),
                id: newest.id,
                name: newest.name.to_string(),
                state: worst.1.status.state,
                reason: worst.1.status.reason.clone(),
                document: without_secrets(newest),
                held_by: entries.iter().map(|(place, entry)| Holding::of(place, entry)).collect(),
            })
        })
        .collect();
    rows.sort_by(|a, b| (a.kind, &a.name, a.id).cmp(&(b.kind, &b.name, b.id)));
    rows
}

/// A document as it may be shown: how volumes are reached is a secret in part.
fn without_secrets(document: &Document) -> Document {
    let mut document = document.clone();
    if let Spec::Instance(instance) = &mut document.spec {
        for volume in &mut instance.volumes {
            if let Connection::Iscsi { password: Some(password), .. } = &mut volume.connection {
                *password = Secret(HIDDEN.to_owned());
            }
        }
    }
    document
}

fn hide_passwords(mut value: Value) -> Value {
    match &mut value {
        Value::Object(fields) => {
            for (key, field) in fields.iter_mut() {
                *field = match key.as_str() {
                    "password" => HIDDEN.into(),
                    _ => hide_passwords(field.take()),
                };
            }
        }
        Value::Array(items) => {
            for item in items {
                *item = hide_passwords(item.take());
            }
        }
        _ => {}
    }
    value
}

fn badness(state: State) -> u8 {
    match state {
        State::Active => 0,
        State::Pending => 1,
        State::Deleting => 2,
        State::Error => 3,
    }
}

impl Holding {
    fn of(place: &Place, entry: &Entry) -> Self {
        Self {
            host: place.host.clone(),
            state: entry.status.state,
            reason: entry.status.reason.clone(),
            generation: entry.status.generation,
            accepted: entry.accepted,
            request_id: entry.request_id.clone(),
            observed: hide_passwords(entry.status.observed.clone()),
        }
    }
}

impl ObjectRow {
    /// The holder on whose host the object is, else the first.
    pub(crate) fn home(&self) -> Option<&Holding> {
        let home = host_of(&self.document);
        self.held_by
            .iter()
            .find(|holding| Some(&*holding.host) == home)
            .or_else(|| self.held_by.first())
    }

    fn state_cell(&self) -> Cell {
        let tone = match self.state {
            State::Active => Tone::Good,
            State::Pending | State::Deleting => Tone::Warning,
            State::Error => Tone::Bad,
        };
        Cell::toned(self.state.as_str(), tone)
    }
}

/// Finds an object by name or id among those held.
///
/// # Errors
///
/// None is there, with the nearest name; several share the name.
pub(crate) fn find<'a>(
    rows: &'a [ObjectRow],
    kind: Kind,
    name: &str,
    cloud: &str,
) -> Result<&'a ObjectRow> {
    let mut of_kind = rows.iter().filter(|row| row.kind == kind);
    // An id, or the id that the name stands for, is never ambiguous.
    let id = name.parse::<Uuid>().unwrap_or_else(|_| id_from_name(cloud, kind, name));
    if let Some(row) = of_kind.clone().find(|row| row.id == id) {
        return Ok(row);
    }
    let fitting = |row: &&ObjectRow| {
        row.name == name || (name.len() >= 8 && row.id.to_string().starts_with(name))
    };
    let found: Vec<&ObjectRow> = of_kind.clone().filter(fitting).collect();
    match found[..] {
        [row] => Ok(row),
        [] => {
            let hint = nearest(name, of_kind.by_ref().map(|row| &*row.name))
                .map(|near| format!("; did you mean {near:?}?"))
                .unwrap_or_default();
            bail!("no agent holds a {kind} {name:?}{hint}")
        }
        _ => {
            let ids: Vec<String> = found.iter().map(|row| row.id.to_string()).collect();
            bail!(Usage::new(format!(
                "{} {kind}s are called {name:?}; name one by its id: {}",
                found.len(),
                ids.join(", ")
            )))
        }
    }
}

/// Reads `KIND/NAME` or `KIND/ID`.
///
/// # Errors
///
/// No slash, or an unknown kind with the nearest one.
pub(crate) fn parse_ref(text: &str) -> Result<(Kind, String), String> {
    let (kind, name) =
        text.split_once('/').ok_or_else(|| format!("{text:?} is not of the form KIND/NAME"))?;
    let kind = kind.parse::<Kind>().map_err(|error| error.to_string())?;
    if name.is_empty() {
        return Err(format!("{text:?} names no object"));
    }
    Ok((kind, name.to_owned()))
}

/// Fills the table of `agentctl get`: columns by kind when there is only one.
pub(crate) fn table(rows: &[ObjectRow], names: &BTreeMap<ObjectRef, String>, out: &mut Table) {
    let kinds: BTreeSet<Kind> = rows.iter().map(|row| row.kind).collect();
    let only = (kinds.len() == 1).then(|| kinds.first().copied()).flatten();
    let mut headers = vec!["NAME", "ID"];
    match only {
        Some(kind) => headers.extend(columns::headers(kind)),
        None => headers.insert(0, "KIND"),
    }
    headers.extend(["STATE", "HOSTS", "+GENERATION", "+ACCEPTED", "REASON"]);
    out.headers(&headers);
    for row in rows {
        let mut cells = vec![Cell::from(row.name.as_str()), Cell::from(row.id.to_string())];
        match only {
            Some(_) => cells.extend(columns::cells(row, names).into_iter().map(Cell::from)),
            None => cells.insert(0, Cell::from(row.kind.as_str())),
        }
        let hosts: Vec<&str> = row.held_by.iter().map(|it| &*it.host).collect();
        let accepted = row.home().map(|it| it.accepted.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
        cells.extend([
            row.state_cell(),
            Cell::from(few(&hosts)),
            Cell::from(row.document.generation.to_string()),
            Cell::from(accepted.unwrap_or_default()),
            Cell::from(row.reason.as_deref().unwrap_or_default()),
        ]);
        out.row(cells);
    }
}

/// The names of all objects, for showing references.
pub(crate) fn names(rows: &[ObjectRow]) -> BTreeMap<ObjectRef, String> {
    rows.iter().map(|row| (row.document.object(), row.name.clone())).collect()
}

/// The first three, and how many more.
fn few(items: &[&str]) -> String {
    match items {
        [a, b, c, _, rest @ ..] => format!("{a},{b},{c} and {} more", rest.len() + 1),
        _ => items.join(","),
    }
}

/// What a spec is, for those who only have the row.
pub(crate) fn spec(row: &ObjectRow) -> &Spec {
    &row.document.spec
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn passwords_are_not_shown_wherever_they_are() {
        let observed = json!({"connection": {"type": "iscsi", "password": "p", "lun": 1}});
        let shown = json!({"connection": {"type": "iscsi", "password": HIDDEN, "lun": 1}});
        assert_eq!(hide_passwords(observed), shown);
        assert_eq!(hide_passwords(json!([{"password": "p"}, 7])), json!([{"password": HIDDEN}, 7]));
        let connection = json!({
            "type": "iscsi", "portal": "192.0.2.1:3260", "iqn": "iqn.2026-11.org.x:v", "lun": 1,
            "username": "u", "password": "p",
        });
        let document = json!({
            "kind": "Instance", "id": Uuid::nil(), "name": "i",
            "spec": {
                "host": "n", "vcpus": 1, "memory_mib": 64,
                "volumes": [{"volume": Uuid::nil(), "boot": true, "connection": connection}],
            },
        });
        let shown = without_secrets(&Document::from_value(&document).unwrap()).to_value();
        assert_eq!(shown["spec"]["volumes"][0]["connection"]["password"], HIDDEN);
    }
}
