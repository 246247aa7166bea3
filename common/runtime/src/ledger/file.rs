//! The ledger's file: opening, checking, migrating, reading it whole, writing a batch.
//!
//! Three files stand in the state folder:
//!
//! * `ledger.redb`, the store. It is made under another name and renamed when complete, so it
//!   is there whole or not at all.
//! * `ledger.lock`, held by the process that has the ledger, with that process's id in it.
//! * `ledger.marker`, which tells that a ledger was made here. A store that is missing beside
//!   its marker was lost: the agent refuses to start, because a new one would be empty and
//!   an empty wish means nothing is wanted.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::fcntl::{Flock, FlockArg};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use stackhand_model::{AgentKind, Document, ObjectRef};

use super::{Accepted, LedgerError};
use crate::agent::Held;
use crate::api::Control;

type Text = &'static str;
type Bytes = &'static [u8];

pub(super) const META: TableDefinition<'_, Text, Bytes> = TableDefinition::new("meta");
pub(super) const DOCUMENTS: TableDefinition<'_, Text, Bytes> = TableDefinition::new("documents");
pub(super) const JOURNAL: TableDefinition<'_, Text, Bytes> = TableDefinition::new("journal");
pub(super) const NONCES: TableDefinition<'_, Text, u64> = TableDefinition::new("nonces");

const STORE: &str = "ledger.redb";
const LOCK: &str = "ledger.lock";
const MARKER: &str = "ledger.marker";

/// Bytes of the store that are kept in memory; everything that is read often is kept decoded.
const CACHE_BYTES: usize = 1 << 20;

/// How long opening waits for the lock before it tells who holds it.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// One step forward in the store's schema.
#[derive(Clone, Copy)]
pub(super) struct Migration {
    /// The schema version it starts from; it leads to the next one.
    pub(super) from: u32,
    /// Changes the tables. Committed together with the new version.
    pub(super) step: fn(&WriteTransaction) -> Result<(), redb::Error>,
}

/// The steps from each older schema to the present one.
pub(super) const MIGRATIONS: &[Migration] = &[];

/// The store of one agent, open and locked.
pub(super) struct Store {
    /// `None` after a failed write: it is opened anew before the next one.
    database: Option<Database>,
    path: PathBuf,
    _lock: Flock<File>,
}

/// Everything in a store.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Contents {
    pub(super) objects: BTreeMap<ObjectRef, Held>,
    pub(super) accepted: BTreeMap<ObjectRef, Accepted>,
    pub(super) journal: BTreeMap<String, Value>,
    pub(super) nonces: BTreeMap<String, u64>,
    pub(super) control: Control,
    pub(super) revision: u64,
    pub(super) agent: String,
    pub(super) host: String,
    pub(super) created: String,
}

/// What one commit writes. `None` takes an entry out.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) documents: Vec<(ObjectRef, Option<(Held, Accepted)>)>,
    pub(super) journal: Vec<(String, Option<Value>)>,
    pub(super) nonces: Vec<(String, Option<u64>)>,
    pub(super) control: Option<Control>,
    pub(super) revision: u64,
}

/// A document as stored.
#[derive(Serialize)]
struct Row<'a> {
    document: &'a Document,
    deleting: bool,
    accepted: Timestamp,
    request_id: &'a str,
}

#[derive(Deserialize)]
struct StoredRow {
    document: Value,
    deleting: bool,
    accepted: Timestamp,
    request_id: String,
}

impl Store {
    /// Opens the store in `dir`, or makes it where there was none.
    pub(super) fn open(
        dir: &Path,
        agent: AgentKind,
        host: &str,
        migrations: &[Migration],
    ) -> Result<(Self, Contents), LedgerError> {
        fs::create_dir_all(dir).map_err(|source| LedgerError::io("make folder", dir, source))?;
        let lock = take_lock(&dir.join(LOCK))?;
        let path = dir.join(STORE);
        let marker = dir.join(MARKER);
        let missing = match fs::metadata(&path) {
            Ok(found) => found.len() == 0,
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(source) => return Err(LedgerError::io("look at", &path, source)),
        };
        if missing {
            if marker.exists() {
                return Err(LedgerError::Lost { path, marker });
            }
            create(dir, &path, agent, host, migrations)?;
        }
        if !marker.exists() {
            write_marker(dir, &marker, agent, host)?;
        }
        let mut store = Self { database: None, path, _lock: lock };
        let contents = store.reopen(migrations)?;
        if contents.agent != agent.as_str() {
            return Err(LedgerError::Foreign {
                path: store.path,
                theirs: contents.agent,
                ours: agent,
            });
        }
        Ok((store, contents))
    }

    /// The store's path, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a write failed since the store was opened, so that what is on disk is in doubt.
    pub(super) fn in_doubt(&self) -> bool {
        self.database.is_none()
    }

    /// Opens the file anew and reads all of it.
    pub(super) fn reopen(&mut self, migrations: &[Migration]) -> Result<Contents, LedgerError> {
        self.database = None;
        let path = self.path.clone();
        let newest = newest_schema(migrations);
        // The store's library panics on some damages.
        let opened = catch_unwind(AssertUnwindSafe(|| -> Result<_, LedgerError> {
            let database = open_database(&path)?;
            let found = schema_of(&database, &path)?;
            if found > newest {
                return Err(LedgerError::Newer { path: path.clone(), found, newest });
            }
            for migration in migrations.iter().filter(|it| it.from >= found) {
                back_up(&path, migration.from)?;
                migrate(&database, migration)
                    .map_err(|error| LedgerError::store("migrate", &path, error))?;
                tracing::info!(path = %path.display(), to = migration.from + 1, "ledger migrated");
            }
            let contents = read_all(&database, &path)?;
            Ok((database, contents))
        }));
        let (database, contents) = match opened {
            Ok(opened) => opened?,
            Err(_panic) => return Err(LedgerError::damaged(&self.path, "its structure is broken")),
        };
        self.database = Some(database);
        Ok(contents)
    }

    /// Writes a batch; when this returns `Ok` it is on disk. After an error the store is
    /// [in doubt](Self::in_doubt) and must be reopened.
    pub(super) fn commit(&mut self, batch: &Batch) -> Result<(), LedgerError> {
        let Some(database) = &self.database else {
            return Err(LedgerError::damaged(&self.path, "it is closed"));
        };
        let written = catch_unwind(AssertUnwindSafe(|| write(database, batch)));
        let error = match written {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => LedgerError::store("write", &self.path, error),
            Err(_panic) => LedgerError::damaged(&self.path, "its structure is broken"),
        };
        self.database = None;
        Err(error)
    }
}

fn newest_schema(migrations: &[Migration]) -> u32 {
    migrations.last().map_or(1, |last| last.from + 1)
}

fn take_lock(path: &Path) -> Result<Flock<File>, LedgerError> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|source| LedgerError::io("open", path, source))?;
    let mut lock = match lock_soon(file) {
        Ok(lock) => lock,
        Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
            let mut holder = String::new();
            // Without the name of the holder the error is as true.
            let _ = file.read_to_string(&mut holder);
            let holder = holder.trim().chars().take(80).collect();
            return Err(LedgerError::Held { path: path.to_owned(), holder });
        }
        Err((_, errno)) => return Err(LedgerError::io("lock", path, errno.into())),
    };
    let holder = format!("process {}\n", std::process::id());
    let told = lock
        .set_len(0)
        .and_then(|()| lock.rewind())
        .and_then(|()| lock.write_all(holder.as_bytes()));
    if let Err(error) = told {
        // On a full disk the ledger still opens.
        tracing::debug!(%error, path = %path.display(), "cannot write who holds the lock");
    }
    Ok(lock)
}

/// Takes the lock, waiting a moment for a holder who is going: a child that a killed agent had just
/// forked holds it until it becomes another program.
fn lock_soon(mut file: File) -> Result<Flock<File>, (File, nix::errno::Errno)> {
    let end = Instant::now() + LOCK_PATIENCE;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Err((held, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() < end => {
                file = held;
                std::thread::sleep(LOCK_PATIENCE / 50);
            }
            result => return result,
        }
    }
}

/// Makes a complete store beside its place, then moves it there.
fn create(
    dir: &Path,
    path: &Path,
    agent: AgentKind,
    host: &str,
    migrations: &[Migration],
) -> Result<(), LedgerError> {
    let unfinished = dir.join("ledger.redb.new");
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(LedgerError::io("remove", &unfinished, error));
        }
        _ => {}
    }
    let make = || -> Result<(), redb::Error> {
        let database = builder().create(&unfinished)?;
        let transaction = begin(&database)?;
        transaction.open_table(DOCUMENTS)?;
        transaction.open_table(JOURNAL)?;
        transaction.open_table(NONCES)?;
        let mut meta = transaction.open_table(META)?;
        let schema = newest_schema(migrations).to_string();
        let created = Timestamp::now().to_string();
        for (key, value) in [
            ("schema", schema.as_str()),
            ("agent", agent.as_str()),
            ("host", host),
            ("created", created.as_str()),
        ] {
            meta.insert(key, value.as_bytes())?;
        }
        drop(meta);
        transaction.commit()?;
        Ok(())
    };
    make().map_err(|error| LedgerError::store("make", &unfinished, error))?;
    fs::rename(&unfinished, path)
        .and_then(|()| File::open(dir)?.sync_all())
        .map_err(|source| LedgerError::io("make", path, source))
}

fn write_marker(
    dir: &Path,
    marker: &Path,
    agent: AgentKind,
    host: &str,
) -> Result<(), LedgerError> {
    let text = format!(
        "A ledger of the {agent} agent of {host} was made here on {}.\n\
         While this file is here the agent does not start without its ledger.\n",
        Timestamp::now()
    );
    let write = || -> io::Result<()> {
        let mut file = File::create(marker)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        File::open(dir)?.sync_all()
    };
    write().map_err(|source| LedgerError::io("write", marker, source))
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

fn open_database(path: &Path) -> Result<Database, LedgerError> {
    builder().open(path).map_err(|error| LedgerError::store("open", path, error.into()))
}

fn begin(database: &Database) -> Result<WriteTransaction, redb::Error> {
    let mut transaction = database.begin_write()?;
    // Keeps reopening after a crash flat: no walk over the whole file.
    transaction.set_quick_repair(true);
    Ok(transaction)
}

/// Keeps a copy of the store as it was before a migration.
fn back_up(path: &Path, schema: u32) -> Result<(), LedgerError> {
    let copy = path.with_extension(format!("redb.v{schema}"));
    fs::copy(path, &copy)
        .and_then(|_bytes| File::open(&copy)?.sync_all())
        .map_err(|source| LedgerError::io("back up to", &copy, source))
}

fn migrate(database: &Database, migration: &Migration) -> Result<(), redb::Error> {
    let transaction = begin(database)?;
    (migration.step)(&transaction)?;
    let next = (migration.from + 1).to_string();
    transaction.open_table(META)?.insert("schema", next.as_bytes())?;
    transaction.commit()?;
    Ok(())
}

fn schema_of(database: &Database, path: &Path) -> Result<u32, LedgerError> {
    let text = (|| -> Result<_, redb::Error> {
        let meta = database.begin_read()?.open_table(META)?;
        Ok(meta.get("schema")?.map(|value| String::from_utf8_lossy(value.value()).into_owned()))
    })()
    .map_err(|error| LedgerError::store("read", path, error))?;
    text.as_deref()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| LedgerError::damaged(path, "it has no schema version"))
}

fn read_all(database: &Database, path: &Path) -> Result<Contents, LedgerError> {
    let mut contents = Contents::default();
    let mut wrong = None;
    read_tables(database, &mut contents, &mut wrong)
        .map_err(|error| LedgerError::store("read", path, error))?;
    wrong.map_or(Ok(contents), |what| Err(LedgerError::damaged(path, &what)))
}

/// Reads every table. An entry that does not read as it should goes to `wrong` and ends it.
fn read_tables(
    database: &Database,
    contents: &mut Contents,
    wrong: &mut Option<String>,
) -> Result<(), redb::Error> {
    let transaction = database.begin_read()?;
    for entry in transaction.open_table(META)?.iter()? {
        let (key, value) = entry?;
        let text = String::from_utf8_lossy(value.value()).into_owned();
        match key.value() {
            "agent" => contents.agent = text,
            "host" => contents.host = text,
            "created" => contents.created = text,
            "revision" => match text.parse() {
                Ok(revision) => contents.revision = revision,
                Err(error) => *wrong = Some(format!("its revision cannot be read: {error}")),
            },
            "control" => match serde_json::from_str(&text) {
                Ok(control) => contents.control = control,
                Err(error) => *wrong = Some(format!("its control entry cannot be read: {error}")),
            },
            _ => {}
        }
    }
    let mut last_request: Arc<str> = Arc::from("");
    for entry in transaction.open_table(DOCUMENTS)?.iter()? {
        let (key, value) = entry?;
        match read_row(key.value(), value.value(), &mut last_request) {
            Ok((object, held, accepted)) => {
                contents.objects.insert(object, held);
                contents.accepted.insert(object, accepted);
            }
            Err(why) => {
                *wrong = Some(format!("its document {} cannot be read: {why}", key.value()));
                return Ok(());
            }
        }
    }
    for entry in transaction.open_table(JOURNAL)?.iter()? {
        let (key, value) = entry?;
        match serde_json::from_slice(value.value()) {
            Ok(value) => {
                contents.journal.insert(key.value().to_owned(), value);
            }
            Err(why) => {
                *wrong = Some(format!("its journal entry {} cannot be read: {why}", key.value()));
                return Ok(());
            }
        }
    }
    for entry in transaction.open_table(NONCES)?.iter()? {
        let (key, value) = entry?;
        contents.nonces.insert(key.value().to_owned(), value.value());
    }
    Ok(())
}

fn read_row(
    key: &str,
    value: &[u8],
    last_request: &mut Arc<str>,
) -> Result<(ObjectRef, Held, Accepted), String> {
    let row: StoredRow = serde_json::from_slice(value).map_err(|error| error.to_string())?;
    let document = Document::from_value(&row.document).map_err(|error| error.to_string())?;
    let object = document.object();
    if object.to_string() != key {
        return Err(format!("it holds {object}"));
    }
    // Documents of one request share its id.
    if **last_request != row.request_id {
        *last_request = Arc::from(row.request_id);
    }
    let accepted = Accepted { at: row.accepted, request_id: Arc::clone(last_request) };
    Ok((object, Held { document: Arc::new(document), deleting: row.deleting }, accepted))
}

fn write(database: &Database, batch: &Batch) -> Result<(), redb::Error> {
    let transaction = begin(database)?;
    if !batch.documents.is_empty() {
        let mut table = transaction.open_table(DOCUMENTS)?;
        for (object, entry) in &batch.documents {
            let key = object.to_string();
            match entry {
                Some((held, accepted)) => {
                    let row = Row {
                        document: &held.document,
                        deleting: held.deleting,
                        accepted: accepted.at,
                        request_id: &accepted.request_id,
                    };
                    table.insert(key.as_str(), encode(&row)?.as_slice())?;
                }
                None => {
                    table.remove(key.as_str())?;
                }
            }
        }
    }
    if !batch.journal.is_empty() {
        let mut table = transaction.open_table(JOURNAL)?;
        for (key, entry) in &batch.journal {
            match entry {
                Some(value) => table.insert(key.as_str(), encode(value)?.as_slice())?,
                None => table.remove(key.as_str())?,
            };
        }
    }
    if !batch.nonces.is_empty() {
        let mut table = transaction.open_table(NONCES)?;
        for (nonce, expiry) in &batch.nonces {
            match expiry {
                Some(expiry) => table.insert(nonce.as_str(), expiry)?,
                None => table.remove(nonce.as_str())?,
            };
        }
    }
    {
        let mut meta = transaction.open_table(META)?;
        if let Some(control) = &batch.control {
            meta.insert("control", encode(control)?.as_slice())?;
        }
        meta.insert("revision", batch.revision.to_string().as_bytes())?;
    }
    transaction.commit()?;
    Ok(())
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>, redb::Error> {
    serde_json::to_vec(value).map_err(|error| redb::Error::Io(io::Error::other(error)))
}
