//! What changes in a namespace, as it happens.

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::AsyncSocket;

use super::{Address, Link, address, link};
use crate::KernelError;

/// Room for events that nobody has read yet, in bytes.
const BUFFER: usize = 4 << 20;

/// Something changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A link appeared or changed.
    Link(Link),
    /// A link is gone.
    LinkGone(Link),
    /// A link got an address.
    Address(Address),
    /// A link lost an address.
    AddressGone(Address),
    /// An entry set by somebody appeared, changed or went in a neighbour or forwarding table of
    /// the link with this number.
    Neighbour(u32),
    /// A neighbour of the link with this number is gone, set by somebody or not: the kernel does not
    /// say.
    NeighbourGone(u32),
    /// A route that somebody set appeared, changed or went.
    Route,
    /// A queue or filter appeared, changed or went on the link with this number.
    Traffic(u32),
    /// Events came faster than they were read and some are lost: look at everything.
    Lost,
}

/// A stream of [`Event`]s of one namespace.
pub struct Monitor {
    events: BoxStream<'static, Event>,
}

impl std::fmt::Debug for Monitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Monitor")
    }
}

impl Monitor {
    /// Listens to links, addresses, neighbours, routes and queues of the calling thread's
    /// namespace. Must be called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub fn open() -> Result<Self, KernelError> {
        let fail = |source| KernelError::Netlink {
            action: "listen",
            object: "route netlink".to_owned(),
            source,
        };
        let (mut connection, _, messages) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Neigh,
            MulticastGroup::Tc,
            // Tells of sysctls of IPv6, which the first group does not.
            MulticastGroup::Ipv6Ifinfo,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ])
        .map_err(fail)?;
        // Best effort: with a small buffer more is lost, and a loss is told.
        drop(connection.socket_mut().socket_mut().set_rx_buf_sz(BUFFER));
        tokio::spawn(connection);
        let events = messages.filter_map(|(message, _)| async move {
            match message.payload {
                NetlinkPayload::InnerMessage(inner) => translate(&inner),
                NetlinkPayload::Overrun(_) => Some(Event::Lost),
                _ => None,
            }
        });
        Ok(Self { events: events.boxed() })
    }

    /// The next event; `None` once the socket is closed, which only a fault of it does.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.next().await
    }
}

fn translate(message: &RouteNetlinkMessage) -> Option<Event> {
    use rtnetlink::packet_route::AddressFamily::{Bridge, Inet6, Unspec};
    match message {
        // The bridge tells of its ports in its own family; what matters comes in the other, too.
        RouteNetlinkMessage::NewLink(found)
            if matches!(found.header.interface_family, Unspec | Inet6) =>
        {
            Some(Event::Link(link::parse(found)))
        }
        RouteNetlinkMessage::DelLink(found) if found.header.interface_family != Bridge => {
            Some(Event::LinkGone(link::parse(found)))
        }
        RouteNetlinkMessage::NewAddress(found) => address::parse(found).map(Event::Address),
        RouteNetlinkMessage::DelAddress(found) => address::parse(found).map(Event::AddressGone),
        RouteNetlinkMessage::DelNeighbour(found)
            if found.header.family != Bridge && !super::neighbour::is_set_by_somebody(found) =>
        {
            Some(Event::NeighbourGone(found.header.ifindex))
        }
        RouteNetlinkMessage::NewNeighbour(found) | RouteNetlinkMessage::DelNeighbour(found) => {
            super::neighbour::is_set_by_somebody(found)
                .then_some(Event::Neighbour(found.header.ifindex))
        }
        RouteNetlinkMessage::NewRoute(found) | RouteNetlinkMessage::DelRoute(found) => {
            super::route::is_set_by_somebody(found).then_some(Event::Route)
        }
        RouteNetlinkMessage::NewQueueDiscipline(found)
        | RouteNetlinkMessage::DelQueueDiscipline(found)
        | RouteNetlinkMessage::NewTrafficFilter(found)
        | RouteNetlinkMessage::DelTrafficFilter(found) => {
            u32::try_from(found.header.index).ok().map(Event::Traffic)
        }
        _ => None,
    }
}
