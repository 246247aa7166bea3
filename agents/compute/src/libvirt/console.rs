//! A guest's serial console as two channels.
//!
//! The stream has a connection of its own, so that nothing that happens to it can hold up the
//! agent's calls, and a thread that moves bytes both ways without ever waiting in libvirt.

use std::time::Duration;

use stackhand_model::InstanceId;
use tokio::sync::mpsc::{self, error::TryRecvError};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::stream::Stream;
use virt::sys;

use super::calls::{self, Moved};

/// How long the thread rests when nothing moves.
const REST: Duration = Duration::from_millis(10);

/// Bytes that are taken from the guest at once.
const CHUNK: usize = 4096;

/// Connects to the console of a domain.
pub(super) fn open(
    uri: &str,
    id: InstanceId,
    output: mpsc::Sender<Vec<u8>>,
) -> Result<mpsc::Sender<Vec<u8>>, Error> {
    let mut connect = Connect::open(Some(uri))?;
    let stream = match begin(&connect, id) {
        Ok(stream) => stream,
        Err(error) => {
            let _closed = connect.close();
            return Err(error);
        }
    };
    let (sender, input) = mpsc::channel(16);
    let started = std::thread::Builder::new().name("console".into()).spawn(move || {
        pump(&stream, input, &output);
        // It is closed whether or not libvirt says so.
        let _ended = stream.abort();
        let _closed = connect.close();
    });
    if let Err(error) = started {
        tracing::warn!(%error, "no thread for a console");
    }
    Ok(sender)
}

fn begin(connect: &Connect, id: InstanceId) -> Result<Stream, Error> {
    let domain = Domain::lookup_by_uuid(connect, id.0)?;
    let stream = Stream::new(connect, sys::VIR_STREAM_NONBLOCK)?;
    // Who holds the console is decided by the agent; one left over from before gives way.
    domain.open_console(None, &stream, sys::VIR_DOMAIN_CONSOLE_FORCE)?;
    Ok(stream)
}

/// Moves bytes until either end closes.
fn pump(stream: &Stream, mut input: mpsc::Receiver<Vec<u8>>, output: &mpsc::Sender<Vec<u8>>) {
    let mut typed: Vec<u8> = Vec::new();
    let mut buffer = vec![0; CHUNK];
    loop {
        let mut rests = true;
        if typed.is_empty() {
            match input.try_recv() {
                Ok(bytes) => typed = bytes,
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return,
            }
        }
        if !typed.is_empty() {
            match calls::send(stream, &typed) {
                Ok(Moved::Bytes(sent)) => {
                    typed.drain(..sent.min(typed.len()));
                    rests = false;
                }
                Ok(Moved::Later) => {}
                Err(_) => return,
            }
        }
        // What nobody takes stays with the guest until somebody does.
        if output.capacity() > 0 {
            match calls::receive(stream, &mut buffer) {
                Ok(Moved::Bytes(0)) | Err(_) => return,
                Ok(Moved::Bytes(read)) => {
                    if output.blocking_send(buffer[..read].to_vec()).is_err() {
                        return;
                    }
                    rests = false;
                }
                Ok(Moved::Later) => {}
            }
        }
        if rests {
            if output.is_closed() {
                return;
            }
            std::thread::sleep(REST);
        }
    }
}
