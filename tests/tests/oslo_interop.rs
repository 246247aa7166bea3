//! Python's own oslo.messaging, from PyPI, on the other side of a real RabbitMQ.
//!
//! The Python process does what it is told, line by line (`tests/python/peer.py`); this file
//! tells it, serves it, calls it and compares. Every case runs with transient, durable and
//! quorum queues, and with fanouts by streams; on the last two Python compresses what it sends.

#![expect(clippy::disallowed_methods, reason = "runs a long-lived helper over pipes")]

#[cfg(test)]
mod broker {
    use std::io::{BufRead, BufReader, Write};
    use std::path::Path;
    use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};

    use futures_util::FutureExt;
    use futures_util::future::BoxFuture;
    use serde_json::{Map, Value, json};
    use stackhand_bus::amqp::{AmqpOptions, AmqpTransport};
    use stackhand_bus::{
        BusError, CallLimits, Context, Delivered, Failure, Handler, Notification, Priority,
        Request, ServerHandle, Service, Target, Transport, Version,
    };
    use stackhand_testkit::broker::Broker;
    use tokio::runtime::Runtime;

    const EXCHANGE: &str = "interop";
    const LIMIT: Duration = Duration::from_secs(20);

    /// A kind of queues: its name, our options, Python's options.
    struct Mode {
        name: &'static str,
        ours: AmqpOptions,
        theirs: &'static str,
    }

    fn modes() -> [Mode; 4] {
        let plain = AmqpOptions { rpc_ping_enabled: true, ..AmqpOptions::default() };
        let quorum =
            AmqpOptions { quorum_queues: true, transient_quorum_queues: true, ..plain.clone() };
        [
            Mode { name: "transient", ours: plain.clone(), theirs: "" },
            Mode {
                name: "durable",
                ours: AmqpOptions { durable_queues: true, ..plain },
                theirs: "?amqp_durable_queues=true",
            },
            Mode {
                name: "quorum",
                ours: quorum.clone(),
                theirs: "?rabbit_quorum_queue=true&rabbit_transient_quorum_queue=true\
                         &kombu_compression=gzip",
            },
            // Fanouts by streams, which want a bound on what is under way.
            Mode {
                name: "streams",
                ours: AmqpOptions { stream_fanout: true, ..quorum },
                theirs: "?rabbit_quorum_queue=true&rabbit_transient_quorum_queue=true\
                         &rabbit_stream_fanout=true&rabbit_qos_prefetch_count=10\
                         &kombu_compression=bzip2",
            },
        ]
    }

    #[test]
    fn python_s_oslo_messaging_calls_us_and_is_called() {
        let broker = Broker::start();
        let runtime = Runtime::new().unwrap();
        for mode in modes() {
            // One vhost a mode: exchanges are shared by name and must agree in their flags.
            broker.ctl(0, &["add_vhost", mode.name]);
            broker.ctl(0, &["set_permissions", "-p", mode.name, "guest", ".*", ".*", ".*"]);
        }
        std::thread::scope(|threads| {
            for mode in modes() {
                let url = format!("{}{}", broker.url(), mode.name);
                let runtime = &runtime;
                threads.spawn(move || both_ways(runtime, &mode, &url));
            }
        });
    }

    fn both_ways(runtime: &Runtime, mode: &Mode, url: &str) {
        let mut python = Python::start();
        let their_url = format!("{url}{}", mode.theirs);
        python.ok(json!({"op": "connect", "name": mode.name, "url": their_url}));
        let ours = {
            let _inside = runtime.enter();
            AmqpTransport::connect(url.parse().unwrap(), &mode.ours).unwrap()
        };
        python_calls_us(&mut python, runtime, &ours, mode.name);
        we_call_python(&mut python, runtime, &ours, mode.name);
        notifications_go_both_ways(&mut python, runtime, &ours, mode.name);
        assert_eq!(ours.counters().malformed, 0);
        runtime.block_on(ours.close());
    }

    fn python_calls_us(python: &mut Python, runtime: &Runtime, ours: &AmqpTransport, mode: &str) {
        let worker = Arc::new(Worker::default());
        let handle = runtime.block_on(serve(ours, "rust", &worker));
        let call = |method: &str, args: Value| json!({"op": "call", "name": mode, "topic": "rust", "method": method, "args": args});
        let with = |mut command: Value, more: Value| {
            let more = more.as_object().unwrap().clone();
            command.as_object_mut().unwrap().extend(more);
            command
        };

        let args =
            json!({"text": "grüß \u{1f600} \"q\"", "n": [1, 2.5, null, true], "deep": {"a": {}}});
        assert_eq!(python.ok(call("echo", args.clone())), args);
        let to_server = with(call("echo", json!({"a": 1})), json!({"server": "h1"}));
        assert_eq!(python.ok(to_server), json!({"a": 1}));
        let context = json!({"request_id": "req-7", "roles": ["admin"]});
        let in_context = with(call("context", json!({})), json!({"context": context}));
        assert_eq!(python.ok(in_context), context);
        assert_eq!(python.ok(call("nothing_back", json!({}))), Value::Null);
        let namespaced =
            with(call("where", json!({})), json!({"namespace": "special", "version": "2.0"}));
        assert_eq!(python.ok(namespaced), "special");
        assert_eq!(python.ok(call("oslo_rpc_server_ping", json!({}))), "pong");

        for (command, exc_type) in [
            (call("raise_own", json!({})), "VolumeNotFound"),
            (call("no_such", json!({})), "NoSuchMethod"),
            (with(call("echo", json!({})), json!({"version": "1.9"})), "UnsupportedVersion"),
            (with(call("echo", json!({})), json!({"namespace": "none"})), "UnsupportedVersion"),
            (call("panic", json!({})), "InternalError"),
        ] {
            let error = python.error(command);
            assert_eq!(
                (&error["error"], &error["exc_type"]),
                (&json!("RemoteError"), &json!(exc_type))
            );
        }
        let builtin = python.error(call("raise_builtin", json!({})));
        assert!(builtin["bases"].as_array().unwrap().contains(&json!("ValueError")), "{builtin}");
        assert!(builtin["message"].as_str().unwrap().contains("not like this"), "{builtin}");

        let late = with(call("sleep", json!({"seconds": 3})), json!({"timeout": 1}));
        assert_eq!(python.error(late)["error"], "MessagingTimeout");
        // Twice as long as the monitor allows silence for: only our keep-alives carry it.
        let long = with(call("sleep", json!({"seconds": 4})), json!({"timeout": 20, "monitor": 2}));
        assert_eq!(python.ok(long), "woke");

        let cast = |args: Value, more: Value| {
            let cast = json!({"op": "cast", "name": mode, "topic": "rust", "method": "note", "args": args});
            with(cast, more)
        };
        python.ok(cast(json!({"n": 1}), json!({})));
        python.ok(cast(json!({"n": 2}), json!({"server": "h1"})));
        python.ok(cast(json!({"n": 3}), json!({"fanout": true})));
        eventually("Python's casts", || {
            worker.notes() == [json!({"n": 1}), json!({"n": 2}), json!({"n": 3})]
        });
        runtime.block_on(handle.shut_down(LIMIT));
    }

    fn we_call_python(python: &mut Python, runtime: &Runtime, ours: &AmqpTransport, mode: &str) {
        python.ok(json!({"op": "serve", "name": mode, "topic": "python", "server": "p1"}));
        let to = Target::topic(EXCHANGE, "python");
        let ask = |target: &Target, method: &str, args: Value, limits: CallLimits| {
            runtime.block_on(ours.call(target, Request::new(method, args), limits))
        };
        let limits = CallLimits::total(LIMIT);

        let args =
            json!({"text": "grüß \u{1f600} \"q\"", "n": [1, 2.5, null, true], "deep": {"a": {}}});
        assert_eq!(ask(&to, "echo", args.clone(), limits).unwrap(), args);
        let p1 = to.clone().on_server("p1").at_version(Version::new(1, 3));
        assert_eq!(ask(&p1, "echo", json!({"a": 1}), limits).unwrap(), json!({"a": 1}));
        let context = json!({"request_id": "req-8", "is_admin": true}).as_object().unwrap().clone();
        let request = Request::new("context", json!({})).with_context(Context(context.clone()));
        let seen = runtime.block_on(ours.call(&to, request, limits)).unwrap();
        for (key, value) in &context {
            assert_eq!(&seen[key], value);
        }
        let special = to.clone().in_namespace("special").at_version(Version::new(2, 0));
        assert_eq!(ask(&special, "where", json!({}), limits).unwrap(), "special");

        for (target, method, class, module) in [
            (to.clone(), "raise_own", "VolumeNotFound", "__main__"),
            (to.clone(), "raise_builtin", "ValueError", "builtins"),
            (to.clone(), "no_such", "NoSuchMethod", "oslo_messaging.rpc.dispatcher"),
            (
                to.clone().at_version(Version::new(1, 4)),
                "echo",
                "UnsupportedVersion",
                "oslo_messaging.rpc.dispatcher",
            ),
        ] {
            let Err(BusError::Remote(failure)) = ask(&target, method, json!({}), limits) else {
                panic!("{method} raises");
            };
            assert_eq!((failure.class.as_str(), failure.module.as_str()), (class, module));
            assert!(!failure.traceback.is_empty());
        }
        let Err(BusError::Remote(failure)) = ask(&to, "raise_builtin", json!({}), limits) else {
            panic!("it raises");
        };
        assert_eq!(failure.args, [json!("not like this"), json!(7)]);

        let short = CallLimits::total(Duration::from_secs(1));
        let late = ask(&to, "sleep", json!({"seconds": 3}), short);
        assert!(matches!(late, Err(BusError::Timeout { .. })), "{late:?}");
        let monitored = CallLimits { total: LIMIT, monitor: Some(Duration::from_secs(2)) };
        assert_eq!(ask(&to, "sleep", json!({"seconds": 4}), monitored).unwrap(), "woke");

        for (number, target) in (1..).zip([to.clone(), p1, to.clone().to_all()]) {
            runtime
                .block_on(ours.cast(&target, Request::new("note", json!({"n": number}))))
                .unwrap();
        }
        eventually("our casts", || {
            let noted = ask(&to, "noted", json!({}), limits).unwrap();
            let mut noted = noted.as_array().unwrap().clone();
            noted.sort_by_key(|note| note["n"].as_u64());
            noted == [json!({"n": 1}), json!({"n": 2}), json!({"n": 3})]
        });
    }

    fn notifications_go_both_ways(
        python: &mut Python,
        runtime: &Runtime,
        ours: &AmqpTransport,
        mode: &str,
    ) {
        // Ours is sent before anybody listens: the queue keeps it.
        let topic = format!("notes-{mode}");
        let notification = Notification {
            exchange: EXCHANGE.into(),
            topic: topic.clone(),
            publisher_id: "rust.h1".into(),
            event_type: "compute.instance.create.end".into(),
            priority: Priority::Info,
            payload: json!({"instance_id": "i1"}),
            context: Context::fresh(),
        };
        runtime.block_on(ours.notify(notification)).unwrap();
        python.ok(json!({"op": "listen", "name": mode, "topic": topic}));
        eventually("our notification", || {
            let events = python.ok(json!({"op": "events"}));
            events.as_array().unwrap().iter().any(|event| {
                event["publisher_id"] == "rust.h1"
                    && event["priority"] == "info"
                    && event["event_type"] == "compute.instance.create.end"
                    && event["payload"] == json!({"instance_id": "i1"})
            })
        });
        // Python's own goes to its listener through the queue that we declared.
        let event = json!({"op": "notify", "name": mode, "topic": topic,
            "event_type": format!("python.{mode}"), "payload": {"k": [1]}});
        python.ok(event);
        eventually("Python's notification", || {
            let events = python.ok(json!({"op": "events"}));
            let wanted = json!(format!("python.{mode}"));
            events.as_array().unwrap().iter().any(|event| event["event_type"] == wanted)
        });
    }

    /// Our side of the calls.
    #[derive(Debug, Default)]
    struct Worker {
        notes: Mutex<Vec<Value>>,
    }

    impl Worker {
        fn notes(&self) -> Vec<Value> {
            let mut notes = self.notes.lock().unwrap().clone();
            notes.sort_by_key(|note| note["n"].as_u64());
            notes
        }

        async fn serve(&self, delivered: Delivered) -> Result<Value, Failure> {
            let Delivered {
                request: Request { method, args, context }, namespace, version, ..
            } = delivered;
            let served = match namespace.as_deref() {
                None => Version::new(1, 3).serves(version),
                Some("special") => Version::new(2, 0).serves(version),
                Some(_) => false,
            };
            if !served {
                return Err(Failure::unsupported_version(&version.to_string(), &method));
            }
            match method.as_str() {
                "echo" => Ok(Value::Object(args)),
                "context" => Ok(Value::Object(context.0)),
                "nothing_back" => Ok(Value::Null),
                "where" => Ok(json!(namespace)),
                "note" => {
                    self.notes.lock().unwrap().push(Value::Object(args));
                    Ok(Value::Null)
                }
                "sleep" => {
                    let seconds = args["seconds"].as_u64().unwrap();
                    tokio::time::sleep(Duration::from_secs(seconds)).await;
                    Ok(json!("woke"))
                }
                "raise_own" => Err(Failure::new("VolumeNotFound", "Volume v1 could not be found")),
                "raise_builtin" => Err(Failure {
                    class: "ValueError".into(),
                    module: "builtins".into(),
                    message: "not like this".into(),
                    args: vec![json!("not like this")],
                    kwargs: Map::new(),
                    traceback: Vec::new(),
                }),
                "panic" => panic!("told to"),
                other => Err(Failure::no_such_method(other)),
            }
        }
    }

    impl Handler for Worker {
        fn handle(&self, delivered: Delivered) -> BoxFuture<'_, Result<Value, Failure>> {
            self.serve(delivered).boxed()
        }
    }

    async fn serve(ours: &AmqpTransport, topic: &str, worker: &Arc<Worker>) -> ServerHandle {
        let service = Service {
            exchange: EXCHANGE.into(),
            topic: topic.into(),
            server: "h1".into(),
            concurrency: 8,
        };
        let mut link = ours.link();
        let up = link.wait_for(|state| matches!(state, stackhand_bus::LinkState::Up { .. }));
        tokio::time::timeout(LIMIT, up).await.unwrap().unwrap();
        ours.serve(service, Arc::clone(worker) as Arc<dyn Handler>).await.unwrap()
    }

    fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
        let end = Instant::now() + LIMIT;
        while !condition() {
            assert!(Instant::now() < end, "gave up waiting for {what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The Python process.
    struct Python {
        process: Child,
        input: ChildStdin,
        output: BufReader<ChildStdout>,
    }

    impl Python {
        fn start() -> Self {
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
            let venv = Command::new(root.join("scripts/python-venv")).output().unwrap();
            assert!(
                venv.status.success(),
                "scripts/python-venv: {}",
                String::from_utf8_lossy(&venv.stderr)
            );
            let interpreter = String::from_utf8(venv.stdout).unwrap();
            let mut process = Command::new(interpreter.trim())
                .arg(root.join("tests/python/peer.py"))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let input = process.stdin.take().unwrap();
            let output = BufReader::new(process.stdout.take().unwrap());
            Self { process, input, output }
        }

        fn tell(&mut self, command: &Value) -> Value {
            writeln!(self.input, "{command}").unwrap();
            let mut line = String::new();
            self.output.read_line(&mut line).unwrap();
            serde_json::from_str(&line)
                .unwrap_or_else(|_| panic!("{command}: Python said {line:?}"))
        }

        #[expect(
            clippy::needless_pass_by_value,
            reason = "commands are written where they are told"
        )]
        fn ok(&mut self, command: Value) -> Value {
            let mut answer = self.tell(&command);
            assert!(answer.get("ok").is_some(), "{command}: {answer}");
            answer["ok"].take()
        }

        #[expect(
            clippy::needless_pass_by_value,
            reason = "commands are written where they are told"
        )]
        fn error(&mut self, command: Value) -> Value {
            let answer = self.tell(&command);
            assert!(answer.get("error").is_some(), "{command}: {answer}");
            answer
        }
    }

    impl Drop for Python {
        fn drop(&mut self) {
            // Fails only if it is gone already.
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}
