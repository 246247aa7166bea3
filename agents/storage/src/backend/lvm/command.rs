//! Running LVM's program: one absolute path, argument vectors, reports in JSON.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use stackhand_kernel::exec::{ExecError, Output, Program};
use tokio::runtime::Handle;

/// LVM's one program; each command is its first argument.
pub const LVM: &str = "/usr/sbin/lvm";

/// LVM waits for udev and for locks; a disk that hangs must not hang the agent.
const LIMIT: Duration = Duration::from_secs(120);

/// How often a command that crashed is run again.
const TRIES: u32 = 3;

/// Disks that LVM must not read: what guests write to an attached volume is not ours to believe.
const NOT_OURS: &str = r#""r|^/dev/disk/by-path/.*-iscsi-.*|","r|^/dev/nbd.*|""#;

/// Runs LVM commands on one volume group. Clones share the turn.
#[derive(Clone, Debug)]
pub(super) struct Lvm {
    program: PathBuf,
    devices: Vec<PathBuf>,
    runtime: Handle,
    /// One writer at a time for a group: whoever holds it may change the group.
    turn: Arc<Mutex<()>>,
}

impl Lvm {
    pub(super) fn new(devices: Vec<PathBuf>, turn: Arc<Mutex<()>>, runtime: Handle) -> Self {
        Self { program: LVM.into(), devices, runtime, turn }
    }

    /// A command that only looks.
    pub(super) fn report(&self, command: &str, args: &[&str]) -> Result<Vec<u8>, Box<ExecError>> {
        // Not `--readonly`: it does not ask the kernel what is active, open and how full.
        let json = ["--reportformat", "json", "--units", "b", "--nosuffix"];
        let program = self.program(command).args(json).args(args.iter().copied());
        Ok(self.run(&program)?.stdout)
    }

    /// A command that changes the group.
    pub(super) fn change(&self, command: &str, args: &[&str]) -> Result<(), Box<ExecError>> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let program = self.program(command).arg("--yes").args(args.iter().copied());
        self.run(&program).map(drop)
    }

    fn program(&self, command: &str) -> Program {
        let config = format!(
            "devices{{scan_lvs=0 global_filter=[{NOT_OURS}]}} activation{{retry_deactivation=1}}"
        );
        let mut program = Program::new(&self.program)
            .args([command, "--config", &config])
            .env("LVM_SUPPRESS_FD_WARNINGS", "1")
            .limit(LIMIT);
        for device in &self.devices {
            program = program.arg("--devices").arg(device.display().to_string());
        }
        program
    }

    fn run(&self, program: &Program) -> Result<Output, Box<ExecError>> {
        let mut tries = 1;
        loop {
            match self.runtime.block_on(program.run()) {
                Err(ExecError::Failed { status, .. }) if tries < TRIES && crashed(status) => {
                    tracing::warn!(%program, tries, "LVM crashed; trying again");
                    tries += 1;
                }
                outcome => return outcome.map_err(Box::new),
            }
        }
    }
}

/// LVM is known to end by a segmentation fault now and then; a shell would tell it as 139.
fn crashed(status: std::process::ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt;
    status.signal() == Some(nix::libc::SIGSEGV) || status.code() == Some(139)
}
