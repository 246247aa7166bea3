use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use stackhand_testkit::{Spawned, missing, wait_for};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::*;
use crate::{Delivered, Origin};

const LIMIT: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Echo {
    running: AtomicUsize,
    most: AtomicUsize,
    finished: AtomicUsize,
}

impl Handler for Echo {
    fn handle(&self, delivered: Delivered) -> BoxFuture<'_, Result<Value, Failure>> {
        async move {
            let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(running, Ordering::SeqCst);
            let args = delivered.request.args;
            let answer = match delivered.request.method.as_str() {
                "echo" => Ok(Value::Object(args)),
                "sleep" => {
                    let millis = args["millis"].as_u64().unwrap();
                    tokio::time::sleep(Duration::from_millis(millis)).await;
                    Ok(json!("slept"))
                }
                "origin" => match delivered.origin {
                    Origin::Local { uid, gid, .. } => Ok(json!([uid, gid])),
                    other => Ok(json!(format!("{other:?}"))),
                },
                "big" => {
                    Ok(json!("x".repeat(usize::try_from(args["bytes"].as_u64().unwrap()).unwrap())))
                }
                "panic" => panic!("on purpose"),
                other => Err(Failure::no_such_method(other)),
            };
            self.running.fetch_sub(1, Ordering::SeqCst);
            self.finished.fetch_add(1, Ordering::SeqCst);
            answer
        }
        .boxed()
    }
}

fn target() -> Target {
    Target::topic("stackhand", "stackhand.compute")
}

fn service(concurrency: usize) -> Service {
    Service {
        exchange: "stackhand".into(),
        topic: "stackhand.compute".into(),
        server: "h1".into(),
        concurrency,
    }
}

/// A served socket in a folder of its own.
struct Host {
    _folder: TempDir,
    path: PathBuf,
    server: LocalTransport,
    echo: Arc<Echo>,
    handle: Option<ServerHandle>,
}

impl Host {
    async fn with(options: LocalOptions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("compute-agent.sock");
        let server = LocalTransport::with_options(&path, options);
        let echo = Arc::new(Echo::default());
        let handle = server.serve(service(8), Arc::clone(&echo) as Arc<dyn Handler>).await.unwrap();
        Self { _folder: folder, path, server, echo, handle: Some(handle) }
    }

    async fn new() -> Self {
        Self::with(LocalOptions::default()).await
    }

    fn client(&self) -> LocalTransport {
        LocalTransport::connect(&self.path)
    }

    async fn raw(&self) -> BufReader<UnixStream> {
        BufReader::new(UnixStream::connect(&self.path).await.unwrap())
    }
}

async fn ask(client: &LocalTransport, method: &str, args: Value) -> Result<Value, BusError> {
    client.call(&target(), Request::new(method, args), CallLimits::total(LIMIT)).await
}

async fn raw_answer(stream: &mut BufReader<UnixStream>, line: &[u8]) -> Value {
    stream.write_all(line).await.unwrap();
    let mut answer = String::new();
    stream.read_line(&mut answer).await.unwrap();
    serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: {answer:?}"))
}

async fn closes(mut stream: BufReader<UnixStream>) -> bool {
    let mut rest = Vec::new();
    // A reset is an end too: we had written more than was read.
    let _ = tokio::time::timeout(LIMIT, stream.read_to_end(&mut rest)).await.unwrap();
    true
}

#[tokio::test]
async fn many_clients_get_their_own_answers_within_the_shared_bound() {
    let host = Host::new().await;
    let mut tasks = Vec::new();
    for client in 0..20 {
        let bus = Arc::new(host.client());
        for call in 0..25 {
            let bus = Arc::clone(&bus);
            tasks.push(tokio::spawn(async move {
                let args = json!({ "client": client, "call": call });
                assert_eq!(ask(&bus, "echo", args.clone()).await.unwrap(), args);
                ask(&bus, "sleep", json!({ "millis": 5 })).await.unwrap();
            }));
        }
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(host.server.counters().requests, 1000);
    assert_eq!(host.server.counters().connections, 20);
    assert!(host.echo.most.load(Ordering::SeqCst) <= 8);
}

#[tokio::test]
async fn failures_panics_and_unknown_methods_come_back_and_the_peer_is_known() {
    let host = Host::new().await;
    let client = host.client();
    let error = ask(&client, "nothing", json!({})).await.unwrap_err();
    assert!(matches!(error, BusError::Remote(failure) if failure.class == "NoSuchMethod"));
    let error = ask(&client, "panic", json!({})).await.unwrap_err();
    assert!(error.to_string().contains("on purpose"), "{error}");
    let me = [nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw()];
    assert_eq!(ask(&client, "origin", json!({})).await.unwrap(), json!(me));
    let elsewhere = Target::topic("stackhand", "stackhand.network");
    let error = client
        .call(&elsewhere, Request::new("echo", json!({})), CallLimits::default())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("serves stackhand.compute, not"), "{error}");
    client.cast(&target(), Request::new("echo", json!({}))).await.unwrap();
    wait_for(LIMIT, "the cast to be handled", async || {
        (host.echo.finished.load(Ordering::SeqCst) == 3).then_some(())
    })
    .await;
}

#[tokio::test]
async fn ten_megabytes_go_both_ways_and_too_much_is_an_error_for_that_call_alone() {
    let host = Host::new().await;
    let client = host.client();
    let args = json!({ "data": "y".repeat(10_000_000) });
    assert_eq!(ask(&client, "echo", args.clone()).await.unwrap(), args);
    let error = ask(&client, "big", json!({ "bytes": 17_000_000 })).await.unwrap_err();
    assert!(error.to_string().contains("AnswerTooLarge"), "{error}");
    let error = ask(&client, "echo", json!({ "data": "y".repeat(17_000_000) })).await.unwrap_err();
    assert!(matches!(error, BusError::Malformed(_)), "{error}");
    ask(&client, "echo", json!({})).await.unwrap();
    assert_eq!(host.server.counters().connections, 1);
}

#[tokio::test]
async fn malformed_lines_are_answered_where_possible_and_counted() {
    let host = Host::new().await;
    let mut stream = host.raw().await;
    let answer = raw_answer(&mut stream, b"{\"_msg_id\":\"m1\",\"args\":{}}\n").await;
    assert_eq!(answer["_msg_id"], "m1");
    assert!(answer["failure"].as_str().unwrap().contains("names no method"), "{answer}");
    let line = b"\n{\"_msg_id\":\"m2\",\"method\":\"echo\",\"args\":{\"a\":1}}\n";
    assert_eq!(raw_answer(&mut stream, line).await["result"], json!({ "a": 1 }));

    let deep = format!("{{\"a\":{}1{}}}\n", "[".repeat(100_000), "]".repeat(100_000));
    let bad: [&[u8]; 6] = [
        b"what is this\n",
        b"\xff\xfe{}\n",
        b"[1,2]\n",
        b"{\"args\":3}\n",
        b"{\"oslo.version\":\"3.0\",\"oslo.message\":\"{}\"}\n",
        deep.as_bytes(),
    ];
    for line in bad {
        let mut stream = host.raw().await;
        let answer = raw_answer(&mut stream, line).await;
        assert_eq!(answer["_msg_id"], "", "{answer}");
        assert!(answer["failure"].as_str().unwrap().contains("MalformedMessage"), "{answer}");
        assert!(closes(stream).await);
    }
    assert_eq!(host.server.counters().malformed, 7);
    ask(&host.client(), "echo", json!({})).await.unwrap();
}

#[tokio::test]
async fn endless_lines_begun_lines_and_slow_readers_are_cut_off() {
    let host = Host::with(LocalOptions {
        max_line: 100_000,
        partial_line_timeout: Duration::from_millis(100),
        write_timeout: Duration::from_millis(200),
        ..LocalOptions::default()
    })
    .await;
    let mut endless = host.raw().await;
    let _cut = endless.write_all(&vec![b'x'; 300_000]).await;
    assert!(closes(endless).await);
    let mut begun = host.raw().await;
    let answer = raw_answer(&mut begun, b"{\"method\"").await;
    assert!(answer["failure"].as_str().unwrap().contains("not continued"), "{answer}");

    let mut slow = host.raw().await;
    for number in 0..200 {
        let line = format!(
            "{{\"_msg_id\":\"m{number}\",\"method\":\"big\",\"args\":{{\"bytes\":50000}}}}\n"
        );
        if slow.write_all(line.as_bytes()).await.is_err() {
            break;
        }
    }
    wait_for(LIMIT, "the slow reader to be cut off", async || {
        (host.server.counters().slow_readers == 1).then_some(())
    })
    .await;
    let counters = host.server.counters();
    assert_eq!((counters.malformed, counters.stalled), (1, 1));
    ask(&host.client(), "echo", json!({})).await.unwrap();
}

#[tokio::test]
async fn one_connection_has_only_so_many_requests_under_way_and_all_are_answered() {
    let host = Host::with(LocalOptions { max_in_flight: 2, ..LocalOptions::default() }).await;
    let client = host.client();
    let calls = (0..12).map(|_| ask(&client, "sleep", json!({ "millis": 20 })));
    for answer in futures_util::future::join_all(calls).await {
        answer.unwrap();
    }
    assert_eq!(host.echo.most.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_connection_too_many_is_told_to_try_later() {
    let host = Host::with(LocalOptions { max_connections: 1, ..LocalOptions::default() }).await;
    let first = host.client();
    ask(&first, "echo", json!({})).await.unwrap();
    let error = ask(&host.client(), "echo", json!({})).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    drop(first);
    wait_for(LIMIT, "the place to be free", async || {
        ask(&host.client(), "echo", json!({})).await.ok()
    })
    .await;
}

#[tokio::test]
async fn a_long_call_is_kept_alive_for_callers_that_monitor_it() {
    let host = Host::new().await;
    let limits = CallLimits { total: LIMIT, monitor: Some(Duration::from_secs(2)) };
    let request = Request::new("sleep", json!({ "millis": 3500 }));
    assert_eq!(host.client().call(&target(), request, limits).await.unwrap(), json!("slept"));
    let error = host
        .client()
        .call(
            &target(),
            Request::new("sleep", json!({ "millis": 5000 })),
            CallLimits::total(Duration::from_millis(50)),
        )
        .await
        .unwrap_err();
    assert!(matches!(error, BusError::Timeout { .. }), "{error}");
}

#[tokio::test]
async fn a_server_shut_down_in_order_answers_what_runs() {
    let mut host = Host::new().await;
    let client = Arc::new(host.client());
    let asking = {
        let client = Arc::clone(&client);
        tokio::spawn(async move { ask(&client, "sleep", json!({ "millis": 300 })).await })
    };
    wait_for(LIMIT, "the call to run", async || {
        (host.echo.running.load(Ordering::SeqCst) == 1).then_some(())
    })
    .await;
    host.handle.take().unwrap().shut_down(LIMIT).await;
    assert_eq!(asking.await.unwrap().unwrap(), json!("slept"));
    assert!(!host.path.exists());
    let error = ask(&client, "echo", json!({})).await.unwrap_err();
    assert!(error.to_string().contains("is compute-agent running?"), "{error}");
}

#[tokio::test]
async fn a_server_killed_mid_call_is_told_and_found_again_after_its_restart() {
    let mut host = Host::new().await;
    let client = Arc::new(host.client());
    let asking = {
        let client = Arc::clone(&client);
        tokio::spawn(async move { ask(&client, "sleep", json!({ "millis": 60_000 })).await })
    };
    wait_for(LIMIT, "the call to run", async || {
        (host.echo.running.load(Ordering::SeqCst) == 1).then_some(())
    })
    .await;
    host.handle.take().unwrap().shut_down(Duration::ZERO).await;
    let error = asking.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("may or may not have been carried out"), "{error}");
    assert!(matches!(&*client.link().borrow(), LinkState::Down { .. }));

    let handler = Arc::clone(&host.echo) as Arc<dyn Handler>;
    let _again = wait_for(LIMIT, "the path to be free", async || {
        host.server.serve(service(8), Arc::clone(&handler)).await.ok()
    })
    .await;
    ask(&client, "echo", json!({})).await.unwrap();
    assert_eq!(*client.link().borrow(), LinkState::Up { generation: 2 });
}

#[tokio::test]
async fn a_path_is_taken_over_only_from_the_dead() {
    let host = Host::new().await;
    let refusal = |error: BusError| match error {
        BusError::Refused { reason, .. } => reason,
        other => panic!("{other:?}"),
    };
    let live = LocalListener::bind(&host.path, LocalOptions::default()).await.unwrap_err();
    assert!(refusal(live).contains("another process answers"));
    ask(&host.client(), "echo", json!({})).await.unwrap();

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let taken = LocalListener::bind(&file, LocalOptions::default()).await.unwrap_err();
    assert!(refusal(taken).contains("no socket"));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");

    let stale = folder.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let error = ask(&LocalTransport::connect(&stale), "echo", json!({})).await.unwrap_err();
    assert!(error.to_string().contains("nobody listens"), "{error}");
    let listener = LocalListener::bind(&stale, LocalOptions::default()).await.unwrap();
    let mode = std::fs::metadata(&stale).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    drop(listener);
    assert!(!stale.exists());

    let nowhere = folder.path().join("no/such/folder.sock");
    let error = LocalListener::bind(&nowhere, LocalOptions::default()).await.unwrap_err();
    assert!(error.to_string().contains("make it first"), "{error}");
    let long = folder.path().join("x".repeat(200));
    let error = LocalListener::bind(&long, LocalOptions::default()).await.unwrap_err();
    assert!(matches!(error, BusError::Config(_)), "{error}");
}

/// Asks `origin` over the socket as another user and prints what comes back.
const PEER: &str = r#"
use IO::Socket::UNIX;
my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or do { print "connect: $!\n"; exit };
$s->send("{\"method\":\"origin\",\"_msg_id\":\"m\"}\n");
print scalar <$s>, "\n";
"#;

async fn as_user(path: &Path, groups: &str) -> String {
    let path = path.to_owned();
    let groups = groups.to_owned();
    let asking = tokio::task::spawn_blocking(move || {
        let groups = if groups.is_empty() {
            "--clear-groups".to_owned()
        } else {
            format!("--groups={groups}")
        };
        let path = path.to_string_lossy().into_owned();
        let mut child = Spawned::start(
            "/usr/bin/setpriv",
            ["--reuid=65533", "--regid=65533", &groups, "/usr/bin/perl", "-e", PEER, &path],
        );
        assert!(child.wait(LIMIT).success(), "{child:?}");
        child.output()
    });
    asking.await.unwrap()
}

#[tokio::test]
async fn a_stranger_is_refused_by_the_file_and_by_the_server_and_a_member_is_not() {
    if !nix::unistd::geteuid().is_root() {
        return missing("becoming another user needs root");
    }
    let open = |host: &Host| {
        let folder = host.path.parent().unwrap();
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    // `daemon` is group 1 on every distribution; here it plays the part of `stackhand`.
    let group = Some("daemon".to_owned());
    let strict = Host::with(LocalOptions { group: group.clone(), ..LocalOptions::default() }).await;
    open(&strict);
    assert!(as_user(&strict.path, "").await.contains("connect: Permission denied"));
    assert!(as_user(&strict.path, "1").await.contains("[65533,65533]"));

    let lax = Host::with(LocalOptions { mode: 0o666, group, ..LocalOptions::default() }).await;
    open(&lax);
    let answer = as_user(&lax.path, "2").await;
    assert!(answer.contains("Forbidden") && answer.contains("group daemon"), "{answer}");
    assert!(as_user(&lax.path, "2,1").await.contains("[65533,65533]"));
    assert_eq!(lax.server.counters().refused_peers, 1);
}

#[tokio::test]
async fn local_controllers_are_kept_apart_by_a_lock() {
    let host = Host::new().await;
    let (one, two) = (host.client(), host.client());
    let held = one.lock("apply", Duration::ZERO).await.unwrap();
    let error = two.lock("apply", Duration::from_millis(120)).await.unwrap_err();
    assert!(matches!(error, BusError::Timeout { .. }), "{error}");
    two.lock("other", Duration::ZERO).await.unwrap();
    drop(held);
    two.lock("apply", Duration::ZERO).await.unwrap();
    assert!(two.lock("../evil", Duration::ZERO).await.is_err());
    let stream = Stream { name: "s".into(), max_age: LIMIT, max_bytes: 1 };
    let error = one.publish(&stream, json!(1)).await.unwrap_err();
    assert_eq!(error.to_string(), "a local socket does not offer streams");
}
