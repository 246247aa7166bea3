//! What a table is made of, by name: enough to see that somebody changed it.
//!
//! Rules are known by the comment that `nft` was given with them. Reading a big table takes long, so
//! the kernel's generation tells first whether anything changed at all.

use std::collections::{BTreeMap, BTreeSet};

use super::attribute::{self, Attributes};
use super::nft::{CHAIN_NAME, GET_CHAIN, GET_RULE, GET_SET, RULE_CHAIN, SET_NAME, TABLE, message};
use super::{Answer, NLM_F_ACK, NLM_F_REQUEST, Netfilter, Request, Table, refused};
use crate::KernelError;

const GET_TABLE: u16 = 1;
const GET_GENERATION: u16 = 16;

const GENERATION_ID: u16 = 1;
const TABLE_FLAGS: u16 = 2;
const DORMANT: u32 = 1;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_USER_DATA: u16 = 7;
const SET_FLAGS: u16 = 3;
const ANONYMOUS: u32 = 1;

/// A table as it is listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// Whether it is switched off.
    pub dormant: bool,
    /// Its chains.
    pub chains: BTreeMap<String, ListedChain>,
    /// Names of its sets and maps.
    pub sets: BTreeSet<String>,
}

/// A chain as it is listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListedChain {
    /// Where packets enter it, if not from other chains.
    pub base: Option<ListedBase>,
    /// The comments of its rules, in order.
    pub rules: Vec<Option<String>>,
}

/// Where packets enter a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListedBase {
    /// The kernel's number of the hook.
    pub hook: u32,
    /// Lower is earlier.
    pub priority: i32,
    /// What happens to a packet that it does not judge: 0 drop, 1 accept.
    pub policy: u32,
}

impl Netfilter {
    /// The generation of the namespace's nftables, which grows with every transaction of anybody.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn generation(&self) -> Result<u32, KernelError> {
        let request = Request {
            kind: message(GET_GENERATION),
            flags: NLM_F_REQUEST | NLM_F_ACK,
            family: 0,
            resource: 0,
            attributes: Vec::new(),
        };
        let mut generation = None;
        self.talk(&[request], |answer| {
            generation = generation.or(attribute::number(answer.attributes, GENERATION_ID));
        })
        .await
        .map_err(|source| refused("read the generation", "nftables", source))?;
        generation.ok_or_else(|| {
            refused("read the generation", "nftables", std::io::ErrorKind::InvalidData.into())
        })
    }

    /// What `table` is made of; `None` if there is none.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn listing(&self, table: &Table) -> Result<Option<Listing>, KernelError> {
        let is_it = |answer: &Answer<'_>| {
            attribute::text(answer.attributes, TABLE).is_some_and(|name| name == table.name)
        };
        let flags = |answer: &Answer<'_>| {
            is_it(answer).then(|| attribute::number(answer.attributes, TABLE_FLAGS).unwrap_or(0))
        };
        let all = Attributes::default().into_bytes();
        let tables = self
            .dump(message(GET_TABLE), table.family as u8, &all, flags)
            .await
            .map_err(|source| refused("list", "tables", source))?;
        let Some(flags) = tables.first() else { return Ok(None) };
        let mut listing = Listing { dormant: flags & DORMANT != 0, ..Listing::default() };
        let chain = |answer: &Answer<'_>| {
            let name = attribute::text(answer.attributes, CHAIN_NAME).filter(|_| is_it(answer))?;
            let chain = ListedChain { base: base(answer.attributes), rules: Vec::new() };
            Some((name.to_owned(), chain))
        };
        listing.chains.extend(self.list(table, GET_CHAIN, "chains", chain).await?);
        let set = |answer: &Answer<'_>| {
            let flags = attribute::number(answer.attributes, SET_FLAGS).unwrap_or(0);
            let named = is_it(answer) && flags & ANONYMOUS == 0;
            attribute::text(answer.attributes, SET_NAME).filter(|_| named).map(str::to_owned)
        };
        listing.sets.extend(self.list(table, GET_SET, "sets", set).await?);
        let rule = |answer: &Answer<'_>| {
            let chain = attribute::text(answer.attributes, RULE_CHAIN).filter(|_| is_it(answer))?;
            let comment = attribute::find(answer.attributes, RULE_USER_DATA).and_then(comment);
            Some((chain.to_owned(), comment))
        };
        for (chain, comment) in self.list(table, GET_RULE, "rules", rule).await? {
            listing.chains.entry(chain).or_default().rules.push(comment);
        }
        Ok(Some(listing))
    }
}

fn base(chain: &[u8]) -> Option<ListedBase> {
    let hook = attribute::find(chain, CHAIN_HOOK)?;
    Some(ListedBase {
        hook: attribute::number(hook, HOOK_NUMBER)?,
        priority: attribute::number(hook, HOOK_PRIORITY)?.cast_signed(),
        policy: attribute::number(chain, CHAIN_POLICY)?,
    })
}

/// The comment in what `nft` keeps with a rule: items of kind, length and value, of which kind 0 is
/// the comment.
fn comment(mut rest: &[u8]) -> Option<String> {
    while let [kind, length, after @ ..] = rest {
        let value = after.get(..usize::from(*length))?;
        if *kind == 0 {
            let value = value.strip_suffix(&[0]).unwrap_or(value);
            return std::str::from_utf8(value).ok().map(str::to_owned);
        }
        rest = after.get(usize::from(*length)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::comment;

    #[test]
    fn the_comment_is_found_behind_other_data() {
        assert_eq!(comment(&[7, 1, 9, 0, 3, b'h', b'i', 0]), Some("hi".to_owned()));
        assert_eq!(comment(&[7, 1, 9]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            drop(comment(&bytes));
        }
    }
}
