//! Which QEMUs owe an answer.
//!
//! A QEMU that does not answer holds the thread that asked, here and in libvirtd, for as long as it
//! likes. So nothing more is asked of it meanwhile, and few may hold threads at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use uuid::Uuid;

use crate::hypervisor::{HypervisorError, SILENT_QEMU_REMEDY};

/// Most questions that are open at once. Each holds one of libvirtd's twenty threads.
const QUESTIONS: usize = 6;

/// Most calls that are left behind, of either kind, when another begins. With the calls at once that is
/// less than the threads of libvirtd.
const LEFT_BEHIND: usize = 10;

/// How long a change waits for what is late. It is gone soon once its QEMU is.
const MOMENT: Duration = Duration::from_secs(1);

/// The QEMUs that were asked and have not answered yet.
#[derive(Clone, Debug)]
pub(super) struct Owing {
    places: Arc<Semaphore>,
    debts: Arc<Mutex<Vec<Arc<Debt>>>>,
    /// Told when something is owed no more.
    paid: Arc<Notify>,
}

/// What a QEMU owes.
#[derive(Debug)]
pub(super) struct Debt {
    id: Uuid,
    /// Nobody waits for it any more.
    late: AtomicBool,
    /// It is the QEMU itself that does not answer.
    silent: AtomicBool,
}

/// A call to a QEMU that is open until this is dropped.
#[derive(Debug)]
pub(super) struct Open {
    owing: Owing,
    debt: Arc<Debt>,
    /// Of a question; none while others hold all places.
    place: Option<OwnedSemaphorePermit>,
}

/// Why a QEMU cannot be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It does not answer.
    Silent,
    /// It is at work on something else.
    Busy,
    /// So many others have owed one for long that there is no place.
    OthersOwe(usize),
}

impl Owing {
    /// Nobody owes anything.
    pub(super) fn new() -> Self {
        Self {
            places: Arc::new(Semaphore::new(QUESTIONS)),
            debts: Arc::default(),
            paid: Arc::default(),
        }
    }

    /// Opens a question, as soon as there is a place for it, to a QEMU of which nothing else is
    /// asked.
    pub(super) async fn question(&self, id: Uuid) -> Result<Open, Refusal> {
        let mut open = self.open(id, QUESTIONS, true)?;
        // It is never closed.
        open.place = Arc::clone(&self.places).acquire_owned().await.ok();
        Ok(open)
    }

    /// Begins a change by a QEMU that is not silent.
    pub(super) async fn change(&self, id: Uuid) -> Result<Open, Refusal> {
        let opened = async {
            loop {
                let paid = self.paid.notified();
                match self.open(id, LEFT_BEHIND, false) {
                    Err(Refusal::Silent) => paid.await,
                    other => return other,
                }
            }
        };
        timeout(MOMENT, opened).await.unwrap_or(Err(Refusal::Silent))
    }

    fn open(&self, id: Uuid, most: usize, alone: bool) -> Result<Open, Refusal> {
        let mut debts = self.debts();
        let own: Vec<_> = debts.iter().filter(|debt| debt.id == id).collect();
        if own.iter().any(|debt| debt.silent.load(Ordering::Relaxed)) {
            return Err(Refusal::Silent);
        }
        if alone && !own.is_empty() {
            return Err(Refusal::Busy);
        }
        let late = debts.iter().filter(|debt| debt.late.load(Ordering::Relaxed)).count();
        if late >= most {
            return Err(Refusal::OthersOwe(late));
        }
        let debt = Arc::new(Debt { id, late: false.into(), silent: false.into() });
        debts.push(Arc::clone(&debt));
        Ok(Open { owing: self.clone(), debt, place: None })
    }

    fn debts(&self) -> MutexGuard<'_, Vec<Arc<Debt>>> {
        self.debts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Debt {
    /// Nobody waits for the answer any more; whether it is the QEMU itself that does not answer.
    pub(super) fn leave_behind(&self, silent: bool) {
        self.late.store(true, Ordering::Relaxed);
        self.silent.store(silent, Ordering::Relaxed);
    }
}

impl Open {
    /// What is owed.
    pub(super) fn debt(&self) -> Arc<Debt> {
        Arc::clone(&self.debt)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.owing.debts().retain(|debt| !Arc::ptr_eq(debt, &self.debt));
        drop(self.place.take());
        self.owing.paid.notify_waiters();
    }
}

/// What people are told.
pub(super) fn refused(action: String, refusal: Refusal) -> HypervisorError {
    let reason = match refusal {
        Refusal::Silent => format!("its QEMU does not answer: {SILENT_QEMU_REMEDY}"),
        Refusal::Busy => "something else is being done with it".to_owned(),
        Refusal::OthersOwe(late) => {
            format!("{late} other QEMUs do not answer (see `agentctl list`), and hold all places")
        }
    };
    HypervisorError::Refused { action, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: usize) -> Uuid {
        Uuid::from_u128(u128::try_from(number).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_owes_an_answer_is_asked_nothing_and_few_owe_one() {
        let owing = Owing::new();
        let mut open = Vec::new();
        for number in 1..=QUESTIONS {
            open.push(owing.question(id(number)).await.unwrap());
        }
        assert_eq!(owing.question(id(1)).await.unwrap_err(), Refusal::Busy);
        // The others may answer any moment.
        let wait = async |number| timeout(Duration::from_secs(1), owing.question(id(number))).await;
        assert!(wait(7).await.is_err());
        open.remove(0);
        open.push(wait(7).await.unwrap().unwrap());
        // Those that are late hold all places until one of them answers.
        open.iter().for_each(|open| open.debt().leave_behind(false));
        assert_eq!(owing.question(id(8)).await.unwrap_err(), Refusal::OthersOwe(QUESTIONS));
        assert_eq!(owing.question(id(2)).await.unwrap_err(), Refusal::Busy);
        open.remove(0);
        owing.question(id(2)).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_waits_for_questions_and_no_longer_than_a_moment_for_a_silent_qemu() {
        let owing = Owing::new();
        let question = owing.question(id(1)).await.unwrap();
        drop(owing.change(id(1)).await.unwrap());
        question.debt().leave_behind(false);
        drop(owing.change(id(1)).await.unwrap());
        question.debt().leave_behind(true);
        assert_eq!(owing.change(id(1)).await.unwrap_err(), Refusal::Silent);
        assert_eq!(owing.question(id(1)).await.unwrap_err(), Refusal::Silent);
        let answered = async { drop(question) };
        let (change, ()) = tokio::join!(owing.change(id(1)), answered);
        assert_eq!(owing.question(id(1)).await.unwrap_err(), Refusal::Busy);
        drop(change.unwrap());
        owing.question(id(1)).await.unwrap();

        // Changes of others go on beyond the limit of questions, and have one of their own.
        let mut open = Vec::new();
        for number in 1..=LEFT_BEHIND {
            open.push(owing.change(id(number)).await.unwrap());
            open[number - 1].debt().leave_behind(true);
        }
        assert_eq!(owing.change(id(99)).await.unwrap_err(), Refusal::OthersOwe(LEFT_BEHIND));
        drop(open);
        owing.change(id(99)).await.unwrap();
    }
}
