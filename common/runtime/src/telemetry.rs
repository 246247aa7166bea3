//! Logs: to the journal when systemd started the agent, else to standard error.
//!
//! Spans carry `request_id`, so that one request can be followed through an agent. Lines to
//! standard error go through a bounded queue and a thread of their own: a terminal or pipe that
//! nobody reads costs lines, which are counted, and never holds up the agent.

use std::fmt;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::Registry;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, reload};

use crate::config::{LogFormat, LogSettings};

/// Lines that wait for standard error at most.
const QUEUE_LINES: usize = 4096;

/// How long the end of the process waits for lines to be written.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Why logging cannot start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The level or filter is none.
    #[error("cannot use {filter:?} as a log filter: {reason}")]
    Filter {
        /// The text.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The journal was asked for and is not there.
    #[error("cannot log to the journal")]
    Journal(#[source] io::Error),
    /// The thread that writes lines cannot start.
    #[error("cannot start the thread that writes the log")]
    Thread(#[source] io::Error),
    /// A process logs to one place.
    #[error("cannot set up logging twice")]
    AlreadySet,
}

/// The running log. Keep it until the end of `main`: its drop writes out what waits.
#[derive(Debug)]
pub struct Telemetry {
    filter: reload::Handle<EnvFilter, Registry>,
    lines: Option<Lines>,
    form: LogFormat,
}

/// Starts logging for the whole process.
///
/// # Errors
///
/// Fails if the filter is wrong, if the journal was asked for by name and is not there, or if
/// logging was started before. With [`LogFormat::Auto`] a journal that is not there means
/// standard error.
pub fn start(settings: &LogSettings) -> Result<Telemetry, TelemetryError> {
    let (filter, handle) = reload::Layer::new(parse_filter(&settings.level)?);
    let mut form = match settings.format {
        LogFormat::Auto if stderr_is_journal() => LogFormat::Journald,
        LogFormat::Auto => LogFormat::Human,
        asked => asked,
    };
    let mut journal = None;
    if form == LogFormat::Journald {
        match tracing_journald::layer() {
            Ok(layer) => journal = Some(layer),
            Err(_gone) if settings.format == LogFormat::Auto => form = LogFormat::Human,
            Err(error) => return Err(TelemetryError::Journal(error)),
        }
    }
    let lines = match form {
        LogFormat::Journald => None,
        _ => Some(Lines::start(io::stderr(), QUEUE_LINES).map_err(TelemetryError::Thread)?),
    };
    let text = lines.clone().map(|lines| stderr_layer(form, lines, io::stderr().is_terminal()));
    Registry::default()
        .with(filter)
        .with(journal)
        .with(text)
        .try_init()
        .map_err(|_| TelemetryError::AlreadySet)?;
    Ok(Telemetry { filter: handle, lines, form })
}

fn stderr_layer<S>(form: LogFormat, lines: Lines, terminal: bool) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    let layer = tracing_subscriber::fmt::layer().with_writer(lines);
    match form {
        LogFormat::Json => {
            layer.json().flatten_event(true).with_current_span(true).with_ansi(false).boxed()
        }
        _ => layer.with_ansi(terminal).boxed(),
    }
}

impl Telemetry {
    /// Replaces the filter, for a reload of the settings.
    ///
    /// # Errors
    ///
    /// Fails if `filter` is none; the old one stays.
    pub fn set_level(&self, filter: &str) -> Result<(), TelemetryError> {
        let wrong = |reason: String| TelemetryError::Filter { filter: filter.to_owned(), reason };
        self.filter.reload(parse_filter(filter)?).map_err(|error| wrong(error.to_string()))
    }

    /// The form in use; never [`LogFormat::Auto`].
    #[must_use]
    pub fn form(&self) -> LogFormat {
        self.form
    }

    /// Lines that were dropped because standard error was not read.
    #[must_use]
    pub fn dropped_lines(&self) -> u64 {
        self.lines.as_ref().map_or(0, |lines| lines.shared.dropped.load(Ordering::Relaxed))
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(lines) = &self.lines {
            lines.flush(FLUSH_LIMIT);
        }
    }
}

/// Whether `filter` is a level or filter.
///
/// # Errors
///
/// Tells what is wrong with it.
pub(crate) fn check_filter(filter: &str) -> Result<(), String> {
    if filter.trim().is_empty() {
        return Err("it is empty".into());
    }
    // A lone word that is no level would be taken for the name of a module, and silence the rest.
    for part in filter.split(',').map(str::trim) {
        let is_level = part.parse::<tracing_subscriber::filter::LevelFilter>().is_ok();
        if !is_level && !part.contains(['=', '[', ':']) {
            return Err(format!("{part:?} is not one of error, warn, info, debug, trace, off"));
        }
    }
    EnvFilter::builder().parse(filter).map(drop).map_err(|error| error.to_string())
}

fn parse_filter(filter: &str) -> Result<EnvFilter, TelemetryError> {
    let wrong = |reason| TelemetryError::Filter { filter: filter.to_owned(), reason };
    check_filter(filter).map_err(wrong)?;
    // The AMQP library logs whole messages, and as errors what the bus copes with and tells in
    // its own words. Whoever wants to hear it names it.
    let quiet = if filter.contains("lapin") { "" } else { ",lapin=off" };
    let filter = format!("{filter}{quiet}");
    EnvFilter::builder().parse(filter).map_err(|error| wrong(error.to_string()))
}

/// Whether systemd connected standard error to the journal.
fn stderr_is_journal() -> bool {
    let Ok(named) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(file) = fs::metadata("/proc/self/fd/2") else { return false };
    is_journal(&named, file.dev(), file.ino())
}

/// `JOURNAL_STREAM` is `device:inode` of the stream.
fn is_journal(named: &str, device: u64, inode: u64) -> bool {
    named.split_once(':').is_some_and(|(d, i)| d.parse() == Ok(device) && i.parse() == Ok(inode))
}

/// Writes lines from a bounded queue, on a thread of its own.
#[derive(Clone)]
struct Lines {
    queue: SyncSender<Vec<u8>>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    dropped: AtomicU64,
    queued: AtomicU64,
    written: Mutex<u64>,
    progress: std::sync::Condvar,
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lines").field("shared", &self.shared).finish_non_exhaustive()
    }
}

impl Lines {
    fn start(out: impl Write + Send + 'static, capacity: usize) -> io::Result<Self> {
        let (queue, lines) = sync_channel(capacity);
        let shared = Arc::new(Shared::default());
        let writer = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || write_lines(out, &lines, &writer))?;
        Ok(Self { queue, shared })
    }

    fn put(&self, line: Vec<u8>) {
        self.shared.queued.fetch_add(1, Ordering::Relaxed);
        if self.queue.try_send(line).is_err() {
            self.shared.queued.fetch_sub(1, Ordering::Relaxed);
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until what was queued before is written, at most for `limit`.
    fn flush(&self, limit: Duration) {
        let goal = self.shared.queued.load(Ordering::Relaxed);
        let deadline = Instant::now() + limit;
        let mut written = self.shared.written.lock().unwrap_or_else(PoisonError::into_inner);
        while *written < goal {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.shared.progress.wait_timeout(written, left);
            written = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn write_lines(mut out: impl Write, lines: &Receiver<Vec<u8>>, shared: &Shared) {
    let mut told = 0;
    loop {
        // Nothing is lost by waking up rarely; the time limit only serves the report below.
        let line = match lines.recv_timeout(Duration::from_secs(60)) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let dropped = shared.dropped.load(Ordering::Relaxed);
        if dropped > told {
            let _ = writeln!(
                out,
                "{} log lines were dropped: standard error was not read",
                dropped - told
            );
            told = dropped;
        }
        if let Some(line) = line {
            // There is no other place to report that standard error is closed.
            let _ = out.write_all(&line);
            *shared.written.lock().unwrap_or_else(PoisonError::into_inner) += 1;
            shared.progress.notify_all();
        }
    }
}

/// One line in the making; goes into the queue when dropped.
#[derive(Debug)]
pub(crate) struct Line {
    bytes: Vec<u8>,
    lines: Lines,
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if !self.bytes.is_empty() {
            self.lines.put(std::mem::take(&mut self.bytes));
        }
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line { bytes: Vec::new(), lines: self.clone() }
    }
}

#[cfg(test)]
mod tests;
