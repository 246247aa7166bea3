use super::*;

fn value(text: &str, name: &str) -> f64 {
    let line = text.lines().find(|line| line.split([' ', '{']).next() == Some(name));
    let line = line.unwrap_or_else(|| panic!("no {name} in\n{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_scrape_tells_what_was_counted_and_about_the_process() {
    let metrics = Metrics::new("network", "1.2.3");
    metrics.reconcile_passes.inc();
    metrics.reconcile_writes.inc_by(7);
    metrics.count_failure("Port");
    metrics.count_refusal("replayed");
    metrics.ledger_documents.set(42);
    let text = metrics.encode().unwrap();
    assert!(text.contains(r#"stackhand_build_info{agent="network",version="1.2.3"} 1"#), "{text}");
    assert!(text.contains(r#"stackhand_reconcile_failures_total{kind="Port"} 1"#), "{text}");
    assert!(text.contains(r#"stackhand_refused_commands_total{reason="replayed"} 1"#), "{text}");
    assert!((value(&text, "stackhand_reconcile_writes_total") - 7.0).abs() < 0.1);
    assert!((value(&text, "stackhand_ledger_documents") - 42.0).abs() < 0.1);
    assert!(value(&text, "stackhand_process_resident_memory_bytes") > 1e6);
    assert!(value(&text, "stackhand_process_threads") >= 1.0);
    assert!(value(&text, "stackhand_process_uptime_seconds") < 3600.0);
    assert!(value(&text, "stackhand_process_start_time_seconds") > 1.6e9);
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn parts_can_hand_in_numbers_of_their_own() {
    let metrics = Metrics::new("network", "1.2.3");
    metrics.register_readings(vec![
        Reading::counter("bus_published", "Messages published", || 5),
        Reading::gauge("bus_waiting", "Calls waiting for an answer", || 2),
    ]);
    let own = Counter::<u64>::default();
    metrics.register(|registry| registry.register("frames", "Frames seen", own.clone()));
    own.inc();
    let text = metrics.encode().unwrap();
    assert!((value(&text, "stackhand_bus_published_total") - 5.0).abs() < 0.1);
    assert!((value(&text, "stackhand_bus_waiting") - 2.0).abs() < 0.1);
    assert!((value(&text, "stackhand_frames_total") - 1.0).abs() < 0.1);
}
