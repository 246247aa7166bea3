//! Fixtures for tests that touch a real kernel, real sockets and real processes.
//!
//! * [`in_netns`]: a test in a network namespace of its own; [`on_a_host`]: with names of
//!   namespaces of its own, too;
//! * [`in_the_lab`]: tests of a binary that need a full kernel, in a machine that has one;
//! * [`wait_for`] and [`wait_for_sync`]: wait for a condition with a deadline, never for a time;
//! * [`bin`] and [`Spawned`]: the workspace's own programs, started and surely ended;
//! * [`broker`]: private RabbitMQ nodes, to be killed and restarted at will;
//! * [`guest`]: a private libvirtd, and a guest that boots in seconds;
//! * [`free_port`]: a TCP port nobody listens on.
//!
//! A fixture that cannot be had is never passed over in silence: see [`missing`].

pub mod broker;
pub mod guest;
mod lab;
mod netns;
mod process;
mod wait;

pub use lab::in_the_lab;
pub use netns::{in_netns, on_a_host};
pub use process::{Spawned, bin};
pub use wait::{wait_for, wait_for_sync};

use std::net::{Ipv4Addr, TcpListener};

/// Says that a test cannot run here because `what` is missing.
///
/// With `CI` or `STACKHAND_REQUIRE` in the environment that fails the test; otherwise it is told
/// on stderr, and the test has to return.
///
/// # Panics
///
/// When `CI` or `STACKHAND_REQUIRE` is set to anything but nothing, `0` or `false`.
pub fn missing(what: &str) {
    let demanded = |name: &str| {
        std::env::var(name).is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"))
    };
    assert!(
        !demanded("CI") && !demanded("STACKHAND_REQUIRE"),
        "this test must run here, and cannot: {what}"
    );
    #[expect(clippy::print_stderr, reason = "the only way to say that a test did not run")]
    {
        eprintln!("NOT RUN: {what}");
    }
}

/// A TCP port on 127.0.0.1 that nobody listens on at this moment.
///
/// Another process may take it before the caller does: use it for programs that must be told
/// a port beforehand, and bind to port 0 everywhere else.
///
/// # Panics
///
/// When the kernel gives no port.
#[must_use]
pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a loopback port is free");
    listener.local_addr().expect("a bound socket has an address").port()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_port_can_be_bound() {
        let port = free_port();
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    }
}
