//! What this kernel can do, found by trying in a namespace that nobody sees.

use std::net::IpAddr;
use std::time::Duration;

use serde_json::{Value, json};
use stackhand_kernel::exec::Program;
use stackhand_kernel::netlink::{
    Geneve, Gre, LinkChange, Links, NewKind, NewLink, Peer, Vxlan, WriteCount,
};
use stackhand_kernel::{Chain, netns};

use crate::l2::BRIDGE;

/// The kernel's release, such as `6.1.0-18-amd64`.
#[must_use]
pub(crate) fn kernel() -> String {
    nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// What works, by name: `true`, or why not. Creates links in a namespace of its own, which is gone
/// afterwards.
pub(crate) async fn abilities() -> Value {
    let mut found = serde_json::Map::new();
    match netns::in_a_scratch_netns(|| Links::connect(WriteCount::default())).await {
        Ok(links) => {
            for (name, kind) in kinds() {
                let works = try_kind(&links, name, kind).await;
                found.insert(name.to_owned(), works);
            }
            let works = try_vlan(&links).await;
            found.insert("vlan".to_owned(), works);
        }
        Err(error) => {
            found.insert("links".to_owned(), json!(Chain(&error).to_string()));
        }
    }
    found.insert("tap".to_owned(), json!(std::path::Path::new("/dev/net/tun").exists()));
    found.insert("ipv6".to_owned(), json!(std::path::Path::new("/proc/sys/net/ipv6").exists()));
    let nft = Program::new("/usr/sbin/nft").arg("--version").limit(Duration::from_secs(5));
    let nft = match nft.run().await {
        Ok(output) => json!(output.text().trim()),
        Err(_) => json!(false),
    };
    found.insert("nft".to_owned(), nft);
    Value::Object(found)
}

/// The types of network that these abilities allow.
pub(crate) fn network_types(abilities: &Value) -> Vec<&'static str> {
    let needs = [
        ("local", "bridge"),
        ("flat", "bridge"),
        ("vlan", "vlan"),
        ("vxlan", "vxlan"),
        ("gre", "gretap"),
        ("geneve", "geneve"),
    ];
    let has = |(_, kind): &(_, &str)| abilities[*kind] == json!(true);
    needs.into_iter().filter(has).map(|(name, _)| name).collect()
}

/// Kinds of link that network types need and that stand on their own.
fn kinds() -> [(&'static str, NewKind); 6] {
    let (local, remote) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
    let peer = Peer { name: "peer".to_owned(), mac: None, mtu: None, group: 0 };
    let vxlan = Vxlan { vni: 1, local: None, port: 4789, learning: false };
    [
        ("bridge", NewKind::Bridge(BRIDGE)),
        ("veth", NewKind::Veth(peer)),
        ("vxlan", NewKind::Vxlan(vxlan)),
        ("gretap", NewKind::Gre(Gre { key: 1, local, remote })),
        ("geneve", NewKind::Geneve(Geneve { vni: 1, remote, port: 6081 })),
        ("ifb", NewKind::Ifb),
    ]
}

/// A VLAN needs a link to be on.
async fn try_vlan(links: &Links) -> Value {
    match links.index("try-bridge").await {
        Ok(parent) => try_kind(links, "vlan", NewKind::Vlan { parent, id: 1 }).await,
        Err(error) => json!(Chain(&error).to_string()),
    }
}

async fn try_kind(links: &Links, name: &str, kind: NewKind) -> Value {
    let name = format!("try-{name}");
    let new = NewLink { name, kind, group: 0, change: LinkChange::default() };
    match links.create(&new, None).await {
        Ok(()) => json!(true),
        Err(error) => json!(Chain(&error).to_string()),
    }
}
