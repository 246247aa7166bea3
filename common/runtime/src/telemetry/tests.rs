use std::sync::mpsc;

use super::*;

/// Collects what is written.
#[derive(Clone, Default)]
struct Page(Arc<Mutex<Vec<u8>>>);

impl Page {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Page {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes nothing until told to.
struct Stuck(Receiver<()>, Page);

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.recv();
        self.1.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn logged(form: LogFormat, log: impl FnOnce()) -> String {
    let page = Page::default();
    let lines = Lines::start(page.clone(), 100).unwrap();
    let subscriber = Registry::default().with(stderr_layer(form, lines.clone(), false));
    tracing::subscriber::with_default(subscriber, log);
    lines.flush(Duration::from_secs(5));
    page.text()
}

#[test]
fn a_json_line_carries_the_request_id_of_its_span() {
    let text = logged(LogFormat::Json, || {
        let _span = tracing::info_span!("request", request_id = "req-7").entered();
        tracing::info!(port = "p1", "applied");
    });
    let line: serde_json::Value = serde_json::from_str(text.trim()).unwrap();
    assert_eq!(line["message"], "applied");
    assert_eq!(line["port"], "p1");
    assert_eq!(line["span"]["request_id"], "req-7");
}

#[test]
fn lines_for_people_have_no_colour_off_a_terminal() {
    let text = logged(LogFormat::Human, || {
        let _span = tracing::info_span!("request", request_id = "req-7").entered();
        tracing::warn!("careful");
    });
    assert!(text.contains("careful") && text.contains("req-7"), "{text}");
    assert!(!text.contains('\x1b'), "{text:?}");
}

#[test]
fn a_stuck_output_costs_lines_and_never_time() {
    let (go, gate) = mpsc::channel();
    let page = Page::default();
    let lines = Lines::start(Stuck(gate, page.clone()), 2).unwrap();
    let start = Instant::now();
    for n in 0..100 {
        lines.put(format!("line {n}\n").into_bytes());
    }
    lines.flush(Duration::from_millis(50));
    assert!(start.elapsed() < Duration::from_secs(5));
    let dropped = lines.shared.dropped.load(Ordering::Relaxed);
    assert!((97..=98).contains(&dropped), "{dropped} dropped");

    drop(go);
    lines.flush(Duration::from_secs(5));
    let text = page.text();
    assert!(text.contains("line 0\n") && text.contains("log lines were dropped"), "{text}");
}

#[test]
fn the_journal_is_used_only_where_it_is_this_very_stream() {
    assert!(is_journal("8:1234", 8, 1234));
    assert!(!is_journal("8:1234", 8, 1235));
    assert!(!is_journal("journal", 8, 1234));
}

#[test]
fn filters_are_checked_before_use() {
    for good in ["info", "DEBUG", "off", "info,stackhand_bus=debug", "warn,[{request_id}]=trace"] {
        assert_eq!(check_filter(good), Ok(()), "{good}");
    }
    for bad in ["", "verbose", "info,chatty", "stackhand_bus=loud"] {
        assert!(check_filter(bad).is_err(), "{bad}");
    }
}

/// The only test that sets the process's log.
#[test]
fn logging_starts_once_and_its_level_can_change() {
    let settings = LogSettings { level: "error".into(), format: LogFormat::Json };
    let telemetry = start(&settings).unwrap();
    assert_eq!(telemetry.form(), LogFormat::Json);
    assert!(!tracing::enabled!(tracing::Level::DEBUG));
    telemetry.set_level("debug").unwrap();
    assert!(tracing::enabled!(tracing::Level::DEBUG));
    assert!(telemetry.set_level("loudest").is_err());
    assert!(matches!(start(&settings), Err(TelemetryError::AlreadySet)));
}
