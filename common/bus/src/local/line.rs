//! Lines from a socket, bounded in length and in patience.

use std::io;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// Why there is no next line.
#[derive(Debug, thiserror::Error)]
pub(super) enum LineError {
    #[error("a line is longer than the {0} bytes accepted")]
    TooLong(usize),
    #[error("a line was begun and not continued for {0:?}")]
    Stalled(Duration),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads lines; safe to cancel, what was read stays.
pub(super) struct Lines<R> {
    from: R,
    buffer: BytesMut,
    /// How much of the buffer is known to hold no line end.
    scanned: usize,
    limit: usize,
    patience: Duration,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(super) fn new(from: R, limit: usize, patience: Duration) -> Self {
        Self { from, buffer: BytesMut::new(), scanned: 0, limit, patience }
    }

    /// The next line without its end; `None` when the peer has closed. A last line without an
    /// end is dropped: its sender did not finish it.
    pub(super) async fn next(&mut self) -> Result<Option<BytesMut>, LineError> {
        loop {
            if let Some(at) = self.buffer[self.scanned..].iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(self.scanned + at);
                self.buffer.advance(1);
                self.scanned = 0;
                if line.len() > self.limit {
                    return Err(LineError::TooLong(self.limit));
                }
                return Ok(Some(line));
            }
            self.scanned = self.buffer.len();
            if self.scanned > self.limit {
                return Err(LineError::TooLong(self.limit));
            }
            self.buffer.reserve(8 * 1024);
            let reading = self.from.read_buf(&mut self.buffer);
            let count = if self.scanned == 0 {
                reading.await?
            } else {
                let stalled = |_| LineError::Stalled(self.patience);
                timeout(self.patience, reading).await.map_err(stalled)??
            };
            if count == 0 {
                return Ok(None);
            }
        }
    }
}

/// Writes a whole line. Every part of it must be taken within `patience`.
pub(super) async fn write_line<W: AsyncWrite + Unpin>(
    to: &mut W,
    line: &[u8],
    patience: Duration,
) -> io::Result<()> {
    let mut rest = line;
    while !rest.is_empty() {
        let slow = |_| io::Error::from(io::ErrorKind::TimedOut);
        let count = timeout(patience, to.write(rest)).await.map_err(slow)??;
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        rest = &rest[count..];
    }
    Ok(())
}
