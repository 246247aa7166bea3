//! What this kernel can do, found by trying in a namespace that nobody sees.

use std::time::Duration;

use serde_json::{Value, json};
use stackhand_kernel::exec::Program;
use stackhand_kernel::netlink::{LinkChange, Links, NewKind, NewLink, WriteCount};
use stackhand_kernel::{Chain, netns};

/// Kinds of link that network types need and that stand on their own.
const KINDS: [&str; 6] = ["bridge", "veth", "vxlan", "gretap", "geneve", "ifb"];

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
            for kind in KINDS {
                let works = try_kind(&links, kind).await;
                found.insert(kind.to_owned(), works);
            }
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

async fn try_kind(links: &Links, kind: &str) -> Value {
    let name = format!("try-{kind}");
    let kind = match kind {
        "vxlan" => NewKind::Vxlan(stackhand_kernel::netlink::Vxlan {
            vni: 1,
            local: None,
            port: 4789,
            learning: false,
        }),
        "bridge" => NewKind::Bridge(crate::l2::BRIDGE),
        other => NewKind::Plain(other.to_owned()),
    };
    let new = NewLink { name, kind, group: 0, change: LinkChange::default() };
    match links.create(&new, None).await {
        Ok(()) => json!(true),
        Err(error) => json!(Chain(&error).to_string()),
    }
}
