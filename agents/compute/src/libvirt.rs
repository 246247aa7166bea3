//! The real hypervisor. Nothing outside this folder knows libvirt's types.
//!
//! Every call blocks, so calls run on threads for that, a bounded number at a time. One thread
//! runs libvirt's event loop for the whole process; without it there are neither events nor
//! keepalives. Connections that are lost (libvirtd restarts) are opened again; guests run on
//! meanwhile.

mod calls;
mod console;
mod events;
mod host;
mod links;
mod logs;
mod owing;
mod perform;
mod probe;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use stackhand_model::InstanceId;
use tokio::sync::{Semaphore, mpsc};
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};
use virt::stream::Stream;
use virt::sys;

use crate::domain::{Engine, read};
use crate::hypervisor::{
    DomainChange, DomainSeen, HostFacts, Hypervisor, HypervisorError, KernelUsage, OffReason,
    Power, QemuAnswer, QemuUsage, Question, Screenshot, Stall,
};
use links::{Link, Links};
use owing::{Owing, Refusal};

/// Most calls at once: more than there are questions to QEMUs. A libvirtd has twenty threads for the
/// calls of all its clients.
const CALLS_AT_ONCE: usize = 8;

/// How long a QEMU is waited for that is asked what it used.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a QEMU may keep a change waiting, such as for a volume that is to be opened.
const LONG_PATIENCE: Duration = Duration::from_secs(30);

/// How often a lost connection is tried again, and a silent one is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How often a copy is looked at.
const COPY_EVERY: Duration = Duration::from_millis(100);

/// Most bytes of a picture: four bytes for each point of a large screen.
const MOST_SCREENSHOT: usize = 64 << 20;

/// Told about a domain whose state changed; about no domain in particular if `None`.
pub type Notice = Arc<dyn Fn(Option<Uuid>) + Send + Sync>;

/// libvirt at one URI. Clones share the connections.
#[derive(Clone, Debug)]
pub struct Libvirt {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    links: Links,
    turns: Semaphore,
    owing: Owing,
}

impl Libvirt {
    /// libvirt at `uri`, such as `qemu:///system`. Connects at the first call, and keeps trying
    /// until the process ends or all clones are dropped. Must be called inside a runtime.
    ///
    /// # Errors
    ///
    /// Fails if libvirt's event loop cannot be started.
    pub fn new(uri: &str, notice: Notice) -> Result<Self, HypervisorError> {
        let links = Links::new(uri, notice);
        events::start_loop().map_err(|reason| links.away(&reason))?;
        let shared =
            Arc::new(Shared { links, turns: Semaphore::new(CALLS_AT_ONCE), owing: Owing::new() });
        tokio::spawn(watch(Arc::downgrade(&shared)));
        Ok(Self { shared })
    }

    /// Runs the probe guest on `engine`, with its files in `folder`.
    ///
    /// # Errors
    ///
    /// Tells why it did not run.
    pub async fn probe(&self, folder: &Path, engine: Engine) -> Result<(), HypervisorError> {
        probe::run(self, folder, engine).await
    }

    /// Runs `call` on a thread that may block.
    async fn call<T: Send + 'static>(
        &self,
        action: String,
        call: impl FnOnce(&Connect) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, HypervisorError> {
        self.call_on(action, move |link| call(&link.connect)).await
    }

    /// The same for a call that looks for domains that are on.
    async fn call_on<T: Send + 'static>(
        &self,
        action: String,
        call: impl FnOnce(&mut Link) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, HypervisorError> {
        let Ok(_turn) = self.shared.turns.acquire().await else {
            return Err(HypervisorError::Refused { action, reason: "the agent is ending".into() });
        };
        self.call_now(action, call).await
    }

    /// The same for a short call that waits for no turn.
    async fn call_now<T: Send + 'static>(
        &self,
        action: String,
        call: impl FnOnce(&mut Link) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, HypervisorError> {
        let (shared, told) = (Arc::clone(&self.shared), action.clone());
        // A panic of the bindings ends up in the handle instead of ending the agent.
        let handle = tokio::task::spawn_blocking(move || shared.links.call(told, call));
        handle.await.unwrap_or_else(|error| {
            let reason = format!("the call broke off: {error}");
            Err(HypervisorError::Refused { action, reason })
        })
    }

    /// Makes a call by a domain's QEMU: waits for as long as that answers, and asks nothing of one
    /// that owes an answer.
    async fn call_qemu<T: Send + 'static>(
        &self,
        id: InstanceId,
        action: String,
        call: impl FnOnce(&Connect) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, HypervisorError> {
        let refused = |refusal| owing::refused(action.clone(), refusal);
        let open = self.shared.owing.change(id.0).await.map_err(refused)?;
        let debt = open.debt();
        let called = self.call(action.clone(), move |connect| {
            // Until it is done, however long nobody waits for it any more.
            let _open = open;
            call(connect)
        });
        tokio::pin!(called);
        loop {
            if let Ok(done) = tokio::time::timeout(LONG_PATIENCE, &mut called).await {
                return done;
            }
            if self.is_silent(id, LONG_PATIENCE).await {
                debt.leave_behind(true);
                return Err(refused(Refusal::Silent));
            }
        }
    }

    /// Whether a domain's QEMU, which was waited for for so long, has not answered for most of that.
    /// Else it is another change of the domain that is waited for, or libvirtd, or a long work.
    async fn is_silent(&self, id: InstanceId, waited: Duration) -> bool {
        let action = format!("look at the QEMU of domain {id}");
        // Those that wait for silent QEMUs may have all turns.
        let unanswered = self.call_now(action, move |link| {
            calls::unanswered(&Domain::lookup_by_uuid(&link.connect, id.0)?)
        });
        let since = tokio::time::timeout(PATIENCE, unanswered).await;
        matches!(since, Ok(Ok(Some(since))) if since >= waited / 2)
    }
}

/// Asks a domain's QEMU.
fn ask(domain: &Domain, question: Question) -> Result<QemuAnswer, Error> {
    Ok(match question {
        // Of all disks together.
        Question::Disks => {
            let disks = host::disk_usage(&domain.get_block_stats("")?);
            QemuAnswer::Told(QemuUsage::Disks(disks))
        }
        Question::Memory => match host::memory_usage(&domain.memory_stats(0)?) {
            Some(memory) => QemuAnswer::Told(QemuUsage::Memory(memory)),
            None => QemuAnswer::Busy,
        },
    })
}

/// Notices that libvirtd went away, or came back, when nobody calls.
async fn watch(shared: std::sync::Weak<Shared>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let Some(shared) = shared.upgrade() else { return };
        if let Err(error) = tokio::task::spawn_blocking(move || shared.links.look_after()).await {
            tracing::warn!(%error, "looking after the connections to libvirt");
        }
    }
}

impl Hypervisor for Libvirt {
    async fn domains(&self) -> Result<Vec<DomainSeen>, HypervisorError> {
        self.call("list domains".into(), |connect| {
            let mut seen = Vec::new();
            for domain in connect.list_all_domains(0)? {
                match look(&domain) {
                    Ok(found) => seen.push(found),
                    // It went away since the list was made.
                    Err(error) if error.code() == ErrorNumber::NoDomain => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(seen)
        })
        .await
    }

    async fn perform(&self, id: InstanceId, change: DomainChange) -> Result<(), HypervisorError> {
        let action = format!("{change} ({id})");
        let by_qemu = perform::is_by_qemu(&change);
        let perform = move |connect: &Connect| perform::perform(connect, id, change);
        if by_qemu {
            self.call_qemu(id, action, perform).await
        } else {
            self.call(action, perform).await
        }
    }

    async fn host(&self) -> Result<HostFacts, HypervisorError> {
        self.call("look at the host".into(), |connect| {
            let node = connect.get_node_info()?;
            let found = host::capabilities(&connect.get_capabilities()?);
            Ok(HostFacts {
                hypervisor_version: version(connect.get_hyp_version()?),
                libvirt_version: version(connect.get_lib_version()?),
                cpus: node.cpus,
                memory_mib: node.memory / 1024,
                cpu_model: found.cpu_model,
                architecture: found.architecture,
                numa_cells: found.cells,
            })
        })
        .await
    }

    async fn probe_kvm(&self, folder: &Path) -> Result<(), HypervisorError> {
        probe::kvm(self, folder).await
    }

    async fn kernel_usage(&self) -> Result<BTreeMap<Uuid, KernelUsage>, HypervisorError> {
        self.call("count what domains use".into(), |connect| {
            let all = calls::kernel_stats(connect)?.into_iter();
            Ok(all.map(|(id, (info, rest))| (id, host::kernel_usage(info, &rest))).collect())
        })
        .await
    }

    async fn qemu_usage(
        &self,
        id: InstanceId,
        question: Question,
    ) -> Result<QemuAnswer, HypervisorError> {
        let action = format!("ask the QEMU of domain {id} what it used");
        let open = match tokio::time::timeout(PATIENCE, self.shared.owing.question(id.0)).await {
            Ok(Ok(open)) => open,
            Ok(Err(Refusal::Silent)) => return Ok(QemuAnswer::Silent),
            // Or there was no place to ask from.
            Ok(Err(Refusal::Busy)) | Err(_) => return Ok(QemuAnswer::Busy),
            Ok(Err(refusal)) => return Err(owing::refused(action, refusal)),
        };
        let debt = open.debt();
        let answer = self.call_on(action, move |link| {
            // Until there is an answer, however long nobody waits for it any more.
            let _open = open;
            ask(link.running(id.0)?, question)
        });
        if let Ok(answer) = tokio::time::timeout(PATIENCE, answer).await {
            return answer;
        }
        let silent = self.is_silent(id, PATIENCE).await;
        debt.leave_behind(silent);
        Ok(if silent { QemuAnswer::Silent } else { QemuAnswer::Busy })
    }

    async fn xml(&self, id: InstanceId) -> Result<String, HypervisorError> {
        self.call(format!("read the XML of domain {id}"), move |connect| {
            Domain::lookup_by_uuid(connect, id.0)?.get_xml_desc(0)
        })
        .await
    }

    async fn read_log(
        &self,
        path: &Path,
        start: Option<u64>,
        most: u64,
    ) -> Result<(u64, Vec<u8>), HypervisorError> {
        let action = format!("read {}", path.display());
        let folder = path.parent().unwrap_or(path).to_owned();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.call(action, move |connect| logs::read(connect, &folder, &name, start, most)).await
    }

    async fn screenshot(&self, id: InstanceId) -> Result<Screenshot, HypervisorError> {
        self.call_qemu(id, format!("take a picture of domain {id}"), move |connect| {
            let domain = Domain::lookup_by_uuid(connect, id.0)?;
            let stream = Stream::new(connect, 0)?;
            let mime = domain.screenshot(&stream, 0, 0)?;
            let (mut bytes, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
            loop {
                match stream.recv(&mut buffer)? {
                    0 => break,
                    read if bytes.len() + read > MOST_SCREENSHOT => break,
                    read => bytes.extend_from_slice(&buffer[..read]),
                }
            }
            // What came is there, whatever libvirt says of the end.
            let _ended = stream.finish();
            Ok(Screenshot { mime, bytes })
        })
        .await
    }

    async fn open_console(
        &self,
        id: InstanceId,
        output: mpsc::Sender<Vec<u8>>,
    ) -> Result<mpsc::Sender<Vec<u8>>, HypervisorError> {
        let uri = self.shared.links.uri().to_owned();
        let action = format!("open the console of domain {id}");
        self.call(action, move |_| console::open(&uri, id, output)).await
    }

    async fn copy_disk(
        &self,
        id: InstanceId,
        disk: &str,
        target: &Path,
    ) -> Result<(), HypervisorError> {
        let action = format!("copy disk {disk} of domain {id}");
        let xml = perform::backup_xml(disk, target);
        let begin = move |connect: &Connect| {
            calls::begin_backup(&Domain::lookup_by_uuid(connect, id.0)?, &xml)
        };
        self.call_qemu(id, action.clone(), begin).await?;
        let looked = action.clone();
        // Dropped before its end, for whatever reason, it leaves the copy to `abort_copy`.
        while self
            .call_qemu(id, looked.clone(), move |connect| {
                calls::job(&Domain::lookup_by_uuid(connect, id.0)?, false)
            })
            .await?
            != sys::VIR_DOMAIN_JOB_NONE
        {
            tokio::time::sleep(COPY_EVERY).await;
        }
        let ended = self.call_qemu(id, looked, move |connect| {
            calls::job(&Domain::lookup_by_uuid(connect, id.0)?, true)
        });
        match ended.await? {
            sys::VIR_DOMAIN_JOB_COMPLETED => Ok(()),
            kind => Err(HypervisorError::Refused {
                action,
                reason: format!("the copy broke off (job type {kind}): see QEMU's log"),
            }),
        }
    }

    async fn abort_copy(&self, id: InstanceId) -> Result<(), HypervisorError> {
        self.call_qemu(id, format!("end the copy of a disk of domain {id}"), move |connect| {
            let domain = match Domain::lookup_by_uuid(connect, id.0) {
                Err(error) if error.code() == ErrorNumber::NoDomain => return Ok(()),
                domain => domain?,
            };
            if power(domain.get_state()?).is_off()
                || calls::job(&domain, false)? == sys::VIR_DOMAIN_JOB_NONE
            {
                return Ok(());
            }
            calls::abort_job(&domain)
        })
        .await
    }

    fn trouble(&self) -> Option<String> {
        let problem = self.shared.links.problem()?;
        let uri = self.shared.links.uri();
        Some(format!("libvirt at {uri} is away: {problem}; guests run on, start libvirtd"))
    }
}

fn look(domain: &Domain) -> Result<DomainSeen, Error> {
    let power = power(domain.get_state()?);
    let described = |flags| {
        let text = domain.get_xml_desc(flags)?;
        // What cannot be read has no mark, so it is not touched.
        Ok(read(&text).unwrap_or_default())
    };
    let next = described(sys::VIR_DOMAIN_XML_INACTIVE)?;
    let running = match power {
        Power::Off(_) => None,
        Power::Running | Power::Paused | Power::Stalled(_) => Some(described(0)?),
    };
    Ok(DomainSeen {
        uuid: domain.get_uuid()?,
        name: domain.get_name()?,
        power,
        mark: next.mark,
        vnc_port: running.as_ref().and_then(|running| running.vnc_port),
        devices: running.as_ref().map(|running| running.devices.clone()).unwrap_or_default(),
        running_mark: running.and_then(|running| running.mark),
        // Only the drivers that can save say whether they did.
        saved: power.is_off() && domain.has_managed_save(0).unwrap_or(false),
    })
}

fn power((state, reason): (sys::virDomainState, i32)) -> Power {
    match state {
        sys::VIR_DOMAIN_SHUTOFF => Power::Off(match u32::try_from(reason).unwrap_or(0) {
            sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN => OffReason::Shutdown,
            sys::VIR_DOMAIN_SHUTOFF_DESTROYED => OffReason::Destroyed,
            sys::VIR_DOMAIN_SHUTOFF_CRASHED => OffReason::Crashed,
            // One that could not start is tried again, and says why each time.
            _ => OffReason::Unknown,
        }),
        sys::VIR_DOMAIN_PAUSED => match u32::try_from(reason).unwrap_or(0) {
            sys::VIR_DOMAIN_PAUSED_IOERROR => Power::Stalled(Stall::Disk),
            sys::VIR_DOMAIN_PAUSED_WATCHDOG => Power::Stalled(Stall::Watchdog),
            _ => Power::Paused,
        },
        sys::VIR_DOMAIN_CRASHED => Power::Paused,
        _ => Power::Running,
    }
}

/// libvirt packs versions as major × 1,000,000 + minor × 1,000 + release.
fn version(packed: u32) -> String {
    format!("{}.{}.{}", packed / 1_000_000, packed / 1_000 % 1_000, packed % 1_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_unpacked() {
        assert_eq!(version(7_002_022), "7.2.22");
    }

    #[test]
    fn states_become_powers() {
        assert_eq!(power((sys::VIR_DOMAIN_RUNNING, 1)), Power::Running);
        assert_eq!(power((sys::VIR_DOMAIN_BLOCKED, 0)), Power::Running);
        assert_eq!(power((sys::VIR_DOMAIN_SHUTDOWN, 1)), Power::Running, "on its way down");
        assert_eq!(power((sys::VIR_DOMAIN_PAUSED, 1)), Power::Paused);
        assert_eq!(power((sys::VIR_DOMAIN_PAUSED, 5)), Power::Stalled(Stall::Disk));
        assert_eq!(power((sys::VIR_DOMAIN_PAUSED, 6)), Power::Stalled(Stall::Watchdog));
        assert_eq!(power((sys::VIR_DOMAIN_SHUTOFF, 1)), Power::Off(OffReason::Shutdown));
        assert_eq!(power((sys::VIR_DOMAIN_SHUTOFF, 0)), Power::Off(OffReason::Unknown));
        assert_eq!(power((sys::VIR_DOMAIN_SHUTOFF, 3)), Power::Off(OffReason::Crashed));
        assert_eq!(power((sys::VIR_DOMAIN_SHUTOFF, 6)), Power::Off(OffReason::Unknown));
    }
}
