//! Guests on this host whose QEMU is the initiator. Needs QEMU with its iSCSI client, and the
//! guest's kernel (`scripts/guest-image`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use stackhand_model::Connection;
use stackhand_testkit::Spawned;
use tempfile::TempDir;

/// What a guest may take from start to end.
const LIMIT: Duration = Duration::from_secs(180);

/// How a guest's QEMU reaches a volume.
#[derive(Clone)]
pub(crate) struct Iscsi {
    pub(crate) portal: String,
    pub(crate) iqn: String,
    pub(crate) lun: u32,
    pub(crate) initiator: String,
    pub(crate) user: String,
    pub(crate) password: String,
}

impl Iscsi {
    /// What an attachment tells.
    pub(crate) fn new(connection: &Connection) -> Self {
        let Connection::Iscsi { portal, iqn, lun, initiator, username, password, .. } =
            connection.clone()
        else {
            panic!("{connection:?}")
        };
        Self {
            portal,
            iqn,
            lun,
            initiator: initiator.unwrap(),
            user: username.unwrap(),
            password: password.unwrap().0,
        }
    }

    /// The disk as QEMU's options name it; the password is the secret `chap`.
    fn options(&self) -> String {
        format!(
            "driver=raw,file.driver=iscsi,file.transport=tcp,file.portal={},file.target={},\
             file.lun={},file.initiator-name={},file.user={},file.password-secret=chap",
            self.portal, self.iqn, self.lun, self.initiator, self.user
        )
    }

    /// What `qemu-img info` says of it.
    pub(crate) fn info(&self) -> Output {
        let secret = format!("secret,id=chap,data={}", self.password);
        run("qemu-img", &["info", "--object", &secret, "--image-opts", &self.options()])
    }
}

fn run(program: &str, args: &[&str]) -> Output {
    #[expect(clippy::disallowed_methods, reason = "set-up of a test, ended by its own limit")]
    let mut command = Command::new("/usr/bin/timeout");
    command.arg("300").arg(program).args(args).output().unwrap()
}

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// A guest that runs a shell script and powers off. Its own disk is `/dev/vda`, the volume
/// `/dev/vdb`.
pub(crate) struct Guest {
    machine: Spawned,
    _files: TempDir,
}

impl Guest {
    pub(crate) fn start(disk: &Iscsi, script: &str) -> Self {
        let image = run(top().join("scripts/guest-image").to_str().unwrap(), &[]);
        let folder = String::from_utf8(image.stdout).unwrap();
        let folder = Path::new(folder.trim());
        assert!(folder.join("vmlinuz").exists(), "{}", String::from_utf8_lossy(&image.stderr));
        // A second archive behind the first: its files replace those of the same name.
        let files = tempfile::tempdir().unwrap();
        let own = files.path().join("own");
        fs::File::create(&own).unwrap().set_len(16 << 20).unwrap();
        let init = format!(
            "#!/bin/sh\nexport PATH=/bin\nmount -t proc proc /proc\nmount -t sysfs sys /sys\n\
             mount -t devtmpfs dev /dev\nwhile read -r module; do insmod /modules/$module; done \
             </modules/order\necho begun\n( set -e\n{script}\n) && echo done-well || echo \
             done-badly\nsync\npoweroff -f\n"
        );
        let tree = files.path().join("tree");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("init"), init).unwrap();
        let initrd = files.path().join("initrd");
        let pack = format!(
            "cd {tree} && chmod 755 init && cp {from} {initrd} && \
             echo init | cpio --quiet -o -H newc | gzip -1 >>{initrd}",
            tree = tree.display(),
            from = folder.join("initrd").display(),
            initrd = initrd.display(),
        );
        let packed = run("/bin/bash", &["-c", &pack]);
        assert!(packed.status.success(), "{}", String::from_utf8_lossy(&packed.stderr));
        let machine = Spawned::start(
            "/usr/bin/qemu-system-x86_64",
            [
                "-accel".to_owned(),
                "tcg".into(),
                "-m".into(),
                "256".into(),
                "-nodefaults".into(),
                "-display".into(),
                "none".into(),
                "-no-reboot".into(),
                "-serial".into(),
                "stdio".into(),
                "-kernel".into(),
                folder.join("vmlinuz").display().to_string(),
                "-initrd".into(),
                initrd.display().to_string(),
                "-append".into(),
                "console=ttyS0 quiet panic=-1".into(),
                "-object".into(),
                format!("secret,id=chap,data={}", disk.password),
                "-drive".into(),
                format!("if=virtio,format=raw,file={}", own.display()),
                "-drive".into(),
                format!("if=virtio,{}", disk.options()),
            ],
        );
        Self { machine, _files: files }
    }

    /// What it has told so far.
    pub(crate) fn output(&self) -> String {
        self.machine.output()
    }

    /// Waits until it is off, and answers what it told.
    pub(crate) fn finish(mut self) -> String {
        let status = self.machine.wait(LIMIT);
        let said = self.machine.output();
        assert!(status.success() && said.contains("done-well"), "{said}");
        assert!(!said.contains("I/O error"), "{said}");
        said
    }
}

/// The digest that a guest printed after `mark`.
pub(crate) fn digest(said: &str, mark: &str) -> String {
    let (_, rest) = said.split_once(mark).unwrap_or_else(|| panic!("no {mark} in {said}"));
    let digest: String = rest.trim_start().chars().take_while(char::is_ascii_hexdigit).collect();
    assert_eq!(digest.len(), 64, "{said}");
    digest
}
