use super::*;

const LIMIT: Duration = Duration::from_secs(20);

#[tokio::test(start_paused = true)]
async fn an_idle_process_ends_at_once() {
    let shutdown = Shutdown::new(LIMIT);
    shutdown.request("test");
    let start = Instant::now();
    assert_eq!(shutdown.go_through().await, Ending::Clean);
    assert_eq!(start.elapsed(), Duration::ZERO);
    assert!(shutdown.closing().is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn links_close_only_after_the_last_work_ended() {
    let shutdown = Shutdown::new(LIMIT);
    let work = shutdown.begin("apply req-1").unwrap();
    shutdown.request("test");
    let ending = tokio::spawn({
        let shutdown = shutdown.clone();
        async move { shutdown.go_through().await }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!shutdown.closing().is_cancelled());
    assert!(shutdown.begin("apply req-2").is_none(), "no new work while stopping");
    drop(work);
    assert_eq!(ending.await.unwrap(), Ending::Clean);
}

#[tokio::test(start_paused = true)]
async fn work_that_journals_when_told_to_abandon_makes_a_clean_end() {
    let shutdown = Shutdown::new(LIMIT);
    let work = shutdown.begin("copy volume").unwrap();
    let abandoning = shutdown.abandoning();
    tokio::spawn(async move {
        abandoning.cancelled().await;
        drop(work);
    });
    shutdown.request("test");
    let start = Instant::now();
    assert_eq!(shutdown.go_through().await, Ending::Clean);
    assert_eq!(start.elapsed(), LIMIT / 4 * 3);
}

#[tokio::test(start_paused = true)]
async fn stuck_work_is_named_and_does_not_hold_the_process() {
    let shutdown = Shutdown::new(LIMIT);
    let _stuck = shutdown.begin("copy volume").unwrap();
    shutdown.request("test");
    let start = Instant::now();
    let ending = shutdown.go_through().await;
    assert_eq!(ending, Ending::Unfinished { work: vec!["copy volume".into()] });
    assert_eq!(ending.code(), exit::UNFINISHED);
    assert_eq!(start.elapsed(), LIMIT);
}

#[tokio::test(start_paused = true)]
async fn a_link_that_does_not_close_is_named_after_its_own_limit() {
    let shutdown = Shutdown::new(LIMIT);
    let _link = shutdown.closer("amqp link");
    shutdown.request("test");
    let start = Instant::now();
    let ending = shutdown.go_through().await;
    assert_eq!(ending, Ending::Unfinished { work: vec!["amqp link".into()] });
    assert_eq!(start.elapsed(), CLOSE_LIMIT);
}

#[tokio::test]
async fn the_first_reason_is_kept() {
    let shutdown = Shutdown::new(LIMIT);
    assert_eq!(shutdown.reason(), None);
    shutdown.request("SIGTERM");
    shutdown.request("later");
    assert_eq!(shutdown.reason().as_deref(), Some("SIGTERM"));
}

/// One test for all signals: they are the process's, and tests of one process share them.
#[tokio::test]
async fn signals_reload_stop_and_force() {
    use nix::sys::signal::{Signal as Sig, raise};

    let shutdown = Shutdown::new(Duration::from_secs(600));
    let _stuck = shutdown.begin("long work").unwrap();
    let signals = Signals::install().unwrap();
    let (reloaded, mut reloads) = tokio::sync::mpsc::unbounded_channel();
    let ending = tokio::spawn({
        let shutdown = shutdown.clone();
        async move { shutdown.supervise(signals, move || reloaded.send(()).unwrap()).await }
    });
    raise(Sig::SIGHUP).unwrap();
    reloads.recv().await.unwrap();
    assert!(!shutdown.stopping().is_cancelled());
    raise(Sig::SIGTERM).unwrap();
    shutdown.stopping().cancelled().await;
    assert_eq!(shutdown.reason().as_deref(), Some("SIGTERM"));
    raise(Sig::SIGINT).unwrap();
    let ending = ending.await.unwrap();
    assert_eq!(ending, Ending::Forced(Terminating::Interrupt));
    assert_eq!(ending.code(), 130);
}
