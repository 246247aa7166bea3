use proptest::prelude::*;
use serde_json::json;

use super::*;

/// The fanout cast of the wire reference, byte for byte as Python writes it.
const CAST: &str = r#"{"oslo.version": "2.0", "oslo.message": "{\"method\": \"router_deleted\", \"args\": {\"router_id\": \"1b0c\"}, \"version\": \"1.0\", \"_unique_id\": \"11112222333344445555666677778888\", \"_context_is_admin\": true}"}"#;

fn bare(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

fn refusal(body: &[u8]) -> String {
    decode_request(body).unwrap_err().error.to_string()
}

#[test]
fn a_cast_from_python_is_understood() {
    let frame = decode_request(CAST.as_bytes()).unwrap();
    assert_eq!(frame.request.method, "router_deleted");
    assert_eq!(frame.request.args, json!({"router_id": "1b0c"}).as_object().unwrap().clone());
    assert_eq!(frame.request.context.0, json!({"is_admin": true}).as_object().unwrap().clone());
    assert_eq!(frame.version, Version::V1_0);
    assert_eq!(frame.unique_id, "11112222333344445555666677778888");
    assert_eq!((frame.namespace, frame.reply_to), (None, None));
}

#[test]
fn a_call_is_written_with_the_keys_python_expects() {
    let target = Target::topic("neutron", "q-reports-plugin").at_version(Version::new(1, 2));
    let mut request = Request::new("report_state", json!({"time": "now"}));
    request.context = Context(json!({"is_admin": true}).as_object().unwrap().clone());
    let reply_to = ReplyTo { msg_id: "m".into(), queue: "reply_q".into(), monitor: None };
    let body = encode_request(&target, &request, "u", Some(&reply_to));

    let outer: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(outer.as_object().unwrap().len(), 2);
    assert_eq!(outer["oslo.version"], "2.0");
    let inner: Value = serde_json::from_str(outer["oslo.message"].as_str().unwrap()).unwrap();
    assert_eq!(
        inner,
        json!({
            "method": "report_state", "args": {"time": "now"}, "version": "1.2",
            "_msg_id": "m", "_reply_q": "reply_q", "_timeout": null, "_unique_id": "u",
            "_context_is_admin": true,
        })
    );
}

#[test]
fn a_failure_nests_three_levels_deep() {
    let mut failure = Failure::new("RouterNotFound", "Router 1b0c could not be found");
    failure.module = "neutron_lib.exceptions.l3".into();
    let frame = ReplyFrame { msg_id: "m".into(), outcome: Err(failure), ending: true };
    let body = encode_reply(&frame, "u");

    let outer: Value = serde_json::from_slice(&body).unwrap();
    let inner: Value = serde_json::from_str(outer["oslo.message"].as_str().unwrap()).unwrap();
    assert_eq!(inner["result"], Value::Null);
    let third: Value = serde_json::from_str(inner["failure"].as_str().unwrap()).unwrap();
    assert_eq!(third["class"], "RouterNotFound");
    assert_eq!(third["kwargs"], json!({}));
    assert_eq!(decode_reply(&body).unwrap(), frame);
}

#[test]
fn the_remote_suffix_is_taken_off_a_failure_that_is_passed_on() {
    let mut failure = Failure::new("InstanceNotFound_Remote", "gone");
    failure.module = "nova.exception_Remote".into();
    let passed_on = decode_failure(&encode_failure(&failure));
    assert_eq!(passed_on.class, "InstanceNotFound");
    assert_eq!(passed_on.module, "nova.exception");
}

#[test]
fn a_failure_in_any_form_is_still_a_failure() {
    assert_eq!(decode_failure("not json").message, "not json");
    assert_eq!(decode_failure("[1]").class, "RemoteError");
    let odd = decode_failure(r#"{"class": "E", "message": 5, "args": null, "tb": [1, "x\n"]}"#);
    assert_eq!((odd.class.as_str(), odd.message.as_str()), ("E", "5"));
    assert_eq!(odd.traceback, ["x\n"]);
}

#[test]
fn a_message_without_an_envelope_is_taken_as_it_is() {
    let frame = decode_request(&bare(&json!({"method": "m", "extra": [1]}))).unwrap();
    assert_eq!(frame.request.method, "m");
    assert_eq!(frame.unique_id, "");
}

#[test]
fn bad_bodies_are_refused_with_the_reason() {
    let envelope = |version: &str, message: Value| {
        bare(&json!({"oslo.version": version, "oslo.message": message}))
    };
    let deep = "[".repeat(100_000);
    for (body, reason) in [
        (b"\xff\xfe{}".to_vec(), "not UTF-8"),
        (b"".to_vec(), "not JSON"),
        (b"[]".to_vec(), "not a JSON object"),
        (b"{}".to_vec(), "names no method"),
        (deep.clone().into_bytes(), "recursion limit"),
        (envelope("2.0", deep.into()), "recursion limit"),
        (envelope("3.0", "{}".into()), "envelope version"),
        (envelope("2.1", "{}".into()), "envelope version"),
        (envelope("2.0", json!({})), "not a string"),
        (bare(&json!({"method": "m", "args": [1]})), "not an object"),
        (bare(&json!({"method": "m", "version": "new"})), "major.minor"),
        (vec![b' '; MAX_BODY + 1], "more than"),
    ] {
        let said = refusal(&body);
        assert!(said.contains(reason), "{said:?} should tell of {reason:?}");
    }
}

#[test]
fn a_caller_whose_request_is_refused_can_be_told() {
    let body = bare(&json!({"method": "m", "version": "x", "_msg_id": "i", "_reply_q": "q"}));
    let bad = decode_request(&body).unwrap_err();
    assert_eq!(bad.failure.class, "UnsupportedVersion");
    let reply_to = ReplyTo { msg_id: "i".into(), queue: "q".into(), monitor: None };
    assert_eq!(bad.reply_to, Some(reply_to));
}

#[test]
fn non_finite_numbers_are_read_as_null() {
    let body = br#"{"method": "m", "args": {"a": NaN, "b": [-Infinity, Infinity], "c": "NaN \" -Infinity", "d": -1}}"#;
    let frame = decode_request(body).unwrap();
    assert_eq!(
        Value::Object(frame.request.args),
        json!({"a": null, "b": [null, null], "c": "NaN \" -Infinity", "d": -1})
    );
}

#[test]
fn a_monitor_below_a_second_asks_for_nothing() {
    for (timeout, monitor) in [
        (json!(60), Some(60)),
        (json!(2.9), Some(2)),
        (json!(0), None),
        (json!(-5), None),
        (json!(null), None),
        (json!("60"), None),
        (json!(1e300), None),
    ] {
        let body =
            bare(&json!({"method": "m", "_msg_id": "i", "_reply_q": "q", "_timeout": timeout}));
        let reply_to = decode_request(&body).unwrap().reply_to.unwrap();
        assert_eq!(reply_to.monitor, monitor.map(Duration::from_secs), "{timeout}");
    }
}

#[test]
fn a_notification_goes_and_comes_back() {
    let notification = Notification {
        exchange: "nova".into(),
        topic: "notifications".into(),
        publisher_id: "compute.h1".into(),
        event_type: "compute.instance.create.end".into(),
        priority: Priority::Info,
        payload: json!({"x": 1}),
        context: Context::fresh(),
    };
    let body = encode_notification(&notification, "id", "u", "2026-01-02 03:04:05.678901");
    let inner = Value::Object(open(&body).unwrap());
    assert_eq!((&inner["priority"], &inner["message_id"]), (&json!("INFO"), &json!("id")));
    assert_eq!(decode_notification("nova", "notifications", &body).unwrap(), notification);
    let without = bare(&json!({"event_type": "e", "publisher_id": "p", "priority": "odd"}));
    assert!(decode_notification("nova", "n", &without).is_err());
}

/// Recorded from Nova and Neutron at work. The recorder kept the inner message as an object.
#[test]
fn messages_recorded_from_openstack_are_understood() {
    let recorded = include_str!("../../tests/data/recorded.jsonl");
    let mut methods = std::collections::BTreeSet::new();
    let mut replies = 0;
    for line in recorded.lines() {
        let mut message: Value = serde_json::from_str(line).unwrap();
        let inner = message["body"]["oslo.message"].take();
        let body = seal(&inner);
        if inner.get("method").is_some() {
            let frame = decode_request(&body).unwrap();
            assert_eq!(frame.unique_id.len(), 32);
            assert!(!frame.request.context.0.is_empty());
            methods.insert(frame.request.method);
        } else {
            let frame = decode_reply(&body).unwrap();
            assert!(frame.ending && frame.outcome.is_ok());
            replies += 1;
        }
    }
    assert!(methods.len() >= 5 && replies >= 1, "{methods:?}, {replies} replies");
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_filter("finite", |n| n.is_finite()).prop_map(Value::from),
        ".*".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(".*", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn json_object() -> impl Strategy<Value = Map<String, Value>> {
    prop::collection::btree_map(".*", json_value(), 0..4).prop_map(|map| map.into_iter().collect())
}

proptest! {
    #[test]
    fn every_request_comes_back_as_it_went(
        method in ".+", args in json_object(), context in json_object(),
        namespace in prop::option::of(".*"), minor in any::<u32>(), monitor in 2u64..1_000_000,
    ) {
        let mut target = Target::topic("e", "t").at_version(Version::new(1, minor));
        target.namespace.clone_from(&namespace);
        let request = Request { method, args, context: Context(context) };
        let monitor = Some(Duration::from_secs(monitor));
        let reply_to = ReplyTo { msg_id: "m".into(), queue: "q".into(), monitor };
        let frame = decode_request(&encode_request(&target, &request, "u", Some(&reply_to))).unwrap();
        prop_assert_eq!(frame.request, request);
        prop_assert_eq!(frame.namespace, namespace);
        prop_assert_eq!(frame.version, target.version);
        prop_assert_eq!(frame.reply_to, Some(reply_to));
    }

    #[test]
    fn every_answer_comes_back_as_it_went(
        result in json_value(), class in "[A-Z][a-z]+", message in ".*", kwargs in json_object(),
        raised in any::<bool>(), ending in any::<bool>(),
    ) {
        let mut failure = Failure::new(&class, message);
        failure.kwargs = kwargs;
        let outcome = if raised { Err(failure) } else { Ok(result) };
        let frame = ReplyFrame { msg_id: "m".into(), outcome, ending };
        prop_assert_eq!(decode_reply(&encode_reply(&frame, "u")).unwrap(), frame);
    }

    #[test]
    fn garbage_is_refused_without_a_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode_request(&body);
        let _ = decode_reply(&body);
        let _ = decode_notification("e", "t", &body);
    }

    #[test]
    fn garbage_that_looks_like_json_is_refused_without_a_panic(
        text in r#"[{}\[\]":,\\ NaInfinity\-0-9eé]{0,60}"#, inner in json_value(),
    ) {
        let _ = decode_request(text.as_bytes());
        let _ = decode_reply(&seal(&inner));
        let _ = decode_request(&seal(&inner));
        let _ = decode_notification("e", "t", &seal(&inner));
        let _ = decode_failure(&text);
    }
}
