//! A TCP stream between two guests that is watched.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use stackhand_kernel::Netns;

use super::support::Guest;

/// A TCP stream between two guests that carries a byte every few milliseconds, until told to end.
/// Returns the longest time that a byte took to come.
pub(crate) async fn stream(
    from: &Guest,
    to: &Guest,
    address: &str,
    end: Arc<AtomicBool>,
) -> Duration {
    let there = Netns::named(to.name()).unwrap();
    let listener = there.inside("listen", || TcpListener::bind("0.0.0.0:0")).await.unwrap();
    let target = format!("{address}:{}", listener.local_addr().unwrap().port());
    let echo = tokio::task::spawn_blocking(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut byte = [0];
        while stream.read(&mut byte).unwrap() == 1 {
            stream.write_all(&byte).unwrap();
        }
    });
    let here = Netns::named(from.name()).unwrap();
    let mut stream = here.inside("connect", move || TcpStream::connect(target)).await.unwrap();
    let longest = tokio::task::spawn_blocking(move || {
        stream.set_nodelay(true).unwrap();
        let mut longest = Duration::ZERO;
        while !end.load(Ordering::Relaxed) {
            let sent = Instant::now();
            stream.write_all(&[1]).unwrap();
            stream.read_exact(&mut [0]).unwrap();
            longest = longest.max(sent.elapsed());
            std::thread::sleep(Duration::from_millis(3));
        }
        longest
    });
    let longest = longest.await.unwrap();
    echo.await.unwrap();
    longest
}
