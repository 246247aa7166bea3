//! Interactive consoles: one holder for each instance, who asks and is answered.
//!
//! A session is kept in memory and lives as long as its holder keeps asking. Input and output
//! travel in `console-io`, which waits for output for a moment, so that a slow broker costs a
//! round trip for each answer and not for each byte. What nobody fetches stays with the guest.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use stackhand_model::{ErrorCode, InstanceId};
use stackhand_runtime::agent::Refusal;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::ComputeAgent;
use super::actions::unavailable;
use crate::hypervisor::Hypervisor;

/// How long a session lives that nobody asks for.
const IDLE: Duration = Duration::from_secs(30);

/// Longest wait for output.
const MOST_WAIT_MS: u64 = 5_000;

/// Most bytes of input at once.
const MOST_INPUT: usize = 16 << 10;

/// Most bytes of output in one answer.
const MOST_OUTPUT: usize = 64 << 10;

/// Consoles that are open.
#[derive(Debug, Default)]
pub(super) struct Consoles {
    sessions: Mutex<BTreeMap<InstanceId, Session>>,
}

#[derive(Debug)]
struct Session {
    id: Uuid,
    asked: Instant,
    input: mpsc::Sender<Vec<u8>>,
    output: Arc<tokio::sync::Mutex<mpsc::Receiver<Vec<u8>>>>,
}

impl Consoles {
    fn sessions(&self) -> MutexGuard<'_, BTreeMap<InstanceId, Session>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes sessions that nobody asks for any more.
    pub(super) fn expire(&self) {
        self.sessions().retain(|_, session| session.asked.elapsed() < IDLE);
    }
}

impl<H: Hypervisor> ComputeAgent<H> {
    pub(super) async fn console_open(
        &self,
        id: InstanceId,
        params: &Value,
    ) -> Result<Value, Refusal> {
        self.consoles.expire();
        let force = params["force"] == true;
        let held = || self.consoles.sessions().contains_key(&id);
        let taken = || {
            let message = "somebody else holds its console: wait until it is closed, or force it";
            Refusal::new(ErrorCode::Conflict, message)
        };
        if held() && !force {
            return Err(taken());
        }
        if self.domain(id).await?.power.is_off() {
            let message = "it is shut off: start it before you open its console";
            return Err(Refusal::new(ErrorCode::WrongState, message));
        }
        let (sender, output) = mpsc::channel(16);
        let input = self.hypervisor.open_console(id, sender).await.map_err(unavailable)?;
        let session = Session {
            id: Uuid::new_v4(),
            asked: Instant::now(),
            input,
            output: Arc::new(tokio::sync::Mutex::new(output)),
        };
        let answer = json!({"session": session.id});
        let mut sessions = self.consoles.sessions();
        if sessions.contains_key(&id) && !force {
            return Err(taken());
        }
        sessions.insert(id, session);
        Ok(answer)
    }

    pub(super) async fn console_io(
        &self,
        id: InstanceId,
        params: &Value,
    ) -> Result<Value, Refusal> {
        let bad = |message: &str| Refusal::new(ErrorCode::BadRequest, message);
        let typed = match &params["input"] {
            Value::Null => Vec::new(),
            Value::String(text) => {
                STANDARD.decode(text).map_err(|_| bad("input must be base64"))?
            }
            _ => return Err(bad("input must be base64")),
        };
        if typed.len() > MOST_INPUT {
            return Err(bad("input is longer than 16 KiB"));
        }
        let wait = params["wait_ms"].as_u64().unwrap_or(0).min(MOST_WAIT_MS);
        let (input, output) = {
            let mut sessions = self.consoles.sessions();
            let session = sessions.get_mut(&id).filter(|it| params["session"] == json!(it.id));
            let session = session.ok_or_else(|| {
                let message = "this console is closed: open it again";
                Refusal::new(ErrorCode::WrongState, message)
            })?;
            session.asked = Instant::now();
            (session.input.clone(), Arc::clone(&session.output))
        };
        let mut closed = !typed.is_empty() && input.send(typed).await.is_err();
        let mut said: Vec<u8> = Vec::new();
        {
            let mut output = output.lock().await;
            match tokio::time::timeout(Duration::from_millis(wait), output.recv()).await {
                Ok(Some(bytes)) => said.extend(bytes),
                Ok(None) => closed = true,
                Err(_) => {}
            }
            while said.len() < MOST_OUTPUT {
                match output.try_recv() {
                    Ok(bytes) => said.extend(bytes),
                    Err(error) => {
                        closed |= error == mpsc::error::TryRecvError::Disconnected;
                        break;
                    }
                }
            }
        }
        if closed && said.is_empty() {
            self.consoles.sessions().remove(&id);
        }
        Ok(json!({"output": STANDARD.encode(&said), "closed": closed && said.is_empty()}))
    }

    pub(super) fn console_close(&self, id: InstanceId, params: &Value) -> Result<Value, Refusal> {
        let mut sessions = self.consoles.sessions();
        // Only by its holder; closed twice is closed.
        if sessions.get(&id).is_some_and(|session| params["session"] == json!(session.id)) {
            sessions.remove(&id);
        }
        Ok(Value::Null)
    }
}
