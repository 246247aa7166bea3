//! nftables and connection tracking on the real kernel.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::net::UdpSocket;
use std::time::Duration;

use stackhand_kernel::Netns;
use stackhand_kernel::exec::Program;
use stackhand_kernel::netfilter::{Element, Family, Netfilter, NftChange, NftMonitor, Table};
use stackhand_kernel::netlink::{LinkChange, Links, WriteCount};
use stackhand_testkit::on_a_host;
use stackhand_testkit::wait_for;

const SCRIPT: &str = r#"
table inet tried {
    comment "for a test"
    map places { type ipv4_addr : ipv4_addr; }
    map doors { type inet_proto . ipv4_addr . inet_service : ipv4_addr . inet_service; }
    set names { type ifname; comment "who"; }
    chain first {
        type nat hook prerouting priority dstnat; policy accept;
        dnat ip to ip daddr map @places
        dnat ip to meta l4proto . ip daddr . th dport map @doors
        iifname @names ct state established,related accept comment "known"
    }
    chain second {
        type filter hook forward priority 10; policy drop;
        oifname "qg-*" tcp dport 22 accept
    }
    chain third { ip saddr 10.0.0.0/8 return; jump fourth; }
    chain fourth { }
}
"#;

fn table() -> Table {
    Table { family: Family::Inet, name: "tried".to_owned() }
}

fn netfilter() -> Netfilter {
    Netfilter::open(WriteCount::default()).unwrap()
}

async fn nft(arguments: &str, script: &str) -> String {
    let program = Program::new("/usr/sbin/nft").args(arguments.split_whitespace());
    program.stdin(script).run().await.unwrap().text()
}

#[test]
fn a_structure_that_nft_loaded_is_built_again_elsewhere_and_compares_equal() {
    on_a_host(|| async {
        let here = netfilter();
        assert_eq!(here.structure(&table()).await.unwrap(), None);
        nft("-f -", SCRIPT).await;
        let structure = here.structure(&table()).await.unwrap().unwrap();

        let space = Netns::named("copy").unwrap();
        space.create().await.unwrap();
        let there = Netfilter::open_in(&space, WriteCount::default()).await.unwrap();
        let build = [NftChange::Build(structure.clone())];
        there.commit(&table(), &build).await.unwrap();
        assert_eq!(there.structure(&table()).await.unwrap(), Some(structure.clone()));
        let ip = Program::new("/usr/sbin/ip").args("netns exec copy nft list ruleset".split(' '));
        // In order of names; neither says who made the table.
        let sorted = |text: &str| {
            let mut lines: Vec<_> =
                text.lines().filter(|line| !line.contains("for a test")).collect();
            lines.sort_unstable();
            lines.join("\n")
        };
        let copied = sorted(&ip.run().await.unwrap().text());
        assert_eq!(copied, sorted(&nft("list ruleset", "").await));

        nft("add rule inet tried fourth drop", "").await;
        let changed = here.structure(&table()).await.unwrap();
        assert_ne!(changed, Some(structure.clone()));
        let anew = [NftChange::DeleteTable, NftChange::Build(structure.clone())];
        here.commit(&table(), &anew).await.unwrap();
        assert_eq!(here.structure(&table()).await.unwrap(), Some(structure));
    });
}

#[test]
fn elements_come_and_go_in_transactions_that_are_made_whole_or_not_at_all() {
    on_a_host(|| async {
        nft("-f -", SCRIPT).await;
        let netfilter = netfilter();
        let mut heard = NftMonitor::open().unwrap();
        let many: Vec<Element> = (0..2000_u16)
            .map(|number| {
                let [high, low] = number.to_be_bytes();
                Element::pair([10, 1, high, low], [10, 2, high, low])
            })
            .collect();
        let add = |elements: &[Element]| NftChange::Add {
            set: "places".to_owned(),
            elements: elements.to_vec(),
        };
        let door =
            Element::pair([6, 0, 0, 0, 192, 0, 2, 1, 0, 80, 0, 0], [10, 0, 0, 5, 31, 144, 0, 0]);
        let doors = NftChange::Add { set: "doors".to_owned(), elements: vec![door.clone()] };
        netfilter.commit(&table(), &[add(&many), doors]).await.unwrap();
        heard.next().await.unwrap();
        assert_eq!(netfilter.elements(&table(), "places").await.unwrap(), many);
        assert_eq!(netfilter.elements(&table(), "doors").await.unwrap(), [door]);
        let printed = nft("list map inet tried doors", "").await;
        assert!(printed.contains("tcp . 192.0.2.1 . 80 : 10.0.0.5 . 8080"), "{printed}");
        netfilter.commit(&table(), &[add(&many[..1])]).await.unwrap();

        let clash = Element::pair(many[0].key.clone(), [9, 9, 9, 9]);
        let remove = NftChange::Remove { set: "places".to_owned(), elements: many[1..].to_vec() };
        let error = netfilter.commit(&table(), &[remove.clone(), add(&[clash])]).await;
        assert!(error.unwrap_err().is_present());
        assert_eq!(netfilter.elements(&table(), "places").await.unwrap(), many, "all is undone");
        netfilter.commit(&table(), &[remove]).await.unwrap();
        assert_eq!(netfilter.elements(&table(), "places").await.unwrap(), many[..1]);
        assert_eq!(netfilter.writes().get(), 3, "a refused transaction is no write");
    });
}

#[test]
fn a_flow_is_listed_and_forgotten_and_others_stay() {
    on_a_host(|| async {
        nft("-f -", SCRIPT).await;
        let links = Links::open(WriteCount::default()).unwrap();
        let up = LinkChange { up: Some(true), ..LinkChange::default() };
        links.change(links.index("lo").await.unwrap(), "lo", &up).await.unwrap();
        let netfilter = netfilter();
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = server.local_addr().unwrap();
        let from = ["127.0.0.1:0", "127.0.0.2:0"].map(|address| UdpSocket::bind(address).unwrap());
        for socket in &from {
            socket.send_to(b"hello", to).unwrap();
        }
        let flows = wait_for(Duration::from_secs(5), "two flows", || async {
            let flows = netfilter.flows().await.unwrap();
            (flows.len() == 2).then_some(flows)
        })
        .await;
        let of = |address: &str| {
            let source: std::net::IpAddr = address.parse().unwrap();
            flows.iter().find(|flow| flow.original.source == source).unwrap()
        };
        let doomed = of("127.0.0.2");
        assert_eq!((doomed.original.protocol, doomed.original.destination_port), (17, to.port()));
        assert_eq!(doomed.reply.source, doomed.original.destination);
        netfilter.forget(doomed).await.unwrap();
        netfilter.forget(doomed).await.unwrap();
        assert_eq!(netfilter.flows().await.unwrap(), [of("127.0.0.1").clone()]);
    });
}
