//! `agentctl init` writes settings that the agents take, and what it is not sure of it does not
//! start.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use assert_cmd::Command;
use stackhand_model::AgentKind;
use stackhand_testkit::bin;

const LIMIT: Duration = Duration::from_secs(90);

const PACKSTACK: &str = "CONFIG_AMQP_HOST=192.0.2.10
CONFIG_AMQP_ENABLE_AUTH=y
CONFIG_AMQP_AUTH_USER=stack
CONFIG_AMQP_AUTH_PASSWORD=p@ss
CONFIG_NEUTRON_OVS_BRIDGE_MAPPINGS=extnet:br-ex
CONFIG_NEUTRON_OVS_BRIDGE_IFACES=br-ex:eth1
CONFIG_NEUTRON_OVS_TUNNEL_IF=lo
CONFIG_CINDER_BACKEND=lvm
CONFIG_KEYSTONE_ADMIN_PW=hunter2
";

/// Runs a program. Returns whether it succeeded and all that it said.
fn run(program: &Path, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(program).args(arguments).timeout(LIMIT).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn answers_of_packstack_become_settings_that_every_agent_takes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let agentctl = bin("agentctl");
    fs::write(at("packstack.txt"), PACKSTACK).unwrap();
    let (well, said) =
        run(&agentctl, &["import-answers", &at("packstack.txt"), "--out", &at("answers.toml")]);
    assert!(well && said.contains("ignored  1 answer CONFIG_KEYSTONE_"), "{said}");
    assert!(!said.contains("hunter2") && !said.contains("p@ss"), "{said}");

    let (well, said) = run(&agentctl, &["keygen", "--out", &at("controller.pem")]);
    assert!(well, "{said}");
    let etc = at("etc");
    let init = |more: &[&str]| {
        let given = ["init", "--answers", &at("answers.toml"), "--config-dir", &etc, "--no-start"];
        run(&agentctl, &[&given, more].concat())
    };
    let (well, said) = init(&["--dry-run"]);
    assert!(well && said.contains("create") && !Path::new(&etc).exists(), "{said}");
    let public = at("controller.pem.pub");
    // The checks that follow may find this machine wanting; the files are there by then.
    let (_, said) = init(&["--trust", &public, "--zone", "north"]);
    assert!(said.contains("50-init.toml"), "{said}");
    assert_eq!(fs::read_dir(format!("{etc}/trusted_controllers")).unwrap().count(), 1);

    for agent in AgentKind::ALL {
        let program = bin(agent.binary());
        let (well, said) = run(&program, &["--config-dir", &etc, "--check-config"]);
        assert!(well, "{agent}: {said}");
    }
    let (_, said) = run(&bin("network-agent"), &["--config-dir", &etc, "--print-config"]);
    for told in ["north", "eth1", "127.0.0.1", "stack"] {
        assert!(said.contains(told), "{told}: {said}");
    }
    let (_, said) = init(&["--trust", &public, "--zone", "north"]);
    assert!(!said.contains("create") && !said.contains("change "), "{said}");
    let (_, said) =
        run(&agentctl, &["init", "--zone", "south", "--config-dir", &etc, "--no-start"]);
    assert!(!said.contains("give --trust"), "{said}");
    let (_, said) = run(&bin("network-agent"), &["--config-dir", &etc, "--print-config"]);
    for told in ["south", "eth1", "127.0.0.1", "stack"] {
        assert!(said.contains(told), "{told}: {said}");
    }
    let (well, said) = run(&agentctl, &["init", "--zone", " x"]);
    assert!(!well && said.contains("zone: is empty, or has blanks"), "{said}");
}
