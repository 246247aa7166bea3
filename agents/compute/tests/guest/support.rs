//! A private libvirtd, a tiny guest, and a loop that drives the agent as the runtime would.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use stackhand_compute::agent::ComputeAgent;
use stackhand_compute::config::{ComputeSection, VirtType};
use stackhand_compute::libvirt::Libvirt;
use stackhand_model::{Document, ObjectRef};
use stackhand_runtime::agent::{
    Action, Agent, Cause, Desired, Held, Outcome, PassReport, Refusal, Work,
};
use stackhand_runtime::wake::Wake;
use stackhand_testkit::{Spawned, wait_for, wait_for_sync};
use uuid::Uuid;

/// Runs a program to its end and returns what it printed.
pub(crate) fn run<'a>(program: &str, args: impl IntoIterator<Item = &'a str>) -> String {
    #[expect(clippy::disallowed_methods, reason = "set-up of a test, ended by its own time limit")]
    let output = std::process::Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program}, is it installed? {error}"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// libvirtd with folders of its own, in a mount namespace of its own. What it knows of QEMU is
/// kept from one test to the next, because finding it out takes seconds.
#[derive(Debug)]
pub(crate) struct Libvirtd {
    root: PathBuf,
    daemon: Option<Spawned>,
}

impl Libvirtd {
    pub(crate) fn start(root: &Path) -> Self {
        for folder in ["run", "lib", "log", "etc", "sock"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        let sock = root.join("sock");
        fs::write(
            root.join("libvirtd.conf"),
            format!(
                "unix_sock_dir = \"{}\"\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n\
                 unix_sock_rw_perms = \"0700\"\n\
                 log_outputs = \"3:file:{}/libvirtd.log\"\n",
                sock.display(),
                root.display()
            ),
        )
        .unwrap();
        fs::write(
            root.join("etc/qemu.conf"),
            "user = \"root\"\ngroup = \"root\"\nsecurity_driver = \"none\"\nnamespaces = []\n\
             cgroup_controllers = []\nstdio_handler = \"file\"\nremember_owner = 0\n",
        )
        .unwrap();
        let mut libvirtd = Self { root: root.to_owned(), daemon: None };
        libvirtd.restart();
        libvirtd
    }

    pub(crate) fn restart(&mut self) {
        self.daemon = None;
        let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libvirt-cache");
        fs::create_dir_all(&cache).unwrap();
        let (root, cache) = (self.root.display(), cache.display());
        let socket = self.root.join("sock/libvirt-sock");
        let _stale = fs::remove_file(&socket);
        let script = format!(
            "set -e\n\
             mount --bind {root}/run /run\n\
             mount --bind {root}/lib /var/lib/libvirt\n\
             mount --bind {root}/log /var/log/libvirt\n\
             mount --bind {cache} /var/cache/libvirt\n\
             mount --bind {root}/etc /etc/libvirt\n\
             exec /usr/sbin/libvirtd -f {root}/libvirtd.conf -p {root}/pid\n"
        );
        let args = ["--mount", "--propagation", "private", "sh", "-c", &script];
        let mut daemon = Spawned::start("/usr/bin/unshare", args);
        wait_for_sync(Duration::from_secs(20), "libvirtd to listen", || {
            assert!(daemon.is_running(), "{daemon:?}");
            socket.exists().then_some(())
        });
        self.daemon = Some(daemon);
    }

    /// Kills the daemon, not its guests.
    pub(crate) fn kill(&mut self) {
        self.daemon = None;
    }

    pub(crate) fn uri(&self) -> String {
        format!("qemu:///system?socket={}/sock/libvirt-sock", self.root.display())
    }

    pub(crate) fn virsh<const N: usize>(&self, args: [&str; N]) -> String {
        let uri = self.uri();
        run("/usr/bin/virsh", ["-q", "-c", &uri].into_iter().chain(args))
    }

    /// Process id of a guest.
    pub(crate) fn guest_pid(&self, domain: &str) -> String {
        let path = self.root.join(format!("run/libvirt/qemu/{domain}.pid"));
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }
}

impl Drop for Libvirtd {
    /// Ends guests that a failed test has left, each by its own process id, and the daemon.
    fn drop(&mut self) {
        self.daemon = None;
        for entry in
            fs::read_dir(self.root.join("run/libvirt/qemu")).into_iter().flatten().flatten()
        {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "pid")
                && let Ok(text) = fs::read_to_string(&path)
                && let Ok(pid) = text.trim().parse()
                && fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| {
                    line.contains("qemu-system") && line.contains(&*self.root.to_string_lossy())
                })
            {
                let _gone = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        }
    }
}

/// Debian's cloud kernel, fetched once.
pub(crate) fn kernel() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/fetch-kernel");
    PathBuf::from(run(script.to_str().unwrap(), ["cloud"]).trim())
}

/// What the guest says when it is up.
pub(crate) const UP: &str = "the guest is up";

/// A RAM disk whose init loads the virtio drivers, tells what it sees, and then waits; with
/// `stackhand.off` on the kernel's command line it powers itself off.
pub(crate) fn ramdisk(kernel: &Path) -> Vec<u8> {
    let version = fs::read_to_string(kernel.join("version")).unwrap();
    let drivers = kernel.join("lib/modules").join(version.trim()).join("kernel/drivers");
    let modules = [
        "virtio/virtio_ring.ko",
        "virtio/virtio.ko",
        "virtio/virtio_pci_legacy_dev.ko",
        "virtio/virtio_pci_modern_dev.ko",
        "virtio/virtio_pci.ko",
        "block/virtio_blk.ko",
    ];
    let init = format!(
        "#!/bin/busybox sh\n\
         /bin/busybox --install -s /bin\n\
         mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys\n\
         for name in {}; do insmod /lib/$name; done\n\
         for path in /sys/block/vd*; do\n\
           echo \"disk ${{path##*/}} $(cat $path/size) $(cat $path/serial)\"\n\
         done\n\
         for path in /sys/bus/pci/devices/*; do\n\
           case $(cat $path/vendor):$(cat $path/device) in 0x1af4:0x1041) echo network device;; esac\n\
         done\n\
         echo '{UP}'\n\
         grep -q stackhand.off /proc/cmdline && poweroff -f\n\
         while true; do sleep 1000; done\n",
        modules.map(|path| path.rsplit('/').next().unwrap()).join(" ")
    );
    let busybox = fs::read("/usr/bin/busybox").or_else(|_| fs::read("/bin/busybox")).unwrap();
    let mut files: Vec<(String, u32, Vec<u8>)> = ["bin", "dev", "lib", "proc", "sys"]
        .map(|name| (name.to_owned(), 0o040_755, Vec::new()))
        .into();
    files.push(("bin/busybox".into(), 0o100_755, busybox));
    files.push(("init".into(), 0o100_755, init.into_bytes()));
    for path in modules {
        let name = path.rsplit('/').next().unwrap();
        files.push((format!("lib/{name}"), 0o100_644, fs::read(drivers.join(path)).unwrap()));
    }
    cpio(&files)
}

/// An archive in the format that kernels unpack ("newc").
fn cpio(files: &[(String, u32, Vec<u8>)]) -> Vec<u8> {
    let mut archive = Vec::new();
    let trailer = ("TRAILER!!!".to_owned(), 0, Vec::new());
    for (index, (name, mode, data)) in files.iter().chain([&trailer]).enumerate() {
        let (size, length) = (data.len(), name.len() + 1);
        archive.extend_from_slice(
            format!(
                "070701{index:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}{0:08x}{0:08x}\
                 {0:08x}{0:08x}{length:08x}{0:08x}",
                0, 1
            )
            .as_bytes(),
        );
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

pub(crate) fn document(kind: &str, id: u128, generation: u64, spec: &Value) -> Document {
    let (name, id) = (format!("{}{id}", kind.to_lowercase()), Uuid::from_u128(id));
    Document::from_value(&json!({
        "kind": kind, "id": id, "name": name, "generation": generation, "spec": spec,
    }))
    .unwrap()
}

/// An agent and a loop that makes passes all the time, as the runtime does on events.
pub(crate) struct Driven {
    pub(crate) agent: Arc<ComputeAgent<Libvirt>>,
    shared: Arc<Mutex<Shared>>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    desired: Desired,
    last: PassReport,
    revision_of_last: u64,
    writes: u64,
    passes: u64,
}

impl Driven {
    pub(crate) fn new(state: &Path, uri: &str) -> Self {
        let section = ComputeSection {
            libvirt_uri: uri.to_owned(),
            virt_type: VirtType::Qemu,
            shutdown_timeout_seconds: 2,
            ..ComputeSection::default()
        };
        let wake = Wake::new();
        let libvirt = Libvirt::new(uri, Arc::new(|_| {})).unwrap();
        let agent = Arc::new(ComputeAgent::new("here", state, &section, libvirt, wake));
        let shared = Arc::new(Mutex::new(Shared::default()));
        let task = tokio::spawn({
            let (agent, shared) = (Arc::clone(&agent), Arc::clone(&shared));
            async move {
                loop {
                    let desired = Arc::new(shared.lock().unwrap().desired.clone());
                    let due = desired.objects.keys().copied().collect();
                    let revision = desired.revision;
                    let work = Work { desired, due, cause: Cause::Timer };
                    let report = agent.pass(work).await;
                    {
                        let mut shared = shared.lock().unwrap();
                        for (object, outcome) in &report.outcomes {
                            if *outcome == Outcome::Gone {
                                shared.desired.objects.remove(object);
                            }
                        }
                        shared.writes += report.writes;
                        shared.passes += 1;
                        shared.revision_of_last = revision;
                        shared.last = report;
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        });
        Self { agent, shared, task }
    }

    pub(crate) fn want(&self, documents: impl IntoIterator<Item = Document>, deleting: bool) {
        let mut shared = self.shared.lock().unwrap();
        shared.desired.revision += 1;
        for document in documents {
            let held = Held { document: Arc::new(document), deleting };
            shared.desired.objects.insert(held.document.object(), held);
        }
    }

    /// Changes made to the host so far.
    pub(crate) fn writes(&self) -> u64 {
        self.shared.lock().unwrap().writes
    }

    /// Waits for so many more passes.
    pub(crate) async fn passes(&self, count: u64) {
        let target = self.shared.lock().unwrap().passes + count;
        wait_for(Duration::from_secs(30), "passes", async || {
            (self.shared.lock().unwrap().passes >= target).then_some(())
        })
        .await;
    }

    fn last(&self, object: ObjectRef) -> Option<Outcome> {
        let shared = self.shared.lock().unwrap();
        let fresh = shared.revision_of_last == shared.desired.revision;
        fresh.then(|| shared.last.outcomes.get(&object).cloned()).flatten()
    }

    /// Waits until an object comes out in a way that is good.
    pub(crate) async fn until<T>(
        &self,
        object: ObjectRef,
        what: &str,
        good: impl Fn(&Outcome) -> Option<T>,
    ) -> T {
        let found = Mutex::new(None);
        let waited = wait_for(Duration::from_secs(60), what, async || {
            *found.lock().unwrap() = self.last(object);
            found.lock().unwrap().as_ref().and_then(&good)
        });
        waited.await
    }

    pub(crate) async fn until_active(&self, object: ObjectRef) -> Value {
        self.until(object, &format!("{object} to be active"), |outcome| match outcome {
            Outcome::Active { observed } => Some(observed.clone()),
            Outcome::Failed { reason, .. } => panic!("{object} failed: {reason}"),
            _ => None,
        })
        .await
    }

    /// Waits until an object waits or fails with a reason that contains `text`.
    pub(crate) async fn until_reason(&self, object: ObjectRef, text: &str) -> String {
        self.until(object, &format!("{object} to say {text:?}"), |outcome| match outcome {
            Outcome::Pending { reason, .. } | Outcome::Failed { reason, .. } => {
                reason.contains(text).then(|| reason.clone())
            }
            _ => None,
        })
        .await
    }

    pub(crate) async fn until_gone(&self, object: ObjectRef) {
        wait_for(Duration::from_secs(60), "the object to be gone", async || {
            let shared = self.shared.lock().unwrap();
            (!shared.desired.objects.contains_key(&object)).then_some(())
        })
        .await;
    }

    pub(crate) async fn act(
        &self,
        document: &Document,
        name: &str,
        params: Value,
    ) -> Result<Value, Refusal> {
        self.agent
            .act(Action {
                object: document.object(),
                document: Arc::new(document.clone()),
                name: name.to_owned(),
                params,
                request_id: "req-test".into(),
            })
            .await
    }

    /// Waits until the console log contains a text.
    pub(crate) async fn until_console(&self, document: &Document, text: &str) -> String {
        wait_for(Duration::from_secs(60), &format!("the console to say {text:?}"), async || {
            let log = self.act(document, "console-log", Value::Null).await.unwrap();
            let log = log["log"].as_str().unwrap().to_owned();
            log.contains(text).then_some(log)
        })
        .await
    }

    /// Ends the agent at once, whatever it is doing.
    pub(crate) async fn kill(self) {
        self.task.abort();
        let _aborted = self.task.await;
    }
}
