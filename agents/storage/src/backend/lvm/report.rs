//! What LVM reports of a volume group, read from its JSON.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::TAG;
use crate::backend::Fill;

/// Columns that are asked for.
pub(super) const COLUMNS: &str = "vg_uuid,vg_size,vg_free,vg_missing_pv_count,lv_name,lv_size,\
    lv_attr,lv_tags,origin,origin_size,pool_lv,data_percent,metadata_percent,lv_health_status,lv_active,\
    lv_device_open";

/// Columns of a group without volumes, of which the ones above tell nothing.
pub(super) const GROUP_COLUMNS: &str = "vg_uuid,vg_size,vg_free,vg_missing_pv_count";

/// A volume group and its volumes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) uuid: String,
    pub(super) bytes: u64,
    pub(super) free_bytes: u64,
    pub(super) missing_disks: u64,
    pub(super) volumes: Vec<Volume>,
}

/// One logical volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Volume {
    pub(super) name: String,
    /// Its size, as who opens it sees it.
    pub(super) bytes: u64,
    /// What it takes of the group; of a thick snapshot that is room for changes.
    pub(super) room: u64,
    pub(super) tags: BTreeSet<String>,
    /// First letter of the attributes: `V` thin, `t` pool, `s` snapshot, …
    pub(super) kind: char,
    /// Second letter: `r` is read-only, as snapshots are.
    pub(super) writable: bool,
    /// Fifth letter: `a` active, `I` an invalid snapshot, …
    pub(super) state: char,
    pub(super) origin: Option<String>,
    pub(super) pool: Option<String>,
    /// Of a thin volume, what it takes; of a pool or a snapshot, how full it is.
    pub(super) fill: Fill,
    /// LVM's word for what is wrong, such as `partial`. Empty: nothing.
    pub(super) health: String,
    pub(super) active: bool,
    pub(super) open: bool,
}

impl Group {
    /// Takes out a thin volume as LVM does. How full the pool is then, the next look tells.
    pub(super) fn remove_thin(&mut self, name: &str) {
        self.volumes.retain(|volume| volume.name != name);
        for volume in &mut self.volumes {
            volume.origin.take_if(|origin| origin == name);
        }
    }
}

impl Volume {
    /// A thin volume of ours as LVM tells of it when it was just made.
    pub(super) fn new_thin(name: &str, pool: &str, bytes: u64) -> Self {
        Self {
            name: name.to_owned(),
            bytes,
            room: bytes,
            tags: BTreeSet::from([TAG.to_owned()]),
            kind: 'V',
            writable: true,
            state: 'a',
            origin: None,
            pool: Some(pool.to_owned()),
            fill: Fill::default(),
            health: String::new(),
            active: true,
            open: false,
        }
    }
}

#[derive(Deserialize)]
struct Report {
    report: Vec<Section>,
}

#[derive(Deserialize)]
struct Section {
    vg: Vec<Row>,
}

/// Every value is text; what does not apply is empty.
#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Row {
    vg_uuid: String,
    vg_size: String,
    vg_free: String,
    vg_missing_pv_count: String,
    lv_name: String,
    lv_size: String,
    lv_attr: String,
    lv_tags: String,
    origin: String,
    origin_size: String,
    pool_lv: String,
    data_percent: String,
    metadata_percent: String,
    lv_health_status: String,
    lv_active: String,
    lv_device_open: String,
}

/// Reads a report about one group. `None`: it has no rows.
///
/// # Errors
///
/// Tells what is not as it should be.
pub(super) fn parse(json: &[u8]) -> Result<Option<Group>, String> {
    let report: Report = serde_json::from_slice(json)
        .map_err(|error| format!("its report is no report: {error}"))?;
    let rows: Vec<Row> = report.report.into_iter().flat_map(|section| section.vg).collect();
    let Some(first) = rows.first() else { return Ok(None) };
    let uuid = first.vg_uuid.clone();
    if rows.iter().any(|row| row.vg_uuid != uuid) {
        return Err("two volume groups have this name: name the right disks in `devices`".into());
    }
    let mut group = Group {
        bytes: number("vg_size", &first.vg_size)?,
        free_bytes: number("vg_free", &first.vg_free)?,
        missing_disks: number("vg_missing_pv_count", &first.vg_missing_pv_count)?,
        uuid,
        volumes: Vec::with_capacity(rows.len()),
    };
    for row in rows.into_iter().filter(|row| !row.lv_name.is_empty()) {
        group.volumes.push(volume(row)?);
    }
    Ok(Some(group))
}

fn volume(row: Row) -> Result<Volume, String> {
    let some = |text: String| (!text.is_empty()).then_some(text);
    let mut attributes = row.lv_attr.chars();
    let room = number("lv_size", &row.lv_size)?;
    let is_thick_snapshot = row.lv_attr.starts_with(['s', 'S']) && !row.origin_size.is_empty();
    let bytes = if is_thick_snapshot { number("origin_size", &row.origin_size)? } else { room };
    Ok(Volume {
        bytes,
        room,
        tags: row.lv_tags.split(',').filter(|tag| !tag.is_empty()).map(str::to_owned).collect(),
        kind: attributes.next().unwrap_or('-'),
        writable: attributes.next() != Some('r'),
        state: attributes.nth(2).unwrap_or('-'),
        origin: some(row.origin),
        pool: some(row.pool_lv),
        fill: Fill {
            data: hundredths("data_percent", &row.data_percent)?,
            metadata: hundredths("metadata_percent", &row.metadata_percent)?,
        },
        health: row.lv_health_status,
        active: row.lv_active == "active",
        open: row.lv_device_open == "open",
        name: row.lv_name,
    })
}

fn number(column: &str, text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("its report has {text:?} for {column}"))
}

/// `12.34` is 1234; nothing is 0.
fn hundredths(column: &str, text: &str) -> Result<u32, String> {
    let bad = || format!("its report has {text:?} for {column}");
    if text.is_empty() {
        return Ok(0);
    }
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let part = format!("{part:0<2}");
    let whole: u32 = whole.parse().map_err(|_| bad())?;
    let part: u32 = part.get(..2).and_then(|part| part.parse().ok()).ok_or_else(bad)?;
    whole.checked_mul(100).and_then(|whole| whole.checked_add(part)).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(name: &str, more: &serde_json::Value) -> serde_json::Value {
        let mut row = json!({
            "vg_uuid": "GIxMJd", "vg_size": "3217031168", "vg_free": "432013312",
            "vg_missing_pv_count": "0", "lv_name": name, "lv_size": "1073741824",
            "lv_attr": "Vwi-a-tz--", "lv_tags": "stackhand", "origin": "", "pool_lv": "pool",
            "data_percent": "12.50", "metadata_percent": "", "lv_health_status": "",
            "lv_active": "active", "lv_device_open": "",
        });
        for (key, value) in more.as_object().unwrap() {
            row[key] = value.clone();
        }
        row
    }

    fn parsed(rows: &[serde_json::Value]) -> Result<Option<Group>, String> {
        parse(json!({"report": [{"vg": rows}]}).to_string().as_bytes())
    }

    #[test]
    fn a_report_is_read_with_its_tags_and_shares() {
        let pool = row(
            "pool",
            &json!({"lv_attr": "twi-aotz--", "pool_lv": "", "lv_tags": "",
            "data_percent": "7.1", "metadata_percent": "11.13", "lv_device_open": "open"}),
        );
        let group = parsed(&[pool, row("volume-1", &json!({"lv_tags": "a,stackhand"}))]);
        let group = group.unwrap().unwrap();
        assert_eq!((group.bytes, group.free_bytes), (3_217_031_168, 432_013_312));
        assert_eq!(group.volumes[0].fill, Fill { data: 710, metadata: 1113 });
        assert!(group.volumes[0].open);
        assert_eq!(group.volumes[1].fill.data, 1250);
        assert!(group.volumes[1].tags.contains("stackhand"));
        assert_eq!((group.volumes[1].kind, group.volumes[1].state), ('V', 'a'));
        assert!(group.volumes[1].writable);
        let sizes =
            json!({"lv_attr": "sri-a-s---", "lv_size": "88080384", "origin_size": "67108864"});
        let kept = parsed(&[row("_snapshot-1", &sizes)]).unwrap().unwrap().volumes.remove(0);
        assert_eq!((kept.kind, kept.writable, kept.state), ('s', false, 'a'));
        assert_eq!((kept.bytes, kept.room), (64 << 20, 84 << 20));
    }

    #[test]
    fn an_empty_group_has_no_rows_and_two_groups_of_one_name_are_an_error() {
        assert_eq!(parsed(&[]), Ok(None));
        let other = row("volume-1", &json!({"vg_uuid": "other"}));
        let error = parsed(&[row("volume-1", &json!({})), other]).unwrap_err();
        assert!(error.contains("two volume groups"), "{error}");
    }

    #[test]
    fn nonsense_is_an_error_that_names_the_column() {
        let bad = |key: &str, value: &str| parsed(&[row("v", &json!({key: value}))]).unwrap_err();
        assert!(bad("lv_size", "1g").contains("lv_size"));
        assert!(bad("data_percent", "x.1").contains("data_percent"));
        assert!(bad("data_percent", "1.é").contains("data_percent"));
        assert!(parse(b"[]").unwrap_err().contains("no report"));
    }
}
