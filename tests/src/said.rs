//! What a command said, for tests that judge it.

use std::process::Command;

/// Exit status and output of a command that came to its end.
#[derive(Debug)]
pub struct Said {
    /// The exit status, -1 if a signal ended it.
    pub status: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Said {
    /// Runs the command to its end.
    ///
    /// # Panics
    ///
    /// If it cannot be started, or says what is not UTF-8.
    #[must_use]
    pub fn by(command: &mut Command) -> Self {
        let output = command.output().expect("the command can be started");
        let text = |bytes| String::from_utf8(bytes).expect("it speaks UTF-8");
        Self {
            status: output.status.code().unwrap_or(-1),
            out: text(output.stdout),
            err: text(output.stderr),
        }
    }

    /// Whether it succeeded.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.status == 0
    }
}
