//! Real guests on a real libvirtd: TCG domains that boot a Debian kernel and say what they see.
//! Needs root, libvirtd, QEMU, busybox, and the kernel that `scripts/fetch-kernel cloud` fetches.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod hardware;
mod initiator;
mod kill;
mod lab;
mod plug;
mod support;
mod trouble;
