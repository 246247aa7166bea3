//! Opens one connection to one broker, within a time limit and without leaving anything behind.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lapin::tcp::RustlsConnector;
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo};
use lapin::{AsyncTcpStream, Connection, ConnectionProperties, ErrorKind};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::ClientConfig;

use crate::amqp::AmqpOptions;
use crate::amqp::options::seconds;
use crate::amqp::url::Broker;

/// Frames of this size keep lapin's two buffers (32 frames each) at 1 MiB.
const FRAME_BYTES: u32 = 32 * 1024;

/// Why a broker did not let us in.
#[derive(Clone, Debug)]
pub(super) struct DialError {
    /// What happened, with the remedy where one is known.
    pub(super) reason: String,
    /// Whether the broker answered and will answer the same again.
    pub(super) refused: bool,
}

/// A handle on the socket below a connection, to cut it where AMQP's own close hangs.
#[derive(Clone, Debug, Default)]
pub(super) struct Socket(Arc<Mutex<Option<std::net::TcpStream>>>);

impl Socket {
    fn keep(&self, stream: std::net::TcpStream) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
    }

    /// Ends the connection whatever state it is in. lapin's thread sees the end of the stream.
    pub(super) fn cut(&self) {
        if let Some(stream) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // Fails only if the peer was first.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Connects, authenticates and opens the virtual host.
pub(super) async fn dial(
    broker: &Broker,
    vhost: &str,
    options: &AmqpOptions,
    tls: Option<Arc<ClientConfig>>,
) -> Result<(Connection, Socket), DialError> {
    let limit = seconds(options.connect_timeout_seconds);
    let uri = AMQPUri {
        scheme: AMQPScheme::AMQP,
        authority: AMQPAuthority {
            userinfo: AMQPUserInfo {
                username: broker.user.clone(),
                password: broker.password.clone(),
            },
            host: broker.host.clone(),
            port: broker.port,
        },
        vhost: vhost.to_owned(),
        query: AMQPQueryString {
            frame_max: Some(FRAME_BYTES),
            heartbeat: Some(options.heartbeat_seconds),
            ..AMQPQueryString::default()
        },
    };
    let name = options.connection_name.clone().unwrap_or_else(default_name);
    let properties = ConnectionProperties::default()
        .with_client_property("product".into(), "stackhand".into())
        .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into())
        .with_connection_name(name.into());
    let runtime = lapin::runtime::default_runtime()
        .map_err(|error| DialError { reason: error.to_string(), refused: false })?;
    let socket = Socket::default();
    let kept = socket.clone();
    let dead_after = Duration::from_secs(u64::from(options.heartbeat_seconds.max(10)));
    let connecting = Connection::connector(
        uri,
        runtime,
        async move |uri, runtime| {
            let kept = kept.clone();
            let tls = tls.clone();
            let open = async {
                let host = uri.authority.host.clone();
                let addresses = runtime.to_socket_addrs((host.clone(), uri.authority.port));
                let stream = AsyncTcpStream::connect(&runtime, addresses).await?;
                if let AsyncTcpStream::Plain(plain) = &stream {
                    let tcp = plain.get_ref();
                    tune(tcp, dead_after)?;
                    kept.keep(tcp.as_fd().try_clone_to_owned()?.into());
                }
                match tls {
                    Some(config) => stream.into_rustls(&RustlsConnector::from(config), &host).await,
                    None => Ok(stream),
                }
            };
            match tokio::time::timeout(limit, open).await {
                Ok(opened) => opened.map_err(lapin::Error::from),
                Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
            }
        },
        properties,
    );
    match tokio::time::timeout(limit, connecting).await {
        Ok(Ok(connection)) => Ok((connection, socket)),
        Ok(Err(error)) => {
            socket.cut();
            Err(explain(broker, vhost, &error))
        }
        Err(_) => {
            socket.cut();
            let reason = format!("no AMQP greeting within {} s", limit.as_secs_f64());
            Err(DialError { reason, refused: false })
        }
    }
}

/// Small writes go at once, and a peer that vanished is noticed in about a heartbeat.
fn tune(socket: &tokio::net::TcpStream, dead_after: Duration) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let millis = u32::try_from(dead_after.as_millis()).unwrap_or(u32::MAX);
    setsockopt(socket, sockopt::TcpUserTimeout, &millis)?;
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &(millis / 2000).max(5))?;
    setsockopt(socket, sockopt::TcpKeepInterval, &5)?;
    Ok(())
}

fn default_name() -> String {
    let program = std::env::current_exe().ok();
    let program = program.as_deref().and_then(std::path::Path::file_name);
    let program = program.map_or("stackhand".into(), std::ffi::OsStr::to_string_lossy);
    format!("{program}:{}", std::process::id())
}

fn explain(broker: &Broker, vhost: &str, error: &lapin::Error) -> DialError {
    match error.kind() {
        ErrorKind::ProtocolError(amqp) => {
            let remedy = match amqp.get_id() {
                403 => {
                    format!("; check the password of user {:?} in the transport URL", broker.user)
                }
                530 => format!(
                    "; check that vhost {vhost:?} exists and user {:?} may use it \
                     (rabbitmqctl add_vhost, set_permissions)",
                    broker.user
                ),
                _ => String::new(),
            };
            let refused = matches!(amqp.get_id(), 403 | 530);
            DialError { reason: format!("{}{remedy}", amqp.get_message()), refused }
        }
        ErrorKind::IOError(io) => {
            let text = io.to_string();
            if text.contains("certificate") {
                let reason = format!("{text}; check tls_ca_file and the names in the certificate");
                DialError { reason, refused: true }
            } else {
                DialError { reason: text, refused: false }
            }
        }
        _ => DialError { reason: error.to_string(), refused: false },
    }
}
