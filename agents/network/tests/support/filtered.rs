//! A network on this host with filtered ports, and guests behind them.

#![allow(dead_code, reason = "each test file uses its share")]

use std::time::Duration;

use serde_json::{Value, json};
use stackhand_network::NetworkAgent;
use stackhand_testkit::wait_for;
use uuid::Uuid;

use super::support::frames::Wire;
use super::support::{Documents, Guest, link, mac, network, port, short};

/// A network, and guests on filtered ports of it.
pub(crate) struct Site {
    net: Uuid,
    pub(crate) documents: Documents,
    ports: Vec<(u8, Uuid)>,
}

impl Site {
    pub(crate) fn new() -> Self {
        Self::of(Uuid::new_v4())
    }

    pub(crate) fn of(net: Uuid) -> Self {
        let mut documents = Documents::default();
        let subnets = json!({"subnets": [
            {"name": "main", "cidr": "10.7.0.0/24", "dhcp": false},
            {"name": "six", "cidr": "fd00:7::/64", "dhcp": false},
        ]});
        documents.put("Network", "net", net, network("local", &subnets));
        Self { net, documents, ports: Vec::new() }
    }

    pub(crate) fn id(&self, last: u8) -> Option<Uuid> {
        self.ports.iter().find(|(known, _)| *known == last).map(|(_, id)| *id)
    }

    /// A filtered port in some groups.
    pub(crate) fn port(&mut self, last: u8, groups: &[Uuid], more: &Value) -> Uuid {
        let id = self.id(last).unwrap_or_else(Uuid::new_v4);
        self.port_of(id, last, groups, more)
    }

    pub(crate) fn port_of(&mut self, id: Uuid, last: u8, groups: &[Uuid], more: &Value) -> Uuid {
        let filtered = json!({
            "owner": "external",
            "port_security": true,
            "security_groups": groups,
            "fixed_ips": [
                {"subnet": "main", "address": four(last)},
                {"subnet": "six", "address": six(last)},
            ],
        });
        let mut spec = port(self.net, "one", last, &filtered);
        for (key, value) in more.as_object().unwrap() {
            spec[key] = value.clone();
        }
        self.documents.put("Port", &format!("p{last}"), id, spec);
        self.ports.push((last, id));
        id
    }

    pub(crate) fn group(&mut self, rules: &Value) -> Uuid {
        self.group_of(Uuid::new_v4(), true, rules)
    }

    pub(crate) fn group_of(&mut self, id: Uuid, stateful: bool, rules: &Value) -> Uuid {
        let name = format!("g{}", &id.to_string()[..6]);
        let spec = json!({"rules": rules, "stateful": stateful});
        self.documents.put("SecurityGroup", &name, id, spec);
        id
    }

    /// A pass after which everything is active, and the bridge forwards to all guests.
    pub(crate) async fn settle(&self, agent: &NetworkAgent) {
        self.documents.settle(agent).await;
        for (last, id) in &self.ports {
            let tap = format!("tap{}", short(*id));
            let forwards = || async {
                let link = link(&tap).await?;
                let is_up = link["flags"].as_array()?.contains(&json!("UP"));
                let state = &link["linkinfo"]["info_slave_data"]["state"];
                (!is_up || state == "forwarding").then_some(())
            };
            wait_for(Duration::from_secs(20), &format!("port {last} to forward"), forwards).await;
        }
    }

    /// A guest behind a port, with the port's addresses.
    pub(crate) async fn guest(&self, last: u8) -> (Guest, Wire) {
        let guest = Guest::start(&format!("g{last}"), self.id(last).unwrap(), &mac(last)).await;
        guest.run(&format!("ip address add {}/24 dev eth0", four(last))).await;
        guest.run(&format!("ip address add {}/64 dev eth0 nodad", six(last))).await;
        let wire = Wire::of(guest.name()).await;
        (guest, wire)
    }
}

pub(crate) fn four(last: u8) -> String {
    format!("10.7.0.{last}")
}

pub(crate) fn six(last: u8) -> String {
    format!("fd00:7::{last:x}")
}

/// All that leaves, of both families.
pub(crate) fn all_out() -> Value {
    json!([{"direction": "egress"}, {"direction": "egress", "ethertype": "IPv6"}])
}

/// Everything.
pub(crate) fn all() -> Value {
    json!([
        {"direction": "egress"}, {"direction": "egress", "ethertype": "IPv6"},
        {"direction": "ingress"}, {"direction": "ingress", "ethertype": "IPv6"},
    ])
}
