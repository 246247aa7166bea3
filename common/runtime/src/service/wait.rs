//! `wait`: answers when objects are where the caller wants them, or says which are not and why.

use std::collections::BTreeSet;

use stackhand_model::{ErrorCode, ObjectRef, State, Status};

use super::{Api, args, limit, seconds};
use crate::agent::Agent;
use crate::api::{Condition, LONGEST_WAIT, Refused, Settled, Waiting};

/// Most objects that a failed wait lists.
const MOST_LISTED: usize = 100;

impl<A: Agent> Api<A> {
    pub(super) async fn wait(&self, args: args::Wait) -> Result<Vec<Settled>, Refused> {
        limit("refs", args.refs.len())?;
        let timeout = seconds("timeout", args.timeout, LONGEST_WAIT)?;
        let condition = args.condition;
        let mut wanted = self.parts.ledger.revision();
        let mut found = self.parts.statuses.revision();
        let mut dealt_with = self.parts.wake.dealt_with();
        let stopping = self.parts.shutdown.stopping();
        let limit = tokio::time::sleep(timeout);
        tokio::pin!(limit);
        loop {
            wanted.mark_unchanged();
            found.mark_unchanged();
            dealt_with.mark_unchanged();
            // News first: what is dealt with in between is then seen in the status.
            let news: BTreeSet<ObjectRef> =
                args.refs.iter().filter(|it| self.parts.wake.is_news(it)).copied().collect();
            let statuses = self.statuses(&args.refs);
            let missing = |(object, status): &(ObjectRef, Option<Status>)| {
                missing(condition, *object, status.as_ref(), news.contains(object))
            };
            let mut waiting: Vec<Waiting> = statuses.iter().filter_map(missing).collect();
            if waiting.is_empty() {
                let settled = |(object, status)| Settled { object, status };
                return Ok(statuses.into_iter().map(settled).collect());
            }
            // A document that is not there cannot become active by waiting here.
            let (code, why) = tokio::select! {
                biased;
                () = stopping.cancelled() => {
                    (ErrorCode::Unavailable, "the agent stops; ask again in a moment".to_owned())
                }
                () = &mut limit => {
                    (ErrorCode::Timeout, format!("after {} s", timeout.as_secs_f64()))
                }
                _changed = wanted.changed() => continue,
                _changed = found.changed() => continue,
                _changed = dealt_with.changed(), if !news.is_empty() => continue,
            };
            let count = waiting.len();
            waiting.truncate(MOST_LISTED);
            let first = &waiting[0];
            let message = format!(
                "{why}: {count} of {} objects not {}; {}: {}",
                statuses.len(),
                name(condition),
                first.object,
                first.reason
            );
            let object = Some(first.object);
            return Err(Refused { object, waiting, ..Refused::new(code, message) });
        }
    }

    fn statuses(&self, objects: &[ObjectRef]) -> Vec<(ObjectRef, Option<Status>)> {
        let desired = self.parts.ledger.desired();
        let one = |object: &ObjectRef| (*object, self.parts.statuses.within(&desired, object));
        objects.iter().map(one).collect()
    }
}

/// Why an object does not meet the condition; `None` if it does.
fn missing(
    condition: Condition,
    object: ObjectRef,
    status: Option<&Status>,
    is_news: bool,
) -> Option<Waiting> {
    let state = status.map(|it| it.state);
    let met = match (condition, state) {
        (Condition::Active, state) => state == Some(State::Active),
        (Condition::Done, state) => state == Some(State::Active) && !is_news,
        (Condition::Gone, state) => state.is_none(),
        (Condition::Settled, state) => {
            matches!(state, None | Some(State::Active | State::Error))
        }
    };
    if met {
        return None;
    }
    let reason = match status {
        None => "it is not held here".to_owned(),
        Some(status) if status.state == State::Active => "the agent is to look at it".to_owned(),
        Some(status) => status.reason.clone().unwrap_or_else(|| format!("it is {}", status.state)),
    };
    let progress_percent = status.and_then(|it| it.observed.get("progress_percent")?.as_u64());
    Some(Waiting { object, state, reason, progress_percent })
}

fn name(condition: Condition) -> &'static str {
    match condition {
        Condition::Active => "active",
        Condition::Gone => "gone",
        Condition::Settled => "settled",
        Condition::Done => "done",
    }
}
