//! Actions on one instance: what is done once, not wished for.

use std::io;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stackhand_model::{ErrorCode, InstanceId, Kind, PowerState};
use stackhand_runtime::agent::{Action, Refusal};

use super::ComputeAgent;
use crate::hypervisor::{DomainChange, DomainSeen, Hypervisor, HypervisorError, Power};
use crate::plan::is_ours;
use crate::store::{ConsoleText, PowerOverride, Record};

/// What an instance can be told to do.
const ACTIONS: &str = "start, stop, reboot (type: soft or hard), pause, unpause, suspend, resume, \
                       rebuild, snapshot (name), screenshot, console-log (kib, start), console-open \
                       (force), console-io (session, input, wait_ms), console-close (session), usage, \
                       xml";

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
            "suspend" => self.set_power(id, generation, PowerState::Suspended).await,
            "resume" => self.set_power(id, generation, PowerState::Running).await,
            "rebuild" => self.rebuild(id).await,
            "snapshot" => self.snapshot(id, &action).await,
            "screenshot" => self.screenshot(id).await,
            "console-open" => self.console_open(id, &action.params).await,
            "console-io" => self.console_io(id, &action.params).await,
            "console-close" => self.console_close(id, &action.params),
            "usage" => self.usage_of(id).await,
            "xml" => self.xml(id).await,
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
        let start = match params.get("start") {
            None | Some(Value::Null) => None,
            Some(start) => Some(start.as_u64().ok_or_else(|| {
                Refusal::new(ErrorCode::BadRequest, "start must be a number of bytes")
            })?),
        };
        let store = self.store.clone();
        let part = match crate::blocking(move || store.read_console(id, start, kib * 1024)).await {
            Err(error) if error.source.kind() == io::ErrorKind::PermissionDenied => {
                let read = self.hypervisor.read_log(&error.path, start, kib * 1024).await;
                let (start, bytes) = read.map_err(unavailable)?;
                ConsoleText::new(start, &bytes)
            }
            read => {
                read.map_err(|error| Refusal::new(ErrorCode::Unavailable, crate::chain(&error)))?
            }
        };
        let truncated = start.map_or(part.start > 0, |start| part.start > start);
        Ok(json!({"log": part.text, "truncated": truncated, "next": part.next}))
    }

    /// The domain of an instance.
    pub(super) async fn domain(&self, id: InstanceId) -> Result<DomainSeen, Refusal> {
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
        good: impl Fn(&DomainSeen) -> bool,
    ) -> Result<bool, Refusal> {
        let begin = Instant::now();
        loop {
            if good(&self.domain(id).await?) {
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
        let good = move |domain: &DomainSeen| match state {
            PowerState::Running => domain.power == Power::Running,
            PowerState::Paused => matches!(domain.power, Power::Paused | Power::Stalled(_)),
            PowerState::Shutoff => domain.power.is_off() && !domain.saved,
            PowerState::Suspended => domain.power.is_off() && domain.saved,
        };
        {
            let lock = self.lock_of(id);
            let _guard = lock.lock().await;
            let domain = self.domain(id).await?;
            if domain.power.is_off()
                && (state == PowerState::Paused || state == PowerState::Suspended && !domain.saved)
            {
                let message = format!("it is shut off: start it before it is {}", state.as_str());
                return Err(Refusal::new(ErrorCode::WrongState, message));
            }
            self.change_record(id, |record| {
                record.power = Some(PowerOverride { generation, state, by_guest: false });
                // From now on, a guest that shuts itself down does so anew.
                if !good(&domain) {
                    record.seen_running = None;
                }
            })
            .await?;
            if state == PowerState::Running && matches!(domain.power, Power::Stalled(_)) {
                // The pass leaves one that its watchdog stopped to those who look into it.
                let resumed = self.hypervisor.perform(id, DomainChange::Resume).await;
                resumed.map_err(unavailable)?;
            }
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

    /// Ends a guest and lets the next pass start it, as after any end that it did not choose. What
    /// is noted first is enough for that, should the agent die in between.
    async fn reboot(&self, id: InstanceId, hard: bool) -> Result<Value, Refusal> {
        let mut how = "hard";
        {
            let lock = self.lock_of(id);
            let _guard = lock.lock().await;
            let power = self.domain(id).await?.power;
            if power.is_off() {
                let message = "it is shut off: start it instead";
                return Err(Refusal::new(ErrorCode::WrongState, message));
            }
            self.change_record(id, |record| {
                record.seen_running = None;
                if let Some(power) = &mut record.power {
                    power.state = PowerState::Running;
                }
            })
            .await?;
            if !hard && power == Power::Running {
                self.hypervisor.perform(id, DomainChange::Shutdown).await.map_err(unavailable)?;
                let limit = Duration::from_secs(u64::from(self.section.shutdown_timeout_seconds));
                if self.wait_for(id, limit, |domain| domain.power.is_off()).await? {
                    how = "soft";
                }
            }
            if how == "hard" {
                self.hypervisor.perform(id, DomainChange::Destroy).await.map_err(unavailable)?;
            }
        }
        self.wake.object_changed(id.object());
        if self.wait_for(id, WAIT, |domain| !domain.power.is_off()).await? {
            Ok(json!({"rebooted": how}))
        } else {
            let message = format!("ended, and not started again within {WAIT:?}: see its status");
            Err(Refusal::new(ErrorCode::Timeout, message))
        }
    }

    /// Has the root disk made anew from its image by the next pass, which the note survives.
    async fn rebuild(&self, id: InstanceId) -> Result<Value, Refusal> {
        {
            let lock = self.lock_of(id);
            let _guard = lock.lock().await;
            self.domain(id).await?;
            self.change_record(id, |record| {
                record.rebuild = true;
                record.seen_running = None;
            })
            .await?;
        }
        self.wake.object_changed(id.object());
        let begin = Instant::now();
        while begin.elapsed() < WAIT {
            if !self.read_record(id).await?.rebuild {
                return Ok(json!({"rebuilt": true}));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let message = format!("accepted, and not done within {WAIT:?}: see its status");
        Err(Refusal::new(ErrorCode::Timeout, message))
    }

    /// What it has used since it was started.
    async fn usage_of(&self, id: InstanceId) -> Result<Value, Refusal> {
        self.domain(id).await?;
        let usage = self.meter.one(id).await.map_err(unavailable)?;
        let off = || Refusal::new(ErrorCode::WrongState, "it is shut off: it uses nothing");
        usage.ok_or_else(off)
    }

    /// Its XML, as libvirt has it.
    async fn xml(&self, id: InstanceId) -> Result<Value, Refusal> {
        self.domain(id).await?;
        let xml = self.hypervisor.xml(id).await.map_err(unavailable)?;
        Ok(json!({ "log": xml }))
    }

    pub(super) async fn read_record(&self, id: InstanceId) -> Result<Record, Refusal> {
        let store = self.store.clone();
        let read = crate::blocking(move || store.read(id)).await;
        let read = read.map_err(|error| Refusal::new(ErrorCode::Unavailable, crate::chain(&error)));
        Ok(read?.unwrap_or_default())
    }

    /// Changes an instance's record, on disk when this returns. The instance must be locked.
    pub(super) async fn change_record(
        &self,
        id: InstanceId,
        change: impl FnOnce(&mut Record),
    ) -> Result<(), Refusal> {
        let mut record = self.read_record(id).await?;
        change(&mut record);
        let store = self.store.clone();
        crate::blocking(move || store.prepare(id, &record))
            .await
            .map_err(|error| Refusal::new(ErrorCode::Unavailable, crate::chain(&error)))
    }
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function of map_err")]
pub(super) fn unavailable(error: HypervisorError) -> Refusal {
    let code = match &error {
        HypervisorError::Away { .. } => ErrorCode::Unavailable,
        HypervisorError::Refused { .. } => ErrorCode::WrongState,
    };
    Refusal::new(code, error.to_string())
}
