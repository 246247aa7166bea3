//! A private libvirtd and a tiny guest: TCG domains that boot a Debian kernel and say what they see.
//! Needs root, libvirtd, QEMU, busybox, and a kernel that `scripts/fetch-kernel` fetches.

#![expect(clippy::unwrap_used, reason = "a fixture that cannot be set up fails its test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Spawned, wait_for_sync};

/// Runs a program to its end and returns what it printed.
///
/// # Panics
///
/// If it cannot be run or fails.
pub fn run<'a>(program: &str, args: impl IntoIterator<Item = &'a str>) -> String {
    #[expect(clippy::disallowed_methods, reason = "set-up of a test, ended by its own time limit")]
    let output = std::process::Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program}, is it installed? {error}"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// libvirtd with folders of its own, in a mount namespace of its own. It and its guests are in a
/// process namespace that goes, with all that runs in it, when this is dropped or the test is
/// killed. What libvirtd knows of QEMU is kept from one test to the next, because finding it out
/// takes seconds.
#[derive(Debug)]
pub struct Libvirtd {
    root: PathBuf,
    /// Holds the namespaces; first to be dropped, and everything else with it.
    holder: Spawned,
    daemon: Option<Spawned>,
}

impl Libvirtd {
    /// Starts it with its folders in `root`.
    ///
    /// # Panics
    ///
    /// Where libvirtd cannot be started.
    #[must_use]
    pub fn start(root: &Path) -> Self {
        for folder in ["run/lock", "lib", "log", "etc", "sock"] {
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
        let holder = hold(root);
        let mut libvirtd = Self { root: root.to_owned(), holder, daemon: None };
        libvirtd.restart();
        libvirtd
    }

    /// Starts it again.
    ///
    /// # Panics
    ///
    /// Where libvirtd cannot be started.
    pub fn restart(&mut self) {
        self.kill();
        let socket = self.root.join("sock/libvirt-sock");
        let _stale = fs::remove_file(&socket);
        let spaces = format!("/proc/{}/ns", self.holder.pid());
        let root = self.root.display();
        let mut daemon = Spawned::start(
            "/usr/bin/nsenter",
            [
                format!("--mount={spaces}/mnt"),
                // That of the holder's child, not its own.
                format!("--pid={spaces}/pid_for_children"),
                "/usr/sbin/libvirtd".to_owned(),
                format!("--config={root}/libvirtd.conf"),
                format!("--pid-file={root}/pid"),
            ],
        );
        wait_for_sync(Duration::from_secs(20), "libvirtd to listen", || {
            assert!(daemon.is_running(), "{daemon:?}");
            socket.exists().then_some(())
        });
        self.daemon = Some(daemon);
    }

    /// Kills the daemon, not its guests.
    ///
    /// # Panics
    ///
    /// If it does not go.
    pub fn kill(&mut self) {
        let Some(mut daemon) = self.daemon.take() else { return };
        // What entered the namespaces waits for the daemon, and ends as it does.
        let entered = daemon.pid();
        let children = format!("/proc/{entered}/task/{entered}/children");
        for pid in fs::read_to_string(children).unwrap_or_default().split_whitespace() {
            let pid = nix::unistd::Pid::from_raw(pid.parse().unwrap());
            let _gone = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        daemon.wait(Duration::from_secs(20));
    }

    /// The URI by which it is reached.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("qemu:///system?socket={}/sock/libvirt-sock", self.root.display())
    }

    /// Runs virsh, and returns what it printed.
    ///
    /// # Panics
    ///
    /// If virsh fails.
    pub fn virsh<const N: usize>(&self, args: [&str; N]) -> String {
        let uri = self.uri();
        run("/usr/bin/virsh", ["-q", "-c", &uri].into_iter().chain(args))
    }

    /// Sends a signal to a guest's process: `KILL` crashes it, and `STOP` makes it as silent as one
    /// whose storage went away.
    ///
    /// # Panics
    ///
    /// If it does not run.
    pub fn signal(&self, domain: &str, signal: &str) {
        // Its number is one of the namespace.
        let spaces = format!("/proc/{}/ns", self.holder.pid());
        let into = format!("--pid={spaces}/pid_for_children");
        let pid = self.guest_pid(domain);
        run("/usr/bin/nsenter", [into.as_str(), "/bin/kill", "-s", signal, pid.trim()]);
    }

    /// Process id of a guest, where libvirtd is.
    ///
    /// # Panics
    ///
    /// If it does not run.
    #[must_use]
    pub fn guest_pid(&self, domain: &str) -> String {
        let path = self.root.join(format!("run/libvirt/qemu/{domain}.pid"));
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }
}

/// Starts what holds the namespaces of a libvirtd, with its folders in place.
fn hold(root: &Path) -> Spawned {
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tmp/libvirt-cache");
    fs::create_dir_all(&cache).unwrap();
    let (root, cache) = (root.display(), cache.display());
    // As the first process of its namespace the shell inherits what libvirtd's children leave, and
    // takes it off the list while it waits: libvirtd waits for processes to be gone.
    let script = format!(
        "set -e\n\
         mount --bind {root}/run /run\n\
         mount --bind {root}/lib /var/lib/libvirt\n\
         mount --bind {root}/log /var/log/libvirt\n\
         mount --bind {cache} /var/cache/libvirt\n\
         mount --bind {root}/etc /etc/libvirt\n\
         echo held\n\
         sleep infinity &\n\
         wait\n"
    );
    let tied = ["--pdeathsig", "KILL", "--", "unshare", "--mount", "--propagation", "private"];
    let apart = ["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", &script];
    let mut holder = Spawned::start("/usr/bin/setpriv", tied.into_iter().chain(apart));
    holder.wait_for_output(Duration::from_secs(20), "held");
    holder
}

/// One of Debian's kernels, `cloud` or `full`, fetched once: its folder.
///
/// # Panics
///
/// If it cannot be fetched.
#[must_use]
pub fn kernel(flavour: &str) -> PathBuf {
    PathBuf::from(run(script("fetch-kernel").to_str().unwrap(), [flavour]).trim())
}

/// A script of the project.
fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts").join(name)
}

/// What the guest says when it is up.
pub const UP: &str = "the guest is up";

/// Drivers that every guest has.
const DRIVERS: [&str; 10] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_scsi",
    "sr_mod",
    "isofs",
    "virtio_net",
    "virtio_console",
    "virtio_balloon",
    "virtio_rng",
    "ext4",
];

/// A RAM disk whose init loads the virtio drivers and `more`, tells what it sees, and then does
/// what it is told on its console: `run COMMAND` runs a command of its shell. With `stackhand.off`
/// on the kernel's command line it powers itself off.
///
/// # Panics
///
/// Without busybox or the kernel's modules.
#[must_use]
pub fn ramdisk(kernel: &Path, more: &[&str]) -> Vec<u8> {
    let modules = tempfile::tempdir().unwrap();
    let folders = [kernel, modules.path()].map(|path| path.to_str().unwrap());
    let names = DRIVERS.iter().chain(more).copied();
    run(script("pack-modules").to_str().unwrap(), folders.into_iter().chain(names));
    let init = format!(
        "#!/bin/busybox sh\n\
         /bin/busybox --install -s /bin\n\
         mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys\n\
         while read name; do insmod /lib/$name; done </lib/order\n\
         [ -d /sys/firmware/efi ] && echo firmware uefi || echo firmware bios\n\
         for path in /sys/block/vd*; do\n\
           echo \"disk ${{path##*/}} $(cat $path/size) $(cat $path/serial)\"\n\
         done\n\
         nics() {{ ls /sys/class/net | grep -c eth; }}\n\
         [ $(nics) = 0 ] || echo network device\n\
         if [ -b /dev/sr0 ] && mount -o ro /dev/sr0 /mnt; then\n\
           echo \"config drive: $(cat /mnt/openstack/latest/meta_data.json)\"\n\
         fi\n\
         echo '{UP}'\n\
         grep -q stackhand.off /proc/cmdline && poweroff -f\n\
         (before=\n\
         while true; do\n\
           now=\"nics $(nics)\"\n\
           for path in /sys/block/vd*; do now=\"$now ${{path##*/}} $(cat $path/size)\"; done\n\
           [ \"$now\" = \"$before\" ] || echo \"devices: $now.\"\n\
           before=$now; sleep 0.3\n\
         done) &\n\
         while read word rest; do\n\
           case $word in run) eval \"$rest\";; esac\n\
           echo \"heard $word\"\n\
         done\n\
         while true; do sleep 1000; done\n"
    );
    let busybox = fs::read("/usr/bin/busybox").or_else(|_| fs::read("/bin/busybox")).unwrap();
    let mut files: Vec<(String, u32, Vec<u8>)> = ["bin", "dev", "lib", "mnt", "proc", "sys"]
        .map(|name| (name.to_owned(), 0o040_755, Vec::new()))
        .into();
    files.push(("bin/busybox".into(), 0o100_755, busybox));
    files.push(("init".into(), 0o100_755, init.into_bytes()));
    for entry in fs::read_dir(modules.path()).unwrap() {
        let entry = entry.unwrap();
        let name = format!("lib/{}", entry.file_name().to_str().unwrap());
        files.push((name, 0o100_644, fs::read(entry.path()).unwrap()));
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
