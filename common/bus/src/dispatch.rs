//! What the transports share: checking a call, and running a handler so that nothing it does can
//! take the server down.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use serde_json::Value;
use uuid::Uuid;

use crate::{BusError, CallLimits, Delivered, Failure, Handler, Target};

/// The shortest monitor a call may ask for.
const MIN_MONITOR: Duration = Duration::from_secs(2);

/// Refuses calls that no transport can carry.
pub(crate) fn check_call(
    target: &Target,
    method: &str,
    limits: CallLimits,
) -> Result<(), BusError> {
    if target.fanout {
        let what = format!("`{method}` to {target}: a call cannot go to all; cast it");
        return Err(BusError::Config(what));
    }
    if limits.monitor.is_some_and(|monitor| monitor < MIN_MONITOR) {
        let what = "the monitor of a call must be at least 2 s, which servers answer every second";
        return Err(BusError::Config(what.into()));
    }
    Ok(())
}

/// The error of a call that got no answer for `passed`.
pub(crate) fn timed_out(target: &Target, method: &str, passed: Duration) -> BusError {
    let seconds = passed.as_secs() + u64::from(passed.subsec_nanos() > 0);
    BusError::Timeout { target: target.to_string(), method: method.to_owned(), seconds }
}

/// Runs a handler; a panic in it becomes a failure like any other, and `panicked` is told.
pub(crate) async fn run(
    handler: &dyn Handler,
    delivered: Delivered,
    panicked: impl FnOnce(),
) -> Result<Value, Failure> {
    let method = delivered.request.method.clone();
    // The call that makes the future may panic as well as the future.
    let handling = AssertUnwindSafe(async { handler.handle(delivered).await });
    handling.catch_unwind().await.unwrap_or_else(|panic| {
        panicked();
        let why = panic_text(panic.as_ref());
        tracing::error!(method, why, "handler panicked");
        Err(Failure::new("InternalError", format!("the handler of `{method}` panicked: {why}")))
    })
}

/// A fresh 128-bit id as 32 hex digits, the form of every id on the wire.
pub(crate) fn new_id() -> String {
    Uuid::new_v4().simple().to_string()
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}
