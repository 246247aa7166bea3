//! Ports of guests that are machines: taps that the agent makes ahead of them, filtered before they
//! carry a frame.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/filtered.rs"]
mod filtered;
#[path = "support/machine.rs"]
mod machine;
mod support;

/// Machines take their turn.
mod guest {
    use serde_json::json;

    use crate::filtered::{Site, all_out, four};
    use crate::machine::{Machine, ready};
    use crate::support::{agent, link, mac, on_a_host, run, short};

    /// Gives a machine's link what its port has.
    async fn configure(machine: &Machine, last: u8) {
        machine
            .run(&format!("ip address add {}/24 dev eth0; ip link set eth0 up", four(last)))
            .await;
    }

    #[test]
    fn machines_reach_what_their_groups_allow_and_pretend_to_be_nobody_else() {
        let folder = ready();
        on_a_host(|| async {
            let (agent, _) = agent("one");
            let mut site = Site::new();
            let open = site.group(&json!([
                {"direction": "egress"},
                {"direction": "ingress", "protocol": "icmp", "remote_cidr": format!("{}/32", four(10))},
                {"direction": "ingress", "protocol": "tcp", "port_range_min": 80, "port_range_max": 80},
            ]));
            let shut = site.group(&all_out());
            let first = site.port(10, &[shut], &json!({"owner": "instance"}));
            let second = site.port(11, &[open], &json!({"owner": "instance", "queues": 2}));
            site.documents.settle(&agent).await;
            // Taps are there, and up, before anybody opens them.
            for id in [first, second] {
                let tap = link(&format!("tap{}", short(id))).await.unwrap();
                assert!(tap["flags"].as_array().unwrap().contains(&json!("UP")), "{tap}");
                assert_eq!(tap["operstate"], "DOWN", "nobody has it open: {tap}");
            }
            let one = Machine::start(folder.path(), first, 10, 1).await;
            let two = Machine::start(folder.path(), second, 11, 2).await;
            configure(&one, 10).await;
            configure(&two, 11).await;
            site.settle(&agent).await;
            site.documents.rest(&agent).await;

            assert!(one.reaches(&four(11)).await, "its group allows ICMP from there");
            assert!(!two.reaches(&four(10)).await, "no rule lets it in");
            two.run("(while true; do echo served | nc -l -p 80; done) >/dev/null 2>&1 &").await;
            let served = one.run(&format!("nc -w 5 {} 80 </dev/null", four(11))).await;
            assert!(served.contains("served"), "{served}");
            two.run("(echo hidden | nc -l -p 81) >/dev/null 2>&1 &").await;
            let hidden = one.run(&format!("nc -w 3 {} 81 </dev/null", four(11))).await;
            assert!(!hidden.contains("hidden\r\n"), "{hidden}");

            // Another address, then another Ethernet address: nothing of it arrives.
            one.run(&format!("ip address flush dev eth0; ip address add {}/24 dev eth0", four(77)))
                .await;
            assert!(!one.reaches(&four(11)).await, "with an address that is not its own");
            one.run("ip address flush dev eth0; ip link set eth0 down").await;
            one.run(&format!("ip link set eth0 address {} up", mac(78))).await;
            one.run(&format!("ip address add {}/24 dev eth0", four(10))).await;
            assert!(!one.reaches(&four(11)).await, "with an Ethernet address that is not its own");
            one.run(&format!("ip link set eth0 down; ip link set eth0 address {} up", mac(10)))
                .await;
            configure(&one, 10).await;
            assert!(one.reaches(&four(11)).await, "as itself again");
        });
    }

    #[test]
    fn machines_lose_nothing_when_the_agent_is_followed_by_another() {
        let folder = ready();
        on_a_host(|| async {
            let (before, _) = agent("one");
            let mut site = Site::new();
            let group = site.group(&json!([
                {"direction": "egress"}, {"direction": "ingress", "protocol": "icmp"},
            ]));
            let first = site.port(10, &[group], &json!({"owner": "instance"}));
            site.port(11, &[group], &json!({}));
            let (namespace, _) = site.guest(11).await;
            site.documents.settle(&before).await;
            let machine = Machine::start(folder.path(), first, 10, 1).await;
            configure(&machine, 10).await;
            site.settle(&before).await;
            assert!(machine.reaches(&four(11)).await);
            let flood = namespace.run("ping -i 0.01 -c 400 -W 5 -q 10.7.0.10");
            let follow = async {
                drop(before);
                let (after, _) = agent("one");
                site.documents.rest(&after).await;
                after
            };
            let (lost, after) = tokio::join!(flood, follow);
            assert!(lost.contains(" 0% packet loss"), "{lost}");
            // The machine ends; its port stays ready for the next, which needs no pass.
            let tap = format!("tap{}", short(first));
            drop(machine);
            site.documents.rest(&after).await;
            assert!(run("bridge link").await.contains(&tap));
            let machine = Machine::start(folder.path(), first, 10, 1).await;
            configure(&machine, 10).await;
            assert!(machine.reaches(&four(11)).await);
            drop(after);
        });
    }
}
