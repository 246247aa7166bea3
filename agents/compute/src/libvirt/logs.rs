//! Reading a file that only libvirt may read, of those in a folder of ours.
//!
//! virtlogd turns a console log over when it is long, and the new one belongs to root. libvirt hands it out as
//! a volume of a storage pool, which is there for as long as the reading takes.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use virt::connect::Connect;
use virt::error::Error;
use virt::storage_pool::StoragePool;
use virt::storage_vol::StorageVol;
use virt::stream::Stream;

use crate::store::begin;

/// libvirt lets a folder be in one pool alone, so that readers take turns.
static TURN: Mutex<()> = Mutex::new(());

/// Reads at most `most` bytes of the file `name` in `folder`; gives where they start, too.
pub(super) fn read(
    connect: &Connect,
    folder: &Path,
    name: &str,
    start: Option<u64>,
    most: u64,
) -> Result<(u64, Vec<u8>), Error> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let pool = Pool::open(connect, folder)?;
    let volume = StorageVol::lookup_by_name(&pool.0, name)?;
    let length = volume.get_info()?.capacity;
    let start = begin(length, start, most);
    let most = most.min(length - start);
    let mut bytes = Vec::new();
    // A length of 0 means all of it.
    if most > 0 {
        let stream = Stream::new(connect, 0)?;
        volume.download(&stream, start, most, 0)?;
        let mut buffer = vec![0; 64 << 10];
        loop {
            match stream.recv(&mut buffer)? {
                0 => break,
                read => bytes.extend_from_slice(&buffer[..read]),
            }
        }
        let _ended = stream.finish();
    }
    Ok((start, bytes))
}

/// A pool that nobody else knows, gone when it is dropped. Its files stay.
struct Pool(StoragePool);

impl Pool {
    fn open(connect: &Connect, folder: &Path) -> Result<Self, Error> {
        let path = folder.to_string_lossy();
        let name = format!("stackhand-{}", path.rsplit('/').next().unwrap_or_default());
        if let Ok(left) = StoragePool::lookup_by_name(connect, &name) {
            // Of an agent that was killed while it read.
            drop(Self(left));
        }
        let [name, path] = [&name, &*path].map(|text| quick_xml::escape::escape(text).into_owned());
        let xml = format!(
            "<pool type='dir'><name>{name}</name><target><path>{path}</path></target></pool>"
        );
        StoragePool::create_xml(connect, &xml, 0).map(Self)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Err(error) = self.0.destroy() {
            tracing::debug!(error = error.message(), "a pool to read a log by is left");
        }
    }
}
