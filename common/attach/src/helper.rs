//! Attaching for somebody without the rights for it: a helper that answers one question and ends.
//!
//! ```text
//! compute-agent ──question──> compute-initiator.socket ──> compute-agent initiator (user root)
//!               <──answer────────────────────────────────
//! ```
//!
//! The service manager listens on the socket, which decides who may ask, and starts one helper
//! for each connection, with the connection as its standard input and output. A question and its
//! answer are a line of JSON each. Who may ask can attach volumes of targets that let this host
//! in, and no more: every question goes through the same checks as `storage-agent attach`.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stackhand_model::{Connection, VolumeId};
use stackhand_runtime::chain;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Most bytes of a question or an answer.
const MOST: u64 = 64 << 10;

/// How long an answer may take: a login and a device that comes, each with its own limit.
const LIMIT: Duration = Duration::from_secs(180);

/// What a helper can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase", deny_unknown_fields)]
pub enum Question {
    /// The name under which this host's kernel logs in.
    Name,
    /// [`attach`](crate::attach).
    Attach {
        /// The volume.
        volume: VolumeId,
        /// How this host reaches it.
        connection: Connection,
    },
    /// [`detach`](crate::detach).
    Detach {
        /// The volume.
        volume: VolumeId,
        /// How this host reaches it.
        connection: Connection,
    },
    /// [`rescan`](crate::rescan).
    Rescan {
        /// The volume.
        volume: VolumeId,
        /// How this host reaches it.
        connection: Connection,
    },
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
enum Answer {
    /// It is done; a name, a path or a size.
    Done(String),
    /// It is not, for this reason.
    Failed(String),
}

/// Why there is no good answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// There is no helper.
    #[error("cannot ask for this host's initiator at {socket}")]
    Away {
        /// Where it should listen.
        socket: String,
        /// Why not.
        source: io::Error,
    },
    /// It does not answer as it should.
    #[error("the helper at {socket} does not answer: {reason}")]
    Silent {
        /// Where it listens.
        socket: String,
        /// What is wrong.
        reason: String,
    },
    /// It tried in vain.
    #[error("{0}")]
    Failed(String),
}

/// Asks a helper.
///
/// # Errors
///
/// Fails if there is none, or it cannot do what it is asked for.
pub async fn ask(socket: &Path, question: &Question) -> Result<String, AskError> {
    let name = || socket.display().to_string();
    let away = |source| AskError::Away { socket: name(), source };
    let silent = |reason: String| AskError::Silent { socket: name(), reason };
    let mut line = serde_json::to_vec(question).map_err(|error| silent(error.to_string()))?;
    line.push(b'\n');
    let talk = async {
        let mut stream = UnixStream::connect(socket).await.map_err(away)?;
        stream.write_all(&line).await.map_err(away)?;
        let mut answer = Vec::new();
        stream.take(MOST).read_to_end(&mut answer).await.map_err(away)?;
        serde_json::from_slice(&answer).map_err(|error| silent(error.to_string()))
    };
    match tokio::time::timeout(LIMIT, talk).await {
        Ok(Ok(Answer::Done(said))) => Ok(said),
        Ok(Ok(Answer::Failed(reason))) => Err(AskError::Failed(reason)),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(silent(format!("not within {} s", LIMIT.as_secs()))),
    }
}

/// Answers the one question that comes in.
///
/// # Errors
///
/// Fails if it cannot be read or its answer written.
pub fn serve(input: impl Read, mut output: impl Write) -> io::Result<()> {
    let mut line = Vec::new();
    BufReader::new(input.take(MOST)).read_until(b'\n', &mut line)?;
    let answer = match serde_json::from_slice(&line) {
        Ok(question) => answer(question)?,
        Err(error) => Answer::Failed(format!("this is no question: {error}")),
    };
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    output.write_all(&line)?;
    output.flush()
}

fn answer(question: Question) -> io::Result<Answer> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let done = runtime.block_on(async {
        match question {
            Question::Name => crate::initiator(),
            Question::Attach { volume, connection } => {
                crate::attach(&connection, volume).await.map(|path| path.display().to_string())
            }
            Question::Detach { volume, connection } => {
                crate::detach(&connection, volume).await.map(|()| String::new())
            }
            Question::Rescan { volume, connection } => {
                crate::rescan(&connection, volume).await.map(|bytes| bytes.to_string())
            }
        }
    });
    Ok(done.map_or_else(|error| Answer::Failed(chain(&error)), Answer::Done))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(question: &[u8]) -> Answer {
        let mut output = Vec::new();
        serve(question, &mut output).unwrap();
        assert_eq!(output.pop(), Some(b'\n'));
        serde_json::from_slice(&output).unwrap()
    }

    #[test]
    fn what_is_no_question_is_answered_with_why() {
        for bad in [&b""[..], b"\n", b"{}\n", b"{\"do\":\"format\"}\n", b"\xff\xff\n"] {
            let Answer::Failed(reason) = said(bad) else { panic!("{bad:?}") };
            assert!(reason.starts_with("this is no question: "), "{reason}");
        }
        let long = vec![b' '; 1 << 20];
        assert!(matches!(said(&long), Answer::Failed(_)));
    }

    #[test]
    fn a_question_about_a_name_that_is_none_does_nothing() {
        let connection = serde_json::json!({
            "type": "iscsi", "portal": "192.0.2.1:3260", "iqn": "iqn.x/../y", "lun": 0,
            "client": "host",
        });
        let question = serde_json::json!({
            "do": "detach", "volume": uuid::Uuid::nil(), "connection": connection,
        });
        let expected = Answer::Failed("\"iqn.x/../y\" is no iSCSI name".into());
        assert_eq!(said(format!("{question}\n").as_bytes()), expected);
    }

    #[tokio::test]
    async fn a_helper_that_is_away_or_babbles_is_told_as_such() {
        let root = tempfile::tempdir().unwrap();
        let socket = root.path().join("socket");
        let error = ask(&socket, &Question::Name).await.unwrap_err();
        assert!(matches!(error, AskError::Away { .. }), "{error}");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let babble = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"hello").await.unwrap();
        });
        let error = ask(&socket, &Question::Name).await.unwrap_err();
        babble.await.unwrap();
        assert!(matches!(error, AskError::Silent { .. } | AskError::Away { .. }), "{error}");
    }
}
