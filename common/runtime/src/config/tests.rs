//! The loader as an operator meets it: folders with files, an environment, and the texts of errors.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use proptest::prelude::*;
use serde::Deserialize;

use super::*;

/// The section of the agent under test.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
struct Network {
    mtu: u16,
    local_ip: Option<std::net::IpAddr>,
    bridges: BTreeMap<String, String>,
    mode: Mode,
    servers: Vec<String>,
    chap_password: Secret,
    ratio: f64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Mode {
    #[default]
    Vxlan,
    Gre,
}

impl AgentSection for Network {
    const AGENT: &'static str = "network";

    fn check(&self, problems: &mut Problems) {
        if self.mode == Mode::Gre && self.local_ip.is_none() {
            problems.add("network.local_ip", "must be set when `network.mode` is \"gre\"");
        }
    }
}

/// A folder of settings and an environment.
struct Etc {
    folder: tempfile::TempDir,
    environment: Vec<(OsString, OsString)>,
    agent_file: Option<PathBuf>,
}

impl Etc {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { folder, environment: Vec::new(), agent_file: None }
    }

    fn file(self, name: &str, text: &str) -> Self {
        let path = self.folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        self
    }

    fn var(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    fn sources(&self) -> Sources {
        Sources {
            config_dir: self.folder.path().to_owned(),
            agent_file: self.agent_file.clone(),
            environment: self.environment.clone(),
        }
    }

    fn load(&self) -> Loaded<Network> {
        load(&self.sources()).unwrap_or_else(|errors| panic!("{errors}"))
    }

    /// The errors, with the folder's name taken out.
    fn errors(&self) -> String {
        self.plain(
            &load::<Network>(&self.sources()).expect_err("the settings are wrong").to_string(),
        )
    }

    fn plain(&self, text: &str) -> String {
        text.replace(&*self.folder.path().to_string_lossy(), "ETC")
    }
}

#[test]
fn an_empty_folder_gives_the_defaults() {
    let etc = Etc::new();
    let loaded = etc.load();
    let mut expected = Settings::<Network>::default();
    expected.common.signing.trusted_controllers = etc.folder.path().join("trusted_controllers");
    assert_eq!(loaded.settings, expected);
    assert_eq!(loaded.settings.common.state_dir, PathBuf::from("/var/lib/stackhand/network"));
    assert_eq!(loaded.settings.socket(), PathBuf::from("/run/stackhand/network.sock"));
    assert!(loaded.files.is_empty() && loaded.warnings.is_empty());
}

#[test]
fn later_layers_win_key_by_key() {
    let etc = Etc::new()
        .file("stackhand.toml", "zone = 'z1'\ncloud = 'c1'\nhost = 'h1'\n[network]\nmtu = 1\n[heartbeat]\ninterval_seconds = 1\n")
        .file("network.toml", "zone = 'z2'\ncloud = 'c2'\nhost = 'h2'\n[heartbeat]\nregister_interval_seconds = 20\n")
        .file("stackhand.d/10-a.toml", "zone = 'z3'\ncloud = 'c3'\n")
        .file("stackhand.d/20-b.toml", "cloud = 'c4'\n")
        .file("network.d/10-a.toml", "[network]\nmtu = 9000\n")
        .file("network.d/ignored.conf", "not read")
        .file("network.d/.hidden.toml", "not read")
        .var("STACKHAND_HEARTBEAT__INTERVAL_SECONDS", "5");
    let loaded = etc.load();
    let common = &loaded.settings.common;
    assert_eq!((&*common.host, &*common.zone, &*common.cloud), ("h2", "z3", "c4"));
    assert_eq!(common.heartbeat.interval_seconds, 5);
    assert_eq!(common.heartbeat.register_interval_seconds, 20);
    assert_eq!(loaded.settings.agent.mtu, 9000);
    assert_eq!(loaded.files.len(), 5);
    assert_eq!(
        loaded.origin("network.mtu").to_string(),
        format!("{}:2:7", etc.folder.path().join("network.d/10-a.toml").display())
    );
    assert_eq!(loaded.origin("run_dir"), Origin::Default);
}

#[test]
fn a_named_file_takes_the_place_of_the_agents_own() {
    let mut etc = Etc::new()
        .file("network.toml", "zone = 'not-read'\n")
        .file("elsewhere/mine.toml", "cloud = 'c1'\n");
    etc.agent_file = Some(etc.folder.path().join("elsewhere/mine.toml"));
    let loaded = etc.load();
    assert_eq!((&*loaded.settings.common.zone, &*loaded.settings.common.cloud), ("nova", "c1"));

    etc.agent_file = Some(etc.folder.path().join("missing.toml"));
    assert_eq!(
        etc.errors(),
        "ETC/missing.toml: cannot read: No such file or directory (os error 2)"
    );
}

#[test]
fn every_problem_is_told_with_its_place_and_what_is_expected() {
    let etc = Etc::new()
        .file(
            "stackhand.toml",
            "\
zome = 'nova'
state_dir = 'relative'

[bus]
ulr = 'rabbit://h'
concurrency = 'many'

[hartbeat]
interval_seconds = 1

[heartbeat]
interval_seconds = 0

[log]
level = 'verbose'
format = 'xml'

[http]
listen = 'somewhere'

[compute]
anything = 'is for another agent'
",
        )
        .file(
            "network.toml",
            "\
[network]
mtu = 70000
servers = ['a', 2]
chap_password = 7
bridges = { physnet1 = 1 }
modes = 'gre'
[storage]
x = 1
",
        )
        .var("STACKHAND_SIGNING__REQUIRED", "maybe")
        .var("STACKHAND_NETWORK__RATIO", "high")
        .var("STACKHAND_BUS__AMQP__", "x");
    let expected = "\
ETC/network.toml:7:2: `storage` is the section of another agent; put it into storage.toml or stackhand.toml
environment STACKHAND_BUS__AMQP__: needs a name on each side of `__`
ETC/stackhand.toml:6:15: `bus.concurrency` must be an integer from 0 to 4294967295, not the string \"many\"
ETC/stackhand.toml:5:1: unknown key `bus.ulr`; did you mean `url`?
ETC/stackhand.toml:8:2: unknown key or section `hartbeat`; did you mean `heartbeat`?
ETC/stackhand.toml:19:10: `http.listen` must be an address and port, such as 127.0.0.1:9469 or [::1]:9469, or unix:/path
ETC/stackhand.toml:16:10: `log.format` must be one of \"auto\", \"journald\", \"human\", \"json\", not \"xml\"
environment STACKHAND_SIGNING__REQUIRED: `signing.required` must be true or false, not the string \"maybe\"
ETC/stackhand.toml:1:1: unknown key or section `zome`; did you mean `zone`?
ETC/network.toml:5:24: `network.bridges.physnet1` must be a string, not 1
ETC/network.toml:4:17: `network.chap_password` must be a string, not a number
ETC/network.toml:6:1: unknown key `network.modes`; did you mean `mode`?
ETC/network.toml:2:7: `network.mtu` must be an integer from 0 to 65535, not 70000
environment STACKHAND_NETWORK__RATIO: `network.ratio` must be a number, not the string \"high\"
ETC/network.toml:3:17: `network.servers.1` must be a string, not 2
ETC/stackhand.toml:2:13: `state_dir` must be an absolute path, not \"relative\"
ETC/stackhand.toml:12:20: `heartbeat.interval_seconds` must be from 1 to 3600, not 0
ETC/stackhand.toml:15:9: `log.level` is not a level or filter: \"verbose\" is not one of error, warn, info, debug, trace, off";
    assert_eq!(etc.errors(), expected);
}

#[test]
fn text_that_is_not_toml_is_placed_too() {
    let etc = Etc::new()
        .file("stackhand.toml", "zone = 'nova'\nhost = \n")
        .file("network.toml", "[network]\nmtu = 1\nmtu = 2\n");
    let expected = "\
ETC/stackhand.toml:2:8: not TOML: string values must be quoted, expected literal string
ETC/network.toml:3:1: not TOML: duplicate key";
    assert_eq!(etc.errors(), expected);
}

#[test]
fn files_that_are_no_text_or_too_large_are_refused() {
    let etc = Etc::new().file("stackhand.toml", &"#".repeat((1 << 20) + 1));
    fs::write(etc.folder.path().join("network.toml"), b"zone = '\xff'").unwrap();
    fs::create_dir_all(etc.folder.path().join("network.d/x.toml")).unwrap();
    let expected = "\
ETC/stackhand.toml: cannot read: larger than 1048576 bytes
ETC/network.toml: cannot read: not UTF-8 at byte 8
ETC/network.d/x.toml: cannot read: not a regular file";
    assert_eq!(etc.errors(), expected);
}

#[test]
fn a_section_that_is_no_table_is_placed() {
    let etc = Etc::new().file("stackhand.toml", "network = 3\nbus = 'x'\n");
    let expected = "\
ETC/stackhand.toml:2:7: `bus` must be a table, not the string \"x\"
ETC/stackhand.toml:1:11: `network` must be a table, not 3";
    assert_eq!(etc.errors(), expected);
}

#[test]
fn what_agents_need_together_is_checked_and_placed() {
    let etc = Etc::new().file(
        "network.toml",
        "[network]\nmode = 'gre'\n[reconcile]\nretry_min_milliseconds = 2000\nretry_max_seconds = 1\n",
    );
    let expected = "\
ETC/network.toml:5:21: `reconcile.retry_max_seconds` must not be shorter than `reconcile.retry_min_milliseconds`
default: `network.local_ip` must be set when `network.mode` is \"gre\"";
    assert_eq!(etc.errors(), expected);
    // One that is there and cannot be read is not reported as missing as well.
    let etc = Etc::new().file("network.toml", "[network]\nmode = 'gre'\nlocal_ip = 'ten'\n");
    assert_eq!(etc.errors(), "ETC/network.toml:3:12: `network.local_ip` invalid IP address syntax");
}

#[test]
fn what_the_transport_would_refuse_is_told_before_it_starts() {
    let etc = Etc::new().file(
        "stackhand.toml",
        "[bus]\nurl = 'rabbit://u:hunter2@h/v?prefetch=many'\n[bus.amqp]\nsend_timeout_seconds = -1\nconnect_timeout = 3\nxyzzy = 1\n",
    );
    let errors = etc.errors();
    for (n, expected) in [
        "ETC/stackhand.toml:5:1: unknown key `bus.amqp.connect_timeout`; did you mean `connect_timeout_seconds`?",
        "ETC/stackhand.toml:6:1: unknown key `bus.amqp.xyzzy`; none of the ",
        "ETC/stackhand.toml:3:1: `bus.amqp` cannot be used: ",
        "ETC/stackhand.toml:2:7: `bus.url` cannot be used: ",
    ]
    .into_iter()
    .enumerate()
    {
        let line = errors.lines().nth(n).unwrap_or_default();
        assert!(line.starts_with(expected), "{errors}");
    }
    assert!(!errors.contains("hunter2"), "{errors}");
}

#[test]
fn variables_become_what_the_setting_is() {
    let loaded = Etc::new()
        .file("stackhand.toml", "[bus]\nurl = 'rabbit://h'\n[http]\nlisten = 'unix:/x'\n")
        .var("STACKHAND_HOST", "123")
        .var("STACKHAND_BUS__URL", "")
        .var("STACKHAND_BUS__AMQP__QUORUM_QUEUES", "true")
        .var("STACKHAND_NETWORK__LOCAL_IP", "192.0.2.1")
        .var("STACKHAND_NETWORK__MODE", "gre")
        .var("STACKHAND_NETWORK__SERVERS", "['a', 'b']")
        .var("STACKHAND_NETWORK__BRIDGES", "{ physnet1 = 'br0' }")
        .var("STACKHAND_NETWORK__RATIO", "2.5")
        .var("STACKHAND_COMPUTE__ANYTHING", "is for another agent")
        .var("STACKHAND_CONFIG_DIR", "/elsewhere")
        .var("OTHER_HOST", "x")
        .load();
    let Settings { common, agent } = &loaded.settings;
    assert_eq!(common.host, "123");
    assert_eq!(common.bus.url, None, "an empty variable unsets");
    assert!(common.bus.amqp.quorum_queues);
    assert_eq!(common.http.listen, Some(Listen::Unix("/x".into())));
    assert_eq!(agent.local_ip, Some([192, 0, 2, 1].into()));
    assert_eq!((agent.mode, agent.ratio), (Mode::Gre, 2.5));
    assert_eq!(agent.servers, ["a", "b"]);
    assert_eq!(agent.bridges["physnet1"], "br0");
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
}

#[test]
fn a_stray_variable_is_a_warning_and_a_typo_below_a_section_an_error() {
    let loaded = Etc::new().var("STACKHAND_HOTS", "x").load();
    assert_eq!(
        loaded.warnings[0].to_string(),
        "environment STACKHAND_HOTS: is not a setting and has no effect; did you mean `host`?"
    );
    let etc = Etc::new().var("STACKHAND_BUS__ULR", "x").var("STACKHAND_BUSS__URL", "x");
    let expected = "\
environment STACKHAND_BUS__ULR: unknown key `bus.ulr`; did you mean `url`?
environment STACKHAND_BUSS__URL: unknown key or section `buss`; did you mean `bus`?";
    assert_eq!(etc.errors(), expected);
}

#[test]
fn an_unknown_key_that_resembles_none_lists_the_known_ones() {
    let etc = Etc::new().file("stackhand.toml", "[heartbeat]\nfrequency = 1\n");
    let expected = "ETC/stackhand.toml:2:1: unknown key `heartbeat.frequency`; \
                    known here: `interval_seconds`, `register_interval_seconds`";
    assert_eq!(etc.errors(), expected);
}

#[test]
fn a_password_that_everybody_can_read_is_a_warning() {
    let etc = Etc::new().file("stackhand.toml", "[bus]\nurl = 'rabbit://u:hunter2@h'\n");
    assert!(etc.load().warnings.is_empty());
    let path = etc.folder.path().join("stackhand.toml");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o646)).unwrap();
    let warnings: Vec<String> =
        etc.load().warnings.iter().map(|warning| etc.plain(&warning.to_string())).collect();
    assert_eq!(
        warnings,
        [
            "ETC/stackhand.toml: holds a password and everybody can read it; \
             remedy: chgrp stackhand-agents ETC/stackhand.toml && chmod 0640 ETC/stackhand.toml",
            "ETC/stackhand.toml: everybody can write to it; remedy: chmod o-w ETC/stackhand.toml",
        ]
    );
}

#[test]
fn printed_settings_tell_every_source_and_no_secret() {
    let etc = Etc::new()
        .file(
            "stackhand.toml",
            "host = 'compute1'\n[bus]\nurl = 'rabbit://u:hunter2@h1,w:hunter2@h2/v'\n\
             [bus.amqp]\nprefetch = 7\nheartbeat_timeout_threshold = 20\n",
        )
        .file("network.d/10-mtu.toml", "[network]\nmtu = 9000\nchap_password = 'hunter2'\n")
        .var("STACKHAND_LOG__LEVEL", "debug");
    let loaded = etc.load();
    let printed = etc.plain(&loaded.print());
    // The transport's options are many, and not ours.
    let (before, amqp) = printed.split_once("\n[bus.amqp]\n").unwrap();
    let (amqp, after) = amqp.split_once("\n\n").unwrap();
    let set: Vec<&str> = amqp.lines().filter(|line| !line.ends_with("# default")).collect();
    assert_eq!(
        set,
        [
            "heartbeat_seconds = 20                       # set under another name",
            "prefetch = 7                                 # ETC/stackhand.toml:5",
        ]
    );
    let expected = r#"# Settings of the network agent, with the source of each.
cloud = "default"                            # default
host = "compute1"                            # ETC/stackhand.toml:1
run_dir = "/run/stackhand"                   # default
state_dir = "/var/lib/stackhand/network"     # default
zone = "nova"                                # default

[bus]
call_timeout_seconds = 60                    # default
concurrency = 16                             # default
url = "rabbit://u:***@h1,w:***@h2/v"         # ETC/stackhand.toml:3

[heartbeat]
interval_seconds = 10                        # default
register_interval_seconds = 3600             # default

[http]
# listen is not set                          # default

[log]
format = "auto"                              # default
level = "debug"                              # environment STACKHAND_LOG__LEVEL

[network]
chap_password = "***"                        # ETC/network.d/10-mtu.toml:3
# local_ip is not set                        # default
mode = "vxlan"                               # default
mtu = 9000                                   # ETC/network.d/10-mtu.toml:2
ratio = 0.0                                  # default
servers = []                                 # default

[network.bridges]

[reconcile]
resync_seconds = 60                          # default
retry_max_seconds = 60                       # default
retry_min_milliseconds = 500                 # default

[shutdown]
limit_seconds = 20                           # default

[signing]
required = true                              # default
trusted_controllers = "ETC/trusted_controllers" # default
window_seconds = 60                          # default
"#;
    assert_eq!(format!("{before}\n{after}"), expected);
    assert!(!format!("{:?}", loaded.settings.agent).contains("hunter2"));
    assert!(!format!("{:?}", loaded.settings.common.bus.url).contains("hunter2"));
}

/// What is printed can be read back, and is the same then.
#[test]
fn printed_settings_are_settings() {
    let etc = Etc::new().file(
        "network.toml",
        "[network]\nservers = ['a \"b\"']\n[network.bridges]\n'phys net' = 'br0'\n",
    );
    let first = etc.load();
    let again = Etc::new().file("network.toml", &first.print()).load();
    assert_eq!(again.settings, first.settings);
}

#[test]
fn the_flags_check_and_print_without_starting() {
    let flags = |check_config, print_config| ConfigArgs {
        config_dir: "unused".into(),
        config: None,
        check_config,
        print_config,
    };
    let good = Etc::new().file("stackhand.toml", "zone = 'z1'\n");
    let bad = Etc::new().file("stackhand.toml", "zome = 'z1'\n");

    let Begin::Exit { out, err, code } = flags(true, false).begin_with::<Network>(&good.sources())
    else {
        panic!("ran")
    };
    assert_eq!((&*out, &*err, code), ("settings of the network agent are good\n", "", 0));
    let Begin::Exit { out, err, code } = flags(true, false).begin_with::<Network>(&bad.sources())
    else {
        panic!("ran")
    };
    let expected =
        "error: ETC/stackhand.toml:1:1: unknown key or section `zome`; did you mean `zone`?\n";
    assert_eq!((&*out, &*bad.plain(&err), code), ("", expected, 1));
    let Begin::Exit { out, code, .. } = flags(false, true).begin_with::<Network>(&good.sources())
    else {
        panic!("ran")
    };
    assert!(out.contains("zone = \"z1\"") && code == 0);
    let Begin::Exit { code, .. } = flags(false, false).begin_with::<Network>(&bad.sources()) else {
        panic!("ran")
    };
    assert_eq!(code, crate::lifecycle::exit::CONFIG);
    let Begin::Run(loaded) = flags(false, false).begin_with::<Network>(&good.sources()) else {
        panic!("did not run")
    };
    assert_eq!(loaded.settings.common.zone, "z1");
}

#[test]
fn brokers_are_read_from_the_url() {
    let list = |url: &str| -> Vec<(String, u16)> {
        let url: BusUrl = url.parse().unwrap();
        url.brokers().into_iter().map(|broker| (broker.host, broker.port)).collect()
    };
    let one = |host: &str, port| (host.to_owned(), port);
    assert_eq!(list("rabbit://u:p@h1:5673,h2/v"), [one("h1", 5673), one("h2", 5672)]);
    assert_eq!(list("rabbits://[::1]:1,w:q@[fe80::1]/"), [one("::1", 1), one("fe80::1", 5671)]);
    for (bad, why) in [
        ("h1:5672", InvalidBusUrl::Scheme),
        ("http://h1", InvalidBusUrl::Scheme),
        ("rabbit://", InvalidBusUrl::Host),
        ("rabbit://h1:0", InvalidBusUrl::Host),
        ("rabbit://h1:port", InvalidBusUrl::Host),
        ("rabbit://[::1", InvalidBusUrl::Host),
        ("rabbit://h1,,h2", InvalidBusUrl::Host),
    ] {
        assert_eq!(bad.parse::<BusUrl>(), Err(why), "{bad}");
    }
}

proptest! {
    /// Whatever stands in the files and the environment: an answer, never a panic, and no more
    /// rounds than there are problems.
    #[test]
    fn any_text_is_settings_or_errors(file in "\\PC{0,80}", key in "[A-Z_]{0,20}", value in "\\PC{0,20}") {
        let etc = Etc::new().file("network.toml", &file).var(&format!("STACKHAND_{key}"), &value);
        match load::<Network>(&etc.sources()) {
            Ok(loaded) => drop(loaded.print()),
            Err(errors) => prop_assert!(!errors.problems.is_empty()),
        }
    }

    /// Any setting given a value of any type either takes it or tells its own place.
    #[test]
    fn a_wrong_value_is_told_at_its_place(
        key in proptest::sample::select(vec!["bus.url", "bus.amqp", "log.level", "http.listen", "host", "signing", "network.mode", "network.bridges", "network.servers"]),
        value in proptest::sample::select(vec!["1", "-1", "1.5", "'x'", "true", "[]", "[1]", "{}", "{ x = 1 }", "1979-05-27", "99999999999999999999"]),
    ) {
        let etc = Etc::new().file("network.toml", &format!("{key} = {value}\n"));
        if let Err(errors) = load::<Network>(&etc.sources()) {
            for problem in errors.problems {
                prop_assert!(problem.key.starts_with(key), "{problem}");
                prop_assert!(problem.to_string().contains("network.toml:1:"), "{problem}");
            }
        }
    }
}
