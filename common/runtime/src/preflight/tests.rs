use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::clock::Sync;
use super::network::Unreachable;
use super::*;
use crate::config::{self, AgentSection, BrokerAddress, SigningSettings, Sources};

fn severities(findings: &[Finding]) -> Vec<Severity> {
    findings.iter().map(|finding| finding.severity).collect()
}

fn only(findings: Vec<Finding>) -> Finding {
    assert_eq!(findings.len(), 1, "{findings:?}");
    findings.into_iter().next().unwrap()
}

#[tokio::test]
async fn a_check_that_hangs_or_crashes_is_a_failure_and_the_others_go_on() {
    let dropped = Arc::new(AtomicBool::new(false));
    struct Tell(Arc<AtomicBool>);
    impl Drop for Tell {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let tell = Arc::clone(&dropped);
    let checks = [
        Check::new("hangs", move || {
            let tell = Tell(Arc::clone(&tell));
            async move {
                let _tell = tell;
                std::future::pending().await
            }
        })
        .with_limit(Duration::from_millis(20)),
        Check::new("crashes", || async { panic!("oops") }),
        Check::blocking("crashes too", || panic!("oops")),
        Check::blocking("works", || vec![Finding::pass("works", "yes")]),
    ];
    let report = run(&checks).await;
    let names: Vec<&str> = report.findings.iter().map(|finding| &*finding.check).collect();
    assert_eq!(names, ["hangs", "crashes", "crashes too", "works"]);
    use Severity::{Failure, Pass};
    assert_eq!(severities(&report.findings), [Failure, Failure, Failure, Pass]);
    assert_eq!(report.findings[0].finding, "no answer within 20ms");
    assert!(!report.is_fit());
    while !dropped.load(Ordering::SeqCst) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_check_that_hangs_in_the_kernel_takes_one_thread_however_often_it_is_run() {
    let (started, starts) = std::sync::mpsc::channel();
    let (go, gate) = std::sync::mpsc::channel::<()>();
    let gate = std::sync::Mutex::new(gate);
    let check = Check::blocking("hangs", move || {
        started.send(()).unwrap();
        let _ended = gate.lock().unwrap().recv();
        vec![Finding::pass("hangs", "over")]
    });
    let checks = [check.with_limit(Duration::from_millis(20))];
    for _ in 0..3 {
        assert!(!run(&checks).await.is_fit());
    }
    assert_eq!(starts.try_iter().count(), 1);
    // It comes back: the next look is a new one.
    drop(go);
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while !run(&checks).await.is_fit() {
        assert!(std::time::Instant::now() < deadline, "did not recover");
    }
    assert!(starts.try_iter().count() >= 1);
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
struct Network {}

impl AgentSection for Network {
    const AGENT: &'static str = "network";
}

#[tokio::test]
async fn the_common_checks_look_at_this_host_and_name_what_is_missing() {
    let etc = tempfile::tempdir().unwrap();
    let dir = etc.path().display();
    let settings = format!(
        "state_dir = '{dir}/state'\nrun_dir = '{dir}'\n[bus]\nurl = 'rabbit://127.0.0.1:1/'\n"
    );
    fs::write(etc.path().join("stackhand.toml"), settings).unwrap();
    let sources = Sources { config_dir: etc.path().to_owned(), ..Sources::default() };
    let loaded = config::load::<Network>(&sources).unwrap();
    let report = run(&common_checks(&loaded)).await;
    println!("{report}");

    let names: Vec<&str> = report.findings.iter().map(|finding| &*finding.check).collect();
    let expected = [
        "config",
        "state-dir",
        "run-dir",
        "clock",
        "kernel",
        "cgroup",
        "security-module",
        "open-files",
        "host-name",
        "trusted-controllers",
        "broker",
    ];
    assert_eq!(names, expected);
    let failed: Vec<&str> =
        report.at_least(Severity::Failure).map(|finding| &*finding.check).collect();
    for missing in ["state-dir", "trusted-controllers", "broker"] {
        assert!(failed.contains(&missing), "{missing} is missing and was not told:\n{report}");
    }
    assert!(!report.to_string().contains("crashed"), "{report}");
    for finding in report.at_least(Severity::Warning) {
        assert!(finding.remedy.is_some(), "{finding:?}");
    }
}

#[test]
fn a_report_reads_as_lines_with_remedies_and_travels_as_json() {
    let report = Report {
        findings: vec![
            Finding::pass("clock", "kept"),
            Finding::failure("state-dir", "/x is not there", "install -d /x"),
        ],
    };
    let expected = "\
pass     clock      kept
FAILURE  state-dir  /x is not there
                    -> install -d /x
";
    assert_eq!(report.to_string(), expected);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["findings"][1]["severity"], "failure");
    assert_eq!(json["findings"][0].get("remedy"), None);
    assert_eq!(serde_json::from_value::<Report>(json).unwrap(), report);
    assert_eq!(report.at_least(Severity::Warning).count(), 1);
}

#[test]
fn a_state_folder_must_be_there_writable_and_closed() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("network");
    let finding = only(paths::state_dir("network", &dir));
    assert_eq!(finding.severity, Severity::Failure);
    let remedy = finding.remedy.unwrap();
    assert!(
        remedy.starts_with("install -d -m 0750 -o ") && remedy.ends_with("/network"),
        "{remedy}"
    );

    fs::write(&dir, "a file").unwrap();
    assert!(only(paths::state_dir("network", &dir)).finding.ends_with("is not a folder"));
    fs::remove_file(&dir).unwrap();

    fs::create_dir(&dir).unwrap();
    assert!(only(paths::state_dir("network", &dir)).finding.ends_with("MiB free"));
    if nix::unistd::Uid::effective().is_root() {
        std::os::unix::fs::chown(&dir, Some(65534), None).unwrap();
        let finding = only(paths::state_dir("network", &dir));
        assert!(finding.finding.ends_with(" belongs to nobody, and the agent is root"));
        assert!(finding.remedy.unwrap().starts_with("chown root /"));
    }
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
    let finding = only(paths::state_dir("network", &dir));
    assert_eq!(finding.severity, Severity::Failure);
    assert!(finding.finding.starts_with("everybody can write in"), "{finding:?}");
    assert_eq!(only(paths::run_dir(parent.path())).severity, Severity::Pass);
}

#[test]
fn little_space_warns_and_none_fails() {
    let judge =
        |free, inodes| paths::judge_space("state-dir", "/x".as_ref(), free, inodes).severity;
    assert_eq!(judge(10 << 30, false), Severity::Pass);
    assert_eq!(judge(100 << 20, false), Severity::Warning);
    assert_eq!(judge(1 << 20, false), Severity::Failure);
    assert_eq!(judge(10 << 30, true), Severity::Failure);
}

#[test]
fn keys_of_controllers_must_be_there_and_safe_while_signing_is_required() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("trusted_controllers");
    let mut signing =
        SigningSettings { trusted_controllers: dir.clone(), ..SigningSettings::default() };
    let look = |signing: &SigningSettings| only(paths::trusted_controllers(signing));
    assert!(look(&signing).finding.contains("is not there"));
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(look(&signing).finding.contains("holds no key"));
    assert!(look(&signing).remedy.unwrap().contains("agentctl keygen"));
    fs::write(dir.join("admin"), "key").unwrap();
    assert_eq!(look(&signing).severity, Severity::Pass);
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o775)).unwrap();
    assert_eq!(look(&signing).severity, Severity::Failure);
    signing.required = false;
    assert_eq!(look(&signing).severity, Severity::Warning);
}

#[test]
fn the_clock_is_judged_by_year_and_by_who_keeps_it() {
    let now = jiff::Timestamp::from_second(1_800_000_000).unwrap();
    let kept = Sync::Kept { error_microseconds: 12_000 };
    assert_eq!(
        clock::judge(now, kept),
        Finding::pass("clock", "kept by a time service, within 12 ms")
    );
    assert_eq!(clock::judge(now, Sync::Free).severity, Severity::Warning);
    assert_eq!(clock::judge(now, Sync::Unknown).severity, Severity::Info);
    let finding = clock::judge(jiff::Timestamp::UNIX_EPOCH, kept);
    assert_eq!(finding.finding, "the clock stands in the year 1970");
    assert_eq!(finding.severity, Severity::Failure);
    assert_eq!(clock::check().len(), 1);
}

#[test]
fn a_time_service_is_found_where_the_kernel_may_not_be_asked() {
    let root = tempfile::tempdir().unwrap();
    assert_eq!(clock::service_sync(root.path()), Sync::Unknown);
    fs::create_dir_all(root.path().join("run/chrony")).unwrap();
    fs::write(root.path().join("run/chrony/chronyd.pid"), "1").unwrap();
    let found = clock::service_sync(root.path());
    let now = jiff::Timestamp::from_second(1_800_000_000).unwrap();
    assert_eq!(clock::judge(now, found), Finding::pass("clock", "kept by chronyd"));
}

#[test]
fn old_kernels_fail_and_odd_names_only_warn() {
    for (release, severity) in [
        ("6.1.0-18-amd64", Severity::Pass),
        ("5.14.0-427.el9.x86_64", Severity::Pass),
        ("5.4.0-42-generic", Severity::Failure),
        ("4.18.0", Severity::Failure),
        ("7.0+", Severity::Pass),
        ("custom", Severity::Warning),
    ] {
        assert_eq!(host::judge_kernel(release).severity, severity, "{release}");
    }
    assert_eq!(host::judge_open_files("network", 1024).severity, Severity::Warning);
    assert_eq!(host::judge_open_files("network", 65536).severity, Severity::Pass);
}

#[test]
fn a_host_must_have_a_name_that_others_can_use() {
    let address = |text: &str| -> IpAddr { text.parse().unwrap() };
    let judge = |host: &str, resolved| network::judge_host_name(host, resolved).severity;
    assert_eq!(judge("localhost", Ok(vec![address("127.0.0.1")])), Severity::Failure);
    assert_eq!(judge("compute1", Ok(vec![address("127.0.1.1")])), Severity::Warning);
    assert_eq!(judge("compute1", Err("not found".into())), Severity::Warning);
    assert_eq!(
        judge("compute1", Ok(vec![address("127.0.1.1"), address("192.0.2.1")])),
        Severity::Pass
    );
}

#[tokio::test]
async fn one_broker_that_answers_is_enough_to_work() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let up = listener.local_addr().unwrap().port();
    // A port that was just free: nobody listens on it.
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let down = closed.local_addr().unwrap().port();
    drop(closed);
    let broker = |port| BrokerAddress { host: "127.0.0.1".into(), port };

    let findings = network::brokers(vec![broker(down), broker(up)]).await;
    assert_eq!(severities(&findings), [Severity::Warning, Severity::Pass]);
    let finding = only(network::brokers(vec![broker(down)]).await);
    assert_eq!(finding.severity, Severity::Failure);
    assert!(finding.finding.ends_with("refuses connections: no broker listens there"));
    assert!(finding.remedy.unwrap().contains("systemctl start rabbitmq-server"));
}

#[test]
fn each_way_not_to_reach_a_broker_has_its_own_remedy() {
    let broker = BrokerAddress { host: "broker1".into(), port: 5672 };
    let remedy = |why| network::judge_broker(&broker, Err(why)).remedy.unwrap();
    assert!(remedy(Unreachable::Name("unknown".into())).contains("getent ahosts broker1"));
    assert!(remedy(Unreachable::Silent).contains("open TCP port 5672"));
    assert!(remedy(Unreachable::Other(std::io::Error::other("x"))).contains("ip route get"));
}

#[tokio::test]
async fn a_name_that_does_not_resolve_is_told_as_such() {
    // Too long for a name: refused by the resolver itself, without asking anybody.
    let host = "x".repeat(64);
    let broker = BrokerAddress { host: host.clone(), port: 5672 };
    let finding = only(network::brokers(vec![broker]).await);
    assert!(finding.finding.starts_with(&format!("{host} does not resolve")), "{finding:?}");
}
