//! Images from web servers, which may break off, lie, or never end.
//!
//! A download that breaks off goes on where it was, if the server says by which mark (an ETag or a
//! date) the rest belongs to the same bytes. Such a mark is kept beside the unfinished file, so
//! that this holds across a restart of the agent as well.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use reqwest::header::{ACCEPT_ENCODING, CONTENT_RANGE, ETAG, IF_RANGE, LAST_MODIFIED, RANGE};
use reqwest::redirect::Policy;
use reqwest::{Client, Response, StatusCode};
use serde::{Deserialize, Serialize};
use stackhand_model::ImageSpec;

use crate::fetch::{FetchError, Intake, Progress, Taken};
use crate::files::{blocking, failed, read_json, remove, write_json};

/// How long a connection may take, and how long a server may be silent.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(30));

/// How long a download may take in all.
const LIMIT: Duration = Duration::from_secs(6 * 3600);

/// Attempts in a row that bring nothing.
const ATTEMPTS: u32 = 4;

/// Most redirections.
const REDIRECTIONS: usize = 5;

/// Bytes that are written at once.
const BLOCK: usize = 1 << 20;

/// By what the rest of a download is known to belong to its beginning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Validator {
    source: String,
    mark: String,
}

/// Why an attempt ended.
enum Broke {
    /// Another attempt may bring more.
    Off(String),
    /// No other attempt would.
    Fails(FetchError),
}

impl From<FetchError> for Broke {
    fn from(error: FetchError) -> Self {
        Self::Fails(error)
    }
}

/// Where the mark of an unfinished download is kept.
pub(crate) fn validator_path(partial: &Path) -> PathBuf {
    partial.with_extension("validator")
}

/// Downloads an image to `partial`, going on with what is there of it.
pub(crate) async fn download(
    partial: &Path,
    spec: &ImageSpec,
    most: u64,
    progress: &Progress,
) -> Result<Taken, FetchError> {
    let begin = Instant::now();
    let broken = |reason: String| FetchError::Http { source_name: spec.source.clone(), reason };
    let client = client().map_err(|error| broken(stackhand_runtime::chain(&error)))?;
    let mut download =
        Download { client, spec, partial, most, progress, validator: None, intake: None };
    download.take_up().await?;
    let mut vain = 0;
    loop {
        let before = download.bytes();
        match download.attempt(begin).await {
            Ok(()) => {
                let note = validator_path(partial);
                blocking(move || remove(&note)).await?;
                let Some(intake) = download.intake else {
                    return Err(broken("the server sent nothing".into()));
                };
                return on_thread(move || intake.finish()).await;
            }
            Err(Broke::Fails(error)) => return Err(error),
            Err(Broke::Off(reason)) => {
                vain = if download.bytes() > before { 0 } else { vain + 1 };
                if vain >= ATTEMPTS || begin.elapsed() >= LIMIT {
                    return Err(broken(reason));
                }
                tracing::info!(source = spec.source, reason, "going on with a download");
                tokio::time::sleep(Duration::from_millis(200 << vain)).await;
            }
        }
    }
}

fn client() -> Result<Client, reqwest::Error> {
    let policy = Policy::custom(|attempt| {
        let downgrades = attempt.previous().iter().any(|url| url.scheme() == "https")
            && attempt.url().scheme() != "https";
        if attempt.previous().len() > REDIRECTIONS {
            attempt.error("it redirects too often")
        } else if downgrades {
            attempt.error("it redirects from https to http")
        } else {
            attempt.follow()
        }
    });
    Client::builder().connect_timeout(PATIENCE.0).read_timeout(PATIENCE.1).redirect(policy).build()
}

struct Download<'a> {
    client: Client,
    spec: &'a ImageSpec,
    partial: &'a Path,
    most: u64,
    progress: &'a Progress,
    validator: Option<Validator>,
    /// What was taken so far; absent before the first byte.
    intake: Option<Intake>,
}

impl Download<'_> {
    fn bytes(&self) -> u64 {
        self.intake.as_ref().map_or(0, Intake::bytes)
    }

    /// Takes up what an agent before us has left.
    async fn take_up(&mut self) -> Result<(), FetchError> {
        let note = validator_path(self.partial);
        let found = blocking(move || read_json::<Validator>(&note)).await.unwrap_or_default();
        let Some(found) = found.filter(|found| found.source == self.spec.source) else {
            return Ok(());
        };
        let (partial, spec, most) = (self.partial.to_owned(), self.spec.clone(), self.most);
        self.intake = on_thread(move || Intake::take_up(&partial, &spec, most)).await?;
        self.validator = self.intake.is_some().then_some(found);
        Ok(())
    }

    /// One request, from where the last one ended.
    async fn attempt(&mut self, begin: Instant) -> Result<(), Broke> {
        let off =
            |error: reqwest::Error| Broke::Off(stackhand_runtime::chain(&error.without_url()));
        let fails = |reason: String| {
            Broke::Fails(FetchError::Http { source_name: self.spec.source.clone(), reason })
        };
        let mut request = self.client.get(&self.spec.source).header(ACCEPT_ENCODING, "identity");
        if let Some(Validator { mark, .. }) = &self.validator
            && self.bytes() > 0
        {
            let range = format!("bytes={}-", self.bytes());
            request = request.header(RANGE, range).header(IF_RANGE, mark);
        }
        let mut response = request.send().await.map_err(off)?;
        let goes_on = match response.status() {
            StatusCode::OK => false,
            StatusCode::PARTIAL_CONTENT if starts_at(&response) == Some(self.bytes()) => true,
            StatusCode::PARTIAL_CONTENT => return Err(fails("it sends another part".into())),
            // There is no more than we have.
            StatusCode::RANGE_NOT_SATISFIABLE if self.bytes() > 0 => return Ok(()),
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                return Err(Broke::Off(format!("the server answers {status}")));
            }
            status => return Err(fails(format!("the server answers {status}"))),
        };
        if !goes_on {
            self.begin(&response).await?;
        }
        let expected = response.content_length().map(|rest| self.bytes().saturating_add(rest));
        if expected.is_some_and(|total| total > self.most) {
            let (source_name, most) = (self.spec.source.clone(), self.most);
            return Err(FetchError::TooLarge { source_name, most }.into());
        }
        self.progress.total.store(expected.unwrap_or(0), Ordering::Relaxed);
        let mut block = Vec::with_capacity(BLOCK);
        loop {
            if self.progress.is_cancelled() {
                let source_name = self.spec.source.clone();
                return Err(FetchError::Cancelled { source_name }.into());
            }
            let chunk = response.chunk().await;
            if let Ok(Some(chunk)) = &chunk {
                block.extend_from_slice(chunk);
            }
            let more = matches!(chunk, Ok(Some(_)));
            if !block.is_empty() && (block.len() >= BLOCK || !more) {
                self.take(std::mem::take(&mut block)).await?;
            }
            match chunk {
                Ok(Some(_)) if begin.elapsed() >= LIMIT => {
                    return Err(fails(format!("it did not end within {LIMIT:?}")));
                }
                Ok(Some(_)) => {}
                Ok(None) if expected.is_none_or(|total| total == self.bytes()) => return Ok(()),
                Ok(None) => return Err(Broke::Off("the connection ended early".into())),
                Err(error) => return Err(off(error)),
            }
        }
    }

    /// Begins anew, with the mark that the server gives.
    async fn begin(&mut self, response: &Response) -> Result<(), FetchError> {
        let header = |name| response.headers().get(name)?.to_str().ok().map(str::to_owned);
        // A weak mark says nothing about bytes.
        let etag = header(ETAG).filter(|etag| !etag.starts_with("W/"));
        let mark = etag.or_else(|| header(LAST_MODIFIED));
        self.validator = mark.map(|mark| Validator { source: self.spec.source.clone(), mark });
        let (partial, spec, most) = (self.partial.to_owned(), self.spec.clone(), self.most);
        let (note, validator) = (validator_path(self.partial), self.validator.clone());
        let begin = move || {
            remove(&note)?;
            let intake = Intake::begin(&partial, &spec, most)?;
            if let Some(validator) = validator {
                write_json(&note, &validator)?;
            }
            Ok(intake)
        };
        self.intake = Some(on_thread(begin).await?);
        Ok(())
    }

    async fn take(&mut self, block: Vec<u8>) -> Result<(), FetchError> {
        let Some(mut intake) = self.intake.take() else { return Ok(()) };
        let intake = on_thread(move || intake.take(&block).map(|()| intake)).await?;
        self.progress.done.store(intake.bytes(), Ordering::Relaxed);
        self.intake = Some(intake);
        Ok(())
    }
}

/// Where the part begins that a server sends.
fn starts_at(response: &Response) -> Option<u64> {
    let range = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}

/// Runs file work on a thread that may block.
async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FetchError> + Send + 'static,
) -> Result<T, FetchError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| {
        let error = std::io::Error::other(error);
        Err(failed("finish work on", Path::new("the image"))(error).into())
    })
}
