use std::time::Instant;

use super::*;

fn sh(script: &str) -> Program {
    Program::new("/bin/sh").args(["-c", script])
}

#[tokio::test]
async fn the_program_gets_its_input_and_a_clean_environment() {
    let output = sh("cat; env | sort").stdin("secret\n").env("EXTRA", "1").run().await.unwrap();
    let text = output.text();
    assert!(text.starts_with("secret\n"), "{text}");
    let names: Vec<&str> = text.lines().skip(1).filter_map(|line| line.split('=').next()).collect();
    assert_eq!(names, ["EXTRA", "LC_ALL", "PATH", "PWD"]);
}

#[tokio::test]
async fn a_failure_tells_program_status_and_last_words_but_not_the_input() {
    let error = sh("cat >/dev/null; echo broken >&2; exit 3").stdin("secret").run().await;
    let text = error.unwrap_err().to_string();
    assert!(text.contains("exit status: 3") && text.contains("broken"), "{text}");
    assert!(!text.contains("secret"));
}

#[tokio::test]
async fn a_program_that_does_not_end_is_killed_with_its_children() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("child");
    let script = format!("sleep 60 & echo $! > {}; wait", file.display());
    let start = Instant::now();
    let error = sh(&script).limit(Duration::from_millis(300)).run().await.unwrap_err();
    assert!(matches!(error, ExecError::TimedOut { .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(10));
    let child: i32 = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while is_running(child) {
        assert!(Instant::now() < deadline, "process {child} outlived its program");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A zombie that nobody reaped yet does not run any more.
fn is_running(process: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{process}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim().starts_with('Z'))
}

#[tokio::test]
async fn endless_output_is_cut_off_and_endless_complaints_are_shortened() {
    let error = sh("yes").most_output(100_000).run().await.unwrap_err();
    assert!(matches!(error, ExecError::TooMuch { most: 100_000, .. }), "{error}");
    let output = sh("head -c 100000 /dev/zero | tr '\\0' x >&2").run().await.unwrap();
    assert_eq!(output.stderr.len(), MOST_STDERR);
}

#[tokio::test]
async fn input_that_is_not_read_is_no_failure() {
    let output = sh("exec <&-; echo done").stdin(vec![0; 1 << 20]).run().await.unwrap();
    assert_eq!(output.text(), "done\n");
}

#[tokio::test]
async fn a_relative_path_and_a_missing_program_are_refused() {
    let error = Program::new("true").run().await.unwrap_err();
    assert_eq!(error.to_string(), "cannot run `true`: the path is not absolute");
    let error = Program::new("/nonexistent/tool").arg("a b").run().await.unwrap_err();
    assert_eq!(error.to_string(), "cannot run `/nonexistent/tool \"a b\"`");
}
