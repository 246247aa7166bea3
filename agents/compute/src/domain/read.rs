//! What we read from the XML in which libvirt describes a domain.

use quick_xml::events::Event;
use quick_xml::name::ResolveResult;
use quick_xml::reader::NsReader;
use uuid::Uuid;

use super::{Described, Mark, NAMESPACE};

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
    let mut described = Described { mark: None, vnc_port: None };
    let mut reader = NsReader::from_str(text);
    loop {
        let (namespace, event) = reader.read_resolved_event()?;
        let element = match event {
            Event::Start(element) | Event::Empty(element) => element,
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
                    described.mark = Some(Mark { id, generation, definition });
                }
            }
            "graphics" if attribute("type").as_deref() == Some("vnc") => {
                // -1 as long as none is chosen.
                described.vnc_port = attribute("port").and_then(|port| port.parse().ok());
            }
            _ => {}
        }
    }
}
