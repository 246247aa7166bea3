//! Actions on one instance: what is done once, not wished for.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stackhand_model::{ErrorCode, InstanceId, Kind, PowerState};
use stackhand_runtime::agent::{Action, Refusal};

use super::ComputeAgent;
use crate::hypervisor::{DomainChange, DomainSeen, Hypervisor, HypervisorError, Power};
use crate::plan::is_ours;
use crate::store::PowerOverride;

/// What an instance can be told to do.
const ACTIONS: &str = "start, stop, reboot (type: soft or hard), pause, unpause, console-log (kib)";

/// KiB of console log that are returned unless told otherwise, and at most.
const CONSOLE_KIB: (u64, u64) = (64, 1024);

/// How often a domain is looked at while an action waits for it.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How long an action waits for anything but a guest's shutdown.
const WAIT: Duration = Duration::from_secs(20);

impl<H: Hypervisor> ComputeAgent<H> {
    pub(super) async fn perform_action(&self, action: Action) -> Result<Value, Refusal> {
        let refuse = |code, message: String| Err(Refusal::new(code, message).about(action.object));
        if action.object.kind != Kind::Instance {
            let message = format!("{} has no actions; an Instance has: {ACTIONS}", action.object);
            return refuse(ErrorCode::Unsupported, message);
        }
        let id = InstanceId(action.object.id);
        let generation = action.document.generation;
        match action.name.as_str() {
            "console-log" => self.console_log(id, &action.params).await,
            "start" => self.set_power(id, generation, PowerState::Running).await,
            "stop" => self.set_power(id, generation, PowerState::Shutoff).await,
            "pause" => self.set_power(id, generation, PowerState::Paused).await,
            "unpause" => self.set_power(id, generation, PowerState::Running).await,
            "reboot" => match action.params.get("type").and_then(Value::as_str).unwrap_or("soft") {
                "soft" => self.reboot(id, false).await,
                "hard" => self.reboot(id, true).await,
                other => refuse(
                    ErrorCode::BadRequest,
                    format!("reboot has no type {other:?}; it has: soft, hard"),
                ),
            },
            other => refuse(
                ErrorCode::Unsupported,
                format!("an Instance has no action {other:?}; it has: {ACTIONS}"),
            ),
        }
        .map_err(|refusal| refusal.about(action.object))
    }

    async fn console_log(&self, id: InstanceId, params: &Value) -> Result<Value, Refusal> {
        let kib = match params.get("kib") {
            None | Some(Value::Null) => CONSOLE_KIB.0,
            Some(kib) => {
                kib.as_u64().filter(|kib| (1..=CONSOLE_KIB.1).contains(kib)).ok_or_else(|| {
                    Refusal::new(
                        ErrorCode::BadRequest,
                        format!("kib must be 1 to {}", CONSOLE_KIB.1),
                    )
                })?
            }
        };
        let store = self.store.clone();
        let read = crate::blocking(move || store.read_console(id, kib * 1024)).await;
        let (log, truncated) =
            read.map_err(|error| Refusal::new(ErrorCode::Unavailable, crate::chain(&error)))?;
        Ok(json!({"log": log, "truncated": truncated}))
    }

    /// The domain of an instance.
    async fn domain(&self, id: InstanceId) -> Result<DomainSeen, Refusal> {
        let domains = self.hypervisor.domains().await.map_err(unavailable)?;
        domains.into_iter().find(|domain| domain.uuid == id.0 && is_ours(domain, id)).ok_or_else(
            || {
                let message = "it has no domain yet: see its status for what it waits for";
                Refusal::new(ErrorCode::WrongState, message)
            },
        )
    }

    /// Waits until the domain has a power state that is good; tells whether it came.
    async fn wait_for(
        &self,
        id: InstanceId,
        limit: Duration,
        good: impl Fn(Power) -> bool,
    ) -> Result<bool, Refusal> {
        let begin = Instant::now();
        loop {
            if good(self.domain(id).await?.power) {
                return Ok(true);
            }
            if begin.elapsed() >= limit {
                return Ok(false);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Puts a power state in the place of the document's, until the document changes. The pass
    /// does the rest, as it does for a document.
    async fn set_power(
        &self,
        id: InstanceId,
        generation: u64,
        state: PowerState,
    ) -> Result<Value, Refusal> {
        let good = move |power: Power| match state {
            PowerState::Running => power == Power::Running,
            PowerState::Paused => power == Power::Paused,
            PowerState::Shutoff => matches!(power, Power::Off(_)),
        };
        {
            let lock = self.lock_of(id);
            let _guard = lock.lock().await;
            let domain = self.domain(id).await?;
            if state == PowerState::Paused && matches!(domain.power, Power::Off(_)) {
                let message = "it is shut off: start it before you pause it";
                return Err(Refusal::new(ErrorCode::WrongState, message));
            }
            let store = self.store.clone();
            crate::blocking(move || {
                let mut record = store.read(id)?.unwrap_or_default();
                record.power = Some(PowerOverride { generation, state, by_guest: false });
                // From now on, a guest that shuts itself down does so anew.
                if !good(domain.power) {
                    record.seen_running = None;
                }
                store.prepare(id, &record)
            })
            .await
            .map_err(|error| Refusal::new(ErrorCode::Unavailable, crate::chain(&error)))?;
        }
        self.wake.object_changed(id.object());
        let shutdown = Duration::from_secs(u64::from(self.section.shutdown_timeout_seconds));
        let limit = if state == PowerState::Shutoff { shutdown + WAIT } else { WAIT };
        if self.wait_for(id, limit, good).await? {
            Ok(json!({"power_state": state}))
        } else {
            let message = format!("accepted, and not done within {limit:?}: see its status");
            Err(Refusal::new(ErrorCode::Timeout, message))
        }
    }

    async fn reboot(&self, id: InstanceId, hard: bool) -> Result<Value, Refusal> {
        let lock = self.lock_of(id);
        let _guard = lock.lock().await;
        let power = self.domain(id).await?.power;
        if matches!(power, Power::Off(_)) {
            let message = "it is shut off: start it instead";
            return Err(Refusal::new(ErrorCode::WrongState, message));
        }
        let off = |power: Power| matches!(power, Power::Off(_));
        let mut how = "hard";
        if !hard && power == Power::Running {
            self.hypervisor.perform(id, DomainChange::Shutdown).await.map_err(unavailable)?;
            let limit = Duration::from_secs(u64::from(self.section.shutdown_timeout_seconds));
            if self.wait_for(id, limit, off).await? {
                how = "soft";
            }
        }
        if how == "hard" {
            self.hypervisor.perform(id, DomainChange::Destroy).await.map_err(unavailable)?;
        }
        let start = DomainChange::Start { paused: false };
        self.hypervisor.perform(id, start).await.map_err(unavailable)?;
        self.wake.object_changed(id.object());
        Ok(json!({"rebooted": how}))
    }
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function of map_err")]
fn unavailable(error: HypervisorError) -> Refusal {
    let code = match &error {
        HypervisorError::Away { .. } => ErrorCode::Unavailable,
        HypervisorError::Refused { .. } => ErrorCode::WrongState,
    };
    Refusal::new(code, error.to_string())
}
