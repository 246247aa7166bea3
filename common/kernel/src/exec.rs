//! Running host programs: absolute path, argument vector, clean environment, time limit.
//!
//! A program is run only where it is the right engine (qemu-img, lvm, nft). It never sees a shell,
//! the agent's environment or its standard input, and it never outlives the call: when the time
//! is up, or when the caller goes away, its whole process group is killed.
//!
//! Arguments show up in errors, logs and process lists. Secrets go in by [`Program::stdin`].

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

/// Time that a program gets unless told otherwise.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(30);

/// Bytes of standard output that are taken unless told otherwise.
pub const DEFAULT_MOST_OUTPUT: usize = 16 << 20;

/// Bytes of standard error that are kept for the error message.
const MOST_STDERR: usize = 8 << 10;

/// A program to run: an absolute path and its arguments. Never a shell string.
#[derive(Clone, PartialEq, Eq)]
pub struct Program {
    path: PathBuf,
    args: Vec<String>,
    env: Vec<(String, String)>,
    stdin: Vec<u8>,
    directory: Option<PathBuf>,
    limit: Duration,
    most_output: usize,
}

/// What a program that ended well printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error, at most its first 8 KiB.
    pub stderr: String,
}

/// Why a program did not produce a result.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The path is relative: what would run depends on who asks.
    #[error("cannot run `{program}`: the path is not absolute")]
    NotAbsolute {
        /// The program.
        program: Program,
    },
    /// It could not be started.
    #[error("cannot run `{program}`")]
    Start {
        /// The program.
        program: Program,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its output could not be read.
    #[error("cannot talk to `{program}`")]
    Talk {
        /// The program.
        program: Program,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ended with a status other than 0, or by a signal.
    #[error("`{program}` failed ({status}): {stderr}")]
    Failed {
        /// The program.
        program: Program,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        stderr: String,
        /// What it printed.
        stdout: Vec<u8>,
    },
    /// Its time was up; it was killed.
    #[error("`{program}` did not finish within {limit:?}")]
    TimedOut {
        /// The program.
        program: Program,
        /// The time it had.
        limit: Duration,
    },
    /// It printed more than is taken; it was killed.
    #[error("`{program}` printed more than {most} bytes")]
    TooMuch {
        /// The program.
        program: Program,
        /// The bound in bytes.
        most: usize,
    },
}

impl Program {
    /// A program at an absolute path, without arguments.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            args: Vec::new(),
            env: Vec::new(),
            stdin: Vec::new(),
            directory: None,
            limit: DEFAULT_LIMIT,
            most_output: DEFAULT_MOST_OUTPUT,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I>(mut self, args: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds a variable to the environment, which otherwise holds only `LC_ALL` and `PATH`.
    #[must_use]
    pub fn env(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.push((key.into(), value.into()));
        self
    }

    /// What it reads from standard input. Never printed.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// The folder it runs in. Default: `/`.
    #[must_use]
    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// How long it may take. Default: [`DEFAULT_LIMIT`].
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// How many bytes it may print. Default: [`DEFAULT_MOST_OUTPUT`].
    #[must_use]
    pub fn most_output(mut self, bytes: usize) -> Self {
        self.most_output = bytes;
        self
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs it to its end.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be started, ends with a status other than 0, takes longer than its
    /// limit or prints more than is taken. Dropping the future kills it and its children.
    pub async fn run(&self) -> Result<Output, ExecError> {
        self.run_heard(|_| {}).await
    }

    /// The same; `hear` is told what it prints on standard output as it comes, in pieces that end
    /// anywhere.
    ///
    /// # Errors
    ///
    /// As [`Program::run`].
    pub async fn run_heard(&self, hear: impl FnMut(&[u8]) + Send) -> Result<Output, ExecError> {
        if !self.path.is_absolute() {
            return Err(ExecError::NotAbsolute { program: self.clone() });
        }
        let mut child = Command::new(&self.path)
            .args(&self.args)
            .env_clear()
            .env("LC_ALL", "C.UTF-8")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .envs(self.env.iter().map(|(key, value)| (key, value)))
            .current_dir(self.directory.as_deref().unwrap_or(Path::new("/")))
            .stdin(if self.stdin.is_empty() { Stdio::null() } else { Stdio::piped() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| ExecError::Start { program: self.clone(), source })?;
        let mut group = Group(child.id());
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let feed = async {
            if let Some(mut stdin) = stdin {
                // A program that does not read its input to the end may still end well.
                drop(stdin.write_all(&self.stdin).await);
            }
            Ok(())
        };
        let talk = async {
            let ((), out, err) = tokio::try_join!(
                feed,
                take(stdout, self.most_output, true, hear),
                take(stderr, MOST_STDERR, false, |_| {})
            )?;
            Ok::<_, io::Error>((out, err, child.wait().await?))
        };
        let (out, err, status) = match tokio::time::timeout(self.limit, talk).await {
            Ok(Ok(talked)) => talked,
            Ok(Err(error)) if error.kind() == io::ErrorKind::FileTooLarge => {
                return Err(ExecError::TooMuch { program: self.clone(), most: self.most_output });
            }
            Ok(Err(source)) => return Err(ExecError::Talk { program: self.clone(), source }),
            Err(_) => {
                return Err(ExecError::TimedOut { program: self.clone(), limit: self.limit });
            }
        };
        group.0 = None;
        let stderr = String::from_utf8_lossy(&err).trim().to_owned();
        if !status.success() {
            return Err(ExecError::Failed { program: self.clone(), status, stderr, stdout: out });
        }
        Ok(Output { stdout: out, stderr })
    }
}

impl Output {
    /// Standard output as text; bytes that are not UTF-8 are replaced.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        self.args.iter().try_for_each(|arg| {
            if arg.is_empty() || arg.contains([' ', '"', '\'', '\n']) {
                write!(f, " {arg:?}")
            } else {
                write!(f, " {arg}")
            }
        })
    }
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Program(`{self}`)")
    }
}

/// Kills a process group when dropped, unless disarmed. The leader is not reaped before, so the
/// number cannot belong to anybody else yet.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(id) = self.0
            && let Ok(id) = i32::try_from(id)
        {
            // Gone already is fine.
            let _ = killpg(Pid::from_raw(id), Signal::SIGKILL);
        }
    }
}

/// Reads to the end, keeping at most `most` bytes; more is an error or passed over.
async fn take(
    from: Option<impl AsyncRead + Unpin>,
    most: usize,
    strict: bool,
    mut hear: impl FnMut(&[u8]),
) -> io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    let Some(mut from) = from else { return Ok(kept) };
    let mut chunk = vec![0; 16 << 10];
    loop {
        let read = from.read(&mut chunk).await?;
        if read == 0 {
            return Ok(kept);
        }
        hear(&chunk[..read]);
        let room = most - kept.len();
        if read > room && strict {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        kept.extend_from_slice(&chunk[..read.min(room)]);
    }
}

#[cfg(test)]
mod tests;
