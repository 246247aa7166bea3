//! The message bus: calls, casts, notifications and streams between controllers and agents.
//!
//! Everything above this crate speaks in [`Target`]s and [`Request`]s through one small
//! interface, [`Transport`]. Three transports stand behind it:
//!
//! * [`amqp`]: RabbitMQ, with the wire format of oslo.messaging, so that Python programs call
//!   our agents and are called by them;
//! * [`local`]: a Unix socket on one host, one JSON object a line, no broker needed;
//! * [`memory`]: both ends in one process, for tests.
//!
//! [`sign`] adds signatures to the commands of our own API where they cross a broker.

pub mod amqp;
mod dispatch;
mod error;
pub mod local;
pub mod memory;
mod message;
pub mod sign;
mod target;
mod transport;
pub mod wire;

pub use error::{BusError, Failure};
pub use message::{Context, Notification, Priority, Request};
pub use target::{InvalidVersion, Target, Version};
pub use transport::{
    CallLimits, Delivered, Handler, LinkState, LockGuard, Origin, ReadFrom, Record, ServerHandle,
    Service, Stream, Transport,
};
