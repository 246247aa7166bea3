//! Which QEMUs owe an answer.
//!
//! A QEMU that does not answer holds the thread that asked, here and in libvirtd, for as long as it
//! likes. So it is asked nothing more meanwhile, and few may hold threads at once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use uuid::Uuid;

/// Most questions that are open at once. Each holds one of libvirtd's twenty threads.
const MOST: usize = 6;

/// The QEMUs that were asked and have not answered yet.
#[derive(Clone, Debug)]
pub(super) struct Owing {
    places: Arc<Semaphore>,
    /// Whether each is late.
    debtors: Arc<Mutex<BTreeMap<Uuid, bool>>>,
}

/// A question that is open until this is dropped.
#[derive(Debug)]
pub(super) struct Open {
    owing: Owing,
    id: Uuid,
    /// None while others hold all places.
    place: Option<OwnedSemaphorePermit>,
}

/// Why a question cannot be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It has not answered the last one.
    OwesAnswer,
    /// So many others have not for long that there is no place.
    OthersOwe(usize),
}

impl Owing {
    /// Nobody owes anything.
    pub(super) fn new() -> Self {
        Self { places: Arc::new(Semaphore::new(MOST)), debtors: Arc::default() }
    }

    /// Opens a question to a QEMU, as soon as there is a place for it.
    pub(super) async fn open(&self, id: Uuid) -> Result<Open, Refusal> {
        {
            let mut debtors = self.debtors();
            let late = debtors.values().filter(|late| **late).count();
            if debtors.contains_key(&id) {
                return Err(Refusal::OwesAnswer);
            }
            if late >= MOST {
                return Err(Refusal::OthersOwe(late));
            }
            debtors.insert(id, false);
        }
        let mut open = Open { owing: self.clone(), id, place: None };
        // It is never closed.
        open.place = Arc::clone(&self.places).acquire_owned().await.ok();
        Ok(open)
    }

    /// Nobody waits any more for the answer of a QEMU, should it still owe it.
    pub(super) fn is_late(&self, id: Uuid) {
        if let Some(late) = self.debtors().get_mut(&id) {
            *late = true;
        }
    }

    fn debtors(&self) -> MutexGuard<'_, BTreeMap<Uuid, bool>> {
        self.debtors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.owing.debtors().remove(&self.id);
        drop(self.place.take());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_that_owes_an_answer_is_asked_nothing_and_few_owe_one() {
        let owing = Owing::new();
        let id = Uuid::from_u128;
        let mut open = Vec::new();
        for number in 1..=6 {
            open.push(owing.open(id(number)).await.unwrap());
        }
        assert_eq!(owing.open(id(1)).await.unwrap_err(), Refusal::OwesAnswer);
        // The others may answer any moment.
        let wait = async |number| timeout(Duration::from_secs(1), owing.open(id(number))).await;
        assert!(wait(7).await.is_err());
        open.remove(0);
        open.push(wait(7).await.unwrap().unwrap());
        // Six that are late hold all places until one of them answers.
        for number in 2..=7 {
            owing.is_late(id(number));
        }
        assert_eq!(owing.open(id(8)).await.unwrap_err(), Refusal::OthersOwe(6));
        assert_eq!(owing.open(id(2)).await.unwrap_err(), Refusal::OwesAnswer);
        open.remove(0);
        open.push(owing.open(id(2)).await.unwrap());
        owing.is_late(id(1));
        assert_eq!(owing.debtors().len(), 6, "one that answered is not late");
    }
}
