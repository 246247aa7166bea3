use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;

struct Running {
    health: Health,
    address: std::net::SocketAddr,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

async fn start() -> Running {
    let listen = "127.0.0.1:0".parse().unwrap();
    let health = Health::new();
    let server =
        HttpServer::bind(&listen, Metrics::new("network", "1"), health.clone()).await.unwrap();
    let Some(Listen::Tcp(address)) = server.address() else { panic!("no address") };
    let stop = CancellationToken::new();
    let task = tokio::spawn(server.serve(stop.clone()));
    Running { health, address, stop, task }
}

/// Sends `request` and returns everything that comes until the server closes.
async fn exchange(mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin, request: &[u8]) -> String {
    stream.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    // A reset after the answer is as good as an end.
    let _ = tokio::time::timeout(Duration::from_secs(10), read).await.expect("no end of answer");
    String::from_utf8(answer).unwrap()
}

async fn ask(running: &Running, path: &str) -> String {
    let stream = TcpStream::connect(running.address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n");
    exchange(stream, request.as_bytes()).await
}

#[tokio::test]
async fn metrics_and_health_are_served() {
    let running = start().await;
    let metrics = ask(&running, "/metrics").await;
    assert!(metrics.starts_with("HTTP/1.1 200"), "{metrics}");
    assert!(metrics.contains("application/openmetrics-text"), "{metrics}");
    assert!(metrics.contains("stackhand_build_info{agent=\"network\""), "{metrics}");
    assert!(ask(&running, "/healthz").await.ends_with(r#"{"status":"alive"}"#));
    assert!(ask(&running, "/readyz").await.ends_with(r#"{"status":"ready"}"#));
    assert!(ask(&running, "/etc/passwd").await.starts_with("HTTP/1.1 404"));
    running.stop.cancel();
    running.task.await.unwrap();
}

#[tokio::test]
async fn an_agent_that_is_not_ready_tells_the_reasons() {
    let running = start().await;
    running.health.not_ready("bus", "connecting to broker1:5672");
    let answer = ask(&running, "/readyz").await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(
        answer.ends_with(
            r#"{"status":"not ready","reasons":[{"part":"bus","reason":"connecting to broker1:5672"}]}"#
        ),
        "{answer}"
    );
    assert!(ask(&running, "/healthz").await.starts_with("HTTP/1.1 200"), "not ready is not dead");
    let _pulse = running.health.pulse("reconcile", Duration::ZERO);
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while !ask(&running, "/healthz").await.starts_with("HTTP/1.1 503") {
        assert!(std::time::Instant::now() < deadline, "a stuck loop was not told");
    }
}

#[tokio::test]
async fn a_head_beyond_the_bounds_is_refused() {
    let running = start().await;
    let mut many = b"GET /healthz HTTP/1.1\r\nHost: here\r\n".to_vec();
    for n in 0..=BOUNDS.headers {
        many.extend_from_slice(format!("X-{n}: 1\r\n").as_bytes());
    }
    many.extend_from_slice(b"\r\n");
    let answer = exchange(TcpStream::connect(running.address).await.unwrap(), &many).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");

    let long = format!("GET /{} HTTP/1.1\r\n", "a".repeat(BOUNDS.head_bytes * 2));
    let stream = TcpStream::connect(running.address).await.unwrap();
    let answer = exchange(stream, long.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    assert!(ask(&running, "/healthz").await.starts_with("HTTP/1.1 200"));
}

/// The clock jumps ahead while everybody waits.
#[tokio::test(start_paused = true)]
async fn a_head_that_never_ends_is_cut_off_in_time() {
    let running = start().await;
    let mut stream = TcpStream::connect(running.address).await.unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\n").await.unwrap();
    let start = tokio::time::Instant::now();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert!(start.elapsed() >= BOUNDS.head_limit);
    assert!(start.elapsed() < BOUNDS.head_limit * 2, "{:?}", start.elapsed());
}

#[tokio::test]
async fn silent_connections_do_not_lock_others_out_for_longer_than_their_limit() {
    let running = start().await;
    let mut silent = Vec::new();
    for _ in 0..MOST_CONNECTIONS {
        silent.push(TcpStream::connect(running.address).await.unwrap());
    }
    // All places are taken; one that ends makes room at once.
    let mut waiting = tokio::spawn({
        let address = running.address;
        async move {
            let stream = TcpStream::connect(address).await.unwrap();
            exchange(stream, b"GET /healthz HTTP/1.0\r\n\r\n").await
        }
    });
    let early = tokio::time::timeout(Duration::from_millis(100), &mut waiting).await;
    assert!(early.is_err(), "served beyond the bound: {early:?}");
    silent.pop();
    let answer = tokio::time::timeout(Duration::from_secs(5), waiting).await;
    assert!(answer.expect("locked out").unwrap().starts_with("HTTP/1.0 200"));
}

#[tokio::test]
async fn a_unix_socket_is_served_guarded_and_taken_over_only_when_dead() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("http.sock");
    let listen = Listen::Unix(path.clone());
    let bind = || HttpServer::bind(&listen, Metrics::new("network", "1"), Health::new());

    // A socket that a killed process left behind.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let server = bind().await.unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let error = bind().await.unwrap_err();
    assert_eq!(error.source.kind(), io::ErrorKind::AddrInUse);
    assert_eq!(error.to_string(), format!("cannot listen on unix:{}", path.display()));

    let stop = CancellationToken::new();
    let task = tokio::spawn(server.serve(stop.clone()));
    let stream = UnixStream::connect(&path).await.unwrap();
    let answer = exchange(stream, b"GET /healthz HTTP/1.0\r\n\r\n").await;
    assert!(answer.ends_with(r#"{"status":"alive"}"#), "{answer}");
    stop.cancel();
    task.await.unwrap();
    assert!(!path.exists(), "the socket's file goes with the server");

    std::fs::write(&path, "precious").unwrap();
    assert!(bind().await.is_err());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}
