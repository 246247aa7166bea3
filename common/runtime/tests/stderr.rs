//! The log of a real process on a real pipe: complete when it is read, harmless when it is not.
//!
//! A process has one log, so each case runs in a process of its own: this program again, with the
//! one ignored test that plays the part.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail as a test does")]

use std::process::Stdio;
use std::time::{Duration, Instant};

use stackhand_runtime::config::{LogFormat, LogSettings};
use stackhand_runtime::telemetry;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};

fn play(part: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", part, "--ignored", "--nocapture"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// Waits for the end, and for the word that the part was played and not just passed over.
async fn end(child: &mut Child) {
    let ended = tokio::time::timeout(Duration::from_secs(20), child.wait());
    let status = ended.await.expect("the process hangs on its log").unwrap();
    let mut told = String::new();
    child.stdout.take().unwrap().read_to_string(&mut told).await.unwrap();
    assert!(status.success() && told.contains("1 passed"), "{status}: {told}");
}

fn start() -> telemetry::Telemetry {
    telemetry::start(&LogSettings { level: "info".into(), format: LogFormat::Json }).unwrap()
}

#[tokio::test]
async fn a_pipe_that_nobody_reads_does_not_hold_up_the_process() {
    let mut child = play("part_of_one_who_logs_more_than_a_pipe_holds");
    let _unread = child.stderr.take();
    end(&mut child).await;
}

#[tokio::test]
async fn the_last_lines_before_the_end_are_written() {
    let mut child = play("part_of_one_who_logs_and_ends_at_once");
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).await.unwrap();
    end(&mut child).await;
    let lines: Vec<serde_json::Value> =
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert_eq!(lines.len(), 1000, "{text}");
    assert_eq!(lines[999]["n"], 999);
}

#[test]
#[ignore = "a part that the tests above play in a process of its own"]
fn part_of_one_who_logs_more_than_a_pipe_holds() {
    let telemetry = start();
    let begun = Instant::now();
    let filler = "x".repeat(1000);
    for n in 0..20_000 {
        tracing::info!(n, filler);
    }
    assert!(telemetry.dropped_lines() > 10_000, "{} dropped", telemetry.dropped_lines());
    drop(telemetry);
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
}

#[test]
#[ignore = "a part that the tests above play in a process of its own"]
fn part_of_one_who_logs_and_ends_at_once() {
    let _telemetry = start();
    for n in 0..1000 {
        tracing::info!(n);
    }
}
