//! Counts what instances use, such that no count takes long and no guest holds up the others'.
//!
//! What the kernel counts of all instances comes in one call. What only a QEMU knows takes a
//! question over its monitor, a millisecond or two where processors are slow, and for ever where
//! its storage is away. So a pass asks QEMUs one question each, some at once, those first that were
//! asked it longest ago, for as long as it has time; if there is time left, it asks the other
//! question, too. The next pass begins with the other one. The pauses between passes are such that
//! every question was asked of every QEMU within the interval of the settings. What a QEMU said
//! last stands until it says something new.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use stackhand_model::InstanceId;
use tokio::time::Instant;
use uuid::Uuid;

use crate::hypervisor::{Hypervisor, HypervisorError, QemuAnswer, Question, SILENT_QEMU_REMEDY};
use crate::usage::UsageBoard;

/// How long a pass goes on with asking QEMUs.
const BUDGET: Duration = Duration::from_millis(190);

/// Most QEMUs that are asked at once.
const AT_ONCE: usize = 6;

/// Shortest pause between two passes.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);

/// Counts what the instances of a hypervisor use.
#[derive(Debug)]
pub struct Meter<H> {
    hypervisor: Arc<H>,
    board: UsageBoard,
    /// Held while the kernel's counts are taken and posted, so that older never replace newer.
    counting: tokio::sync::Mutex<()>,
    /// Held while QEMUs are asked, so that none is asked two things at once.
    turns: tokio::sync::Mutex<Turns>,
    silent: Mutex<BTreeSet<Uuid>>,
}

/// What QEMUs were asked, and when.
#[derive(Debug)]
struct Turns {
    /// When each was asked each question last.
    asked: BTreeMap<(Question, Uuid), Instant>,
    /// What the next pass asks first.
    next: Question,
}

/// How many questions a pass asked, and how many there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Those that were asked.
    pub asked: usize,
    /// All that there are: two for each QEMU.
    pub all: usize,
}

impl Asked {
    /// The pause after the pass, such that all are asked once in `interval`.
    #[must_use]
    pub fn pause(self, interval: Duration) -> Duration {
        let as_u32 = |number| u32::try_from(number).unwrap_or(u32::MAX);
        match self.all {
            0 => interval,
            all => (interval.saturating_mul(as_u32(self.asked)) / as_u32(all)).max(SHORTEST_PAUSE),
        }
    }
}

impl<H: Hypervisor> Meter<H> {
    /// A meter that has not counted yet.
    #[must_use]
    pub fn new(hypervisor: Arc<H>) -> Self {
        Self {
            hypervisor,
            board: UsageBoard::default(),
            counting: tokio::sync::Mutex::default(),
            turns: tokio::sync::Mutex::new(Turns::new()),
            silent: Mutex::default(),
        }
    }

    /// Where the counts are.
    #[must_use]
    pub fn board(&self) -> &UsageBoard {
        &self.board
    }

    /// Counts, and asks as many QEMUs as there is time for. While another pass asks, this one does
    /// not.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away; the last counts stand.
    pub async fn pass(&self) -> Result<Asked, HypervisorError> {
        let Ok(mut turns) = self.turns.try_lock() else {
            return Ok(Asked { asked: 0, all: self.count().await?.len() * 2 });
        };
        let until = Instant::now() + BUDGET;
        let questions = turns.questions();
        // Those that ran at the last count are asked while this one is made.
        let known = self.board.read().into_keys().collect();
        let (counted, asked) =
            tokio::join!(self.count(), self.ask_all(&known, questions, until, &mut turns));
        let running = counted?;
        self.silent().retain(|id| running.contains(id));
        turns.asked.retain(|(_, id), _| running.contains(id));
        let new = running.difference(&known).copied().collect();
        let asked = asked + self.ask_all(&new, questions, until, &mut turns).await;
        Ok(Asked { asked, all: running.len() * 2 })
    }

    /// Asks QEMUs by turns until there is no more time; gives how many questions were asked.
    async fn ask_all(
        &self,
        running: &BTreeSet<Uuid>,
        questions: [Question; 2],
        until: Instant,
        turns: &mut Turns,
    ) -> usize {
        let mut asked = 0;
        for question in questions {
            let order = turns.order(question, running);
            let mut answers = stream::iter(order)
                .take_while(|_| std::future::ready(Instant::now() < until))
                .map(async |id| {
                    self.ask(id, question).await;
                    id
                })
                .buffer_unordered(AT_ONCE);
            while let Some(id) = answers.next().await {
                turns.asked.insert((question, id), Instant::now());
                asked += 1;
            }
        }
        asked
    }

    /// What all instances that are on have used, as JSON by their ids. Counts before.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away.
    pub async fn all(&self) -> Result<Value, HypervisorError> {
        self.pass().await?;
        let all = self.board.read();
        Ok(all.into_iter().map(|(id, counted)| (id.to_string(), json!(counted.told()))).collect())
    }

    /// What one instance has used, as JSON. Counts before, and asks its QEMU.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away; nothing is told of an instance that is off.
    pub async fn one(&self, id: InstanceId) -> Result<Option<Value>, HypervisorError> {
        if self.count().await?.contains(&id.0) {
            let mut turns = self.turns.lock().await;
            for question in [Question::Disks, Question::Memory] {
                self.ask(id.0, question).await;
                turns.asked.insert((question, id.0), Instant::now());
            }
        }
        Ok(self.board.read().get(&id.0).map(|counted| json!(counted.told())))
    }

    /// What to tell people: QEMUs that do not answer.
    #[must_use]
    pub fn troubles(&self) -> Vec<String> {
        let told =
            |id: &Uuid| format!("the QEMU of instance {id} does not answer: {SILENT_QEMU_REMEDY}");
        self.silent().iter().map(told).collect()
    }

    /// Posts what the kernel counts; gives who runs.
    async fn count(&self) -> Result<BTreeSet<Uuid>, HypervisorError> {
        let _counting = self.counting.lock().await;
        let kernel = self.hypervisor.kernel_usage().await?;
        let running = kernel.keys().copied().collect();
        self.board.post(kernel);
        Ok(running)
    }

    async fn ask(&self, id: Uuid, question: Question) {
        match self.hypervisor.qemu_usage(InstanceId(id), question).await {
            Ok(QemuAnswer::Told(usage)) => {
                self.board.post_qemu(id, usage);
                if self.silent().remove(&id) {
                    tracing::info!(instance = %id, "its QEMU answers again");
                }
            }
            // What is under way may be the question to which it owes an answer.
            Ok(QemuAnswer::Busy) => {}
            Ok(QemuAnswer::Silent) => {
                if self.silent().insert(id) {
                    tracing::warn!(instance = %id, "its QEMU does not answer");
                }
            }
            Err(error) => tracing::debug!(%error, "what an instance used"),
        }
    }

    fn silent(&self) -> MutexGuard<'_, BTreeSet<Uuid>> {
        self.silent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turns {
    fn new() -> Self {
        Self { asked: BTreeMap::new(), next: Question::Disks }
    }

    /// What a pass asks, one after the other. The next begins with the other one.
    fn questions(&mut self) -> [Question; 2] {
        let other = match self.next {
            Question::Disks => Question::Memory,
            Question::Memory => Question::Disks,
        };
        [std::mem::replace(&mut self.next, other), other]
    }

    /// Who is asked, one after the other: those that never were, then those that were longest ago.
    fn order(&self, question: Question, running: &BTreeSet<Uuid>) -> Vec<Uuid> {
        let mut order: Vec<Uuid> = running.iter().copied().collect();
        order.sort_by_key(|id| self.asked.get(&(question, *id)).copied());
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Devices, domain_name};
    use crate::hypervisor::fake::{FakeHypervisor, Host};
    use crate::hypervisor::{DiskUsage, DomainSeen, KernelUsage, MemoryUsage, Power};
    use Question::{Disks, Memory};

    fn id(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    /// A hypervisor on which so many domains run, each of which has used its number of everything.
    fn meter(domains: u128) -> Meter<FakeHypervisor> {
        let meter = Meter::new(Arc::new(FakeHypervisor::default()));
        (1..=domains).for_each(|number| add(&meter, number));
        meter
    }

    fn add(meter: &Meter<FakeHypervisor>, number: u128) {
        let mut host = fake(meter);
        host.domains.insert(
            id(number),
            DomainSeen {
                uuid: id(number),
                name: domain_name(InstanceId(id(number))),
                power: Power::Running,
                mark: None,
                running_mark: None,
                vnc_port: None,
                devices: Devices::default(),
                saved: false,
            },
        );
        let used = u64::try_from(number).unwrap();
        let kernel = KernelUsage { cpu_nanoseconds: used, ..KernelUsage::default() };
        let disks = DiskUsage { disk_requests: used, ..DiskUsage::default() };
        let memory = MemoryUsage { memory_resident_kib: used, memory_unused_kib: None };
        host.used.insert(id(number), (kernel, disks, memory));
    }

    fn fake(meter: &Meter<FakeHypervisor>) -> MutexGuard<'_, Host> {
        FakeHypervisor::host(&meter.hypervisor)
    }

    /// What QEMUs were asked since this was looked at last.
    fn asked(meter: &Meter<FakeHypervisor>) -> Vec<(Question, Uuid)> {
        std::mem::take(&mut fake(meter).asked)
    }

    /// One question to each of some QEMUs.
    fn each(
        question: Question,
        numbers: impl IntoIterator<Item = u128>,
    ) -> impl Iterator<Item = (Question, Uuid)> {
        numbers.into_iter().map(move |number| (question, id(number)))
    }

    fn requests(meter: &Meter<FakeHypervisor>, number: u128) -> Option<u64> {
        let counted = meter.board.read();
        counted[&id(number)].disks.as_ref().map(|(usage, _)| usage.disk_requests)
    }

    #[tokio::test(start_paused = true)]
    async fn a_pass_asks_all_for_which_there_is_time() {
        let meter = meter(3);
        assert_eq!(meter.pass().await, Ok(Asked { asked: 6, all: 6 }));
        let counted = &meter.board.read()[&id(2)];
        assert_eq!(counted.kernel.cpu_nanoseconds, 2);
        let (memory, _) = counted.memory.as_ref().unwrap();
        assert_eq!((requests(&meter, 2), memory.memory_resident_kib), (Some(2), 2));
        let all: Vec<_> = each(Disks, 1..=3).chain(each(Memory, 1..=3)).collect();
        assert_eq!(asked(&meter), all);
        // One that is new has its turn in the pass that sees it first.
        add(&meter, 4);
        meter.pass().await.unwrap();
        assert_eq!(requests(&meter, 4), Some(4));
    }

    #[tokio::test(start_paused = true)]
    async fn slow_ones_are_asked_some_at_once_and_by_turns() {
        let (meter, most) = (meter(14), u128::try_from(AT_ONCE).unwrap());
        fake(&meter).thinking = BUDGET * 2 / 3;
        // Two times as many as are asked at once.
        assert_eq!(meter.pass().await, Ok(Asked { asked: 2 * AT_ONCE, all: 28 }));
        assert_eq!(fake(&meter).asked_at_once, AT_ONCE);
        assert_eq!((requests(&meter, 12), requests(&meter, 13)), (Some(12), None));
        assert_eq!(meter.board.read()[&id(14)].kernel.cpu_nanoseconds, 14, "all of what is quick");
        assert!(asked(&meter).into_iter().eq(each(Disks, 1..=2 * most)));
        // The other question, and then who was not asked the first.
        meter.pass().await.unwrap();
        assert!(asked(&meter).into_iter().eq(each(Memory, 1..=2 * most)));
        fake(&meter).domains.remove(&id(2));
        meter.pass().await.unwrap();
        assert!(asked(&meter).into_iter().eq(each(Disks, [13, 14].into_iter().chain(1..=10))));
        // That one is gone was seen by now.
        meter.pass().await.unwrap();
        assert!(asked(&meter).into_iter().eq(each(Memory, [13, 14, 1].into_iter().chain(3..=11))));
    }

    #[tokio::test(start_paused = true)]
    async fn two_passes_at_once_ask_nobody_twice() {
        let meter = meter(2);
        fake(&meter).thinking = Duration::from_millis(10);
        let (one, other) = tokio::join!(meter.pass(), meter.pass());
        assert_eq!((one.unwrap().asked, other.unwrap().asked), (4, 0));
        assert_eq!(asked(&meter).len(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn many_who_ask_for_one_each_are_told_what_its_qemu_says_now() {
        let meter = meter(4);
        fake(&meter).thinking = Duration::from_millis(10);
        let one = async |number| meter.one(InstanceId(id(number))).await.unwrap().unwrap();
        let (first, second, third) = tokio::join!(one(1), one(2), one(3));
        let told = [first, second, third].map(|it| it["disk_requests"].as_u64());
        assert_eq!(told, [Some(1), Some(2), Some(3)]);
        // They had their turns by that.
        asked(&meter);
        meter.pass().await.unwrap();
        let turns: Vec<_> = each(Disks, [4, 1, 2, 3]).chain(each(Memory, [4, 1, 2, 3])).collect();
        assert_eq!(asked(&meter), turns);
    }

    #[tokio::test(start_paused = true)]
    async fn a_qemu_that_does_not_answer_is_told_and_stops_no_other() {
        let meter = meter(3);
        fake(&meter).silent.insert(id(1));
        meter.pass().await.unwrap();
        assert_eq!((requests(&meter, 1), requests(&meter, 3)), (None, Some(3)));
        assert_eq!(meter.troubles().len(), 1);
        assert!(meter.troubles()[0].contains(&id(1).to_string()), "{:?}", meter.troubles());
        // The question is still there: it is busy, and that does not mean that it answers.
        fake(&meter).busy.insert(id(1));
        fake(&meter).silent.clear();
        meter.pass().await.unwrap();
        assert_eq!(meter.troubles().len(), 1);
        fake(&meter).busy.clear();
        meter.pass().await.unwrap();
        assert_eq!((requests(&meter, 1), meter.troubles()), (Some(1), Vec::new()));
        // One that is gone is no trouble.
        fake(&meter).silent.insert(id(2));
        meter.pass().await.unwrap();
        assert_eq!(meter.troubles().len(), 1);
        fake(&meter).domains.remove(&id(2));
        meter.pass().await.unwrap();
        assert_eq!(meter.troubles(), Vec::<String>::new());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_busy_keeps_what_it_said() {
        let meter = meter(1);
        meter.pass().await.unwrap();
        fake(&meter).busy.insert(id(1));
        let told = meter.one(InstanceId(id(1))).await.unwrap().unwrap();
        assert_eq!((&told["disk_requests"], &told["memory_resident_kib"]), (&1.into(), &1.into()));
        assert!(told["disk_age_ms"].is_u64() && told["memory_age_ms"].is_u64(), "{told}");
        assert_eq!(meter.one(InstanceId(id(2))).await, Ok(None), "it does not run");
        fake(&meter).away = true;
        assert!(meter.pass().await.is_err() && meter.all().await.is_err());
        assert_eq!(requests(&meter, 1), Some(1), "the last count stands");
    }

    #[test]
    fn pauses_are_such_that_all_are_asked_in_the_interval() {
        let interval = Duration::from_secs(30);
        let pause = |asked, all| Asked { asked, all }.pause(interval);
        assert_eq!(pause(0, 0), interval);
        assert_eq!(pause(16, 16), interval);
        assert_eq!(pause(200, 400), Duration::from_secs(15));
        // However slow they are, the processor is not theirs alone.
        assert_eq!((pause(1, 400), pause(0, 400)), (SHORTEST_PAUSE, SHORTEST_PAUSE));
    }
}
