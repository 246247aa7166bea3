//! A handler that lets only trusted commands through to another one.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::Value;

use super::{Verifier, strip};
use crate::{Delivered, Failure, Handler, Origin, Service};

/// Stands before a handler and refuses what is not signed by a trusted controller.
///
/// Requests that the kernel or the process itself vouches for ([`Origin::Local`],
/// [`Origin::Memory`]) need no signature. The transport below drops repeated deliveries of one
/// request before they come here, so a request that was sent again after a reconnect is not
/// taken for a replay.
pub struct VerifyingHandler {
    inner: Arc<dyn Handler>,
    service: Service,
    verifier: Arc<Verifier>,
    open: BTreeSet<String>,
    required: bool,
}

impl fmt::Debug for VerifyingHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifyingHandler")
            .field("service", &self.service)
            .field("open", &self.open)
            .field("required", &self.required)
            .finish_non_exhaustive()
    }
}

impl VerifyingHandler {
    /// Guards `inner`, which serves `service`. Only `ping` is open.
    #[must_use]
    pub fn new(inner: Arc<dyn Handler>, service: Service, verifier: Arc<Verifier>) -> Self {
        let open = BTreeSet::from(["ping".to_owned()]);
        Self { inner, service, verifier, open, required: true }
    }

    /// Sets which methods need no signature, in place of `ping`.
    #[must_use]
    pub fn open_to_all<'a>(mut self, methods: impl IntoIterator<Item = &'a str>) -> Self {
        self.open = methods.into_iter().map(str::to_owned).collect();
        self
    }

    /// Whether signatures are required at all. Without, everybody who reaches the broker rules
    /// this host: only for closed networks.
    #[must_use]
    pub fn required(mut self, required: bool) -> Self {
        self.required = required;
        self
    }

    /// Whether signatures are required; the heartbeat tells when they are not.
    #[must_use]
    pub fn is_required(&self) -> bool {
        self.required
    }
}

impl Handler for VerifyingHandler {
    fn handle(&self, mut delivered: Delivered) -> BoxFuture<'_, Result<Value, Failure>> {
        async move {
            let open = self.open.contains(&delivered.request.method);
            let vouched = match delivered.origin {
                Origin::Local { .. } | Origin::Memory => true,
                Origin::Broker => false,
            };
            if self.required && !open && !vouched {
                match self.verifier.verify(&self.service, &delivered).await {
                    Ok(key) => tracing::debug!(%key, "signature verified"),
                    Err(refusal) => {
                        let method = delivered.request.method.as_str();
                        let request_id = delivered.context().request_id();
                        let reason = refusal.code();
                        tracing::warn!(method, request_id, reason, %refusal, "command refused");
                        return Err(refusal.into());
                    }
                }
            }
            strip(&mut delivered.request.context);
            self.inner.handle(delivered).await
        }
        .boxed()
    }
}
