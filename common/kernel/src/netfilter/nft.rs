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
const GET_CHAIN: u16 = 4;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const NEW_SET: u16 = 9;
const GET_SET: u16 = 10;
const NEW_ELEMENT: u16 = 12;
const GET_ELEMENT: u16 = 13;
const DELETE_ELEMENT: u16 = 14;

/// The first attribute of every message: the table's name.
const TABLE: u16 = 1;
const SET_NAME: u16 = 2;
const SET_ID: u16 = 10;
const RULE_CHAIN: u16 = 2;
const CHAIN_NAME: u16 = 3;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS: u16 = 3;
const LIST_ITEM: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;

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
    /// The key.
    pub key: Vec<u8>,
    /// What a map leads it to.
    pub data: Option<Vec<u8>>,
}

impl Element {
    /// An element of a set.
    #[must_use]
    pub fn new(key: impl Into<Vec<u8>>) -> Self {
        Self { key: key.into(), data: None }
    }

    /// An element of a map.
    #[must_use]
    pub fn pair(key: impl Into<Vec<u8>>, data: impl Into<Vec<u8>>) -> Self {
        Self { key: key.into(), data: Some(data.into()) }
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

    async fn list<T>(
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

fn message(kind: u16) -> u16 {
    SUBSYSTEM_NFTABLES << 8 | kind
}

fn parse(item: &[u8]) -> Option<Element> {
    let value = |kind| attribute::find(attribute::find(item, kind)?, DATA_VALUE);
    let key = value(ELEMENT_KEY)?.to_vec();
    Some(Element { key, data: value(ELEMENT_DATA).map(<[u8]>::to_vec) })
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
        let item = Attributes::default().nested(ELEMENT_KEY, &value(&element.key));
        let item = match &element.data {
            Some(data) if with_data => item.nested(ELEMENT_DATA, &value(data)),
            _ => item,
        };
        list.nested(LIST_ITEM, &item)
    });
    debug_assert!(list.len() < usize::from(u16::MAX), "too many elements for one message");
    named.text(ELEMENTS_SET, set).nested(ELEMENTS, &list)
}
