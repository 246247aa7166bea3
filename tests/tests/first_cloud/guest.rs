//! The demo's guest. The module is named `guest` because that is how the test tiers know it, see
//! `.config/nextest.toml`.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use nix::sys::signal::Signal;
use serde_json::Value;
use stackhand_model::AgentKind;
use stackhand_testkit::wait_for_sync;

use crate::cloud::{Cloud, Host, LIMIT, OBJECTS};

#[test]
fn a_host_inside_this_host_is_separate_and_goes_with_all_that_runs_on_it() {
    let folder = tempfile::Builder::new().prefix("shf-").tempdir().unwrap();
    let at = folder.path().join("host");
    let host = Host::new(at.clone());
    let again = Command::new(Host::script()).args(["up", host.path()]).output().unwrap();
    let said = String::from_utf8_lossy(&again.stderr);
    assert!(!again.status.success() && said.contains("is in use already"), "{said}");

    // What is made there is not seen here.
    host.run(["ip", "link", "add", "shf0", "type", "bridge"]);
    host.run(["ip", "netns", "add", "shf0"]);
    assert!(host.run(["ip", "netns", "list"]).contains("shf0"));
    assert!(!Path::new("/sys/class/net/shf0").exists());
    assert!(!Path::new("/run/netns/shf0").exists());
    assert!(at.join("run/libvirt/libvirt-sock").exists());

    // A program that does not listen to requests goes, too.
    let mut deaf = host.start(["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1; done"]);
    deaf.wait_for_output(LIMIT, "deaf");
    let mount = |path: &Path| {
        fs::read_to_string("/proc/self/mountinfo").unwrap().contains(path.to_str().unwrap())
    };
    assert!(mount(&at));
    drop(host);
    assert!(!deaf.is_running() && !at.exists() && !mount(&at));
    assert_eq!(deaf.wait(LIMIT).to_string(), "signal: 9 (SIGKILL)");
}

#[test]
fn a_guest_has_its_network_and_volume_outlives_its_agents_and_leaves_nothing_behind() {
    let mut cloud = Cloud::new("guest-image");
    cloud.start_all();
    let guest = cloud.first_guest();

    // It has its address from our DHCP server.
    let leases = cloud.agentctl(&["facts", "--type", "network", "-o", "json"]);
    let leases: Value = serde_json::from_str(&leases).unwrap();
    assert!(leases[0]["facts"]["dhcp"]["answered"].as_u64().unwrap() >= 2, "{leases}");

    let log = cloud.agentctl(&["act", "instance/demo", "console-log"]);
    assert!(log.lines().any(|line| line.starts_with("guest: /dev/vdb has")), "{log}");

    // Applied again, it changes nothing.
    let writes = AgentKind::ALL.map(|agent| cloud.writes(agent));
    let again = cloud.with_manifest(&["apply", "--wait=60"]);
    assert!(!again.contains("create") && !again.contains("update"), "{again}");
    for agent in AgentKind::ALL {
        cloud.wait_for_passes(agent, 2);
    }
    assert_eq!(AgentKind::ALL.map(|agent| cloud.writes(agent)), writes);

    // Agents are killed one by one and all at once; the guest does not notice, and neither
    // does the kernel when they come back.
    let running = cloud.host.run(["virsh", "domid", &guest.domain()]);
    let said = cloud.console(&guest.instance);
    let mut ping = cloud.host.start(guest.ping(["-i", "0.1", "-W", "5"]));
    ping.wait_for_output(LIMIT, "icmp_seq=1 ");
    for agent in AgentKind::ALL {
        cloud.kill(agent);
        cloud.start(agent);
        cloud.wait_for_passes(agent, 2);
        assert_eq!(cloud.writes(agent), 0, "the {agent} agent after its restart");
    }
    for agent in AgentKind::ALL {
        cloud.kill(agent);
    }
    let answered = ping.output().lines().count();
    wait_for_sync(LIMIT, "ten more answers while no agent runs", || {
        (ping.output().lines().count() >= answered + 10).then_some(())
    });
    cloud.start_all();
    for agent in AgentKind::ALL {
        cloud.wait_for_passes(agent, 1);
        assert_eq!(cloud.writes(agent), 0, "the {agent} agent after all were gone");
    }
    ping.signal(Signal::SIGINT);
    let loss = ping.wait_for_output(LIMIT, "packet loss");
    assert!(loss.contains(" 0% packet loss"), "{loss}");
    ping.wait(LIMIT);
    let runs = cloud.host.run(["virsh", "domid", &guest.domain()]);
    assert_eq!(runs, running, "the domain was started anew");
    assert_eq!(cloud.console(&guest.instance), said, "the guest noticed");
    let held = cloud.held();
    assert!(
        held.len() == OBJECTS && held.iter().all(|(_, _, state)| state == "active"),
        "{held:?}"
    );

    // All of it goes.
    cloud.with_manifest(&["delete", "--wait"]);
    // What is left tells of the host itself.
    let held = cloud.held();
    assert!(held.len() == 1 && held[0].0 == "Host", "{held:?}");
    assert_eq!(cloud.host.run(["virsh", "list", "--all", "--name"]).trim(), "");
    let links = cloud.host.run(["ip", "-oneline", "link", "show"]);
    let theirs = ["lo:", "ext0@", "under0@", "under1@"];
    let ours = links.lines().filter(|link| !theirs.iter().any(|name| link.contains(name)));
    assert_eq!(ours.collect::<Vec<_>>(), [] as [&str; 0]);
    let spaces = cloud.host.run(["ip", "netns", "list"]);
    assert!(spaces.lines().count() == 1 && spaces.starts_with("provider"), "{spaces}");
    assert_eq!(cloud.files("compute/instances"), [] as [PathBuf; 0]);
    let volumes = cloud.files("storage/volumes");
    assert!(volumes.iter().all(|path| path.ends_with(".stackhand")), "{volumes:?}");
    // Contents that nobody uses any more go with the next pass.
    wait_for_sync(LIMIT, "the image cache to be empty", || {
        cloud.files("compute/images").is_empty().then_some(())
    });
    for (agent, process) in &mut cloud.agents {
        let status = process.terminate(LIMIT);
        assert!(status.success(), "{agent}: {status}\n{}", process.output());
    }
}

#[test]
fn a_host_that_lost_its_power_has_its_guest_back_without_a_controller() {
    let mut cloud = Cloud::new("guest-image");
    cloud.start_all();
    let guest = cloud.first_guest();
    let volume = cloud.files("storage/volumes");

    cloud.lose_power();
    wait_for_sync(LIMIT, "the guest to answer", || {
        let ping =
            ["exec", cloud.host.path()].into_iter().chain(guest.ping(["-c", "1", "-w", "1"]));
        let answer = Command::new(Host::script()).args(ping).timeout(LIMIT).output().unwrap();
        answer.status.success().then_some(())
    });
    cloud.wait_for_guest(&guest);
    let held = cloud.held();
    assert!(held.len() == OBJECTS && held.iter().all(|it| it.2 == "active"), "{held:?}");
    assert_eq!(cloud.files("storage/volumes"), volume);
    let again = cloud.with_manifest(&["apply", "--wait=60"]);
    assert!(!again.contains("create") && !again.contains("update"), "{again}");
    cloud.with_manifest(&["delete", "--wait"]);
    assert_eq!(cloud.host.run(["virsh", "list", "--all", "--name"]).trim(), "");
}
