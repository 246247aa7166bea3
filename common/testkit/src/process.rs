//! The workspace's own programs and other children, started for a test and surely ended.

use std::ffi::OsStr;
use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::wait_for_sync;

/// Finds a program of this workspace that was built beside the running test.
///
/// Builds nothing: a test that builds would wait for cargo's lock, which its own runner may hold.
///
/// # Panics
///
/// When the program is not there; the message says what to run.
#[must_use]
pub fn bin(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the running test has a path");
    // target/<profile>/deps/<test> or target/<profile>/<test>
    let candidates = test.ancestors().skip(1).take(2).map(|folder| folder.join(name));
    match candidates.into_iter().find(|path| path.is_file()) {
        Some(path) => path,
        None => panic!(
            "there is no `{name}` beside {}; build it first: `cargo build --bin {name}`",
            test.display()
        ),
    }
}

/// A child process that does not outlive the test.
///
/// Its output on stderr and stdout is read as it comes (a full pipe would stop it) and is shown
/// when something goes wrong. Dropping it kills it, by its own process id, and waits for it.
pub struct Spawned {
    child: Child,
    name: String,
    output: Arc<Mutex<Vec<String>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Spawned {
    /// Starts `program` with `args`, no stdin, and the test's environment.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    pub fn start<Arg: AsRef<OsStr>>(
        program: impl AsRef<Path>,
        args: impl IntoIterator<Item = Arg>,
    ) -> Self {
        #[expect(clippy::disallowed_methods, reason = "a test's child is bounded by its guard")]
        let mut command = Command::new(program.as_ref());
        command.args(args);
        Self::start_command(command)
    }

    /// Starts a command that the caller prepared, for example with its own environment.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn start_command(mut command: Command) -> Self {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
        let output = Arc::new(Mutex::new(Vec::new()));
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            readers.push(collect("out", pipe, Arc::clone(&output)));
        }
        if let Some(pipe) = child.stderr.take() {
            readers.push(collect("err", pipe, Arc::clone(&output)));
        }
        Self { child, name, output, readers }
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything the child printed so far; each line is marked `out:` or `err:`.
    #[must_use]
    pub fn output(&self) -> String {
        self.output.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
    }

    /// Waits until the child has printed a line that contains `text`, and returns that line.
    ///
    /// # Panics
    ///
    /// When it ends before, or `limit` passes; the message shows its output.
    pub fn wait_for_output(&mut self, limit: Duration, text: &str) -> String {
        let what = format!("{} to print {text:?}", self.name);
        wait_for_sync(limit, &what, || {
            let ended = self.child.try_wait().ok().flatten();
            if let Some(status) = ended {
                self.join_readers();
                let found = self.find(text);
                assert!(found.is_some(), "{self:?} ended ({status}) before it printed {text:?}");
                return found;
            }
            self.find(text)
        })
    }

    /// Whether the child still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Asks the child to end (SIGTERM) and waits for it.
    ///
    /// # Panics
    ///
    /// When it does not end within `limit`.
    pub fn terminate(&mut self, limit: Duration) -> ExitStatus {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        self.wait(limit)
    }

    /// Sends a signal to the child, and to no one else: a child that was waited for is left alone.
    pub fn signal(&mut self, signal: nix::sys::signal::Signal) {
        if self.is_running()
            && let Ok(pid) = i32::try_from(self.child.id())
        {
            let _gone_meanwhile = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
        }
    }

    /// Kills the child (SIGKILL) and waits for it.
    ///
    /// # Panics
    ///
    /// When the kernel does not say how it ended.
    pub fn kill(&mut self) -> ExitStatus {
        let _ended_before = self.child.kill();
        let status = self.child.wait().expect("a child can be waited for");
        self.join_readers();
        status
    }

    /// Waits for the child to end by itself.
    ///
    /// # Panics
    ///
    /// When it does not within `limit`; the message shows its output.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let status = {
            let what = format!("{self:?} to end");
            wait_for_sync(limit, &what, || self.child.try_wait().ok().flatten())
        };
        self.join_readers();
        status
    }

    fn find(&self, text: &str) -> Option<String> {
        let lines = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().find(|line| line.contains(text)).cloned()
    }

    /// Takes in what the child printed last. A grandchild that keeps the pipes open is not
    /// waited for.
    fn join_readers(&mut self) {
        let deadline = std::time::Instant::now() + Duration::from_millis(500);
        for reader in self.readers.drain(..) {
            while !reader.is_finished() && std::time::Instant::now() < deadline {
                thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        let _ended_before = self.child.kill();
        let _no_zombie = self.child.wait();
        if thread::panicking() {
            self.join_readers();
            #[expect(clippy::print_stderr, reason = "what the child said explains the failure")]
            {
                eprintln!("{self:?}");
            }
        }
    }
}

impl fmt::Debug for Spawned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.name, self.child.id())?;
        let output = self.output();
        if output.is_empty() {
            write!(f, ", silent")
        } else {
            write!(f, ", which said:\n{output}\n")
        }
    }
}

fn collect(
    mark: &'static str,
    pipe: impl Read + Send + 'static,
    output: Arc<Mutex<Vec<String>>>,
) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut lines = BufReader::new(pipe);
        let mut line = Vec::new();
        while let Ok(1..) = read_line(&mut lines, &mut line) {
            let text = String::from_utf8_lossy(&line);
            let text = format!("{mark}: {}", text.trim_end());
            output.lock().unwrap_or_else(PoisonError::into_inner).push(text);
        }
    })
}

fn read_line(from: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<usize> {
    line.clear();
    from.read_until(b'\n', line)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn a_child_is_heard_and_ends_when_asked() {
        let mut child = Spawned::start(
            "/bin/sh",
            ["-c", "echo ready; echo oops >&2; exec cat /dev/zero >/dev/null"],
        );
        assert_eq!(child.wait_for_output(LIMIT, "ready"), "out: ready");
        assert_eq!(child.wait_for_output(LIMIT, "oops"), "err: oops");
        assert!(child.is_running());
        assert!(!child.terminate(LIMIT).success());
    }

    #[test]
    fn a_dropped_child_is_gone() {
        let child = Spawned::start("/bin/sleep", ["600"]);
        let proc = PathBuf::from(format!("/proc/{}", child.pid()));
        assert!(proc.exists());
        drop(child);
        assert!(!proc.exists());
    }

    #[test]
    #[should_panic(expected = "err: no such luck")]
    fn a_child_that_ends_early_is_quoted() {
        let mut child = Spawned::start("/bin/sh", ["-c", "echo no such luck >&2; exit 3"]);
        child.wait_for_output(LIMIT, "ready");
    }

    #[test]
    #[should_panic(expected = "cargo build --bin no-such-program")]
    fn a_program_that_was_not_built_is_named_with_the_remedy() {
        let _ = bin("no-such-program");
    }
}
