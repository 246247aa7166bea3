//! Is this host fit for the compute agent.

use std::path::Path;

use stackhand_model::IscsiClient;
use stackhand_runtime::config::Loaded;
use stackhand_runtime::preflight::{Check, Finding};

use crate::config::{ComputeSection, VirtType};
use crate::initiator::{HELPER, HostInitiator, Initiator, Question};

/// The agent's own checks: QEMU's image tool and KVM.
#[must_use]
pub fn checks(loaded: &Loaded<ComputeSection>) -> Vec<Check> {
    let section = loaded.settings.agent.clone();
    let (tool, virt_type) = (section.qemu_img.clone(), section.virt_type);
    let client = section.iscsi_client;
    vec![
        Check::new("initiator", move || initiator(client, HostInitiator::new(HELPER))),
        Check::blocking("qemu-img", move || vec![program(&tool)]),
        Check::blocking("kvm", move || {
            let mut found = vec![kvm(virt_type, Path::new("/dev/kvm"))];
            found.extend(processor(virt_type, Path::new("/proc/cpuinfo")));
            found
        }),
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

async fn initiator(client: IscsiClient, initiator: HostInitiator) -> Vec<Finding> {
    const CHECK: &str = "initiator";
    if client == IscsiClient::Qemu {
        return vec![Finding::info(CHECK, "not used: compute.iscsi_client is qemu")];
    }
    vec![match initiator.ask(Question::Name).await {
        Ok(name) => Finding::pass(CHECK, format!("this host logs in as {name}")),
        Err(reason) => Finding::failure(
            CHECK,
            reason,
            "apt-get install open-iscsi && systemctl enable --now compute-initiator.socket, or set \
             compute.iscsi_client to qemu",
        ),
    }]
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

/// Without one of these flags the processor, or the machine that this one is a guest of, offers no
/// virtualisation, whatever modules are loaded.
fn processor(virt_type: VirtType, cpuinfo: &Path) -> Option<Finding> {
    let text = std::fs::read_to_string(cpuinfo).ok()?;
    let mut flags = text.lines().filter_map(|line| line.strip_prefix("flags")).peekable();
    // Processors that tell no flags at all are not those that these two words are about.
    flags.peek()?;
    let offered = flags.any(|line| line.split_whitespace().any(|it| it == "vmx" || it == "svm"));
    (!offered && virt_type != VirtType::Qemu).then(|| {
        Finding::warning(
            "kvm",
            "the processor offers no virtualisation: it has neither the flag vmx nor svm",
            "turn on VT-x or AMD-V in the firmware; in a virtual machine, nested virtualisation on \
             its host (or set compute.virt_type to qemu: guests run slowly)",
        )
    })
}

#[cfg(test)]
mod tests {
    use stackhand_runtime::preflight::Severity;

    use super::*;

    #[test]
    fn a_processor_without_virtualisation_is_told() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str, text: &str| {
            let path = root.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let none = at("none", "processor\t: 0\nflags\t\t: fpu vme\n");
        let intel = at("intel", "processor\t: 0\nflags\t\t: fpu vmx\n");
        let other = at("other", "processor\t: 0\nFeatures\t: fp\n");
        let told = processor(VirtType::Auto, &none).unwrap();
        assert!(told.severity == Severity::Warning && told.remedy.unwrap().contains("nested"));
        assert_eq!(processor(VirtType::Qemu, &none), None);
        assert_eq!(processor(VirtType::Auto, &intel), None);
        assert_eq!(processor(VirtType::Kvm, &other), None);
    }

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
