//! The program, killed at each of LVM's commands.

use super::*;

/// The program in its place, with LVM behind a script that kills it when told so.
struct Agent {
    process: Option<Spawned>,
}

const FAULT: &str = "/var/tmp/lab/fault";

impl Agent {
    fn new() -> Self {
        for folder in ["etc", "real"] {
            fs::create_dir_all(Path::new("/var/tmp/lab").join(folder)).unwrap();
        }
        let settings = "host = \"here\"\nstate_dir = \"/var/tmp/lab/agent\"\n\
            run_dir = \"/var/tmp/lab/run\"\n[storage]\ndefault_backend = \"thin\"\n\
            [storage.export]\ntype = \"lio\"\nportals = [\"127.0.0.1:3260\"]\n\
            [storage.backends.thin]\ntype = \"lvm-thin\"\nvolume_group = \"cinder-volumes\"\n\
             overcommit_percent = 1000\n";
        fs::write("/var/tmp/lab/etc/stackhand.toml", settings).unwrap();
        fs::copy("/usr/sbin/lvm", "/var/tmp/lab/real/lvm").unwrap();
        let script = "#!/bin/bash\n\
            case $1 in lvcreate | lvremove | lvrename | lvextend | lvchange) change=yes ;; esac\n\
            if [ -n \"$change\" ] && [ -e /var/tmp/lab/fault ]; then\n\
                read -r when count </var/tmp/lab/fault\n\
                if [ $count -gt 1 ]; then echo \"$when $((count - 1))\" >/var/tmp/lab/fault; when=; fi\n\
                if [ \"$when\" = before ]; then rm /var/tmp/lab/fault; kill -9 $PPID; exit 9; fi\n\
            fi\n\
            /var/tmp/lab/real/lvm \"$@\"\n\
            status=$?\n\
            if [ \"$when\" = after ]; then rm /var/tmp/lab/fault; kill -9 $PPID; fi\n\
            exit $status\n";
        fs::remove_file("/usr/sbin/lvm").unwrap();
        fs::write("/usr/sbin/lvm", script).unwrap();
        fs::set_permissions("/usr/sbin/lvm", fs::Permissions::from_mode(0o755)).unwrap();
        Self { process: None }
    }

    fn start(&mut self) {
        let program = env!("CARGO_BIN_EXE_storage-agent");
        let mut process = Spawned::start(program, ["--config-dir", "/var/tmp/lab/etc"]);
        process.wait_for_output(Duration::from_secs(60), "ready");
        self.process = Some(process);
    }

    fn client() -> AgentClient {
        let transport = Arc::new(LocalTransport::connect("/var/tmp/lab/run/storage.sock"));
        AgentClient::new(transport, AgentKind::Storage, "here")
    }

    /// Waits until an object is active and has these facts, or is gone.
    async fn until(kind: Kind, id: u128, done: impl Fn(Option<&Value>) -> bool) {
        wait_for(Duration::from_secs(90), &format!("{kind} {id}"), async || {
            let entries = Self::client().get(Some(kind), Some(&[Uuid::from_u128(id)])).await;
            let entries = entries.ok()?;
            let status = entries.first().map(|entry| &entry.status);
            let settled = status.is_none_or(|status| status.state == State::Active);
            (settled && done(status.map(|status| &status.observed))).then_some(())
        })
        .await;
    }

    /// Has the agent killed at the `count`th change of LVM that `ask` leads to, and starts it
    /// again.
    async fn killed(&mut self, when: &str, count: u32, ask: impl AsyncFn(&AgentClient)) {
        fs::write(FAULT, format!("{when} {count}\n")).unwrap();
        ask(&Self::client()).await;
        let process = self.process.as_mut().unwrap();
        wait_for_sync(Duration::from_secs(90), "the agent to be killed", || {
            (!process.is_running()).then_some(())
        });
        assert!(!Path::new(FAULT).exists());
        self.start();
    }
}

#[test]
#[ignore = "run by `lab` inside a machine"]
fn agent() {
    runtime().block_on(async {
        let mut agent = Agent::new();
        agent.start();
        let sized = |id: u128, size: u64| {
            document("Volume", id, size, &json!({"host": "here", "size_gib": size}))
        };
        let has = |facts: Option<&Value>, gib: u64| {
            facts.is_some_and(|facts| facts["size_bytes"] == gib << 30)
        };
        for (id, when) in [(1, "before"), (2, "after")] {
            let made = async |client: &AgentClient| {
                client.apply(&[sized(id, 1)]).await.unwrap();
            };
            agent.killed(when, 1, made).await;
            Agent::until(Kind::Volume, id, |facts| has(facts, 1)).await;
            let grown = async |client: &AgentClient| {
                client.apply(&[sized(id, 2)]).await.unwrap();
            };
            agent.killed(when, 1, grown).await;
            Agent::until(Kind::Volume, id, |facts| has(facts, 2)).await;
            let spec = json!({"volume": Uuid::from_u128(id)});
            let shot = async |client: &AgentClient| {
                client.apply(&[document("Snapshot", id + 20, 1, &spec)]).await.unwrap();
            };
            agent.killed(when, 1, shot).await;
            Agent::until(Kind::Snapshot, id + 20, |facts| has(facts, 2)).await;
        }
        println!("ok: killed before and after making, growing and taking a snapshot");
        agent.process.take().unwrap().terminate(Duration::from_secs(20));
    });
}
