//! What enforces the firewall on this host, what it holds, and how it is damaged.

#![allow(dead_code, reason = "each test file uses its share")]

use serde_json::json;
use stackhand_network::NetworkAgent;
use stackhand_runtime::agent::Agent;
use tokio::sync::OnceCell;
use uuid::Uuid;

use super::support::{RENDERER, run, try_run};

/// Names what the probe is to find: `iptables`, or where nftables learns of answers.
pub(crate) const EXPECTED: &str = "STACKHAND_EXPECT_FIREWALL";

/// What the probe found, as facts tell it.
pub(crate) async fn found(agent: &NetworkAgent) -> String {
    let facts = agent.facts().await;
    assert_eq!(facts["firewall"]["enforced"], json!(true), "{facts}");
    let told = |key: &str| facts["firewall"][key].as_str().unwrap().to_owned();
    let found = if told("renderer") == "iptables" { told("renderer") } else { told("tracking") };
    if let Ok(expected) = std::env::var(EXPECTED).or_else(|_| std::env::var(RENDERER)) {
        assert_eq!(found, expected);
    }
    found
}

/// The program of this name that works here.
pub(crate) async fn program(name: &str) -> String {
    static NFTABLES: OnceCell<bool> = OnceCell::const_new();
    let found = NFTABLES.get_or_init(async || try_run("nft list tables").await.is_ok()).await;
    if *found { name.to_owned() } else { format!("{name}-legacy") }
}

/// What `iptables` and its kin hold that is ours, or that a test put there.
pub(crate) async fn saved() -> String {
    let mut all = String::new();
    for name in ["iptables", "ip6tables", "ebtables"] {
        let name = program(name).await;
        let saved = match name.as_str() {
            "ebtables-legacy" => {
                run(&format!("{name} -t nat -L")).await + &run(&format!("{name} -L")).await
            }
            _ => run(&format!("{name}-save")).await,
        };
        // Which tables there are is others' doing.
        let counts =
            |it: &&str| ["stackhand", "foreign", "203.0.113."].iter().any(|word| it.contains(word));
        all.extend(saved.lines().filter(counts).map(|it| format!("{it}\n")));
    }
    let sets = run("ipset save").await;
    // Of a set that is made, all but its name is the kernel's choice.
    let member = |line: &&str| line.starts_with("add ");
    all.extend(sets.lines().filter(member).map(|it| format!("{it}\n")));
    all + &run("ipset list -name").await
}

/// What somebody may do to the rules of a tap and of a group, each with a part of what is told of its
/// repair.
pub(crate) async fn damages(iptables: bool, tap: &str, group: Uuid) -> Vec<(String, &'static str)> {
    if !iptables {
        return vec![
            ("nft delete table bridge stackhand".to_owned(), "create table bridge stackhand"),
            ("nft flush table bridge stackhand".to_owned(), "rules of chain guard4"),
            ("nft flush chain bridge stackhand ingress".to_owned(), "chain ingress"),
            (format!("nft delete element bridge stackhand guards {{ {tap} }}"), "add to guards"),
            (
                format!("nft add element bridge stackhand macs {{ {tap} . 02:00:00:00:00:01 }}"),
                "02:00:00:00:00:01",
            ),
            (format!("nft insert rule bridge stackhand group-{group}-in drop"), "-in of bridge"),
            ("nft add chain bridge stackhand guest".to_owned(), "delete chain guest"),
            (
                "nft add table bridge stackhand { flags dormant ; }".to_owned(),
                "create table bridge stackhand",
            ),
        ];
    }

    let (v4, v6) = (program("iptables").await, program("ip6tables").await);
    let frames = program("ebtables").await;
    let group = &group.simple().to_string()[..15];
    vec![
        (format!("{v4} -D FORWARD 1"), "chain FORWARD of iptables filter"),
        (format!("{v4} -I FORWARD -j ACCEPT"), "chain FORWARD of iptables filter"),
        (format!("{v6} -F stackhand-pi-{tap}"), "of ip6tables filter"),
        (format!("{v4} -I stackhand-gi-{group} -j DROP"), "of iptables filter"),
        (format!("{v4} -t raw -F"), "chain PREROUTING of iptables raw"),
        (format!("{frames} -t nat -F stackhand-ma-{tap}"), "of ebtables nat"),
        (
            format!("{frames} -t nat -I stackhand-is-{tap} -s 02:00:00:00:00:01 -j ACCEPT"),
            "of ebtables nat",
        ),
        (format!("{v4} -N stackhand-guest"), "delete chain stackhand-guest"),
    ]
}
