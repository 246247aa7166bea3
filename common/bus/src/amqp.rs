//! RabbitMQ, in the wire format of oslo.messaging.
//!
//! One connection per transport carries everything, on channels of its own for declaring, for
//! publishing and for every consumer. A supervisor ([`link`]) makes a new [`session`] whenever
//! the old one ends, whatever ended it, and the rest of the module keeps its promises across
//! sessions:
//!
//! * a call in flight is sent again under the same ids, and servers of ours answer a copy of a
//!   call they have seen without doing the work twice ([`client`], [`memory`]);
//! * an answer is kept until its caller's queue is back ([`reply`]);
//! * reply and fanout queues keep their names, so what the broker held is not lost.

mod client;
mod counters;
mod delivery;
mod dial;
mod link;
mod lock;
mod memory;
mod options;
mod reply;
mod server;
mod session;
mod stream;
mod tls;
mod topology;
mod unhurried;
mod url;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use serde_json::Value;
use tokio::sync::watch;

pub use counters::Counters;
pub use options::AmqpOptions;
pub use url::{AmqpUrl, Broker};

use crate::{
    BusError, CallLimits, Handler, LinkState, LockGuard, Notification, ReadFrom, Record, Request,
    ServerHandle, Service, Stream, Target, Transport,
};

/// A transport over RabbitMQ.
///
/// Made at once; connecting goes on in the background for as long as it lives. Dropping it
/// closes the connection and stops its servers.
pub struct AmqpTransport {
    shared: Arc<link::Shared>,
    supervisor: tokio::sync::Mutex<Option<tokio::task::JoinHandle<()>>>,
}

impl AmqpTransport {
    /// Starts to connect. Must be called inside a tokio runtime.
    ///
    /// Options in the URL's query win over `options`.
    ///
    /// # Errors
    ///
    /// [`BusError::Config`] for options that cannot work and TLS files that cannot be read.
    /// Whether a broker is there is not an error of this call: see [`Transport::link`].
    pub fn connect(url: AmqpUrl, options: &AmqpOptions) -> Result<Self, BusError> {
        let options = options.with_query(&url.query)?;
        options.validate()?;
        let tls = if url.tls || options.tls { Some(tls::client_config(&options)?) } else { None };
        let shared = Arc::new(link::Shared::new(url, options));
        let supervisor = tokio::spawn(link::supervise(Arc::clone(&shared), tls));
        Ok(Self { shared, supervisor: tokio::sync::Mutex::new(Some(supervisor)) })
    }

    /// What has happened on this transport so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.counts.snapshot()
    }
}

impl fmt::Debug for AmqpTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AmqpTransport").field(&self.shared.url).finish()
    }
}

impl Drop for AmqpTransport {
    fn drop(&mut self) {
        self.shared.closing.cancel();
        self.shared.stop.cancel();
    }
}

impl Transport for AmqpTransport {
    fn call<'a>(
        &'a self,
        target: &'a Target,
        request: Request,
        limits: CallLimits,
    ) -> BoxFuture<'a, Result<Value, BusError>> {
        client::call(&self.shared, target, request, limits).boxed()
    }

    fn cast<'a>(
        &'a self,
        target: &'a Target,
        request: Request,
    ) -> BoxFuture<'a, Result<(), BusError>> {
        async move { client::cast(&self.shared, target, &request).await }.boxed()
    }

    fn notify(&self, notification: Notification) -> BoxFuture<'_, Result<(), BusError>> {
        async move { client::notify(&self.shared, &notification).await }.boxed()
    }

    fn serve(
        &self,
        service: Service,
        handler: Arc<dyn Handler>,
    ) -> BoxFuture<'_, Result<ServerHandle, BusError>> {
        server::serve(&self.shared, service, handler).boxed()
    }

    fn publish<'a>(
        &'a self,
        stream: &'a Stream,
        body: Value,
    ) -> BoxFuture<'a, Result<(), BusError>> {
        async move { stream::publish(&self.shared, stream, &body).await }.boxed()
    }

    fn read<'a>(
        &'a self,
        stream: &'a Stream,
        from: ReadFrom,
        follow: bool,
    ) -> BoxFuture<'a, Result<BoxStream<'static, Result<Record, BusError>>, BusError>> {
        stream::read(&self.shared, stream, from, follow).boxed()
    }

    fn lock<'a>(
        &'a self,
        name: &'a str,
        limit: Duration,
    ) -> BoxFuture<'a, Result<LockGuard, BusError>> {
        lock::lock(&self.shared, name, limit).boxed()
    }

    fn link(&self) -> watch::Receiver<LinkState> {
        self.shared.state.subscribe()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async move {
            self.shared.closing.cancel();
            self.shared.servers_done(Duration::from_secs(5)).await;
            self.shared.stop.cancel();
            if let Some(supervisor) = self.supervisor.lock().await.take() {
                // The supervisor bounds its own steps; this only guards against the unknown.
                let _ = tokio::time::timeout(Duration::from_secs(5), supervisor).await;
            }
        }
        .boxed()
    }
}
