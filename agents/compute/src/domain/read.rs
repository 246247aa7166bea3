//! What we read from the XML in which libvirt describes a domain.

use quick_xml::events::Event;
use quick_xml::name::ResolveResult;
use quick_xml::reader::NsReader;
use stackhand_model::VolumeId;
use uuid::Uuid;

use super::{Described, Devices, Mark, NAMESPACE, Plugged};

/// A description that is no XML.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the XML of a domain")]
pub struct UnreadableDomain(#[from] quick_xml::Error);

/// Reads a domain's description. What is not ours is passed over.
///
/// # Errors
///
/// Fails if the text is no XML.
pub fn read(text: &str) -> Result<Described, UnreadableDomain> {
    let mut described = Described::default();
    let mut device = Device::default();
    let mut reader = NsReader::from_str(text);
    loop {
        let (namespace, event) = reader.read_resolved_event()?;
        let element = match event {
            Event::Start(element) | Event::Empty(element) => element,
            Event::End(element) => {
                if matches!(element.local_name().as_ref(), "disk" | "interface") {
                    std::mem::take(&mut device).put_into(&mut described.devices);
                }
                continue;
            }
            Event::Text(text) => {
                if device.in_serial {
                    device.serial = text.parse().ok();
                    device.in_serial = false;
                }
                continue;
            }
            Event::Eof => return Ok(described),
            _ => continue,
        };
        let ours = matches!(&namespace, ResolveResult::Bound(bound) if bound.as_ref() == NAMESPACE);
        let attribute = |name: &str| {
            let found = element.try_get_attribute(name).ok().flatten()?;
            Some(found.value.into_owned())
        };
        match element.local_name().as_ref() {
            "instance" if ours => {
                let id = attribute("id").and_then(|id| id.parse::<Uuid>().ok());
                let generation = attribute("generation").and_then(|text| text.parse().ok());
                // A mark that somebody has garbled is no mark: the domain is not touched.
                if let (Some(id), Some(generation), Some(definition)) =
                    (id, generation, attribute("definition"))
                {
                    let core = attribute("core").unwrap_or_default();
                    described.mark = Some(Mark { id, generation, definition, core });
                }
            }
            "graphics" if attribute("type").as_deref() == Some("vnc") => {
                // -1 as long as none is chosen.
                described.vnc_port = attribute("port").and_then(|port| port.parse().ok());
            }
            "disk" => device = Device { is_disk: true, ..Device::default() },
            "interface" => device = Device { is_nic: true, ..Device::default() },
            "target" => device.target = attribute("dev").unwrap_or_default(),
            "mac" => device.mac = attribute("address").unwrap_or_default(),
            "alias" => device.alias = attribute("name").unwrap_or_default(),
            "serial" => device.in_serial = device.is_disk,
            _ => {}
        }
    }
}

/// Reads one device, as it is plugged in.
///
/// # Errors
///
/// Fails if the text is no XML.
pub fn read_device(text: &str) -> Result<Devices, UnreadableDomain> {
    read(text).map(|described| described.devices)
}

/// A device that is being read.
#[derive(Default)]
struct Device {
    is_disk: bool,
    is_nic: bool,
    target: String,
    mac: String,
    alias: String,
    serial: Option<Uuid>,
    in_serial: bool,
}

impl Device {
    fn put_into(self, devices: &mut Devices) {
        if let (true, Some(serial)) = (self.is_disk, self.serial) {
            let plugged = Plugged { alias: self.alias, guest: self.target };
            devices.volumes.insert(VolumeId(serial), plugged);
        } else if self.is_nic {
            let plugged = Plugged { alias: self.alias, guest: self.mac };
            devices.nics.insert(self.target, plugged);
        }
    }
}
