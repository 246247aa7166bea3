//! The connections to libvirt.
//!
//! One listens to events, and by it is known whether libvirtd is there. Every call has a connection
//! to itself meanwhile: libvirt's client (9.0 was seen to) may not notice a call that comes while
//! another waits for its answer on the same connection, until libvirtd's next keepalive five seconds
//! later. It asks the loop of the thread that waits to end (`virNetClientIO`), which is lost if that
//! loop is about to begin.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

use super::Notice;
use super::events::Listener;
use crate::hypervisor::HypervisorError;

/// Seconds between keepalives, and how many may go unanswered.
const KEEPALIVE: (i32, u32) = (5, 3);

/// The connections to libvirt at one URI.
pub(super) struct Links {
    uri: String,
    notice: Notice,
    /// Held while the one that listens is opened, which takes as long as libvirtd likes.
    opening: Mutex<()>,
    /// Held for a moment: whoever asks for troubles does not wait for libvirtd.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The one that listens.
    listening: Option<Link>,
    /// Those that no call uses now: as many as there ever were calls at once.
    idle: Vec<Link>,
    /// Why none can be opened, since it was last tried.
    problem: Option<String>,
}

/// A connection and what listens to it; closed when it is dropped.
pub(super) struct Link {
    pub(super) connect: Connect,
    listener: Option<Listener>,
    /// Domains that were on when one was looked for that was not among them.
    running: BTreeMap<Uuid, Domain>,
}

impl Link {
    fn new(connect: Connect, listener: Option<Listener>) -> Self {
        Self { connect, listener, running: BTreeMap::new() }
    }

    /// A domain that is on. Who asks for all of them, one after the other, has libvirtd look for
    /// them once.
    pub(super) fn running(&mut self, id: Uuid) -> Result<&Domain, Error> {
        if !self.running.contains_key(&id) {
            let domains = self.connect.list_all_domains(sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE)?;
            let known = |domain: Domain| Some((domain.get_uuid().ok()?, domain));
            self.running = domains.into_iter().filter_map(known).collect();
        }
        match self.running.entry(id) {
            Entry::Occupied(domain) => Ok(domain.into_mut()),
            // Says what is wrong.
            Entry::Vacant(place) => Ok(place.insert(Domain::lookup_by_uuid(&self.connect, id)?)),
        }
    }

    fn is_alive(&self) -> bool {
        self.connect.is_alive().unwrap_or(false)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(listener) = self.listener.take() {
            listener.end(&self.connect);
        }
        self.running.clear();
        // `Connect` does not close itself. On a dead connection this only frees memory.
        if let Err(error) = self.connect.close() {
            tracing::debug!(%error, "closing a connection to libvirt");
        }
    }
}

impl Links {
    /// To `uri`; none is opened yet.
    pub(super) fn new(uri: &str, notice: Notice) -> Self {
        Self { uri: uri.to_owned(), notice, opening: Mutex::default(), state: Mutex::default() }
    }

    /// Where libvirt is.
    pub(super) fn uri(&self) -> &str {
        &self.uri
    }

    /// Why libvirt cannot be reached, as far as is known without asking.
    pub(super) fn problem(&self) -> Option<String> {
        self.state().problem.clone()
    }

    /// What is said while it cannot be reached.
    pub(super) fn away(&self, reason: &str) -> HypervisorError {
        HypervisorError::Away { uri: self.uri.clone(), reason: reason.to_owned() }
    }

    /// Makes a call, which blocks.
    pub(super) fn call<T>(
        &self,
        action: String,
        call: impl FnOnce(&mut Link) -> Result<T, Error>,
    ) -> Result<T, HypervisorError> {
        let mut link = self.take()?;
        match call(&mut link) {
            Ok(answer) => {
                self.state().idle.push(link);
                Ok(answer)
            }
            Err(error) if link.is_alive() => {
                self.state().idle.push(link);
                Err(HypervisorError::Refused { action, reason: error.message().to_owned() })
            }
            Err(error) => {
                drop(link);
                self.lose_the_dead();
                Err(self.away(error.message()))
            }
        }
    }

    /// Notices that libvirtd went away, or opens connections again if it is back; tells of both.
    pub(super) fn look_after(&self) {
        let (listening, broken) = {
            let state = self.state();
            (state.listening.is_some(), state.problem.is_some())
        };
        // One that was never opened and never asked for is not missed.
        let changed =
            if listening { self.lose_the_dead() } else { broken && self.listen().is_ok() };
        if changed {
            (self.notice)(None);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection for one call.
    fn take(&self) -> Result<Link, HypervisorError> {
        // Before the call, so that nothing that it sees can change without being heard.
        self.listen()?;
        loop {
            let idle = self.state().idle.pop();
            match idle {
                Some(link) if link.is_alive() => return Ok(link),
                Some(_dead) => {}
                None => {
                    let connect = self.connect().map_err(|error| {
                        self.lose_the_dead();
                        self.away(error.message())
                    })?;
                    return Ok(Link::new(connect, None));
                }
            }
        }
    }

    /// Opens the connection that listens, if it is not open.
    fn listen(&self) -> Result<(), HypervisorError> {
        let _opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        if self.state().listening.is_some() {
            return Ok(());
        }
        let connect = self.connect().map_err(|error| {
            self.state().problem = Some(error.message().to_owned());
            self.away(error.message())
        })?;
        let notice = Arc::clone(&self.notice);
        let listener = Listener::begin(&connect, move |uuid| notice(Some(uuid)));
        if listener.is_none() {
            tracing::warn!(uri = self.uri, "libvirt gives no events; changes are seen late");
        }
        let mut state = self.state();
        state.listening = Some(Link::new(connect, listener));
        state.problem = None;
        tracing::info!(uri = self.uri, "connected to libvirt");
        Ok(())
    }

    fn connect(&self) -> Result<Connect, Error> {
        let connect = Connect::open(Some(&self.uri))?;
        // A driver inside our own process has no keepalive.
        let _unsupported = connect.set_keep_alive(KEEPALIVE.0, KEEPALIVE.1);
        Ok(connect)
    }

    /// Gives up the connection that listens if it is dead; tells whether it was.
    fn lose_the_dead(&self) -> bool {
        let lost = {
            let mut state = self.state();
            if state.listening.as_ref().is_none_or(Link::is_alive) {
                return false;
            }
            state.problem = Some("the connection was lost".to_owned());
            (state.listening.take(), std::mem::take(&mut state.idle))
        };
        tracing::warn!(uri = self.uri, "the connection to libvirt was lost");
        drop(lost);
        true
    }
}

impl std::fmt::Debug for Links {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Links").field("uri", &self.uri).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_libvirtd_that_does_not_answer_keeps_nobody_from_telling_troubles() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let uri = format!("qemu:///system?socket={}", socket.display());
        let links = Arc::new(Links::new(&uri, Arc::new(|_| {})));
        let calling = Arc::clone(&links);
        let call = std::thread::spawn(move || calling.call("look".into(), |_| Ok(())));
        // It is taken in and never answered.
        let (taken, _) = listener.accept().unwrap();
        let (sender, told) = mpsc::channel();
        std::thread::spawn(move || sender.send(links.problem()));
        assert_eq!(told.recv_timeout(Duration::from_secs(20)), Ok(None));
        drop((taken, listener));
        let error = call.join().unwrap().unwrap_err();
        assert!(matches!(error, HypervisorError::Away { .. }), "{error}");
    }
}
