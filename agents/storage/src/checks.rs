//! Is this host fit for the storage agent.

use std::path::Path;
use std::time::Duration;

use nix::unistd::{AccessFlags, eaccess};
use stackhand_kernel::exec::Program;
use stackhand_runtime::config::Loaded;
use stackhand_runtime::preflight::{Check, Finding};

use crate::backend::lvm::LVM;
use crate::config::{
    BackendKind, BackendSection, DEFAULT_BACKEND, ExportKind, ExportSection, StorageSection,
};
use crate::export::Exporter;
use crate::export::lio;
use crate::export::tgt::Tgt;

const BACKENDS: &str = "backends";
const EXPORT: &str = "export";
const THIN_CHECK: &str = "/usr/sbin/thin_check";

/// The agent's own checks: one for each configured backend, and for exports.
#[must_use]
pub fn checks(loaded: &Loaded<StorageSection>) -> Vec<Check> {
    let section = loaded.settings.agent.clone();
    let export = section.export.clone();
    let tool = section.qemu_img.clone();
    vec![
        Check::new(BACKENDS, move || backends(section.clone())).with_limit(Duration::from_secs(30)),
        Check::blocking(EXPORT, move || exports(&export)),
        Check::blocking("images", move || vec![images(&tool)]),
    ]
}

async fn backends(section: StorageSection) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, backend) in section.all_backends() {
        if backend.kind == BackendKind::File {
            findings.push(folder(&name, &backend));
        } else {
            findings.extend(group(&name, &backend).await);
        }
    }
    findings
}

fn folder(name: &str, backend: &BackendSection) -> Finding {
    let Some(path) = &backend.path else {
        return Finding::pass(BACKENDS, format!("{name} is kept in the state folder"));
    };
    if path.is_dir() {
        return writable(name, path);
    }
    if name == DEFAULT_BACKEND {
        return Finding::info(BACKENDS, format!("{} is made at its first use", path.display()));
    }
    Finding::failure(
        BACKENDS,
        format!("backend {name}: there is no folder {}", path.display()),
        format!("mkdir -p {}, or mount its file system", path.display()),
    )
}

fn writable(name: &str, path: &Path) -> Finding {
    match eaccess(path, AccessFlags::W_OK) {
        Ok(()) => Finding::pass(BACKENDS, format!("{name} is kept in {}", path.display())),
        Err(errno) => Finding::failure(
            BACKENDS,
            format!("backend {name}: {} cannot be written to ({errno})", path.display()),
            format!("chown stackhand-storage {}", path.display()),
        ),
    }
}

/// A missing drop-in, by its name.
fn drop_in(name: &str) -> String {
    format!(
        "install -D -m 644 /usr/share/stackhand/storage-{name}.conf \
         /etc/systemd/system/storage-agent.service.d/{name}.conf && systemctl daemon-reload && \
         systemctl restart storage-agent"
    )
}

async fn group(name: &str, backend: &BackendSection) -> Vec<Finding> {
    let group = backend.volume_group.clone().unwrap_or_default();
    let failure = |what: String, remedy: String| {
        vec![Finding::failure(BACKENDS, format!("backend {name}: {what}"), remedy)]
    };
    if !Path::new(LVM).exists() {
        return failure(format!("{LVM} is not there"), "apt-get install lvm2".into());
    }
    let is_thin = backend.kind == BackendKind::LvmThin;
    if is_thin && !Path::new(THIN_CHECK).exists() {
        let what = format!("{THIN_CHECK} is not there, without which no pool is activated");
        return failure(what, "apt-get install thin-provisioning-tools".into());
    }
    let control = Path::new("/dev/mapper/control");
    if !control.exists() {
        let what = "the kernel has no device-mapper".to_owned();
        return failure(what, "modprobe dm_mod dm_thin_pool".into());
    }
    if eaccess(control, AccessFlags::W_OK).is_err() {
        let what = format!("this process may not use {}", control.display());
        return failure(what, drop_in("block"));
    }
    let mut program = Program::new(LVM)
        .args(["lvs", "--readonly", "--noheadings", "-o", "lv_name", &group])
        .limit(Duration::from_secs(20));
    for device in &backend.devices {
        program = program.arg("--devices").arg(device.display().to_string());
    }
    match program.run().await {
        Err(error) => failure(
            format!("volume group {group} cannot be looked at: {error}"),
            format!("vgcreate {group} DISK..., or connect its disks"),
        ),
        Ok(output) => {
            let pool = backend.pool();
            if is_thin && !output.text().lines().any(|line| line.trim() == pool) {
                return failure(
                    format!("volume group {group} has no thin pool {pool}"),
                    format!("lvcreate --type thin-pool -l 95%FREE -n {pool} {group}"),
                );
            }
            vec![Finding::pass(BACKENDS, format!("{name} is kept in volume group {group}"))]
        }
    }
}

fn exports(export: &ExportSection) -> Vec<Finding> {
    let finding = match export.kind {
        ExportKind::None => Finding::info(
            EXPORT,
            "volumes are for guests of this host alone: storage.export.type is none",
        ),
        ExportKind::Lio => {
            let core = Path::new(lio::ROOT).join("core");
            if !core.is_dir() {
                Finding::failure(
                    EXPORT,
                    format!("the kernel's target is not loaded: {} is not there", core.display()),
                    "modprobe -a target_core_mod target_core_iblock target_core_file iscsi_target_mod",
                )
            } else if eaccess(&core, AccessFlags::W_OK).is_err() {
                let what = format!("{} cannot be written to", core.display());
                Finding::failure(EXPORT, what, drop_in("block"))
            } else {
                Finding::pass(EXPORT, "the kernel exports volumes")
            }
        }
        ExportKind::Tgt => match Tgt::new(&export.tgt_socket, vec![]).observe() {
            Ok(_) => Finding::pass(EXPORT, "tgtd exports volumes"),
            Err(error) if nix::unistd::geteuid().is_root() => Finding::failure(
                EXPORT,
                error.to_string(),
                "apt-get install tgt && systemctl enable --now tgt",
            ),
            Err(error) => Finding::failure(EXPORT, error.to_string(), drop_in("tgt")),
        },
    };
    vec![finding]
}

fn images(tool: &Path) -> Finding {
    if tool.exists() {
        Finding::pass("images", format!("{} converts images", tool.display()))
    } else {
        Finding::warning(
            "images",
            format!("{} is not there: no volume can be made from an image", tool.display()),
            "apt-get install qemu-utils",
        )
    }
}

#[cfg(test)]
mod tests {
    use stackhand_runtime::preflight::Severity;

    use super::*;

    #[test]
    fn a_missing_folder_is_a_failure_with_its_remedy() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &Path| BackendSection { path: Some(path.to_owned()), ..Default::default() };
        let found = folder("fast", &at(&root.path().join("none")));
        assert_eq!(found.severity, Severity::Failure);
        assert!(found.remedy.unwrap().starts_with("mkdir -p"));
        assert_eq!(folder("fast", &at(root.path())).severity, Severity::Pass);
        assert_eq!(folder("default", &BackendSection::default()).severity, Severity::Pass);
    }

    #[test]
    fn a_daemon_that_does_not_answer_is_a_failure_with_its_remedy() {
        let root = tempfile::tempdir().unwrap();
        let tgt_socket = root.path().join("none");
        let export = ExportSection { kind: ExportKind::Tgt, portals: vec![], tgt_socket };
        let found = exports(&export).remove(0);
        assert_eq!(found.severity, Severity::Failure);
        assert!(found.finding.contains("tgtd does not answer"), "{}", found.finding);
        assert!(found.remedy.unwrap().contains("tgt"));
    }
}
