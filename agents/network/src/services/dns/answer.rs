//! What is said to a query. Pure: a zone and bytes in, a decision out.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, HINFO, NS, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use super::zone::Zone;

/// Seconds that an answer of ours may be kept: names change with documents.
const TTL: u32 = 30;

/// The largest answer that goes by UDP: what passes through every network unfragmented.
const MOST_UDP: u16 = 1232;

/// What a client without EDNS takes by UDP.
const LEAST_UDP: u16 = 512;

/// How a query came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Answers have to fit one packet.
    Udp,
    /// They do not.
    Tcp,
}

/// What to do with a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send this.
    Answer(Vec<u8>),
    /// Ask others. The query as it came is fine to be sent on.
    Forward {
        /// What to send if they do not answer.
        failure: Vec<u8>,
    },
    /// Nothing: it is no query.
    Drop,
}

/// Decides what to do with a message from a client of the network.
#[must_use]
pub fn decide(zone: &Zone, bytes: &[u8], transport: Transport) -> Decision {
    // A header says enough to refuse; less than one is noise.
    let Some(header) = bytes.first_chunk::<12>() else { return Decision::Drop };
    let is_response = header[2] & 0x80 != 0;
    if is_response {
        return Decision::Drop;
    }
    let Ok(query) = Message::from_vec(bytes) else {
        let id = u16::from_be_bytes([header[0], header[1]]);
        let answer = Message::error_msg(id, OpCode::Query, ResponseCode::FormErr);
        return sent(&answer, transport, None);
    };
    let mut reply = Message::response(query.metadata.id, query.metadata.op_code);
    reply.metadata.recursion_desired = query.metadata.recursion_desired;
    reply.metadata.recursion_available = !zone.forwarders.is_empty();
    reply.metadata.checking_disabled = query.metadata.checking_disabled;
    reply.add_queries(query.queries.iter().cloned());
    let edns = query.edns.as_ref();
    if let Some(asked) = edns {
        let mut own = Edns::new();
        own.set_max_payload(MOST_UDP).set_dnssec_ok(asked.flags().dnssec_ok);
        reply.set_edns(own);
        if asked.version() > 0 {
            return refused(reply, ResponseCode::BADVERS, transport, edns);
        }
    }
    if query.metadata.op_code != OpCode::Query {
        return refused(reply, ResponseCode::NotImp, transport, edns);
    }
    let [question] = query.queries.as_slice() else {
        return refused(reply, ResponseCode::FormErr, transport, edns);
    };
    if query.metadata.message_type != MessageType::Query {
        return Decision::Drop;
    }
    if question.query_class() != DNSClass::IN
        || matches!(question.query_type(), RecordType::AXFR | RecordType::IXFR)
    {
        return refused(reply, ResponseCode::Refused, transport, edns);
    }
    match own_name(zone, question) {
        Some(name) => {
            fill(zone, question, &name, &mut reply);
            sent(&reply, transport, edns)
        }
        None if zone.forwarders.is_empty() || !query.metadata.recursion_desired => {
            refused(reply, ResponseCode::Refused, transport, edns)
        }
        None => {
            reply.metadata.response_code = ResponseCode::ServFail;
            encode(&reply, transport, edns)
                .map_or(Decision::Drop, |failure| Decision::Forward { failure })
        }
    }
}

/// What of ours a question is about.
enum Own {
    /// The domain itself.
    Apex(Name),
    /// A host below it, or a bare host name.
    Host { host: String, apex: Name },
    /// An address of the network, by its reverse name.
    Address { address: IpAddr, apex: Name },
}

fn own_name(zone: &Zone, question: &Query) -> Option<Own> {
    let apex = Name::from_ascii(format!("{}.", zone.domain)).ok()?;
    let name = question.name().to_lowercase();
    if name == apex {
        return Some(Own::Apex(apex));
    }
    let label = |name: &Name| {
        let first = name.iter().next()?;
        std::str::from_utf8(first).ok().map(str::to_owned)
    };
    if apex.zone_of(&name) {
        // Only one label goes below the domain; deeper names are nobody's.
        let one = name.num_labels() == apex.num_labels() + 1;
        let host = label(&name).filter(|_| one).unwrap_or_default();
        return Some(Own::Host { host, apex });
    }
    if name.num_labels() == 1 {
        let host = label(&name)?;
        return zone.names.contains_key(&host).then_some(Own::Host { host, apex });
    }
    let net = name.parse_arpa_name().ok()?;
    let address = net.addr();
    let whole = net.prefix_len() == net.max_prefix_len();
    (whole && zone.nets.iter().any(|net| net.contains(&address)))
        .then_some(Own::Address { address, apex })
}

fn fill(zone: &Zone, question: &Query, own: &Own, reply: &mut Message) {
    reply.metadata.authoritative = true;
    let (apex, records, exists) = match own {
        Own::Apex(apex) => (apex, apex_records(zone, apex, question), true),
        Own::Host { host, apex } => {
            let addresses = zone.names.get(host);
            let records = addresses.into_iter().flatten().filter_map(|address| {
                let data = match (address, question.query_type()) {
                    (IpAddr::V4(v4), RecordType::A) => RData::A(A(*v4)),
                    (IpAddr::V6(v6), RecordType::AAAA) => RData::AAAA(AAAA(*v6)),
                    _ => return None,
                };
                Some(Record::from_rdata(question.name().clone(), TTL, data))
            });
            (apex, records.collect(), addresses.is_some())
        }
        Own::Address { address, apex } => {
            let host = zone.addresses.get(address);
            let target = host.and_then(|host| apex.prepend_label(host.as_str()).ok());
            let records = target.filter(|_| question.query_type() == RecordType::PTR);
            let record =
                |target| Record::from_rdata(question.name().clone(), TTL, RData::PTR(PTR(target)));
            (apex, records.map(record).into_iter().collect(), host.is_some())
        }
    };
    if exists && question.query_type() == RecordType::ANY {
        // RFC 8482: as little as is an answer.
        let least = RData::HINFO(HINFO::new("RFC8482".into(), String::new()));
        reply.add_answer(Record::from_rdata(question.name().clone(), TTL, least));
        return;
    }
    if !exists {
        reply.metadata.response_code = ResponseCode::NXDomain;
    }
    if records.is_empty() {
        // How long the absence may be kept.
        reply.add_authority(soa(zone, apex));
    }
    reply.add_answers(records);
}

fn apex_records(zone: &Zone, apex: &Name, question: &Query) -> Vec<Record> {
    let record = match question.query_type() {
        RecordType::SOA => Some(soa(zone, apex)),
        RecordType::NS => {
            let server = server_name(zone, apex);
            Some(Record::from_rdata(question.name().clone(), TTL, RData::NS(NS(server))))
        }
        _ => None,
    };
    record.into_iter().collect()
}

/// The server's own name, if one of its addresses has one.
fn server_name(zone: &Zone, apex: &Name) -> Name {
    let host = zone.servers.iter().find_map(|address| zone.addresses.get(address));
    let name = host.and_then(|host| apex.prepend_label(host.as_str()).ok());
    name.unwrap_or_else(|| apex.clone())
}

fn soa(zone: &Zone, apex: &Name) -> Record {
    let contact = apex.prepend_label("hostmaster").unwrap_or_else(|_| apex.clone());
    let data = SOA::new(server_name(zone, apex), contact, 1, 3600, 600, 86400, TTL);
    Record::from_rdata(apex.clone(), TTL, RData::SOA(data))
}

fn refused(
    mut reply: Message,
    code: ResponseCode,
    transport: Transport,
    edns: Option<&Edns>,
) -> Decision {
    reply.metadata.response_code = code;
    sent(&reply, transport, edns)
}

fn sent(reply: &Message, transport: Transport, edns: Option<&Edns>) -> Decision {
    encode(reply, transport, edns).map_or(Decision::Drop, Decision::Answer)
}

fn encode(reply: &Message, transport: Transport, edns: Option<&Edns>) -> Option<Vec<u8>> {
    let bytes = reply.to_vec().ok()?;
    let most = match transport {
        Transport::Tcp => usize::from(u16::MAX),
        Transport::Udp => {
            let asked = edns.map_or(LEAST_UDP, Edns::max_payload);
            usize::from(asked.clamp(LEAST_UDP, MOST_UDP))
        }
    };
    if bytes.len() <= most { Some(bytes) } else { reply.truncate().to_vec().ok() }
}
