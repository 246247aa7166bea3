//! What libvirt tells of the host, and of what guests use.

use quick_xml::events::Event;
use quick_xml::reader::Reader;

use super::calls::{Info, Numbers};
use crate::hypervisor::{KernelUsage, NumaCell, QemuUsage};

/// What the host's capabilities say, as far as it concerns us.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Capabilities {
    pub(super) architecture: String,
    pub(super) cpu_model: Option<String>,
    pub(super) cells: Vec<NumaCell>,
}

/// Reads libvirt's capabilities. What is not understood is left out.
pub(super) fn capabilities(xml: &str) -> Capabilities {
    let mut found = Capabilities::default();
    let mut reader = Reader::from_str(xml);
    let mut path: Vec<String> = Vec::new();
    loop {
        let (element, opens) = match reader.read_event() {
            Ok(Event::Start(element)) => (element, true),
            Ok(Event::Empty(element)) => (element, false),
            Ok(Event::End(_)) => {
                path.pop();
                continue;
            }
            Ok(Event::Text(text)) => {
                let text = text.trim().to_owned();
                match path.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
                    ["capabilities", "host", "cpu", "arch"] => found.architecture = text,
                    ["capabilities", "host", "cpu", "model"] => found.cpu_model = Some(text),
                    ["capabilities", "host", "topology", "cells", "cell", "memory"] => {
                        if let (Some(cell), Ok(kib)) = (found.cells.last_mut(), text.parse::<u64>())
                        {
                            cell.memory_mib = kib / 1024;
                        }
                    }
                    _ => {}
                }
                continue;
            }
            Ok(Event::Eof) | Err(_) => return found,
            Ok(_) => continue,
        };
        let number = |name: &str| {
            let attribute = element.try_get_attribute(name).ok().flatten()?;
            attribute.value.parse::<u32>().ok()
        };
        let name = element.local_name().as_ref().to_owned();
        match (path.last().map(String::as_str), name.as_str()) {
            (Some("cells"), "cell") => {
                let id = number("id").unwrap_or_default();
                found.cells.push(NumaCell { id, memory_mib: 0, cpus: Vec::new() });
            }
            (Some("cpus"), "cpu") => {
                if let (Some(cell), Some(cpu)) = (found.cells.last_mut(), number("id")) {
                    cell.cpus.push(cpu);
                }
            }
            _ => {}
        }
        if opens {
            path.push(name);
        }
    }
}

/// What the kernel counts for one domain.
pub(super) fn kernel_usage(info: Info, numbers: &Numbers) -> KernelUsage {
    KernelUsage {
        cpu_nanoseconds: info.cpu_nanoseconds,
        memory_kib: info.memory_kib,
        network_receive_bytes: sum(numbers, "net", &["rx.bytes"]),
        network_transmit_bytes: sum(numbers, "net", &["tx.bytes"]),
        network_drops: sum(numbers, "net", &["rx.drop", "tx.drop"]),
    }
}

/// What a QEMU counts; none if it was not asked, because it was busy.
pub(super) fn qemu_usage(numbers: &Numbers) -> Option<QemuUsage> {
    Some(QemuUsage {
        // Told if QEMU was asked, and else neither this nor what disks did.
        memory_resident_kib: *numbers.get("balloon.rss")?,
        memory_unused_kib: numbers.get("balloon.unused").copied(),
        disk_read_bytes: sum(numbers, "block", &["rd.bytes"]),
        disk_write_bytes: sum(numbers, "block", &["wr.bytes"]),
        disk_requests: sum(numbers, "block", &["rd.reqs", "wr.reqs"]),
    })
}

/// Sums up one thing over all devices of a kind.
fn sum(numbers: &Numbers, kind: &str, ends: &[&str]) -> u64 {
    let counts = |name: &str| {
        let rest = name.strip_prefix(kind).and_then(|rest| rest.strip_prefix('.'));
        let end = rest.and_then(|rest| rest.split_once('.')).map(|(_, end)| end);
        end.is_some_and(|end| ends.contains(&end))
    };
    let all = numbers.iter().filter(|(name, _)| counts(name)).map(|(_, value)| *value);
    all.fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_and_cells_are_read_from_the_capabilities() {
        let xml = "<capabilities><host><cpu><arch>x86_64</arch><model>Haswell</model></cpu>\
                   <topology><cells num='1'><cell id='0'><memory unit='KiB'>2048</memory>\
                   <cpus num='2'><cpu id='0' socket_id='0'/><cpu id='1'/></cpus></cell></cells>\
                   </topology></host><guest><arch name='i686'/></guest></capabilities>";
        let found = capabilities(xml);
        assert_eq!(
            (found.architecture.as_str(), found.cpu_model.as_deref()),
            ("x86_64", Some("Haswell"))
        );
        assert_eq!(found.cells, [NumaCell { id: 0, memory_mib: 2, cpus: vec![0, 1] }]);
        assert_eq!(capabilities("<capabilities><host>&"), Capabilities::default());
    }

    #[test]
    fn numbers_are_summed_over_disks_and_devices() {
        let numbers = [
            ("balloon.rss", 9),
            ("block.count", 2),
            ("block.0.rd.bytes", 10),
            ("block.1.rd.bytes", 20),
            ("block.1.wr.reqs", 3),
            ("net.0.rx.bytes", 7),
            ("net.0.tx.drop", 1),
        ];
        let mut numbers: Numbers = numbers.map(|(name, value)| (name.to_owned(), value)).into();
        let info = Info { cpu_nanoseconds: 5, memory_kib: 64 };
        let kernel = KernelUsage {
            cpu_nanoseconds: 5,
            memory_kib: 64,
            network_receive_bytes: 7,
            network_drops: 1,
            ..KernelUsage::default()
        };
        assert_eq!(kernel_usage(info, &numbers), kernel);
        let qemu = QemuUsage {
            memory_resident_kib: 9,
            disk_read_bytes: 30,
            disk_requests: 3,
            ..QemuUsage::default()
        };
        assert_eq!(qemu_usage(&numbers), Some(qemu));
        numbers.remove("balloon.rss");
        assert_eq!(qemu_usage(&numbers), None, "one that is busy has not read nothing");
    }
}
