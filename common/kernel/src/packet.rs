//! Packet sockets: whole Ethernet frames to and from one link.
#![expect(unsafe_code, reason = "a packet socket is bound by a sockaddr_ll, which nobody wraps")]

use std::io;

use nix::libc;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// EtherTypes that a packet socket may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receive {
    /// Nothing: the socket only sends.
    Nothing,
    /// Every frame.
    All,
    /// Frames of one EtherType.
    EtherType(u16),
}

/// Opens a non-blocking socket for whole frames on the link with number `index` in the calling
/// thread's namespace. Send with [`Socket::send`], receive with [`Socket::recv`].
///
/// # Errors
///
/// Fails without `CAP_NET_RAW`, or if there is no such link.
pub fn frames(index: u32, receive: Receive) -> io::Result<Socket> {
    let protocol = match receive {
        Receive::Nothing => 0,
        Receive::All => 3,
        Receive::EtherType(ethertype) => ethertype,
    };
    let index = i32::try_from(index).map_err(|_| io::Error::from_raw_os_error(libc::ENODEV))?;
    // Protocol 0 until bound, so that no frame of another link slips in.
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
    socket.set_nonblocking(true)?;
    // SAFETY: the storage is zeroed, large and aligned enough for a `sockaddr_ll`, and the length
    // written is that of the structure filled in.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let link = storage.cast::<libc::sockaddr_ll>();
            (*link).sll_family = libc::AF_PACKET.cast_unsigned().try_into().unwrap_or_default();
            (*link).sll_protocol = protocol.to_be();
            (*link).sll_ifindex = index;
            *length = size_of::<libc::sockaddr_ll>().try_into().unwrap_or_default();
            Ok(())
        })
    }?;
    socket.bind(&address)?;
    Ok(socket)
}
