//! Counts what instances use, such that no count takes long and no guest holds up the others'.
//!
//! What the kernel counts of all instances comes in one call. What only a QEMU knows takes several
//! questions over its monitor, milliseconds where processors are slow, and for ever where its
//! storage is away. So QEMUs are asked by turns, those first that were asked longest ago, as many
//! as a pass has time for; the pauses between passes are such that each has had its turn within the
//! interval of the settings. What a QEMU said last stands until it says something new.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use stackhand_model::InstanceId;
use tokio::time::Instant;
use uuid::Uuid;

use crate::hypervisor::{Hypervisor, HypervisorError, QemuAnswer};
use crate::usage::UsageBoard;

/// How long a pass goes on with asking QEMUs.
const BUDGET: Duration = Duration::from_millis(100);

/// Shortest pause between two passes.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);

/// Counts what the instances of a hypervisor use.
#[derive(Debug)]
pub struct Meter<H> {
    hypervisor: Arc<H>,
    board: UsageBoard,
    /// Held while the kernel's counts are taken and posted, so that older never replace newer.
    counting: tokio::sync::Mutex<()>,
    /// Held while QEMUs are asked, so that it is one at a time.
    turns: tokio::sync::Mutex<Turns>,
    silent: Mutex<BTreeSet<Uuid>>,
}

/// When QEMUs were asked last.
type Turns = BTreeMap<Uuid, Instant>;

/// How many QEMUs were asked in a pass, and how many there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Those that were asked.
    pub asked: usize,
    /// All that run.
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
            turns: tokio::sync::Mutex::default(),
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
        let running = self.count().await?;
        self.silent().retain(|id| running.contains(id));
        let Ok(mut turns) = self.turns.try_lock() else {
            return Ok(Asked { asked: 0, all: running.len() });
        };
        turns.retain(|id, _| running.contains(id));
        let begun = Instant::now();
        let mut asked = 0;
        for id in order(&turns, &running) {
            if begun.elapsed() >= BUDGET {
                break;
            }
            self.ask(id, &mut turns).await;
            asked += 1;
        }
        Ok(Asked { asked, all: running.len() })
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
            self.ask(id.0, &mut *self.turns.lock().await).await;
        }
        Ok(self.board.read().get(&id.0).map(|counted| json!(counted.told())))
    }

    /// What to tell people: QEMUs that do not answer.
    #[must_use]
    pub fn troubles(&self) -> Vec<String> {
        let told = |id: &Uuid| {
            format!(
                "the QEMU of instance {id} does not answer: look whether its storage is there, or \
                 reboot it with --hard"
            )
        };
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

    async fn ask(&self, id: Uuid, turns: &mut Turns) {
        match self.hypervisor.qemu_usage(InstanceId(id)).await {
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
        turns.insert(id, Instant::now());
    }

    fn silent(&self) -> MutexGuard<'_, BTreeSet<Uuid>> {
        self.silent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who is asked, one after the other: those that never were, then those that were longest ago.
fn order(turns: &Turns, running: &BTreeSet<Uuid>) -> Vec<Uuid> {
    let mut order: Vec<Uuid> = running.iter().copied().collect();
    order.sort_by_key(|id| turns.get(id).copied());
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Devices, domain_name};
    use crate::hypervisor::fake::{FakeHypervisor, Host};
    use crate::hypervisor::{DomainSeen, KernelUsage, Power, QemuUsage};

    fn id(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    /// A hypervisor on which so many domains run, each of which has used its number of everything.
    fn meter(domains: u128) -> Meter<FakeHypervisor> {
        let hypervisor = FakeHypervisor::default();
        for number in 1..=domains {
            let mut host = FakeHypervisor::host(&hypervisor);
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
            let qemu = QemuUsage { disk_requests: used, ..QemuUsage::default() };
            host.used.insert(id(number), (kernel, qemu));
        }
        Meter::new(Arc::new(hypervisor))
    }

    fn fake(meter: &Meter<FakeHypervisor>) -> MutexGuard<'_, Host> {
        FakeHypervisor::host(&meter.hypervisor)
    }

    fn requests(meter: &Meter<FakeHypervisor>, number: u128) -> Option<u64> {
        let counted = meter.board.read();
        counted[&id(number)].qemu.as_ref().map(|(usage, _)| usage.disk_requests)
    }

    #[tokio::test(start_paused = true)]
    async fn a_pass_asks_all_for_which_there_is_time() {
        let meter = meter(3);
        assert_eq!(meter.pass().await, Ok(Asked { asked: 3, all: 3 }));
        assert_eq!(meter.board.read()[&id(2)].kernel.cpu_nanoseconds, 2);
        assert_eq!(requests(&meter, 2), Some(2));
        assert_eq!(fake(&meter).asked, [id(1), id(2), id(3)]);
    }

    #[tokio::test(start_paused = true)]
    async fn slow_ones_are_asked_by_turns() {
        let meter = meter(7);
        fake(&meter).thinking = BUDGET / 3;
        assert_eq!(meter.pass().await, Ok(Asked { asked: 3, all: 7 }));
        assert_eq!((requests(&meter, 3), requests(&meter, 4)), (Some(3), None));
        assert_eq!(meter.board.read()[&id(7)].kernel.cpu_nanoseconds, 7, "all of what is quick");
        meter.pass().await.unwrap();
        fake(&meter).domains.remove(&id(2));
        meter.pass().await.unwrap();
        let asked = [1, 2, 3, 4, 5, 6, 7, 1, 3].map(id);
        assert_eq!(fake(&meter).asked, asked);
    }

    #[tokio::test(start_paused = true)]
    async fn two_passes_at_once_ask_nobody_twice() {
        let meter = meter(2);
        fake(&meter).thinking = Duration::from_millis(10);
        let (one, other) = tokio::join!(meter.pass(), meter.pass());
        assert_eq!((one.unwrap().asked, other.unwrap().asked), (2, 0));
        assert_eq!(fake(&meter).asked.len(), 2);
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
        meter.pass().await.unwrap();
        assert_eq!(fake(&meter).asked, [1, 2, 3, 4, 1, 2, 3].map(id));
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
        assert_eq!(told["disk_requests"], 1, "{told}");
        assert!(told["qemu_age_ms"].is_u64(), "{told}");
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
        assert_eq!(pause(8, 8), interval);
        assert_eq!(pause(20, 200), Duration::from_secs(3));
        // However slow they are, the processor is not theirs alone.
        assert_eq!((pause(1, 200), pause(0, 200)), (SHORTEST_PAUSE, SHORTEST_PAUSE));
    }
}
