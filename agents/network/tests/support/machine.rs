//! Guests that are machines: QEMU behind a tap that the agent made.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use stackhand_testkit::guest::{UP, kernel, ramdisk};
use stackhand_testkit::{Spawned, wait_for};
use tempfile::TempDir;
use uuid::Uuid;

use super::support::{mac, short};

/// How long a machine may take to start, or to do what it is told.
const LIMIT: Duration = Duration::from_secs(100);

/// A machine whose `eth0` is behind a port's tap. It ends with this.
pub(crate) struct Machine {
    console: UnixStream,
    said: Arc<Mutex<String>>,
    _qemu: Spawned,
}

/// A folder with what machines boot from. To be called where packages can be fetched.
pub(crate) fn ready() -> TempDir {
    let folder = tempfile::tempdir_in("/tmp").unwrap();
    std::fs::write(folder.path().join("ramdisk"), ramdisk(&kernel("cloud"), &[])).unwrap();
    folder
}

impl Machine {
    /// Starts one in the calling thread's namespaces, behind the tap of `port` as its domain would
    /// name it, and waits until it is up.
    pub(crate) async fn start(folder: &Path, port: Uuid, last: u8, queues: u8) -> Self {
        let (socket, ramdisk) = (folder.join(format!("console{last}")), folder.join("ramdisk"));
        let tap = format!("tap{}", short(port));
        let many = if queues > 1 { format!(",queues={queues}") } else { String::new() };
        let vectors = if queues > 1 { ",mq=on,vectors=6" } else { "" };
        let arguments = format!(
            "-accel tcg -M q35 -cpu max -m 160 -nodefaults -display none -no-reboot -kernel {} \
             -initrd {} -append console=ttyS0 -chardev socket,id=c,path={},server=on,wait=on \
             -serial chardev:c -netdev tap,id=n,ifname={tap},script=no,downscript=no{many} \
             -device virtio-net-pci,netdev=n,mac={}{vectors}",
            kernel("cloud").join("vmlinuz").display(),
            ramdisk.display(),
            socket.display(),
            mac(last),
        );
        let mut qemu = Spawned::start("/usr/bin/qemu-system-x86_64", arguments.split_whitespace());
        let console = wait_for(LIMIT, "the machine's console", || {
            assert!(qemu.is_running(), "{qemu:?}");
            let console = UnixStream::connect(&socket).ok();
            async move { console }
        });
        let console = console.await;
        let said = Arc::new(Mutex::new(String::new()));
        let (mut from, heard) = (console.try_clone().unwrap(), Arc::clone(&said));
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(length @ 1..) = from.read(&mut piece) {
                let text = String::from_utf8_lossy(&piece[..length]);
                heard.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
            }
        });
        let machine = Self { console, said, _qemu: qemu };
        machine.says(0, UP).await;
        machine
    }

    fn said(&self, since: usize) -> String {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)[since..].to_owned()
    }

    async fn says(&self, since: usize, text: &str) -> String {
        let what = format!("the machine to say {text:?}");
        wait_for(LIMIT, &what, || async {
            let said = self.said(since);
            said.contains(text).then_some(said)
        })
        .await
    }

    /// Runs a command of its shell, and returns what it printed.
    pub(crate) async fn run(&self, command: &str) -> String {
        let since = self.said(0).len();
        (&self.console).write_all(format!("run {command}\n").as_bytes()).unwrap();
        self.says(since, "heard run").await
    }

    /// Whether an address answers.
    pub(crate) async fn reaches(&self, address: &str) -> bool {
        let told = self.run(&format!("ping -c 1 -W 2 {address}")).await;
        told.contains("1 packets received")
    }
}
