//! Talking to the service manager: ready, status, reloading, stopping, watchdog.
//!
//! The protocol is one datagram of `NAME=value` lines to the socket in `NOTIFY_SOCKET`. Without
//! that variable everything here does nothing, so agents need not know who started them. The
//! socket is taken as a value, not read from the environment on each use, and sends never block:
//! a manager that does not read must not hold up the agent.
//!
//! The watchdog is fed at half its interval, and only while [`Health::is_alive`]: an agent whose
//! loop is stuck gets killed and restarted, and takes up its work from the ledger.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::health::Health;

/// Sends notices to the service manager. Clones share one socket.
#[derive(Clone, Debug, Default)]
pub struct Notifier {
    target: Option<Arc<Target>>,
    watchdog: Option<Duration>,
}

#[derive(Debug)]
struct Target {
    socket: UnixDatagram,
    address: SocketAddr,
}

impl Notifier {
    /// Takes `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` from the environment. Without a
    /// usable socket the notifier does nothing; a socket that cannot be used is logged.
    #[must_use]
    pub fn from_environment() -> Self {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Self::default() };
        let watchdog = watchdog_interval(
            std::env::var("WATCHDOG_USEC").ok().as_deref(),
            std::env::var("WATCHDOG_PID").ok().as_deref(),
            std::process::id(),
        );
        match Self::to_socket(path.as_bytes(), watchdog) {
            Ok(notifier) => notifier,
            Err(error) => {
                tracing::warn!(%error, ?path, "cannot use NOTIFY_SOCKET; the service manager will not hear from this agent");
                Self::default()
            }
        }
    }

    /// A notifier to the socket at `path` (`@name` in the abstract namespace), with the watchdog's
    /// interval if one is wanted.
    ///
    /// # Errors
    ///
    /// Fails if `path` is no address of a Unix socket or no socket can be made.
    pub fn to_socket(path: &[u8], watchdog: Option<Duration>) -> io::Result<Self> {
        let address = match path {
            [b'/', ..] => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path))?,
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => return Err(io::Error::from(io::ErrorKind::Unsupported)),
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self { target: Some(Arc::new(Target { socket, address })), watchdog })
    }

    /// Whether a service manager listens.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.target.is_some()
    }

    /// The agent has started and serves.
    pub fn ready(&self) {
        self.send("READY=1");
    }

    /// One line about what the agent does now, shown by `systemctl status`.
    pub fn status(&self, text: &str) {
        let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        self.send(&format!("STATUS={line}"));
    }

    /// The agent reads its settings again; call [`Notifier::ready`] when done.
    pub fn reloading(&self) {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
        let microseconds = now.map_or(0, |now| now.tv_sec() * 1_000_000 + now.tv_nsec() / 1000);
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}"));
    }

    /// The agent ends, and needs up to `limit` for that.
    pub fn stopping(&self, limit: Duration) {
        self.send(&format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={}", limit.as_micros()));
    }

    /// Feeds the watchdog until `stop`, as long as the process is alive. Returns at once where no
    /// watchdog is set.
    pub async fn feed_watchdog(&self, health: Health, stop: CancellationToken) {
        let Some(interval) = self.watchdog else { return };
        let mut ticks = tokio::time::interval(interval / 2);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut was_alive = true;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _now = ticks.tick() => {}
            }
            let stuck = health.stuck();
            if stuck.is_empty() {
                self.send("WATCHDOG=1");
            } else if was_alive {
                tracing::error!(?stuck, "stuck; the watchdog is no longer fed");
                let part = &stuck[0];
                self.status(&format!("stuck: {} {}", part.part, part.reason));
            }
            was_alive = stuck.is_empty();
        }
    }

    fn send(&self, notice: &str) {
        let Some(target) = &self.target else { return };
        if let Err(error) = target.socket.send_to_addr(notice.as_bytes(), &target.address) {
            tracing::debug!(%error, notice, "cannot notify the service manager");
        }
    }
}

/// The watchdog's interval, if one is set and meant for this process.
fn watchdog_interval(usec: Option<&str>, pid: Option<&str>, own_pid: u32) -> Option<Duration> {
    if pid.is_some_and(|pid| pid.parse() != Ok(own_pid)) {
        return None;
    }
    usec?.parse().ok().filter(|&usec: &u64| usec > 0).map(Duration::from_micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Manager {
        socket: tokio::net::UnixDatagram,
        path: std::path::PathBuf,
        _folder: tempfile::TempDir,
    }

    impl Manager {
        fn start() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("notify");
            Self { socket: tokio::net::UnixDatagram::bind(&path).unwrap(), path, _folder: folder }
        }

        fn notifier(&self, watchdog: Option<Duration>) -> Notifier {
            Notifier::to_socket(self.path.as_os_str().as_bytes(), watchdog).unwrap()
        }

        async fn next(&self) -> String {
            let mut buffer = vec![0; 4096];
            let received = self.socket.recv(&mut buffer);
            let length = tokio::time::timeout(Duration::from_secs(5), received)
                .await
                .expect("no notice within 5 s")
                .unwrap();
            buffer.truncate(length);
            String::from_utf8(buffer).unwrap()
        }
    }

    #[tokio::test]
    async fn the_manager_hears_each_notice_as_one_datagram() {
        let manager = Manager::start();
        let notifier = manager.notifier(None);
        notifier.ready();
        notifier.status("connected\nREADY=1");
        notifier.reloading();
        notifier.stopping(Duration::from_secs(20));
        assert_eq!(manager.next().await, "READY=1");
        assert_eq!(manager.next().await, "STATUS=connected READY=1");
        assert!(manager.next().await.starts_with("RELOADING=1\nMONOTONIC_USEC="));
        assert_eq!(manager.next().await, "STOPPING=1\nEXTEND_TIMEOUT_USEC=20000000");
    }

    #[tokio::test]
    async fn an_abstract_socket_works_too() {
        let name = format!("stackhand-notify-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        manager.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        Notifier::to_socket(format!("@{name}").as_bytes(), None).unwrap().ready();
        let mut buffer = [0; 64];
        let length = manager.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"READY=1");
    }

    #[tokio::test]
    async fn the_watchdog_is_fed_only_while_the_process_is_alive() {
        let manager = Manager::start();
        let notifier = manager.notifier(Some(Duration::from_millis(20)));
        let health = Health::new();
        let stop = CancellationToken::new();
        let fed = tokio::spawn({
            let (health, stop) = (health.clone(), stop.clone());
            async move { notifier.feed_watchdog(health, stop).await }
        });
        assert_eq!(manager.next().await, "WATCHDOG=1");
        assert_eq!(manager.next().await, "WATCHDOG=1");
        let pulse = health.pulse("reconcile", Duration::ZERO);
        let mut told = manager.next().await;
        for _fed_before_the_limit in 0..100 {
            if told != "WATCHDOG=1" {
                break;
            }
            told = manager.next().await;
        }
        assert!(told.starts_with("STATUS=stuck: reconcile has not moved"), "{told}");
        let silence = tokio::time::timeout(Duration::from_millis(100), manager.next()).await;
        assert!(silence.is_err(), "fed while stuck: {silence:?}");
        drop(pulse);
        assert_eq!(manager.next().await, "WATCHDOG=1");
        stop.cancel();
        fed.await.unwrap();
    }

    #[tokio::test]
    async fn nothing_happens_without_a_manager() {
        let notifier = Notifier::default();
        notifier.ready();
        notifier.feed_watchdog(Health::new(), CancellationToken::new()).await;
        assert!(!notifier.is_active());
        // A manager that went away, or an address that is none.
        Notifier::to_socket(b"/nonexistent/notify", None).unwrap().ready();
        assert!(Notifier::to_socket(b"vsock:2:1", None).is_err());
    }

    #[test]
    fn the_watchdog_of_another_process_is_not_ours() {
        let ten = Some(Duration::from_secs(10));
        assert_eq!(watchdog_interval(Some("10000000"), None, 7), ten);
        assert_eq!(watchdog_interval(Some("10000000"), Some("7"), 7), ten);
        assert_eq!(watchdog_interval(Some("10000000"), Some("8"), 7), None);
        assert_eq!(watchdog_interval(Some("0"), None, 7), None);
        assert_eq!(watchdog_interval(Some("soon"), None, 7), None);
    }
}
