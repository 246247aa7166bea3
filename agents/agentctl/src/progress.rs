//! Waiting for objects and telling how they get on: one line per object, drawn again on a
//! terminal, with a bar for long work, otherwise a line whenever one changes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::Result;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use stackhand_model::{ErrorCode, ObjectRef, State};
use stackhand_runtime::api::{Condition, Settled, Waiting};
use stackhand_runtime::client::{AgentClient, ClientError};

use crate::console::{Console, tame};
use crate::exit::Exit;
use crate::fleet::Member;
use crate::manifest::held::Place;
use crate::roster::duration;

/// How long one question to an agent waits; progress is told at least this often.
const ROUND: Duration = Duration::from_secs(1);

/// Most lines that are drawn on a terminal.
const MOST_LINES: usize = 30;

/// Cells of a bar.
const BAR_CELLS: u64 = 20;

/// One object at one agent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Target {
    pub(crate) object: ObjectRef,
    pub(crate) place: Place,
    pub(crate) name: String,
}

/// How an object gets on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Standing {
    done: bool,
    word: String,
    reason: String,
    /// How far long work on it is, 0 to 100.
    percent: Option<u64>,
}

/// What came of waiting.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    /// Objects that were not there in time, with the reason.
    pub(crate) late: BTreeMap<Target, String>,
    /// Those that settled, as the agents tell.
    pub(crate) settled: BTreeMap<Target, Settled>,
}

impl Outcome {
    /// 0 when all are there, else 3.
    pub(crate) fn exit(&self) -> Exit {
        if self.late.is_empty() { Exit::Well } else { Exit::NotWell }
    }
}

/// Waits until every target meets the condition, or the time is over.
///
/// # Errors
///
/// An agent refuses to be asked. One that is away for a while is asked again.
pub(crate) async fn watch(
    members: &[Member],
    targets: Vec<Target>,
    condition: Condition,
    limit: Duration,
    console: &mut Console,
) -> Result<Outcome> {
    let start = Instant::now();
    let mut board = Board::new(&targets, condition, console.is_live());
    let mut by_place: BTreeMap<Place, BTreeSet<Target>> = BTreeMap::new();
    for target in targets {
        by_place.entry(target.place.clone()).or_default().insert(target);
    }
    let mut outcome = Outcome::default();
    let client = |place: &Place| {
        members
            .iter()
            .find(|it| it.row.agent == place.agent && it.row.host == place.host)
            .map(|it| it.client.clone())
    };
    let mut rounds = FuturesUnordered::new();
    for (place, waiting) in by_place {
        match client(&place) {
            Some(client) => rounds.push(round(client, place, waiting, condition, start + limit)),
            None => {
                for target in waiting {
                    outcome.late.insert(target, format!("{place} is not there"));
                }
            }
        }
    }
    board.draw(console, start.elapsed());
    while let Some((client, place, mut waiting, answer)) = rounds.next().await {
        match answer? {
            Answer::Met(settled) => {
                for one in settled {
                    let Some(target) = waiting.iter().find(|it| it.object == one.object) else {
                        continue;
                    };
                    board.done(target, &one);
                    outcome.settled.insert(target.clone(), one);
                }
                waiting.clear();
            }
            Answer::NotYet(still) => {
                let reasons: BTreeMap<ObjectRef, Waiting> =
                    still.into_iter().map(|it| (it.object, it)).collect();
                waiting.retain(|target| match reasons.get(&target.object) {
                    Some(why) => {
                        board.still(target, why);
                        true
                    }
                    None => {
                        let settled = Settled { object: target.object, status: None };
                        board.done(target, &settled);
                        outcome.settled.insert(target.clone(), settled);
                        false
                    }
                });
            }
            Answer::Away(reason) => {
                for target in &waiting {
                    board.away(target, &reason);
                }
            }
        }
        board.draw(console, start.elapsed());
        if waiting.is_empty() {
            continue;
        }
        if start.elapsed() >= limit {
            for target in waiting {
                let reason = board.reason(&target);
                outcome.late.insert(target, reason);
            }
            continue;
        }
        rounds.push(round(client, place, waiting, condition, start + limit));
    }
    board.finish(console);
    for (target, reason) in &outcome.late {
        let Target { object, place, name } = target;
        console.note(&format!(
            "agentctl: {} {name} on {} is not {} after {}: {reason}",
            object.kind,
            place.host,
            word(condition),
            duration(i64::try_from(limit.as_secs()).unwrap_or(i64::MAX)),
        ));
    }
    Ok(outcome)
}

enum Answer {
    Met(Vec<Settled>),
    NotYet(Vec<Waiting>),
    Away(String),
}

/// Asks one agent once.
async fn round(
    client: AgentClient,
    place: Place,
    waiting: BTreeSet<Target>,
    condition: Condition,
    end: Instant,
) -> (AgentClient, Place, BTreeSet<Target>, Result<Answer>) {
    let objects: Vec<ObjectRef> = waiting.iter().map(|target| target.object).collect();
    let left = end.saturating_duration_since(Instant::now());
    let answer = match client.wait(&objects, condition, ROUND.min(left)).await {
        Ok(settled) => Ok(Answer::Met(settled)),
        Err(ClientError::Refused(refused)) if refused.code == ErrorCode::Timeout => {
            Ok(Answer::NotYet(refused.waiting))
        }
        Err(ClientError::Bus(error)) if error.is_transient() => {
            // Asked at once, an agent that is away would be asked without end.
            tokio::time::sleep(ROUND.min(left)).await;
            Ok(Answer::Away(error.to_string()))
        }
        Err(error) => {
            let context = format!("cannot wait for objects of {place}");
            Err(anyhow::Error::new(error).context(context))
        }
    };
    (client, place, waiting, answer)
}

/// The lines, and what was drawn of them.
struct Board {
    lines: BTreeMap<Target, Standing>,
    condition: Condition,
    live: bool,
    drawn: usize,
    changed: BTreeSet<Target>,
}

impl Board {
    fn new(targets: &[Target], condition: Condition, live: bool) -> Self {
        let standing =
            Standing { done: false, word: "waiting".into(), reason: String::new(), percent: None };
        Self {
            lines: targets.iter().map(|target| (target.clone(), standing.clone())).collect(),
            condition,
            live,
            drawn: 0,
            changed: BTreeSet::new(),
        }
    }

    fn set(&mut self, target: &Target, standing: Standing) {
        if self.lines.get(target) != Some(&standing) {
            self.lines.insert(target.clone(), standing);
            self.changed.insert(target.clone());
        }
    }

    fn done(&mut self, target: &Target, settled: &Settled) {
        let (text, reason) = match (&settled.status, self.condition) {
            (Some(status), _) => (status.state.as_str(), status.reason.clone().unwrap_or_default()),
            (None, Condition::Active | Condition::Done) => ("active", String::new()),
            (None, _) => ("gone", String::new()),
        };
        self.set(target, Standing { done: true, word: text.into(), reason, percent: None });
    }

    fn still(&mut self, target: &Target, why: &Waiting) {
        let state = why.state.unwrap_or(State::Pending);
        let (word, reason) = (state.as_str().into(), why.reason.clone());
        self.set(target, Standing { done: false, word, reason, percent: why.progress_percent });
    }

    fn away(&mut self, target: &Target, reason: &str) {
        let (word, reason) = ("unknown".into(), reason.into());
        self.set(target, Standing { done: false, word, reason, percent: None });
    }

    fn reason(&self, target: &Target) -> String {
        let standing = self.lines.get(target);
        standing.map_or_else(String::new, |it| match it.reason.as_str() {
            "" => it.word.clone(),
            reason => reason.to_owned(),
        })
    }

    /// Tells what changed.
    fn draw(&mut self, console: &mut Console, elapsed: Duration) {
        if !self.live {
            for target in std::mem::take(&mut self.changed) {
                if let Some(standing) = self.lines.get(&target) {
                    let line = line(&target, standing);
                    console.note(&format!("[{:>5.1}s] {line}", elapsed.as_secs_f64()));
                }
            }
            return;
        }
        let mut text = self.erase();
        let open: Vec<_> = self.lines.iter().filter(|(_, standing)| !standing.done).collect();
        let done = self.lines.len() - open.len();
        text.push_str(&format!(
            "{done} of {} {} ({:.0} s)\n",
            self.lines.len(),
            word(self.condition),
            elapsed.as_secs_f64()
        ));
        for (target, standing) in open.iter().take(MOST_LINES) {
            let bar = standing.percent.map(bar).unwrap_or_default();
            text.push_str(&format!(
                "  {}\n",
                cut(&format!("{bar}{}", line(target, standing)), 110)
            ));
        }
        self.drawn = 1 + open.len().min(MOST_LINES);
        console.draw(&text);
    }

    /// Removes what was drawn, where it was drawn on a terminal.
    fn finish(&mut self, console: &mut Console) {
        if self.live {
            let text = self.erase();
            console.draw(&text);
        }
        self.drawn = 0;
    }

    fn erase(&self) -> String {
        match self.drawn {
            0 => String::new(),
            lines => format!("\u{1b}[{lines}A\u{1b}[J"),
        }
    }
}

fn line(target: &Target, standing: &Standing) -> String {
    let Target { object, place, name } = target;
    let reason = match standing.reason.as_str() {
        "" => String::new(),
        reason => format!(": {reason}"),
    };
    tame(&format!("{} {name} on {}: {}{reason}", object.kind, place.host, standing.word))
}

/// How far work is, drawn.
fn bar(percent: u64) -> String {
    let full = percent.min(100) * BAR_CELLS / 100;
    (0..BAR_CELLS).map(|cell| if cell < full { '█' } else { '░' }).chain([' ']).collect()
}

fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

fn word(condition: Condition) -> &'static str {
    match condition {
        Condition::Active => "active",
        Condition::Gone => "gone",
        Condition::Settled => "settled",
        Condition::Done => "done",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_full_as_the_work_is_done_and_never_longer() {
        for (percent, full) in [(0, 0), (4, 0), (5, 1), (50, 10), (99, 19), (100, 20), (250, 20)] {
            let bar = bar(percent);
            assert_eq!(bar.chars().count(), 21, "{bar}");
            assert_eq!(bar.chars().filter(|&cell| cell == '█').count(), full, "{bar}");
        }
    }
}
