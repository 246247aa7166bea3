//! Tables of nftables: how they are built, what their sets hold, and changes in one transaction.
//!
//! Rules are not written here but by `nft`, which knows how. What `nft` loaded once can be read back
//! as a [`Structure`], compared with that of another namespace, and built there again.

use std::collections::BTreeMap;

use super::attribute::{self, Attributes};
use super::{Answer, NLM_F_REQUEST, Netfilter, Request, SUBSYSTEM_NFTABLES, refused};
use crate::KernelError;

/// Elements in one message, whose length has 16 bits.
const MOST_ELEMENTS: usize = 400;

const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;

const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
pub(super) const GET_CHAIN: u16 = 4;
const NEW_RULE: u16 = 6;
pub(super) const GET_RULE: u16 = 7;
const NEW_SET: u16 = 9;
pub(super) const GET_SET: u16 = 10;
const NEW_ELEMENT: u16 = 12;
const GET_ELEMENT: u16 = 13;
const DELETE_ELEMENT: u16 = 14;

/// The first attribute of every message: the table's name.
pub(super) const TABLE: u16 = 1;
pub(super) const SET_NAME: u16 = 2;
const SET_ID: u16 = 10;
pub(super) const RULE_CHAIN: u16 = 2;
pub(super) const CHAIN_NAME: u16 = 3;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS: u16 = 3;
const LIST_ITEM: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const ELEMENT_FLAGS: u16 = 3;
const ELEMENT_END: u16 = 10;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
/// The flag of an element that is the first key behind a range.
const CLOSES: u32 = 1;
/// The kernel's number of the verdict that jumps.
const JUMP: i32 = -3;

/// What makes a set: name, flags, types and lengths, policy, description, timeouts, and what `nft`
/// keeps for printing. Not its number or how many elements it has.
const SET_KEPT: [u16; 12] = [2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 17];
/// What makes a chain: name, hook, policy, type, flags, comment.
const CHAIN_KEPT: [u16; 5] = [3, 4, 5, 7, 10];
/// What makes a rule: chain, expressions, comment.
const RULE_KEPT: [u16; 3] = [2, 4, 7];

/// A family of nftables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet = 1,
    /// IPv4.
    Ipv4 = 2,
    /// Frames on bridges.
    Bridge = 7,
    /// IPv6.
    Ipv6 = 10,
}

/// A table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Table {
    /// Its family.
    pub family: Family,
    /// Its name.
    pub name: String,
}

/// An element of a set or map, in the bytes that rules compare: network order, each field of a
/// concatenation padded to four bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Element {
    /// The key; the first one of a range.
    pub key: Vec<u8>,
    /// The last key of a range, for sets of concatenations.
    pub end: Option<Vec<u8>>,
    /// The first key behind a range, for sets of plain ranges.
    pub closes: bool,
    /// What a map leads it to.
    pub data: Option<Data>,
}

/// What a map leads to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Data {
    /// A value, in the bytes that rules use.
    Value(Vec<u8>),
    /// A verdict, in verdict maps.
    Verdict(Judgement),
}

/// A verdict.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Judgement {
    /// The packet passes this hook.
    Accept,
    /// The packet is dropped.
    Drop,
    /// The chain judges; what it does not judge goes on.
    Jump(String),
    /// Any other, by the kernel's number.
    Other(i32),
}

impl Element {
    /// An element of a set.
    #[must_use]
    pub fn new(key: impl Into<Vec<u8>>) -> Self {
        Self { key: key.into(), end: None, closes: false, data: None }
    }

    /// An element of a map.
    #[must_use]
    pub fn pair(key: impl Into<Vec<u8>>, data: impl Into<Vec<u8>>) -> Self {
        Self { data: Some(Data::Value(data.into())), ..Self::new(key) }
    }

    /// What a map leads it to, if that is a value.
    #[must_use]
    pub fn value(&self) -> Option<&[u8]> {
        match &self.data {
            Some(Data::Value(value)) => Some(value),
            _ => None,
        }
    }

    /// An element of a verdict map.
    #[must_use]
    pub fn verdict(key: impl Into<Vec<u8>>, judgement: Judgement) -> Self {
        Self { data: Some(Data::Verdict(judgement)), ..Self::new(key) }
    }
}

impl Judgement {
    /// As the kernel numbers them.
    fn code(&self) -> i32 {
        match self {
            Self::Drop => 0,
            Self::Accept => 1,
            Self::Jump(_) => JUMP,
            Self::Other(code) => *code,
        }
    }
}

/// What a table is made of besides elements. Equal structures do the same. Sets without a name,
/// as `tcp dport { 22, 80 }` makes them, are not carried over: name them in what is built again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Structure {
    sets: BTreeMap<String, Vec<u8>>,
    chains: BTreeMap<String, Vec<u8>>,
    /// By chain, in order.
    rules: BTreeMap<String, Vec<Vec<u8>>>,
}

/// One change of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NftChange {
    /// Deletes the table, which must be there, with all that is in it.
    DeleteTable,
    /// Makes the table, which must not be there.
    Build(Structure),
    /// Adds elements. Equal ones that are there already are fine.
    Add {
        /// The set or map.
        set: String,
        /// The elements.
        elements: Vec<Element>,
    },
    /// Removes elements, which must be there.
    Remove {
        /// The set or map.
        set: String,
        /// The elements.
        elements: Vec<Element>,
    },
}

impl Netfilter {
    /// What `table` is made of; `None` if there is no chain and no set of it.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn structure(&self, table: &Table) -> Result<Option<Structure>, KernelError> {
        let mut structure = Structure::default();
        let named = |answer: &Answer<'_>, name: u16, kept: &[u16]| {
            let of_table = attribute::text(answer.attributes, TABLE)? == table.name;
            let name = attribute::text(answer.attributes, name).filter(|_| of_table)?;
            Some((name.to_owned(), attribute::keep(answer.attributes, kept)))
        };
        structure.chains.extend(
            self.list(table, GET_CHAIN, "chains", |it| named(it, CHAIN_NAME, &CHAIN_KEPT)).await?,
        );
        structure
            .sets
            .extend(self.list(table, GET_SET, "sets", |it| named(it, SET_NAME, &SET_KEPT)).await?);
        if structure == Structure::default() {
            return Ok(None);
        }
        let rules = self.list(table, GET_RULE, "rules", |it| named(it, RULE_CHAIN, &RULE_KEPT));
        for (chain, rule) in rules.await? {
            structure.rules.entry(chain).or_default().push(rule);
        }
        Ok(Some(structure))
    }

    /// The elements of a set or map, in order.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal, for instance if there is no such set.
    pub async fn elements(&self, table: &Table, set: &str) -> Result<Vec<Element>, KernelError> {
        let query = Attributes::default().text(TABLE, &table.name).text(ELEMENTS_SET, set);
        let mut elements: Vec<Element> = self
            .dump(message(GET_ELEMENT), table.family as u8, &query.into_bytes(), |answer| {
                let list = attribute::find(answer.attributes, ELEMENTS)?;
                Some(attribute::read(list).filter_map(|(_, item)| parse(item)).collect::<Vec<_>>())
            })
            .await
            .map_err(|source| refused("list elements", format!("set {set}"), source))?
            .into_iter()
            .flatten()
            .collect();
        elements.sort_unstable();
        Ok(elements)
    }

    /// Makes changes of one table, all or none.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal; then nothing was changed.
    pub async fn commit(&self, table: &Table, changes: &[NftChange]) -> Result<(), KernelError> {
        let mut requests = Vec::new();
        for change in changes {
            describe(table, change, &mut requests);
        }
        self.transaction(requests)
            .await
            .map_err(|source| refused("change", format!("table {}", table.name), source))
    }

    pub(super) async fn list<T>(
        &self,
        table: &Table,
        kind: u16,
        what: &'static str,
        take: impl FnMut(&Answer<'_>) -> Option<T>,
    ) -> Result<Vec<T>, KernelError> {
        let query = Attributes::default().text(TABLE, &table.name).into_bytes();
        match self.dump(message(kind), table.family as u8, &query, take).await {
            // There is no such table.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => Ok(Vec::new()),
            result => result.map_err(|source| refused("list", what, source)),
        }
    }
}

pub(super) fn message(kind: u16) -> u16 {
    SUBSYSTEM_NFTABLES << 8 | kind
}

fn parse(item: &[u8]) -> Option<Element> {
    let value = |kind| attribute::find(attribute::find(item, kind)?, DATA_VALUE);
    let flags = attribute::number(item, ELEMENT_FLAGS).unwrap_or(0);
    Some(Element {
        // A set that holds everything has an element without a key: none of what is written here.
        key: value(ELEMENT_KEY)?.to_vec(),
        end: value(ELEMENT_END).map(<[u8]>::to_vec),
        closes: flags & CLOSES != 0,
        data: attribute::find(item, ELEMENT_DATA).and_then(parse_data),
    })
}

fn parse_data(data: &[u8]) -> Option<Data> {
    if let Some(value) = attribute::find(data, DATA_VALUE) {
        return Some(Data::Value(value.to_vec()));
    }
    let verdict = attribute::find(data, DATA_VERDICT)?;
    let code = attribute::number(verdict, VERDICT_CODE)?.cast_signed();
    Some(Data::Verdict(match (code, attribute::text(verdict, VERDICT_CHAIN)) {
        (0, _) => Judgement::Drop,
        (1, _) => Judgement::Accept,
        (JUMP, Some(chain)) => Judgement::Jump(chain.to_owned()),
        (other, _) => Judgement::Other(other),
    }))
}

fn describe(table: &Table, change: &NftChange, requests: &mut Vec<Request>) {
    let named = || Attributes::default().text(TABLE, &table.name);
    let mut ask = |kind, flags, attributes: Attributes| {
        requests.push(Request {
            kind: message(kind),
            flags: NLM_F_REQUEST | flags,
            family: table.family as u8,
            resource: 0,
            attributes: attributes.into_bytes(),
        });
    };
    match change {
        NftChange::DeleteTable => ask(DELETE_TABLE, 0, named()),
        NftChange::Build(structure) => {
            ask(NEW_TABLE, NLM_F_CREATE, named());
            for (number, set) in (1..).zip(structure.sets.values()) {
                ask(NEW_SET, NLM_F_CREATE, named().number(SET_ID, number).written(set));
            }
            for chain in structure.chains.values() {
                ask(NEW_CHAIN, NLM_F_CREATE, named().written(chain));
            }
            for rule in structure.rules.values().flatten() {
                ask(NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, named().written(rule));
            }
        }
        NftChange::Add { set, elements } => {
            for some in elements.chunks(MOST_ELEMENTS) {
                ask(NEW_ELEMENT, NLM_F_CREATE, elements_of(named(), set, some, true));
            }
        }
        NftChange::Remove { set, elements } => {
            for some in elements.chunks(MOST_ELEMENTS) {
                ask(DELETE_ELEMENT, 0, elements_of(named(), set, some, false));
            }
        }
    }
}

fn elements_of(named: Attributes, set: &str, elements: &[Element], with_data: bool) -> Attributes {
    let value = |bytes: &[u8]| Attributes::default().bytes(DATA_VALUE, bytes);
    let list = elements.iter().fold(Attributes::default(), |list, element| {
        let mut item = Attributes::default().nested(ELEMENT_KEY, &value(&element.key));
        if let Some(end) = &element.end {
            item = item.nested(ELEMENT_END, &value(end));
        }
        if element.closes {
            item = item.number(ELEMENT_FLAGS, CLOSES);
        }
        item = match &element.data {
            Some(Data::Value(data)) if with_data => item.nested(ELEMENT_DATA, &value(data)),
            Some(Data::Verdict(judgement)) if with_data => {
                let code = judgement.code().cast_unsigned();
                let mut verdict = Attributes::default().number(VERDICT_CODE, code);
                if let Judgement::Jump(chain) = judgement {
                    verdict = verdict.text(VERDICT_CHAIN, chain);
                }
                let data = Attributes::default().nested(DATA_VERDICT, &verdict);
                item.nested(ELEMENT_DATA, &data)
            }
            _ => item,
        };
        list.nested(LIST_ITEM, &item)
    });
    debug_assert!(list.len() < usize::from(u16::MAX), "too many elements for one message");
    named.text(ELEMENTS_SET, set).nested(ELEMENTS, &list)
}
