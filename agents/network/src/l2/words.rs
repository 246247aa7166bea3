//! Changes in the kernel's words: for plans, logs and events.

use std::fmt;

use stackhand_kernel::KernelError;
use stackhand_model::MacAddr;

use super::{At, Change, Make, Set};

impl Change {
    /// What to do about a refusal of the kernel, where that is known; follows its words.
    #[must_use]
    pub fn remedy(&self, error: &KernelError) -> Option<String> {
        let Self::Make { make, .. } = self else { return None };
        if error.errno() != Some(nix::libc::EOPNOTSUPP) {
            return None;
        }
        let (what, module) = match make {
            Make::Bridge => ("bridges", "bridge"),
            Make::Tap(_) => ("taps", "tun"),
            Make::Pair { .. } => ("veth pairs", "veth"),
            Make::Vxlan(_) => ("VXLAN links", "vxlan"),
            Make::Vlan { .. } => ("VLAN links", "8021q"),
            Make::Gre(gre) if gre.local.is_ipv6() => ("GRE tunnels over IPv6", "ip6_gre"),
            Make::Gre(_) => ("GRE tunnels", "ip_gre"),
            Make::Geneve(_) => ("Geneve tunnels", "geneve"),
            Make::Ifb => ("ifb links, which limits on what a guest sends need", "ifb"),
            Make::PairEnd | Make::Loopback | Make::Brought => return None,
        };
        Some(format!("; this kernel has no {what}: load the module {module}, or use another type"))
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if let Some(mark) = self.mark {
            parts.push(format!("alias {mark}"));
        }
        if let Some(mac) = self.mac {
            parts.push(format!("address {mac}"));
        }
        if let Some(mtu) = self.mtu {
            parts.push(format!("mtu {mtu}"));
        }
        match &self.bridge {
            Some(Some(bridge)) => parts.push(format!("master {bridge}")),
            Some(None) => parts.push("nomaster".to_owned()),
            None => {}
        }
        if let Some(up) = self.up {
            parts.push(if up { "up" } else { "down" }.to_owned());
        }
        if let Some(off) = self.ipv6_off {
            parts.push(if off { "IPv6 off" } else { "IPv6 on" }.to_owned());
        }
        if let Some(port) = self.port {
            parts.push(format!(
                "isolated {}, neigh_suppress {}, hairpin {}",
                port.isolated, port.neighbour_suppression, port.hairpin
            ));
        }
        if let Some(bridge) = self.as_bridge {
            parts.push(format!(
                "stp {}, forward_delay {}, ageing_time {}, mcast_snooping {}, nf_call_iptables {}",
                bridge.stp,
                bridge.forward_delay,
                bridge.ageing_time,
                bridge.multicast_snooping,
                bridge.netfilter
            ));
        }
        if let Some(routing) = self.routing {
            parts.push(format!(
                "forwarding {}, arp_ignore {}, arp_announce {}, rp_filter {}",
                routing.forwarding, routing.arp_ignore, routing.arp_announce, routing.rp_filter
            ));
        }
        if let Some(learning) = self.learning {
            parts.push(if learning { "learning" } else { "nolearning" }.to_owned());
        }
        match self.shaper {
            Some(Some(shaper)) => parts.push(format!(
                "tbf rate {} burst {} limit {}",
                shaper.rate, shaper.burst, shaper.limit
            )),
            Some(None) => parts.push("no tbf".to_owned()),
            None => {}
        }
        match &self.redirect {
            Some(Some(to)) => parts.push(format!("redirect to {to}")),
            Some(None) => parts.push("no redirect".to_owned()),
            None => {}
        }
        f.write_str(&parts.join(", "))
    }
}

impl fmt::Display for Make {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bridge => f.write_str("bridge"),
            Self::Tap(tap) if tap.multi_queue => f.write_str("tap, several queues"),
            Self::Tap(_) => f.write_str("tap"),
            Self::Pair { peer, .. } => write!(f, "veth, peer {peer}"),
            Self::PairEnd => f.write_str("veth"),
            Self::Loopback => f.write_str("loopback"),
            Self::Vxlan(vxlan) => {
                write!(f, "vxlan {}, port {}", vxlan.vni, vxlan.port)?;
                vxlan.local.map_or(Ok(()), |local| write!(f, ", local {local}"))
            }
            Self::Vlan { parent, id } => write!(f, "vlan {id} of {parent}"),
            Self::Gre(gre) => write!(f, "gretap key {}, remote {}", gre.key, gre.remote),
            Self::Geneve(geneve) => write!(f, "geneve {}, remote {}", geneve.vni, geneve.remote),
            Self::Ifb => f.write_str("ifb"),
            Self::Brought => f.write_str("brought by somebody else"),
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flood = |mac: &Option<MacAddr>| mac.map_or("flood".to_owned(), |mac| mac.to_string());
        match self {
            Self::MakeSpace { space, .. } => write!(f, "create namespace {space}"),
            Self::DeleteSpace { space } => write!(f, "delete namespace {space}"),
            Self::Make { at, make, set } => write!(f, "create link {at} ({make}; {set})"),
            Self::Set { at, set } => write!(f, "set link {at}: {set}"),
            Self::Delete { links } => {
                let names: Vec<String> = links.iter().map(At::to_string).collect();
                write!(f, "delete {}", names.join(", "))
            }
            Self::AddAddress { at, net } => write!(f, "add address {net} to {at}"),
            Self::RemoveAddress { at, net } => write!(f, "remove address {net} from {at}"),
            Self::Forward { link, mac, via } => {
                write!(f, "forward {} by {link} to {via}", flood(mac))
            }
            Self::Unforward { link, mac, via } => {
                write!(f, "no longer forward {} by {link} to {via}", flood(mac))
            }
            Self::Place { link, mac } => write!(f, "place {mac} behind {link}"),
            Self::Unplace { link, mac } => write!(f, "no longer place {mac} behind {link}"),
            Self::Answer { bridge, address, mac } => {
                write!(f, "let {bridge} answer {mac} for {address}")
            }
            Self::Unanswer { bridge, address, .. } => {
                write!(f, "no longer let {bridge} answer for {address}")
            }
        }
    }
}
