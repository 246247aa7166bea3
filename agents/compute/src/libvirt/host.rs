//! What libvirt tells of the host, and of what guests use.

use quick_xml::events::Event;
use quick_xml::reader::Reader;

use virt::domain::{BlockStats, MemoryStat};
use virt::sys;

use super::calls::{Info, Numbers};
use crate::hypervisor::{DiskUsage, KernelUsage, MemoryUsage, NumaCell};

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

/// What a QEMU counts of its disks, all together.
pub(super) fn disk_usage(stats: &BlockStats) -> DiskUsage {
    // libvirt says -1 of what it does not know.
    let known = |number: i64| u64::try_from(number).unwrap_or(0);
    DiskUsage {
        disk_read_bytes: known(stats.rd_bytes),
        disk_write_bytes: known(stats.wr_bytes),
        disk_requests: known(stats.rd_req).saturating_add(known(stats.wr_req)),
    }
}

/// How a domain's memory is used; none if that was not told.
pub(super) fn memory_usage(stats: &[MemoryStat]) -> Option<MemoryUsage> {
    let told = |tag| stats.iter().find(|it| it.tag == tag).map(|it| it.val);
    Some(MemoryUsage {
        memory_resident_kib: told(sys::VIR_DOMAIN_MEMORY_STAT_RSS)?,
        memory_unused_kib: told(sys::VIR_DOMAIN_MEMORY_STAT_UNUSED),
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
    fn numbers_are_summed_over_devices() {
        let numbers = [
            ("net.count", 2),
            ("net.0.rx.bytes", 7),
            ("net.1.rx.bytes", 20),
            ("net.1.rx.pkts", 3),
            ("net.0.tx.drop", 1),
        ];
        let numbers: Numbers = numbers.map(|(name, value)| (name.to_owned(), value)).into();
        let info = Info { cpu_nanoseconds: 5, memory_kib: 64 };
        let kernel = KernelUsage {
            cpu_nanoseconds: 5,
            memory_kib: 64,
            network_receive_bytes: 27,
            network_drops: 1,
            ..KernelUsage::default()
        };
        assert_eq!(kernel_usage(info, &numbers), kernel);
    }

    #[test]
    fn what_libvirt_does_not_know_is_not_counted() {
        let stats = BlockStats { rd_req: 1, rd_bytes: 512, wr_req: 2, wr_bytes: -1, errs: -1 };
        let disks = DiskUsage { disk_read_bytes: 512, disk_write_bytes: 0, disk_requests: 3 };
        assert_eq!(disk_usage(&stats), disks);
        let stat = |tag, val| MemoryStat { tag, val };
        let rss = stat(sys::VIR_DOMAIN_MEMORY_STAT_RSS, 9);
        let mut memory = MemoryUsage { memory_resident_kib: 9, memory_unused_kib: None };
        assert_eq!(memory_usage(std::slice::from_ref(&rss)).as_ref(), Some(&memory));
        let unused = stat(sys::VIR_DOMAIN_MEMORY_STAT_UNUSED, 4);
        memory.memory_unused_kib = Some(4);
        assert_eq!(memory_usage(&[unused.clone(), rss]), Some(memory));
        assert_eq!(memory_usage(&[unused]), None);
    }
}
