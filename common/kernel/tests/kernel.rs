//! Links, namespaces and sockets on the real kernel, on hosts of the tests' own.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use stackhand_kernel::exec::Program;
use stackhand_kernel::netlink::{
    Address, Bridge, BridgePort, EntryChange, Event, FdbEntry, FdbTable, Hop, Link, LinkChange,
    LinkKind, Links, Monitor, Neighbour, NewKind, NewLink, Peer, Queue, QueueKind, RouteEntry,
    Shaper, Tap, Vxlan, WriteCount,
};
use stackhand_kernel::tun::{NewTap, VirtioHeader};
use stackhand_kernel::{KernelError, Netns, netns, packet, sysctl};
use stackhand_model::MacAddr;
use stackhand_testkit::on_a_host;

const BRIDGE: Bridge = Bridge {
    stp: false,
    forward_delay: 0,
    ageing_time: 30_000,
    multicast_snooping: false,
    netfilter: false,
};

const MAC: MacAddr = MacAddr([0xfa, 0x16, 0x3e, 0, 0, 1]);

fn links() -> Links {
    Links::open(WriteCount::default()).unwrap()
}

fn new(name: &str, kind: NewKind, change: LinkChange) -> NewLink {
    NewLink { name: name.into(), kind, group: 77, change }
}

fn bridge() -> NewKind {
    NewKind::Bridge(BRIDGE)
}

fn tap() -> Tap {
    Tap { user: Some(0), group: None, multi_queue: false, persist: true }
}

async fn get(links: &Links, name: &str) -> Link {
    links.link(name).await.unwrap().unwrap_or_else(|| panic!("{name} is missing"))
}

#[test]
fn a_bridge_and_a_tap_come_out_as_asked_for_and_every_write_is_counted() {
    on_a_host(|| async {
        let links = links();
        let change = LinkChange {
            alias: Some("mark".into()),
            mtu: Some(1450),
            up: Some(true),
            ..LinkChange::default()
        };
        links.create(&new("br0", bridge(), change.clone()), None).await.unwrap();
        let made = get(&links, "br0").await;
        assert_eq!((made.mtu, made.up, made.group), (1450, true, 77));
        assert_eq!(made.alias.as_deref(), Some("mark"));
        assert_eq!(made.kind, LinkKind::Bridge(BRIDGE));
        assert_eq!(links.writes().get(), 2);

        let change = LinkChange { master: Some(Some(made.index)), ..change };
        links.create(&new("tap0", NewKind::Tap(tap()), change), None).await.unwrap();
        let port = get(&links, "tap0").await;
        assert_eq!(port.kind, LinkKind::Tap(tap()));
        assert_eq!((port.master, port.mtu, port.up), (Some(made.index), 1450, true));
        assert_eq!(port.port, Some(BridgePort::default()));
        assert!(!port.carrier, "nobody has it open");
        assert_eq!(links.writes().get(), 5);

        let isolated = BridgePort { isolated: true, neighbour_suppression: true, hairpin: false };
        links.change_port(port.index, "tap0", isolated).await.unwrap();
        assert_eq!(get(&links, "tap0").await.port, Some(isolated));
        let snooping = Bridge {
            forward_delay: 200,
            ageing_time: 100,
            multicast_snooping: true,
            netfilter: true,
            ..BRIDGE
        };
        links.change_bridge(made.index, "br0", snooping).await.unwrap();
        assert_eq!(get(&links, "br0").await.kind, LinkKind::Bridge(snooping));

        let before = links.writes().get();
        assert!(links.links().await.unwrap().len() >= 3);
        assert_eq!(links.writes().get(), before, "reading is no write");
        let again = new("tap0", NewKind::Tap(tap()), LinkChange::default());
        assert!(links.create(&again, None).await.unwrap_err().is_present());
    });
}

#[test]
fn a_tap_that_was_not_told_to_persist_vanishes_with_its_maker() {
    on_a_host(|| async {
        let links = links();
        let made = NewTap::open("tap1", true, VirtioHeader::Without).unwrap();
        assert_eq!(
            get(&links, "tap1").await.kind,
            LinkKind::Tap(Tap { multi_queue: true, ..Tap::default() })
        );
        drop(made);
        assert_eq!(links.link("tap1").await.unwrap(), None);
    });
}

#[test]
fn fifty_links_go_in_one_request() {
    on_a_host(|| async {
        let links = links();
        let mut doomed = Vec::new();
        for number in 0..50 {
            let name = format!("br{number}");
            links.create(&new(&name, bridge(), LinkChange::default()), None).await.unwrap();
            doomed.push((get(&links, &name).await.index, name));
        }
        links.create(&new("stays", bridge(), LinkChange::default()), None).await.unwrap();
        // One that is gone already does not stop the others.
        doomed.push((4_000_000, "gone".into()));
        let start = Instant::now();
        links.delete(&doomed, 123_456).await.unwrap();
        println!("50 bridges deleted in {:?}", start.elapsed());
        let left: BTreeSet<String> =
            links.links().await.unwrap().into_iter().map(|link| link.name).collect();
        assert!(left.contains("stays") && !left.iter().any(|name| name.starts_with("br")));
        links.delete(&doomed, 123_457).await.unwrap();
    });
}

#[test]
fn a_pair_reaches_into_a_namespace_made_and_deleted_by_name() {
    on_a_host(|| async {
        assert_eq!(Netns::list().unwrap(), [""; 0]);
        let space = Netns::named("qdhcp-test").unwrap();
        assert_eq!(space.id(), None);
        space.create().await.unwrap();
        let id = space.id().unwrap();
        space.create().await.unwrap();
        assert_eq!(space.id(), Some(id), "creating twice changes nothing");
        assert_eq!(Netns::list().unwrap(), ["qdhcp-test"]);
        let ids = Netns::ids().unwrap();
        assert_eq!(ids.keys().collect::<Vec<_>>(), ["qdhcp-test"]);
        assert_eq!(ids.get("qdhcp-test").copied(), Netns::named("qdhcp-test").unwrap().id());

        let host = links();
        let peer = Peer { name: "ns-a".into(), mac: Some(MAC), mtu: Some(1400), group: 77 };
        let pair = new("tap-a", NewKind::Veth(peer), LinkChange::default());
        host.create(&pair, Some(&space.open().unwrap())).await.unwrap();
        let inside = Links::open_in(&space, WriteCount::default()).await.unwrap();
        let far = get(&inside, "ns-a").await;
        assert_eq!((far.mac, far.mtu, far.group), (Some(MAC), 1400, 77));
        assert_eq!(get(&host, "tap-a").await.kind, LinkKind::Veth);
        assert!(get(&host, "tap-a").await.parent_netns.is_some());

        let up = LinkChange { up: Some(true), ..LinkChange::default() };
        inside.change(far.index, "ns-a", &up).await.unwrap();
        host.change(host.index("tap-a").await.unwrap(), "tap-a", &up).await.unwrap();
        let net = Address { link: far.index, net: "10.0.0.2/24".parse().unwrap() };
        inside.add_address(net).await.unwrap();
        inside.add_address(net).await.unwrap();
        assert!(inside.addresses().await.unwrap().contains(&net));
        let hop = |last: u8| Hop { gateway: Some(IpAddr::from([10, 0, 0, last])), link: far.index };
        let mut route = RouteEntry {
            destination: "0.0.0.0/0".parse().unwrap(),
            hops: BTreeSet::from([hop(1)]),
            protocol: 83,
        };
        inside.set_route(&route).await.unwrap();
        assert_eq!(inside.routes().await.unwrap(), [route.clone()]);
        route.hops.insert(hop(9));
        inside.set_route(&route).await.unwrap();
        assert_eq!(inside.routes().await.unwrap(), [route.clone()], "it takes the other's place");
        inside.remove_route(&route).await.unwrap();
        inside.remove_route(&route).await.unwrap();
        inside.remove_address(net).await.unwrap();
        inside.remove_address(net).await.unwrap();
        assert_eq!(inside.routes().await.unwrap(), []);

        let forwarding = space
            .inside("set forwarding", || {
                sysctl::write("net/ipv4/ip_forward", "1").map_err(std::io::Error::other)?;
                sysctl::read("net/ipv4/ip_forward").map_err(std::io::Error::other)
            })
            .await
            .unwrap();
        assert_eq!(forwarding, "1");
        assert_eq!(sysctl::read("net/ipv4/ip_forward").unwrap(), "0", "the host has its own");
        assert!(sysctl::read("../../etc/passwd").is_err());

        drop(inside);
        space.delete().unwrap();
        space.delete().unwrap();
        assert_eq!(Netns::list().unwrap(), [""; 0]);
        assert!(matches!(
            Links::open_in(&space, WriteCount::default()).await.unwrap_err(),
            KernelError::Namespace { .. }
        ));
        let deadline = Instant::now() + Duration::from_secs(10);
        while host.link("tap-a").await.unwrap().is_some() {
            assert!(Instant::now() < deadline, "the pair outlived its namespace");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
}

#[test]
fn forwarding_and_neighbours_are_set_read_and_removed() {
    on_a_host(|| async {
        let links = links();
        links.create(&new("br0", bridge(), LinkChange::default()), None).await.unwrap();
        let bridge = links.index("br0").await.unwrap();
        let vxlan = Vxlan {
            vni: 42,
            local: Some("192.0.2.1".parse().unwrap()),
            port: 4789,
            learning: false,
        };
        let change =
            LinkChange { master: Some(Some(bridge)), up: Some(true), ..LinkChange::default() };
        links.create(&new("vxlan-42", NewKind::Vxlan(vxlan.clone()), change), None).await.unwrap();
        let made = get(&links, "vxlan-42").await;
        assert_eq!(made.kind, LinkKind::Vxlan(vxlan));
        let link = made.index;
        let via = |last| IpAddr::from([192, 0, 2, last]);
        let behind = |mac, last| FdbEntry { link, mac, table: FdbTable::Link { via: via(last) } };
        let flood = MacAddr([0; 6]);
        let port = FdbEntry { link, mac: MAC, table: FdbTable::Bridge };
        let entries =
            [behind(MAC, 10), behind(MAC, 11), behind(flood, 10), behind(flood, 11), port];
        for _ in 0..2 {
            all_of(&links, &entries.map(EntryChange::Forward)).await;
        }
        assert_eq!(
            links.forwarding().await.unwrap(),
            [behind(flood, 10), behind(flood, 11), behind(MAC, 11), port],
            "an address moved, the flood list grew, and nothing of the kernel's own shows"
        );
        let neighbour =
            |address: &str| Neighbour { link: bridge, address: address.parse().unwrap(), mac: MAC };
        let known = [neighbour("10.0.0.5"), neighbour("fd00::5")];
        all_of(&links, &known.map(EntryChange::Know)).await;
        assert_eq!(
            links.neighbours().await.unwrap(),
            [neighbour("10.0.0.5"), neighbour("fd00::5")]
        );
        for _ in 0..2 {
            let gone = [behind(flood, 10), behind(flood, 11), behind(MAC, 11), port];
            all_of(&links, &gone.map(EntryChange::Unforward)).await;
            all_of(&links, &[EntryChange::Forget(neighbour("fd00::5"))]).await;
        }
        assert_eq!(links.forwarding().await.unwrap(), []);
        assert_eq!(links.neighbours().await.unwrap(), [neighbour("10.0.0.5")]);
    });
}

/// Makes changes, none of which may fail.
async fn all_of(links: &Links, changes: &[EntryChange]) {
    for (change, result) in changes.iter().zip(links.change_entries(changes).await) {
        result.unwrap_or_else(|error| panic!("{change:?}: {error}"));
    }
}

#[test]
fn of_a_thousand_changes_at_once_each_has_an_answer_of_its_own() {
    on_a_host(|| async {
        let writes = WriteCount::default();
        let links = Links::open(writes.clone()).unwrap();
        links.create(&new("br0", bridge(), LinkChange::default()), None).await.unwrap();
        let link = get(&links, "br0").await.index;
        let before = writes.get();
        let entry = |number: u16| {
            let [high, low] = number.to_be_bytes();
            // Every hundredth is for a link that is not there.
            let link = if number % 100 == 99 { link + 1000 } else { link };
            Neighbour { link, address: IpAddr::from([10, 0, high, low]), mac: MAC }
        };
        let changes: Vec<_> = (0..1000).map(|number| EntryChange::Know(entry(number))).collect();
        let results = links.change_entries(&changes).await;
        assert_eq!(results.len(), changes.len());
        for (number, result) in (0_u16..).zip(&results) {
            let told = format!("{number}: {result:?}");
            assert_eq!(result.is_err(), number % 100 == 99, "{told}");
            if let Err(error) = result {
                let [high, low] = number.to_be_bytes();
                assert!(told.contains(&format!("neighbour 10.0.{high}.{low}")), "{told}");
                assert!(error.is_absent(), "{told}");
            }
        }
        assert_eq!(links.neighbours().await.unwrap().len(), 990);
        assert_eq!(writes.get() - before, 990, "what the kernel refused is no write");
    });
}

#[test]
fn what_others_change_is_heard() {
    on_a_host(|| async {
        let links = links();
        let mut monitor = Monitor::open().unwrap();
        links.create(&new("br0", bridge(), LinkChange::default()), None).await.unwrap();
        let index = links.index("br0").await.unwrap();
        let net = Address { link: index, net: "10.0.0.1/24".parse().unwrap() };
        links.add_address(net).await.unwrap();
        links.delete(&[(index, "br0".into())], 5).await.unwrap();
        let mut heard = Vec::new();
        loop {
            let next = tokio::time::timeout(Duration::from_secs(5), monitor.next());
            let event = next.await.expect("the end is heard").unwrap();
            let last = matches!(&event, Event::LinkGone(link) if link.name == "br0");
            heard.push(event);
            if last {
                break;
            }
        }
        assert!(heard.iter().any(|event| matches!(event, Event::Link(link) if link.name == "br0")));
        assert!(heard.contains(&Event::Address(net)), "{heard:?}");
    });
}

#[test]
fn what_the_kernel_lacks_and_bad_names_are_errors_that_name_the_link() {
    on_a_host(|| async {
        let links = links();
        let unknown = new("odd", NewKind::Plain("nonsense".into()), LinkChange::default());
        let error = links.create(&unknown, None).await.unwrap_err();
        assert_eq!(error.to_string(), "cannot create on link odd");
        for name in ["", "a name", "much-too-long-for-a-link", "../x", "a%d", ".."] {
            let made = links.create(&new(name, bridge(), LinkChange::default()), None).await;
            assert!(matches!(made.unwrap_err(), KernelError::BadName { .. }), "{name:?}");
        }
        assert!(Netns::named("../x").is_err());
        assert!(links.index("none").await.unwrap_err().is_absent());
    });
}

#[test]
fn a_frame_sent_on_one_end_of_a_pair_is_received_on_the_other() {
    on_a_host(|| async {
        let links = links();
        let peer = Peer { name: "b".into(), mac: None, mtu: None, group: 0 };
        let up = LinkChange { up: Some(true), ..LinkChange::default() };
        links.create(&new("a", NewKind::Veth(peer), up.clone()), None).await.unwrap();
        let (a, b) = (links.index("a").await.unwrap(), links.index("b").await.unwrap());
        links.change(b, "b", &up).await.unwrap();
        let receiver = packet::frames(b, packet::Receive::EtherType(0x88b5)).unwrap();
        let sender = packet::frames(a, packet::Receive::Nothing).unwrap();
        let mut frame = vec![0xff; 6];
        frame.extend(MAC.0);
        frame.extend([0x88, 0xb5]);
        frame.extend([7; 46]);
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut buffer = [std::mem::MaybeUninit::uninit(); 128];
        loop {
            // A link that has just come up may drop the first.
            sender.send(&frame).unwrap();
            match receiver.recv(&mut buffer) {
                Ok(length) => return assert_eq!(length, frame.len()),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => panic!("{error}"),
            }
            assert!(Instant::now() < deadline, "the frame did not arrive");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
}

#[test]
fn a_scratch_namespace_is_empty_and_leaves_no_name() {
    on_a_host(|| async {
        let host = links();
        host.create(&new("br0", bridge(), LinkChange::default()), None).await.unwrap();
        let scratch = netns::in_a_scratch_netns(|| Links::connect(WriteCount::default()));
        let scratch = scratch.await.unwrap();
        assert_eq!(scratch.link("br0").await.unwrap(), None);
        assert_eq!(Netns::list().unwrap(), [""; 0]);
    });
}

#[test]
fn a_link_is_held_to_a_rate_in_both_directions_beside_what_others_set() {
    on_a_host(|| async {
        let links = links();
        links.create(&new("tap0", NewKind::Tap(tap()), LinkChange::default()), None).await.unwrap();
        links.create(&new("ifb0", NewKind::Ifb, LinkChange::default()), None).await.unwrap();
        let (port, queue) =
            (links.index("tap0").await.unwrap(), links.index("ifb0").await.unwrap());
        assert_eq!(links.queues().await.unwrap(), []);
        for shaper in [
            Shaper { rate: 125, burst: 3100, limit: 30_000 },
            Shaper { rate: 1_250_000, burst: 1_000_000, limit: 62_500 },
            Shaper { rate: 12_500_000_000, burst: 4_000_000_000, limit: 625_000_000 },
        ] {
            links.set_shaper(port, "tap0", shaper).await.unwrap();
            let [Queue { link, kind: QueueKind::Shaper(seen) }] = links.queues().await.unwrap()[..]
            else {
                panic!("one shaper")
            };
            assert_eq!(link, port);
            assert!(seen.is_about(&shaper), "{shaper:?} came out as {seen:?}");
            assert!(!Shaper { rate: seen.rate + 1, ..seen }.is_about(&shaper));
        }
        assert_eq!(get(&links, "tap0").await.queue, "tbf");
        links.remove_shaper(port, "tap0").await.unwrap();
        links.remove_shaper(port, "tap0").await.unwrap();
        assert_eq!(links.queues().await.unwrap(), []);

        assert_eq!(links.redirect(port, "tap0").await.unwrap(), None);
        links.set_redirect(port, "tap0", queue).await.unwrap();
        links.set_redirect(port, "tap0", queue).await.unwrap();
        assert_eq!(links.redirect(port, "tap0").await.unwrap(), Some(queue));
        let others = "filter add dev tap0 parent ffff: prio 7 u32 match u32 0 0 classid 1:1";
        Program::new("/usr/sbin/tc").args(others.split(' ')).run().await.unwrap();
        links.remove_redirect(port, "tap0").await.unwrap();
        links.remove_redirect(port, "tap0").await.unwrap();
        assert_eq!(links.redirect(port, "tap0").await.unwrap(), None);
        let show = Program::new("/usr/sbin/tc").args(["filter", "show", "dev", "tap0", "ingress"]);
        assert!(show.run().await.unwrap().text().contains("pref 7"), "other people's filters stay");
    });
}
