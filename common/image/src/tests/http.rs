//! Against web servers that are good, that break off, and that mean ill.

use std::sync::Mutex;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// Answers each request with the next of the answers, given what was asked for.
struct Server {
    url: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    async fn start(answers: Vec<Vec<u8>>) -> Self {
        let _first = rustls::crypto::ring::default_provider().install_default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/image", listener.local_addr().unwrap());
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let noted = Arc::clone(&asked);
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(stream.read_u8().await.unwrap());
                }
                noted.lock().unwrap().push(String::from_utf8(request).unwrap().to_lowercase());
                let _sent = stream.write_all(&answer).await;
            }
        });
        Self { url, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn answer(head: &str, body: &[u8]) -> Vec<u8> {
    [head.replace('\n', "\r\n").as_bytes(), b"\r\n\r\n", body].concat()
}

fn from(url: &str) -> ImageSpec {
    ImageSpec {
        source: url.into(),
        checksum: Some(format!("sha256:{ABC}")),
        ..spec(Path::new("/"), None)
    }
}

#[tokio::test]
async fn a_download_that_breaks_off_goes_on_where_it_was() {
    let (_root, cache) = cache();
    let server = Server::start(vec![
        answer("HTTP/1.1 200 OK\nETag: \"v1\"\nContent-Length: 3", b"a"),
        answer("HTTP/1.1 503 Busy\nContent-Length: 0\nConnection: close", b""),
        answer("HTTP/1.1 206 Partial\nContent-Range: bytes 1-2/3\nContent-Length: 2", b"bc"),
    ])
    .await;
    let progress = Arc::new(Progress::default());
    let image = cache.fetch(ID, &from(&server.url), &progress).await.unwrap();
    assert_eq!((image.contents.as_str(), progress.percent()), (ABC, 100));
    let asked = server.asked();
    assert!(!asked[0].contains("range:") && asked[2].contains("range: bytes=1-"), "{asked:?}");
    assert!(asked[2].contains("if-range: \"v1\""), "{asked:?}");
    assert!(cache.look().unwrap().partials.is_empty());
}

#[tokio::test]
async fn a_download_is_taken_up_by_the_next_agent_and_begins_anew_if_the_image_changed() {
    let (_root, cache) = cache();
    let broken = answer("HTTP/1.1 200 OK\nETag: \"v1\"\nContent-Length: 3", b"a");
    let not_found = answer("HTTP/1.1 404 Gone\nContent-Length: 0\nConnection: close", b"");
    let whole = answer("HTTP/1.1 200 OK\nETag: \"v2\"\nContent-Length: 3", b"abc");
    let server = Server::start(vec![broken, not_found, whole]).await;
    let error = cache.fetch(ID, &from(&server.url), &Arc::default()).await.unwrap_err();
    assert!(error.to_string().ends_with("the server answers 404 Not Found"), "{error}");
    assert_eq!(cache.look().unwrap().partials.len(), 1, "what came is kept");
    let image = cache.fetch(ID, &from(&server.url), &Arc::default()).await.unwrap();
    assert_eq!(image.contents, ABC);
    assert!(server.asked()[2].contains("range: bytes=1-"));
    assert!(cache.look().unwrap().partials.is_empty());
}

#[tokio::test]
async fn a_hostile_server_is_bounded() {
    let (_root, cache) = cache();
    let large = format!("HTTP/1.1 200 OK\nContent-Length: {}", 1_u64 << 50);
    // It says nothing of its length and goes on beyond the limit.
    let endless = answer("HTTP/1.1 200 OK\nConnection: close", &vec![7; 3 << 20]);
    for answers in [vec![answer(&large, b"abc")], vec![endless]] {
        let server = Server::start(answers).await;
        let error = cache.fetch(ID, &from(&server.url), &Arc::default()).await.unwrap_err();
        assert!(matches!(error, FetchError::TooLarge { .. }), "{error}");
        assert!(cache.look().unwrap().partials.is_empty());
    }
    // Another part than asked for, another image than asked for, and no HTTP at all.
    let other = answer("HTTP/1.1 200 OK\nContent-Length: 3", b"abd");
    let server = Server::start(vec![other]).await;
    let error = cache.fetch(ID, &from(&server.url), &Arc::default()).await.unwrap_err();
    assert!(matches!(error, FetchError::Checksum { .. }), "{error}");
    let server = Server::start(vec![answer(
        "HTTP/1.1 206 Partial\nContent-Range: bytes 5-7/8\nContent-Length: 3",
        b"abc",
    )])
    .await;
    let error = cache.fetch(ID, &from(&server.url), &Arc::default()).await.unwrap_err();
    assert!(error.to_string().ends_with("it sends another part"), "{error}");
    let server = Server::start(vec![b"SSH-2.0-x\r\n\r\n".to_vec(); 9]).await;
    let error = cache.fetch(ID, &from(&server.url), &Arc::default()).await.unwrap_err();
    assert!(matches!(error, FetchError::Http { .. }), "{error}");
}
