//! The servers of one kind: a task for each site, kept across passes.
//!
//! A server survives passes: a new table is handed to the running task. It is opened anew only
//! when its namespace, its link or the addresses that it listens on are others.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::libc;
use stackhand_kernel::{KernelError, Netns, NetnsId};
use stackhand_model::MacAddr;
use stackhand_runtime::metrics::Reading;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::l2::At;

/// How often sockets are tried to be opened where others were closed just now, once in 10 ms.
const PATIENCE: u32 = 200;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) at: At,
    /// Tells a namespace from one of the same name that came before.
    space: NetnsId,
    /// The link's number.
    pub(super) index: u32,
    /// The link's Ethernet address.
    pub(super) mac: MacAddr,
}

/// A kind of server. The value is what all servers of the kind share: counters and limits.
pub(super) trait Service: Send + Sync + 'static {
    /// What it is called in messages.
    const ACTION: &'static str;
    /// What a server tells.
    type Table: PartialEq + Send + Sync + 'static;
    /// What its sockets depend on besides the place.
    type Binding: PartialEq + Clone + Send + 'static;
    /// What it listens with.
    type Sockets: Send + 'static;

    fn binding(table: &Self::Table) -> Self::Binding;

    /// Opens the sockets; runs on a thread inside the namespace.
    fn open(place: &Place, binding: &Self::Binding) -> io::Result<Self::Sockets>;

    /// Serves until it is dropped.
    fn run(
        self: Arc<Self>,
        place: Place,
        sockets: Self::Sockets,
        table: watch::Receiver<Arc<Self::Table>>,
    ) -> impl Future<Output = ()> + Send;
}

/// A counter that all servers of a kind share, for `/metrics`.
pub(super) fn counter<S: Send + Sync + 'static>(
    shared: &Arc<S>,
    name: &'static str,
    help: &'static str,
    read: fn(&S) -> &AtomicU64,
) -> Reading {
    let shared = Arc::clone(shared);
    Reading::counter(name, help, move || read(&shared).load(Ordering::Relaxed))
}

struct Running<S: Service> {
    place: Place,
    binding: S::Binding,
    table: watch::Sender<Arc<S::Table>>,
    task: JoinHandle<()>,
}

impl<S: Service> Drop for Running<S> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The servers of one kind.
pub(super) struct Fleet<S: Service> {
    shared: Arc<S>,
    running: BTreeMap<At, Running<S>>,
}

impl<S: Service> std::fmt::Debug for Fleet<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.running.keys()).finish()
    }
}

impl<S: Service> Fleet<S> {
    pub(super) fn new(shared: S) -> Self {
        Self { shared: Arc::new(shared), running: BTreeMap::new() }
    }

    pub(super) fn shared(&self) -> &Arc<S> {
        &self.shared
    }

    /// How many servers run.
    pub(super) fn len(&self) -> usize {
        self.running.len()
    }

    /// Stops the servers that are not to be kept.
    pub(super) fn retain(&mut self, keep: impl Fn(&At) -> bool) {
        self.running.retain(|at, _| keep(at));
    }

    /// Makes the server at a link be as wanted. A task is started anew only if it has to be.
    pub(super) async fn serve(
        &mut self,
        at: &At,
        (id, index, mac): (NetnsId, u32, MacAddr),
        table: Option<&Arc<S::Table>>,
    ) -> Result<(), KernelError> {
        let (Some(table), Some(name)) = (table, &at.space) else { return Ok(()) };
        let place = Place { at: at.clone(), space: id, index, mac };
        let binding = S::binding(table);
        if let Some(server) = self.running.get(at)
            && server.place == place
            && server.binding == binding
            && !server.task.is_finished()
        {
            server.table.send_if_modified(|known| {
                let changed = **known != **table;
                if changed {
                    *known = Arc::clone(table);
                }
                changed
            });
            return Ok(());
        }
        let space = Netns::named(name)?;
        let replaced = self.running.remove(at).is_some();
        let mut patience = if replaced { PATIENCE } else { 0 };
        let sockets = loop {
            let (here, bound) = (place.clone(), binding.clone());
            match space.inside(S::ACTION, move || S::open(&here, &bound)).await {
                // The tasks of the one before are ended and let go of its sockets when they are told.
                Err(error) if patience > 0 && error.errno() == Some(libc::EADDRINUSE) => {
                    patience -= 1;
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(error) if error.errno() == Some(libc::EADDRINUSE) => {
                    return Err(taken(S::ACTION, name));
                }
                opened => break opened?,
            }
        };
        let (told, table) = watch::channel(Arc::clone(table));
        let task = tokio::spawn(Arc::clone(&self.shared).run(place.clone(), sockets, table));
        self.running.insert(at.clone(), Running { place, binding, table: told, task });
        Ok(())
    }
}

/// What to say where somebody else's server has the place.
fn taken(action: &'static str, space: &str) -> KernelError {
    let source = io::Error::other(format!(
        "another program serves there; if it is one that OpenStack's agents start, disable that agent \
         and end what it left: ip netns pids {space} | xargs kill"
    ));
    KernelError::Namespace { action, namespace: space.to_owned(), source }
}

/// Refuses a UDP port that another program has in the calling thread's namespace: DHCP servers may
/// share theirs, and all would answer. `family` names the kernel's list of sockets.
pub(super) fn alone_on(family: &str, port: u16) -> io::Result<()> {
    match std::fs::read_to_string(format!("/proc/thread-self/net/{family}")) {
        Ok(sockets) if has(&sockets, port) => Err(io::Error::from_raw_os_error(libc::EADDRINUSE)),
        // A kernel without the family.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn has(sockets: &str, port: u16) -> bool {
    let ending = format!(":{port:04X}");
    let mut locals = sockets.lines().filter_map(|line| line.split_whitespace().nth(1));
    locals.any(|local| local.ends_with(&ending))
}

#[cfg(test)]
mod tests {
    use super::has;

    #[test]
    fn a_server_is_known_by_its_port_and_a_client_is_none() {
        let head = "   sl  local_address rem_address   st tx_queue rx_queue\n";
        let socket = |port: &str| format!("{head}  412: 00000000:{port} 00000000:0000 07 0:0\n");
        assert!(has(&socket("0043"), 67) && has(&socket("0223"), 547));
        assert!(!has(&socket("0044"), 67) && !has(head, 67));
    }
}
