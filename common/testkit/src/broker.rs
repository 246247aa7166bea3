//! RabbitMQ for tests: private nodes that share nothing with a broker of the machine.
//!
//! Each [`Broker`] has its own ports, node names, cookie, home, data folder and port mapper, all
//! below one temporary folder, and is gone when dropped. A killed test takes it along.
//!
//! Make it on the test's own thread: the nodes are tied to the life of the thread that starts
//! them (`PR_SET_PDEATHSIG`).

#![expect(
    clippy::disallowed_methods,
    reason = "a fixture may block, and sets its own limits on every wait"
)]
#![expect(clippy::unwrap_used, reason = "a fixture that cannot be had fails its test, loudly")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// Debian's and Red Hat's place of the scripts that do not change the user.
const SCRIPTS: [&str; 2] = ["/usr/lib/rabbitmq/bin", "/usr/sbin"];

/// A node starts in 4 to 8 s on an idle machine of two cores.
const START_LIMIT: Duration = Duration::from_secs(120);

/// What kind of broker to start.
#[derive(Clone, Debug)]
pub struct BrokerSettings {
    /// Nodes in the cluster, 1 to 3.
    pub nodes: usize,
    /// Certificate files for a TLS listener on every node.
    pub tls: Option<TlsFiles>,
}

impl Default for BrokerSettings {
    fn default() -> Self {
        Self { nodes: 1, tls: None }
    }
}

/// PEM files of a TLS listener.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The authority that signed the certificate, and those of clients.
    pub ca: PathBuf,
    /// The broker's certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Whether clients must show a certificate of the same authority.
    pub verify_client: bool,
}

/// A running broker of one or more nodes.
#[derive(Debug)]
pub struct Broker {
    nodes: Vec<Node>,
    epmd: Child,
    epmd_port: u16,
    scripts: &'static str,
    // Last: the folder goes after the processes.
    folder: TempDir,
}

#[derive(Debug)]
struct Node {
    name: String,
    port: u16,
    tls_port: u16,
    cluster_port: u16,
    process: Option<Child>,
}

impl Broker {
    /// Starts one node and waits until it speaks AMQP.
    ///
    /// # Panics
    ///
    /// When RabbitMQ is not installed or does not start; the message shows its log.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with(&BrokerSettings::default())
    }

    /// Starts a broker and waits until every node speaks AMQP.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start).
    #[must_use]
    pub fn start_with(settings: &BrokerSettings) -> Self {
        let scripts = SCRIPTS
            .into_iter()
            .find(|folder| Path::new(folder).join("rabbitmq-server").exists())
            .expect("RabbitMQ is not installed: apt-get install rabbitmq-server");
        let folder = tempfile::Builder::new().prefix("stackhand-broker-").tempdir().unwrap();
        let cookie = folder.path().join(".erlang.cookie");
        fs::write(&cookie, format!("COOKIE{}", std::process::id())).unwrap();
        fs::set_permissions(&cookie, fs::Permissions::from_mode(0o400)).unwrap();
        let epmd_port = free_port();
        let epmd = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "epmd", "-port", &epmd_port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("cannot run epmd through setpriv");
        let nodes = (1..=settings.nodes)
            .map(|number| Node {
                name: format!("n{number}@localhost"),
                port: free_port(),
                tls_port: free_port(),
                cluster_port: free_port(),
                process: None,
            })
            .collect();
        let mut broker = Self { nodes, epmd, epmd_port, scripts, folder };
        wait_for("epmd", START_LIMIT, || TcpStream::connect(("127.0.0.1", epmd_port)).is_ok());
        for node in 0..settings.nodes {
            broker.write_config(node, settings);
            broker.launch(node);
        }
        for node in 0..settings.nodes {
            broker.wait_until_up(node);
        }
        if settings.nodes > 1 {
            wait_for("the cluster to form", START_LIMIT, || {
                let status = broker.ctl(0, &["cluster_status"]);
                let running = status.split("Running Nodes").nth(1).unwrap_or_default();
                let running = running.split("Versions").next().unwrap_or_default();
                broker.nodes.iter().all(|node| running.contains(&node.name))
            });
        }
        broker
    }

    /// The URL of the whole broker, as user `guest` in vhost `/`.
    #[must_use]
    pub fn url(&self) -> String {
        let hosts: Vec<_> =
            self.nodes.iter().map(|n| format!("guest:guest@127.0.0.1:{}", n.port)).collect();
        format!("rabbit://{}/", hosts.join(","))
    }

    /// The plain AMQP port of a node, counted from 0.
    #[must_use]
    pub fn port(&self, node: usize) -> u16 {
        self.nodes[node].port
    }

    /// The TLS port of a node.
    #[must_use]
    pub fn tls_port(&self, node: usize) -> u16 {
        self.nodes[node].tls_port
    }

    /// Kills a node as a power cut would.
    pub fn kill(&mut self, node: usize) {
        if let Some(mut process) = self.nodes[node].process.take() {
            let pid = Pid::from_raw(i32::try_from(process.id()).unwrap());
            // Fails only if the node is gone already.
            let _ = kill(pid, Signal::SIGKILL);
            process.wait().unwrap();
        }
    }

    /// Starts a killed node again, on its old data. Returns at once.
    pub fn restart(&mut self, node: usize) {
        assert!(self.nodes[node].process.is_none(), "node {node} runs");
        self.launch(node);
    }

    /// Waits until a node speaks AMQP.
    ///
    /// # Panics
    ///
    /// When it does not within two minutes.
    pub fn wait_until_up(&mut self, node: usize) {
        let end = Instant::now() + START_LIMIT;
        while !greets(self.nodes[node].port) {
            let ended = match &mut self.nodes[node].process {
                Some(process) => process.try_wait().unwrap().is_some(),
                None => true,
            };
            assert!(!ended && Instant::now() < end, "node did not start:\n{}", self.log(node));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until a node has it on disk that there are streams, which RabbitMQ 3.10 writes some
    /// seconds after its first stream was made. A node killed before that finds no leader for its
    /// streams ever again; killed later, it brings them back with all they hold.
    ///
    /// # Panics
    ///
    /// When it is not there within two minutes, for example because no stream was made.
    pub fn wait_until_streams_last(&self, node: usize) {
        let name = &self.nodes[node].name;
        let data = self.path(node, "data").join(name);
        let registered = data.join("coordination").join(name).join("names.dets");
        wait_for("streams to be on disk", START_LIMIT, || {
            let coordinator = b"rabbit_stream_coordinator";
            let bytes = fs::read(&registered).unwrap_or_default();
            bytes.windows(coordinator.len()).any(|window| window == coordinator)
        });
    }

    /// Runs `rabbitmqctl` against a node and returns what it printed. Takes a second or two.
    ///
    /// # Panics
    ///
    /// When the command fails.
    pub fn ctl(&self, node: usize, arguments: &[&str]) -> String {
        let output = self
            .command("rabbitmqctl", node)
            .args(["-q", "-n", &self.nodes[node].name])
            .args(arguments)
            .output()
            .expect("cannot run rabbitmqctl");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            output.status.success(),
            "rabbitmqctl {arguments:?}: {}{}",
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    /// Makes the broker close every connection to a node.
    pub fn close_all_connections(&self, node: usize) {
        self.ctl(node, &["close_all_connections", "closed by the test"]);
    }

    /// Whether a node was started and not killed.
    #[must_use]
    pub fn is_running(&self, node: usize) -> bool {
        self.nodes[node].process.is_some()
    }

    fn launch(&mut self, node: usize) {
        let log = File::create(self.path(node, "output")).unwrap();
        // Under systemd the script becomes the node, so that the child's id is the node's.
        let server = Path::new(self.scripts).join("rabbitmq-server");
        let mut command = self.command("setpriv", node);
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(server)
            .env("RUNNING_UNDER_SYSTEMD", "true")
            .env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "+sbwt none +sbwtdcpu none +sbwtdio none")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.nodes[node].process = Some(command.spawn().expect("cannot run rabbitmq-server"));
    }

    fn command(&self, program: &str, node: usize) -> Command {
        let inside = Path::new(self.scripts).join(program);
        let mut command =
            if inside.exists() { Command::new(inside) } else { Command::new(program) };
        command
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LANG", "C.UTF-8")
            .env("HOME", self.folder.path())
            .env("ERL_EPMD_PORT", self.epmd_port.to_string())
            .env("RABBITMQ_NODENAME", &self.nodes[node].name)
            .env("RABBITMQ_CONF_ENV_FILE", self.path(node, "env"))
            .env("RABBITMQ_CONFIG_FILE", self.path(node, "rabbitmq"))
            .env("RABBITMQ_ADVANCED_CONFIG_FILE", self.path(node, "advanced"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", self.path(node, "plugins"))
            .env("RABBITMQ_MNESIA_BASE", self.path(node, "data"))
            .env("RABBITMQ_LOG_BASE", self.path(node, "log"))
            .env("RABBITMQ_DIST_PORT", self.nodes[node].cluster_port.to_string());
        command
    }

    fn write_config(&self, node: usize, settings: &BrokerSettings) {
        fs::create_dir_all(self.path(node, "data")).unwrap();
        fs::create_dir_all(self.path(node, "log")).unwrap();
        fs::write(self.path(node, "plugins"), "[].\n").unwrap();
        fs::write(self.path(node, "env"), "").unwrap();
        let mut config = format!(
            "listeners.tcp.1 = 127.0.0.1:{}\ndisk_free_limit.absolute = 1MB\n",
            self.nodes[node].port
        );
        if settings.nodes > 1 {
            config += "cluster_formation.peer_discovery_backend = classic_config\n";
            for (number, peer) in self.nodes.iter().enumerate() {
                let line = format!(
                    "cluster_formation.classic_config.nodes.{} = {}\n",
                    number + 1,
                    peer.name
                );
                config += &line;
            }
        }
        if let Some(tls) = &settings.tls {
            config += &format!(
                "listeners.ssl.1 = 127.0.0.1:{}\n\
                 ssl_options.cacertfile = {}\nssl_options.certfile = {}\nssl_options.keyfile = {}\n\
                 ssl_options.verify = {}\nssl_options.fail_if_no_peer_cert = {}\n",
                self.nodes[node].tls_port,
                tls.ca.display(),
                tls.certificate.display(),
                tls.key.display(),
                if tls.verify_client { "verify_peer" } else { "verify_none" },
                tls.verify_client,
            );
        }
        fs::write(self.path(node, "rabbitmq.conf"), config).unwrap();
    }

    fn path(&self, node: usize, name: &str) -> PathBuf {
        self.folder.path().join(format!("node{node}-{name}"))
    }

    fn log(&self, node: usize) -> String {
        let text = fs::read_to_string(self.path(node, "output")).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        for node in 0..self.nodes.len() {
            self.kill(node);
        }
        // Fails only if it is gone already.
        let _ = self.epmd.kill();
        let _ = self.epmd.wait();
    }
}

/// Whether something on the port answers AMQP's greeting.
fn greets(port: u16) -> bool {
    let greeting = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"AMQP\x00\x00\x09\x01")?;
        let mut frame = [0; 7];
        stream.read_exact(&mut frame)?;
        std::io::Result::Ok(frame[0] == 1)
    };
    greeting().unwrap_or(false)
}

/// A port nobody listens on, and its neighbour 10,000 further on.
///
/// Below the range of ephemeral ports: there, a client that tries to reach a stopped broker
/// could be given the broker's port for its own end and find itself.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(std::process::id() % 1000).unwrap() * 10;
    loop {
        let port = 10_240 + (start + NEXT.fetch_add(1, Ordering::Relaxed)) % 10_000;
        let free = |port| TcpListener::bind(("127.0.0.1", port)).is_ok();
        if free(port) && free(port + 10_000) {
            return port;
        }
    }
}

fn wait_for(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < end, "gave up waiting for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
