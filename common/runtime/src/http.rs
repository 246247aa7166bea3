//! `/metrics`, `/healthz` and `/readyz` on a local address or socket.
//!
//! * `/metrics`: OpenMetrics text.
//! * `/healthz`: 200 while [`Health::is_alive`], else 503 and the parts that are stuck.
//! * `/readyz`: 200 while nothing keeps the agent from its work, else 503 and the reasons.
//!
//! The server is off unless configured. Whoever can reach it can at worst use up its own
//! connections: their number, the size and time of a request's head and the age of a connection
//! are bounded.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use axum::{Router, serve::Listener};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::config::Listen;
use crate::health::{Health, Reason};
use crate::metrics::Metrics;

/// Connections served at once; further ones wait in the kernel's queue.
const MOST_CONNECTIONS: usize = 32;

/// What one connection may use up.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Largest head of a request, in bytes.
    pub head_bytes: usize,
    /// Most headers of a request.
    pub headers: usize,
    /// Time for a request's head to arrive, also of the next one on a kept connection.
    pub head_limit: Duration,
    /// Age at which the connection is closed.
    pub connection_limit: Duration,
}

const BOUNDS: Bounds = Bounds {
    head_bytes: 16 * 1024,
    headers: 64,
    head_limit: Duration::from_secs(10),
    connection_limit: Duration::from_secs(300),
};

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {listen}")]
pub struct ListenError {
    /// The address or socket that was configured.
    pub listen: Listen,
    /// What went wrong.
    pub source: io::Error,
}

/// A server that listens and does not serve yet.
#[derive(Debug)]
pub struct HttpServer {
    listener: Bound,
    state: AppState,
}

#[derive(Debug)]
enum Bound {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// Removes the socket's file when the server ends.
#[derive(Debug)]
struct SocketFile(PathBuf);

#[derive(Clone, Debug)]
struct AppState {
    metrics: Metrics,
    health: Health,
}

#[derive(Debug, Serialize)]
struct Answer {
    status: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    reasons: Vec<Reason>,
}

impl HttpServer {
    /// Starts to listen. The file of a Unix socket is made for owner and group alone; one that
    /// nobody listens on any more is replaced.
    ///
    /// # Errors
    ///
    /// Fails if the address is in use or not allowed, or if something other than a dead socket
    /// stands at the path.
    pub async fn bind(
        listen: &Listen,
        metrics: Metrics,
        health: Health,
    ) -> Result<Self, ListenError> {
        let listener = match listen {
            Listen::Tcp(address) => TcpListener::bind(address).await.map(Bound::Tcp),
            Listen::Unix(path) => bind_unix(path)
                .await
                .map(|listener| Bound::Unix(listener, SocketFile(path.clone()))),
        };
        match listener {
            Ok(listener) => Ok(Self { listener, state: AppState { metrics, health } }),
            Err(source) => Err(ListenError { listen: listen.clone(), source }),
        }
    }

    /// Where the server listens, with the port that the kernel chose if none was asked for.
    #[must_use]
    pub fn address(&self) -> Option<Listen> {
        match &self.listener {
            Bound::Tcp(listener) => listener.local_addr().ok().map(Listen::Tcp),
            Bound::Unix(_, file) => Some(Listen::Unix(file.0.clone())),
        }
    }

    /// Serves until `stop`; open connections are dropped then.
    pub async fn serve(self, stop: CancellationToken) {
        let router = Router::new()
            .route("/metrics", get(serve_metrics))
            .route("/healthz", get(serve_health))
            .route("/readyz", get(serve_readiness))
            .with_state(self.state);
        match self.listener {
            Bound::Tcp(listener) => accept(listener, &router, &stop).await,
            Bound::Unix(listener, _file) => accept(listener, &router, &stop).await,
        }
    }
}

async fn accept<L: Listener>(mut listener: L, router: &Router, stop: &CancellationToken) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let (stream, place) = tokio::select! {
            () = stop.cancelled() => return,
            accepted = async {
                let place = Arc::clone(&places).acquire_owned().await;
                // Retries by itself when the process is out of files.
                (listener.accept().await.0, place)
            } => accepted,
        };
        while connections.try_join_next().is_some() {}
        let router = router.clone();
        connections.spawn(async move {
            let _place = place;
            serve_connection(stream, router, BOUNDS).await;
        });
    }
}

/// Serves one connection until its end. A peer that goes away or sends nonsense is its own problem.
pub async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    bounds: Bounds,
) {
    let mut server = http1::Builder::new();
    server
        .timer(TokioTimer::new())
        .header_read_timeout(bounds.head_limit)
        .max_headers(bounds.headers)
        .max_buf_size(bounds.head_bytes);
    let service = TowerToHyperService::new(router);
    let connection = server.serve_connection(TokioIo::new(stream), service);
    let _ = tokio::time::timeout(bounds.connection_limit, connection).await;
}

async fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "a file that is no socket is there",
            ));
        }
        Ok(_socket) => match UnixStream::connect(path).await {
            Ok(_served) => return Err(io::Error::from(io::ErrorKind::AddrInUse)),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path)?;
            }
            Err(error) => return Err(error),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Left behind, it is replaced at the next start.
        let _ = std::fs::remove_file(&self.0);
    }
}

async fn serve_metrics(State(state): State<AppState>) -> Response {
    match state.metrics.encode() {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(_failed) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn serve_health(State(state): State<AppState>) -> Response {
    answer("alive", "stuck", state.health.stuck())
}

async fn serve_readiness(State(state): State<AppState>) -> Response {
    answer("ready", "not ready", state.health.unready())
}

fn answer(good: &'static str, bad: &'static str, reasons: Vec<Reason>) -> Response {
    let (code, status) = if reasons.is_empty() {
        (StatusCode::OK, good)
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, bad)
    };
    (code, Json(Answer { status, reasons })).into_response()
}

#[cfg(test)]
mod tests;
