//! Queues of links: how fast a link sends, and where the frames that it receives go first.
//!
//! Only two forms are known here. A *shaper* is a token bucket at a link's root: it holds what the
//! link sends to a rate. A *redirect* hands every frame that a link receives to another link (an
//! `ifb`), whose shaper then holds that direction to a rate; afterwards the frame goes on as
//! received by the first. Both bear a number of ours, and so are told from other people's queues.

use std::io;

use rtnetlink::packet_core::{
    DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Nla, NlasIterator,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};

use super::Links;
use crate::KernelError;

/// The handle of our shapers, and the priority of our redirects: `SH`.
const OURS: u16 = 0x5348;

/// Where a link's received frames pass filters.
const RECEIVED: TcHandle = TcHandle { major: u16::MAX, minor: 0 };

/// Every protocol, in network order as filters have it.
const ALL_PROTOCOLS: u16 = 0x0003_u16.to_be();

/// Nanoseconds in the unit that the kernel counts a bucket's depth in.
const TICK: u64 = 64;

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shaper {
    /// Bytes a second.
    pub rate: u64,
    /// Depth of the bucket: bytes that may go at once.
    pub burst: u32,
    /// Bytes that wait; what comes on top is dropped.
    pub limit: u32,
}

/// What is at a link's root, where that is not the kernel's default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Number of the link.
    pub link: u32,
    /// What it is.
    pub kind: QueueKind,
}

/// What kind of queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QueueKind {
    /// A shaper of ours.
    Shaper(Shaper),
    /// Somebody else's, by the kernel's name for its kind.
    Other(String),
}

impl Shaper {
    /// Whether two are the same but for what the kernel's units round away.
    #[must_use]
    pub fn is_about(&self, other: &Self) -> bool {
        let slack = u64::from(self.burst) / 256 + self.rate * TICK / 1_000_000_000 + 64;
        self.rate == other.rate
            && self.limit == other.limit
            && u64::from(self.burst.abs_diff(other.burst)) <= slack
    }
}

impl Links {
    /// The queues at the roots of links that somebody set, in the kernel's order.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn queues(&self) -> Result<Vec<Queue>, KernelError> {
        let query = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        self.dump(query, |answer| match answer {
            RouteNetlinkMessage::NewQueueDiscipline(message) => parse_queue(&message),
            _ => None,
        })
        .await
        .map_err(|source| refused("list", "queues", source))
    }

    /// Holds what a link sends to a rate. A shaper of ours is changed in place: what waits in it
    /// stays.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn set_shaper(
        &self,
        link: u32,
        name: &str,
        shaper: Shaper,
    ) -> Result<(), KernelError> {
        let mut message = at(link, TcHandle::ROOT)?;
        message.header.handle = TcHandle { major: OURS, minor: 0 };
        message.attributes.push(TcAttribute::Kind("tbf".to_owned()));
        message.attributes.push(TcAttribute::Options(describe_shaper(shaper)));
        let message = RouteNetlinkMessage::NewQueueDiscipline(message);
        self.write(message, NLM_F_CREATE | NLM_F_REPLACE)
            .await
            .map_err(|source| refused("shape", name, source))
    }

    /// Takes the queue from a link's root. None is fine.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn remove_shaper(&self, link: u32, name: &str) -> Result<(), KernelError> {
        let message = RouteNetlinkMessage::DelQueueDiscipline(at(link, TcHandle::ROOT)?);
        gone_is_fine(self.write(message, 0).await)
            .map_err(|source| refused("stop shaping", name, source))
    }

    /// The number of the link that a link's received frames go to first by a redirect of ours.
    /// Zero: to one that is gone.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn redirect(&self, link: u32, name: &str) -> Result<Option<u32>, KernelError> {
        let filters =
            self.filters(link).await.map_err(|source| refused("list filters", name, source))?;
        Ok(filters.iter().filter(|filter| is_ours(filter)).find_map(target))
    }

    /// Sends a link's received frames to another link first, in place of one of before.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn set_redirect(&self, link: u32, name: &str, to: u32) -> Result<(), KernelError> {
        let fail = |source| refused("redirect", name, source);
        let mut received = at(link, TcHandle::INGRESS)?;
        received.header.handle = RECEIVED;
        received.attributes.push(TcAttribute::Kind("ingress".to_owned()));
        let received = RouteNetlinkMessage::NewQueueDiscipline(received);
        match self.write(received, NLM_F_CREATE | NLM_F_EXCL).await {
            Err(error) if error.raw_os_error() == Some(nix::libc::EEXIST) => {}
            result => result.map_err(fail)?,
        }
        gone_is_fine(self.write(remove_filter(link)?, 0).await).map_err(fail)?;
        let mut filter = at(link, RECEIVED)?;
        filter.header.info = info();
        filter.attributes.push(TcAttribute::Kind(TcFilterU32::KIND.to_owned()));
        filter.attributes.push(TcAttribute::Options(describe_redirect(to)));
        let filter = RouteNetlinkMessage::NewTrafficFilter(filter);
        self.write(filter, NLM_F_CREATE | NLM_F_EXCL).await.map_err(fail)
    }

    /// Ends a redirect of ours. None is fine; other people's filters stay.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn remove_redirect(&self, link: u32, name: &str) -> Result<(), KernelError> {
        let fail = |source| refused("stop redirecting", name, source);
        gone_is_fine(self.write(remove_filter(link)?, 0).await).map_err(fail)?;
        if self.filters(link).await.map_err(fail)?.is_empty() {
            let received = RouteNetlinkMessage::DelQueueDiscipline(at(link, TcHandle::INGRESS)?);
            gone_is_fine(self.write(received, 0).await).map_err(fail)?;
        }
        Ok(())
    }

    /// Filters of what a link receives.
    async fn filters(&self, link: u32) -> io::Result<Vec<TcMessage>> {
        let query = at(link, RECEIVED).map_err(io::Error::other)?;
        let answers = self
            .dump(RouteNetlinkMessage::GetTrafficFilter(query), |answer| match answer {
                RouteNetlinkMessage::NewTrafficFilter(message) => Some(message),
                _ => None,
            })
            .await;
        match answers {
            // No queue for received frames, or no link.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(nix::libc::EINVAL | nix::libc::ENOENT | nix::libc::ENODEV)
                ) =>
            {
                Ok(Vec::new())
            }
            answers => answers,
        }
    }
}

fn at(link: u32, parent: TcHandle) -> Result<TcMessage, KernelError> {
    let index = i32::try_from(link)
        .map_err(|_| KernelError::BadName { name: link.to_string(), what: "number of a link" })?;
    let mut message = TcMessage::with_index(index);
    message.header.parent = parent;
    Ok(message)
}

/// Priority and protocol of a filter.
fn info() -> u32 {
    u32::from(TcHandle { major: OURS, minor: ALL_PROTOCOLS })
}

fn is_ours(filter: &TcMessage) -> bool {
    TcHandle::from(filter.header.info).major == OURS
}

fn remove_filter(link: u32) -> Result<RouteNetlinkMessage, KernelError> {
    let mut filter = at(link, RECEIVED)?;
    filter.header.info = info();
    Ok(RouteNetlinkMessage::DelTrafficFilter(filter))
}

/// Numbers of the kernel's attributes of a token bucket.
mod tbf {
    pub(super) const PARAMETERS: u16 = 1;
    pub(super) const RATE64: u16 = 4;
    pub(super) const BURST: u16 = 6;
}

fn describe_shaper(shaper: Shaper) -> Vec<TcOption> {
    /// So that the kernel counts bytes by itself and wants no table of sizes.
    const ETHERNET: u8 = 1;
    let rate = u32::try_from(shaper.rate).unwrap_or(u32::MAX);
    // `struct tc_tbf_qopt`: two rates of twelve bytes, then limit, depth in ticks, size of a packet.
    let mut parameters = vec![0; 36];
    parameters[1] = ETHERNET;
    parameters[8..12].copy_from_slice(&rate.to_ne_bytes());
    parameters[24..28].copy_from_slice(&shaper.limit.to_ne_bytes());
    let mut options = vec![DefaultNla::new(tbf::PARAMETERS, parameters)];
    if rate == u32::MAX {
        options.push(DefaultNla::new(tbf::RATE64, shaper.rate.to_ne_bytes().to_vec()));
    }
    options.push(DefaultNla::new(tbf::BURST, shaper.burst.to_ne_bytes().to_vec()));
    options.into_iter().map(TcOption::Other).collect()
}

fn describe_redirect(to: u32) -> Vec<TcOption> {
    let mut all = TcU32Selector::default();
    all.flags = TcU32SelectorFlags::Terminal;
    all.nkeys = 1;
    all.keys = vec![TcU32Key::default()];
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    vec![
        TcOption::U32(TcFilterU32Option::Selector(all)),
        TcOption::U32(TcFilterU32Option::Action(vec![action])),
    ]
}

fn parse_queue(message: &TcMessage) -> Option<Queue> {
    let header = &message.header;
    // The kernel's own default has no handle.
    if header.parent != TcHandle::ROOT || header.handle.major == 0 {
        return None;
    }
    let (mut kind, mut shaper) = (String::new(), None);
    for attribute in &message.attributes {
        match attribute {
            TcAttribute::Kind(name) => kind.clone_from(name),
            TcAttribute::Options(options) => shaper = parse_shaper(options),
            _ => {}
        }
    }
    let kind = match shaper.filter(|_| kind == "tbf" && header.handle.major == OURS) {
        Some(shaper) => QueueKind::Shaper(shaper),
        None => QueueKind::Other(kind),
    };
    Some(Queue { link: u32::try_from(header.index).ok()?, kind })
}

/// Options of a kind that the library does not know come as one attribute around them all.
fn parse_shaper(options: &[TcOption]) -> Option<Shaper> {
    let [TcOption::Other(around)] = options else { return None };
    let mut bytes = vec![0; around.value_len()];
    around.emit_value(&mut bytes);
    let (mut parameters, mut rate64) = (None, None);
    for option in NlasIterator::new(&bytes) {
        let option = option.ok()?;
        match option.kind() {
            tbf::PARAMETERS => parameters = Some(option.value().to_vec()),
            tbf::RATE64 => rate64 = option.value().try_into().ok().map(u64::from_ne_bytes),
            _ => {}
        }
    }
    let parameters = parameters?;
    let word = |at: usize| {
        parameters.get(at..at + 4).and_then(|word| word.try_into().ok()).map(u32::from_ne_bytes)
    };
    let rate = rate64.unwrap_or(u64::from(word(8)?));
    let depth = u64::from(word(28)?) * TICK;
    let burst = u128::from(rate) * u128::from(depth) / 1_000_000_000;
    Some(Shaper { rate, burst: u32::try_from(burst).unwrap_or(u32::MAX), limit: word(24)? })
}

/// Where a filter redirects to.
fn target(filter: &TcMessage) -> Option<u32> {
    let options = filter.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    let actions = options.iter().find_map(|option| match option {
        TcOption::U32(TcFilterU32Option::Action(actions)) => Some(actions),
        _ => None,
    })?;
    let parts = actions.iter().flat_map(|action| &action.attributes);
    let parts = parts.filter_map(|attribute| match attribute {
        TcActionAttribute::Options(options) => Some(options),
        _ => None,
    });
    parts.flatten().find_map(|option| match option {
        TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror)) => Some(mirror.ifindex),
        _ => None,
    })
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    use nix::libc::{EINVAL, ENODEV, ENOENT};
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(ENOENT | EINVAL | ENODEV)) => Ok(()),
        other => other,
    }
}

fn refused(action: &'static str, name: &str, source: io::Error) -> KernelError {
    let object = if name == "queues" { name.to_owned() } else { format!("link {name}") };
    KernelError::Netlink { action, object, source }
}
