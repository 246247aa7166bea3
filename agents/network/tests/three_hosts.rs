//! Three hosts on one switch, each with an agent of its own: guests on one network of every type.

#![allow(clippy::print_stdout, reason = "what was measured belongs to the output")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use support::{Documents, Guest, agent, link, mac, network, on_a_host, port, run, short};
use tokio::sync::Barrier;
use uuid::Uuid;

/// What is tried: a network, and what is beneath it.
#[derive(Clone, Debug)]
struct Case {
    network: Value,
    /// Hosts' addresses on the switch, without the last part.
    underlay: &'static str,
    /// The MTU that is left for guests.
    mtu: u32,
}

fn case(kind: &str, more: &Value, underlay: &'static str, mtu: u32) -> Case {
    Case { network: network(kind, more), underlay, mtu }
}

const V4: &str = "192.0.2.";
const V6: &str = "2001:db8::";
const HOSTS: [&str; 3] = ["one", "two", "three"];

/// How long one guest asks another until it is answered.
const PATIENCE: Duration = Duration::from_secs(30);

impl Case {
    fn documents(&self) -> Documents {
        let net = Uuid::from_u128(7 << 96);
        let mut documents = Documents::default();
        for (number, name) in (1_u8..).zip(HOSTS) {
            let spec = if self.network["type"] == "vlan" {
                json!({"bridge_mappings": {"public": "wire"}})
            } else {
                json!({"tunnel_address": format!("{}{number}", self.underlay)})
            };
            documents.put("Host", name, Uuid::from_u128(number.into()), spec);
            let more = json!({"owner": "external", "port_security": false});
            let spec = port(net, name, 10 + number, &more);
            documents.put("Port", &format!("on-{name}"), port_id(number), spec);
        }
        documents.put("Network", "net", net, self.network.clone());
        documents
    }

    /// One of the hosts, whose link `wire` leads to the switch.
    async fn host(&self, number: u8, all: &Barrier) {
        let name = HOSTS[usize::from(number - 1)];
        if self.network["type"] != "vlan" {
            let (prefix, more) = if self.underlay == V4 { (24, "") } else { (64, " nodad") };
            run(&format!("ip address add {}{number}/{prefix}{more} dev wire", self.underlay)).await;
        }
        run("ip link set wire up").await;
        let (agent, _) = agent(name);
        let documents = self.documents();
        let guest = Guest::start("guest", port_id(number), &mac(10 + number)).await;
        guest.run(&format!("ip address add 10.7.0.{}/24 dev eth0", 10 + number)).await;
        guest.run(&format!("ip link set eth0 mtu {}", self.mtu)).await;
        documents.settle(&agent).await;
        documents.rest(&agent).await;
        let tap = link(&format!("tap{}", short(port_id(number)))).await.unwrap();
        assert_eq!(tap["mtu"], json!(self.mtu));
        together(all).await;
        for other in (1..=3).filter(|other| *other != number) {
            // A packet of the full size passes in one piece.
            let size = self.mtu - 28;
            let ping = format!("ping -c 1 -W 2 -M do -s {size} 10.7.0.{}", 10 + other);
            // One packet may be lost while each side asks for the other's address; an answer to any
            // shows that the size passes.
            stackhand_testkit::wait_for(PATIENCE, &ping, || async {
                guest.try_run(&ping).await.ok()
            })
            .await;
        }
        together(all).await;
        let before = sent().await;
        let asked = format!("arping -c 2 -I eth0 10.7.0.{}", 100 + number);
        guest.try_run(&asked).await.unwrap_err();
        let frames = sent().await - before;
        assert!(frames < 60, "two questions to all made {frames} frames: a loop");
        together(all).await;
        documents.rest(&agent).await;
        together(all).await;
    }

    fn holds(self) {
        println!("{self:?}");
        let all = Arc::new(Barrier::new(HOSTS.len()));
        let (places, place) = mpsc::channel();
        let mut hosts = Vec::new();
        let mut wired = Vec::new();
        for number in 1..=3_u8 {
            let (case, all, places) = (self.clone(), Arc::clone(&all), places.clone());
            let (ready, is_wired) = tokio::sync::oneshot::channel::<()>();
            wired.push(ready);
            hosts.push(thread::spawn(move || {
                on_a_host(|| async move {
                    let thread = nix::unistd::gettid();
                    let space = format!("/proc/{}/task/{thread}/ns/net", std::process::id());
                    places.send((number, space)).unwrap();
                    is_wired.await.unwrap();
                    case.host(number, &all).await;
                });
            }));
        }
        on_a_host(|| async move {
            run("ip link add switch type bridge").await;
            run("ip link set switch up").await;
            for _ in HOSTS {
                let (number, space) = place.recv().unwrap();
                run(&format!("ip link add to{number} type veth peer name far{number}")).await;
                run(&format!("ip link set to{number} master switch up")).await;
                run(&format!("ip link set far{number} netns {space} name wire")).await;
            }
            wired.into_iter().for_each(|ready| ready.send(()).unwrap());
            // The switch lasts as long as the hosts.
            for host in hosts {
                let end = tokio::task::spawn_blocking(move || host.join());
                if let Err(panic) = end.await.unwrap() {
                    std::panic::resume_unwind(panic);
                }
            }
        });
    }
}

fn port_id(number: u8) -> Uuid {
    Uuid::from_u128(u128::from(number) << 96 | 0xaa << 120)
}

async fn together(all: &Barrier) {
    let wait = tokio::time::timeout(4 * PATIENCE, all.wait());
    wait.await.expect("another host fell out");
}

/// Frames that left this host by `wire`.
async fn sent() -> u64 {
    let text = run("ip -json -statistics link show dev wire").await;
    let links: Value = serde_json::from_str(&text).unwrap();
    links[0]["stats64"]["tx"]["packets"].as_u64().unwrap()
}

#[test]
fn guests_meet_on_vxlan_over_ipv4() {
    case("vxlan", &json!({"segment": 4711}), V4, 1450).holds();
}

#[test]
fn guests_meet_on_vxlan_over_ipv6() {
    case("vxlan", &json!({"segment": 4711}), V6, 1430).holds();
}

/// What needs a full kernel.
mod lab {
    use super::*;

    #[test]
    #[ignore = "runs in the lab"]
    fn a_vlan_is_carried_by_the_mapped_link() {
        let more = json!({"physical_network": "public", "segment": 4094});
        case("vlan", &more, V4, 1500).holds();
    }

    #[test]
    #[ignore = "runs in the lab"]
    fn a_gre_tunnel_to_each_host_over_ipv4_and_over_ipv6() {
        case("gre", &json!({"segment": 4_000_000_000_u32}), V4, 1458).holds();
        case("gre", &json!({"segment": 7}), V6, 1438).holds();
    }

    #[test]
    #[ignore = "runs in the lab"]
    fn a_geneve_tunnel_to_each_host() {
        case("geneve", &json!({"segment": 4711}), V6, 1430).holds();
    }

    #[test]
    fn guests_meet_on_networks_of_types_that_a_full_kernel_has() {
        stackhand_testkit::in_the_lab("lab::a_");
    }
}
