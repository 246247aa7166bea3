//! The first cloud, as `make demo` shows it: agentctl, three agents, libvirt, a guest.
//!
//! It runs on a host inside this host (`scripts/private-host`), with a network and a libvirt of
//! its own, so that bridges, network namespaces and guests are nobody else's.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod cloud;
mod guest;
mod lab;
