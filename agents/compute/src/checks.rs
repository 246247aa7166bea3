//! Is this host fit for the compute agent.

use std::path::Path;

use stackhand_runtime::config::Loaded;
use stackhand_runtime::preflight::{Check, Finding};

use crate::config::{ComputeSection, VirtType};

/// The agent's own checks: QEMU's image tool and KVM.
#[must_use]
pub fn checks(loaded: &Loaded<ComputeSection>) -> Vec<Check> {
    let section = loaded.settings.agent.clone();
    let (tool, virt_type) = (section.qemu_img.clone(), section.virt_type);
    vec![
        Check::blocking("qemu-img", move || vec![program(&tool)]),
        Check::blocking("kvm", move || vec![kvm(virt_type, Path::new("/dev/kvm"))]),
    ]
}

fn program(path: &Path) -> Finding {
    const CHECK: &str = "qemu-img";
    match nix::unistd::access(path, nix::unistd::AccessFlags::X_OK) {
        Ok(()) => Finding::pass(CHECK, path.display().to_string()),
        Err(errno) => Finding::failure(
            CHECK,
            format!("{} cannot be run ({errno})", path.display()),
            "apt-get install qemu-utils, or set compute.qemu_img",
        ),
    }
}

fn kvm(virt_type: VirtType, device: &Path) -> Finding {
    const CHECK: &str = "kvm";
    match (virt_type, device.exists()) {
        (VirtType::Qemu, _) => Finding::info(CHECK, "not used: compute.virt_type is qemu"),
        (VirtType::Kvm, true) => Finding::pass(CHECK, "used: compute.virt_type is kvm"),
        (VirtType::Auto, true) => {
            Finding::pass(CHECK, "there is one; the agent probes whether it runs guests")
        }
        (VirtType::Kvm, false) => Finding::failure(
            CHECK,
            format!("there is no {}", device.display()),
            "modprobe kvm-intel or kvm-amd, or set compute.virt_type to auto",
        ),
        (VirtType::Auto, false) => Finding::warning(
            CHECK,
            format!("there is no {}: guests will run slowly", device.display()),
            "turn on virtualisation in the firmware and modprobe kvm-intel or kvm-amd",
        ),
    }
}

#[cfg(test)]
mod tests {
    use stackhand_runtime::preflight::Severity;

    use super::*;

    #[test]
    fn what_is_missing_is_told_by_how_bad_it_is() {
        let none = Path::new("/none");
        assert_eq!(program(none).severity, Severity::Failure);
        assert_eq!(program(Path::new("/bin/sh")).severity, Severity::Pass);
        for (virt_type, severity) in [
            (VirtType::Kvm, Severity::Failure),
            (VirtType::Auto, Severity::Warning),
            (VirtType::Qemu, Severity::Info),
        ] {
            assert_eq!(kvm(virt_type, none).severity, severity);
        }
    }
}
