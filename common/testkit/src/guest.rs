//! A private libvirtd and a tiny guest: TCG domains that boot a Debian kernel and say what they see.
//! Needs root, libvirtd, QEMU, busybox, and the kernel that `scripts/fetch-kernel cloud` fetches.

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

/// libvirtd with folders of its own, in a mount namespace of its own. What it knows of QEMU is
/// kept from one test to the next, because finding it out takes seconds.
#[derive(Debug)]
pub struct Libvirtd {
    root: PathBuf,
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
        let mut libvirtd = Self { root: root.to_owned(), daemon: None };
        libvirtd.restart();
        libvirtd
    }

    /// Starts it again.
    ///
    /// # Panics
    ///
    /// Where libvirtd cannot be started.
    pub fn restart(&mut self) {
        self.daemon = None;
        let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tmp/libvirt-cache");
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
    pub fn kill(&mut self) {
        self.daemon = None;
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

    /// Process id of a guest.
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

/// Debian's cloud kernel, fetched once: its folder.
///
/// # Panics
///
/// If it cannot be fetched.
#[must_use]
pub fn kernel() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/fetch-kernel");
    PathBuf::from(run(script.to_str().unwrap(), ["cloud"]).trim())
}

/// What the guest says when it is up.
pub const UP: &str = "the guest is up";

/// A RAM disk whose init loads the virtio drivers, tells what it sees, and then waits; with
/// `stackhand.off` on the kernel's command line it powers itself off.
///
/// # Panics
///
/// Without busybox or the kernel's modules.
#[must_use]
pub fn ramdisk(kernel: &Path) -> Vec<u8> {
    let version = fs::read_to_string(kernel.join("version")).unwrap();
    let tree = kernel.join("lib/modules").join(version.trim()).join("kernel");
    let modules = [
        "drivers/virtio/virtio_ring.ko",
        "drivers/virtio/virtio.ko",
        "drivers/virtio/virtio_pci_legacy_dev.ko",
        "drivers/virtio/virtio_pci_modern_dev.ko",
        "drivers/virtio/virtio_pci.ko",
        "drivers/block/virtio_blk.ko",
        "drivers/scsi/scsi_common.ko",
        "drivers/scsi/scsi_mod.ko",
        "drivers/scsi/virtio_scsi.ko",
        "drivers/cdrom/cdrom.ko",
        "drivers/scsi/sr_mod.ko",
        "fs/isofs/isofs.ko",
    ];
    let init = format!(
        "#!/bin/busybox sh\n\
         /bin/busybox --install -s /bin\n\
         mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys\n\
         for name in {}; do insmod /lib/$name; done\n\
         for path in /sys/block/vd*; do\n\
           echo \"disk ${{path##*/}} $(cat $path/size) $(cat $path/serial)\"\n\
         done\n\
         nics() {{ cat /sys/bus/pci/devices/*/device | grep -c 0x1041; }}\n\
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
         while read line; do\n\
           case $line in off) poweroff -f;; mark) echo marked > /dev/vda; sync;; esac\n\
           echo \"heard $line\"\n\
         done\n\
         while true; do sleep 1000; done\n",
        modules.map(|path| path.rsplit('/').next().unwrap()).join(" ")
    );
    let busybox = fs::read("/usr/bin/busybox").or_else(|_| fs::read("/bin/busybox")).unwrap();
    let mut files: Vec<(String, u32, Vec<u8>)> = ["bin", "dev", "lib", "mnt", "proc", "sys"]
        .map(|name| (name.to_owned(), 0o040_755, Vec::new()))
        .into();
    files.push(("bin/busybox".into(), 0o100_755, busybox));
    files.push(("init".into(), 0o100_755, init.into_bytes()));
    for path in modules {
        let name = path.rsplit('/').next().unwrap();
        files.push((format!("lib/{name}"), 0o100_644, fs::read(tree.join(path)).unwrap()));
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
