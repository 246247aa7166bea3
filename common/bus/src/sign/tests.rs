use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;

use futures_util::FutureExt;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::memory::MemoryBroker;
use crate::{Delivered, Failure, Origin};

const VECTOR_TEXT: &str = r#"["stackhand-signature-1","stackhand","stackhand.compute","host1",false,null,"1.0","delete",{"force":true,"note":"café \"\n","refs":[{"id":"8f1c","kind":"Instance"}]},"req-1","2026-11-21T10:00:00.000Z","000102030405060708090a0b0c0d0e0f"]"#;
const VECTOR_PUBLIC: &str = "A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg=";
const VECTOR_SIGNATURE: &str =
    "Vb0jURSjcMsePduQmcIhw6eWjxaYeWVC+wDx07PkcyJHzZo9a0Z8UlKnlIJdlXtZ0UxUu8LVrB2O4srcRgypBQ==";
const VECTOR_TIME: &str = "2026-11-21T10:00:00.000Z";
const VECTOR_NONCE: &str = "000102030405060708090a0b0c0d0e0f";

fn vector_key() -> SigningKey {
    let mut der = vec![0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
    der.extend(0..32_u8);
    let body = BASE64.encode(der);
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n");
    SigningKey::from_pem(&pem).unwrap()
}

fn service() -> Service {
    Service {
        exchange: "stackhand".into(),
        topic: "stackhand.compute".into(),
        server: "host1".into(),
        concurrency: 4,
    }
}

fn target() -> Target {
    Target::topic("stackhand", "stackhand.compute").on_server("host1")
}

fn delete() -> Request {
    let args = json!({
        "refs": [{ "kind": "Instance", "id": "8f1c" }], "force": true, "note": "café \"\n"
    });
    let mut context = Context::default();
    context.0.insert("request_id".into(), "req-1".into());
    Request::new("delete", args).with_context(context)
}

fn delivered(target: &Target, request: Request) -> Delivered {
    Delivered {
        request,
        namespace: target.namespace.clone(),
        version: target.version,
        unique_id: new_id(),
        is_call: true,
        origin: Origin::Broker,
    }
}

/// A host with a clock of its own and one trusted key.
struct Host {
    folder: TempDir,
    now: Arc<Mutex<Timestamp>>,
    signer: Signer,
    verifier: Verifier,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let now = Arc::new(Mutex::new(VECTOR_TIME.parse().unwrap()));
        let read = Arc::clone(&now);
        let clock: Clock = Arc::new(move || *read.lock().unwrap());
        let key = vector_key();
        fs::write(folder.path().join("one.pub"), key.public("test key").to_string()).unwrap();
        let trusted = Arc::new(TrustedKeys::of(folder.path()));
        let nonces = Arc::new(MemoryNonces::new(Arc::clone(&clock)));
        Self {
            signer: Signer::with_clock(key, Arc::clone(&clock)),
            verifier: Verifier::new(trusted, nonces).with_clock(clock),
            folder,
            now,
        }
    }

    fn signed(&self, target: &Target) -> Delivered {
        let mut request = delete();
        self.signer.sign(target, &mut request);
        delivered(target, request)
    }

    fn verify(&self, delivered: &Delivered) -> Result<KeyId, Refusal> {
        // Nothing here waits: the store in memory answers at once.
        self.verifier.verify(&service(), delivered).now_or_never().unwrap()
    }

    fn pass(&self, milliseconds: i64) {
        let mut now = self.now.lock().unwrap();
        *now = now.checked_add(jiff::SignedDuration::from_millis(milliseconds)).unwrap();
    }
}

#[test]
fn what_openssl_signed_is_what_we_sign_and_verify() {
    let key = vector_key();
    assert_eq!(key.public("").to_string(), format!("stackhand-ed25519 {VECTOR_PUBLIC}"));
    assert_eq!(key.id().as_str(), "56475aa75463474c");
    assert_eq!(BASE64.encode(key.sign(VECTOR_TEXT.as_bytes())), VECTOR_SIGNATURE);

    let host = Host::new();
    let mut request = delete();
    host.signer.sign_at(&target(), &mut request, VECTOR_TIME, VECTOR_NONCE);
    assert_eq!(request.context.0[CONTEXT_KEY]["signature"], VECTOR_SIGNATURE);
    assert_eq!(host.verify(&delivered(&target(), request)).unwrap(), *key.id());
}

#[test]
fn the_three_ways_to_address_a_host_are_accepted_and_another_host_is_not() {
    let host = Host::new();
    let any = Target::topic("stackhand", "stackhand.compute");
    for target in [target(), any.clone(), any.to_all(), target().to_all()] {
        host.verify(&host.signed(&target)).unwrap_or_else(|refusal| panic!("{target}: {refusal}"));
    }
    for target in [
        target().on_server("host2"),
        Target::topic("stackhand", "stackhand.network").on_server("host1"),
        Target::topic("other", "stackhand.compute").on_server("host1"),
    ] {
        let refusal = host.verify(&host.signed(&target)).unwrap_err();
        assert!(matches!(refusal, Refusal::BadSignature(_)), "{target}: {refusal}");
    }
}

#[test]
fn a_command_is_carried_out_once() {
    let host = Host::new();
    let command = host.signed(&target());
    host.verify(&command).unwrap();
    for milliseconds in [0, 1_000, 58_999, 1] {
        host.pass(milliseconds);
        assert_eq!(host.verify(&command), Err(Refusal::Replayed));
    }
    // A moment later the nonce is forgotten, and the command is too old.
    host.pass(1);
    assert_eq!(host.verify(&command), Err(Refusal::Stale { seconds: 61, window: 60 }));
    assert_eq!(host.verifier.refused(), [("replayed", 4), ("stale", 1)].into());
}

#[test]
fn the_window_includes_its_edges_and_the_difference_is_told() {
    let host = Host::new();
    for (milliseconds, accepted) in
        [(60_000, true), (60_001, false), (-60_000, true), (-60_001, false), (3_600_000, false)]
    {
        let command = host.signed(&target());
        host.pass(milliseconds);
        let verdict = host.verify(&command);
        assert_eq!(verdict.is_ok(), accepted, "{milliseconds} ms: {verdict:?}");
        if milliseconds == 3_600_000 {
            let text = verdict.unwrap_err().to_string();
            assert!(text.contains("3600 s old, more than the 60 s allowed"), "{text}");
        }
        host.pass(-milliseconds);
    }
}

#[test]
fn each_kind_of_bad_signature_is_told_apart() {
    let host = Host::new();
    let code = |delivered: &Delivered| host.verify(delivered).unwrap_err().code();
    assert_eq!(code(&delivered(&target(), delete())), "unsigned");
    let with = |key: &str, value: Value| {
        let mut command = host.signed(&target());
        command.request.context.0[CONTEXT_KEY][key] = value;
        command
    };
    assert_eq!(code(&with("key", json!("0000000000000000"))), "unknown_key");
    assert_eq!(code(&with("signature", json!("AAAA"))), "bad_signature");
    assert_eq!(code(&with("signature", json!("not base64"))), "malformed_signature");
    assert_eq!(code(&with("nonce", json!("00"))), "malformed_signature");
    assert_eq!(code(&with("nonce", json!(3))), "malformed_signature");
    assert_eq!(code(&with("time", json!("yesterday"))), "malformed_signature");
    assert_eq!(code(&with("time", json!("2026-11-21T10:00:00+00:00"))), "malformed_signature");
    let mut strange = host.signed(&target());
    strange.request.context.0[CONTEXT_KEY] = json!([1, 2]);
    assert_eq!(code(&strange), "malformed_signature");
    let failure = Failure::from(Refusal::Replayed);
    assert_eq!(
        (failure.class.as_str(), &failure.kwargs["code"]),
        ("Forbidden", &json!("replayed"))
    );
}

#[test]
fn a_full_store_refuses_and_forgets_in_time() {
    let now = Arc::new(Mutex::new(Timestamp::UNIX_EPOCH));
    let read = Arc::clone(&now);
    let nonces = MemoryNonces::with_room(Arc::new(move || *read.lock().unwrap()), 2);
    let remember = |nonce: &str, expires: i64| {
        let expires = Timestamp::from_second(expires).unwrap();
        nonces.remember(nonce, expires).now_or_never().unwrap()
    };
    assert!(remember("a", 10).unwrap());
    assert!(!remember("a", 10).unwrap());
    assert!(remember("b", 20).unwrap());
    assert!(remember("c", 20).is_err());
    *now.lock().unwrap() = Timestamp::from_second(11).unwrap();
    assert!(remember("c", 20).unwrap());
    assert!(remember("d", 20).is_err());
}

#[test]
fn keys_are_changed_without_a_restart_and_a_bad_file_spoils_no_other() {
    let host = Host::new();
    let path = |name: &str| host.folder.path().join(name);
    let next = SigningKey::generate().unwrap();
    let clock: Clock = Arc::new(|| VECTOR_TIME.parse().unwrap());
    let signer = Signer::with_clock(next, clock);
    let by_next = || {
        let mut request = delete();
        signer.sign(&target(), &mut request);
        delivered(&target(), request)
    };
    assert!(matches!(host.verify(&by_next()), Err(Refusal::UnknownKey(_))));
    let public = signer.key.public("the next one");
    fs::write(path("two.pub"), format!("# rotation\n\n{public}\n")).unwrap();
    fs::write(path("bad.pub"), "ssh-rsa AAAA").unwrap();
    fs::write(path("latin.pub"), b"\xff\xfe").unwrap();
    fs::write(path("ignored.txt"), "whatever").unwrap();
    let trusted = TrustedKeys::of(host.folder.path());
    let problems = trusted.problems();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].contains("bad.pub: line 1: a public key is"), "{problems:?}");
    assert_eq!(trusted.all().len(), 2);

    stackhand_testkit::wait_for_sync(Duration::from_secs(10), "the new key", || {
        host.verify(&by_next()).ok()
    });
    host.verify(&host.signed(&target())).unwrap();
    fs::remove_file(path("one.pub")).unwrap();
    stackhand_testkit::wait_for_sync(Duration::from_secs(10), "the old key to go", || {
        host.verify(&host.signed(&target())).err()
    });
    host.verify(&by_next()).unwrap();
}

#[test]
fn a_folder_of_keys_that_comes_later_is_taken_up_and_one_that_goes_ends_the_trust() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("trusted_controllers");
    let trusted = TrustedKeys::of(&folder);
    let problems = trusted.problems();
    assert!(problems[0].contains("trusted_controllers: No such file"), "{problems:?}");
    fs::create_dir(&folder).unwrap();
    trusted.refresh();
    assert_eq!(trusted.problems(), Vec::<String>::new(), "empty is no problem of the folder");
    fs::write(folder.join("one.pub"), vector_key().public("").to_string()).unwrap();
    trusted.refresh();
    assert_eq!(trusted.all().len(), 1);
    fs::remove_dir_all(&folder).unwrap();
    trusted.refresh();
    assert_eq!((trusted.all().len(), trusted.problems().len()), (0, 1));
}

#[test]
fn a_private_key_is_kept_private() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key.pem");
    let key = SigningKey::generate().unwrap();
    key.save(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(SigningKey::load(&path).unwrap().id(), key.id());
    assert!(key.save(&path).is_err(), "a key is never written over");
    assert!(!format!("{key:?}").contains("PRIVATE"));
    for mode in [0o640, 0o604, 0o660] {
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        assert!(matches!(SigningKey::load(&path), Err(KeyError::Exposed { .. })), "{mode:o}");
    }
    let other = folder.path().join("other.pem");
    fs::write(&other, "no key").unwrap();
    fs::set_permissions(&other, Permissions::from_mode(0o600)).unwrap();
    assert!(matches!(SigningKey::load(&other), Err(KeyError::NotAKey { .. })));

    let line = key.public("  ops \n team ").to_string();
    let public: PublicKey = line.parse().unwrap();
    assert_eq!((public.comment(), public.id()), ("ops team", key.id()));
    for text in
        ["", "stackhand-ed25519", "stackhand-ed25519 AAAA", "rsa AAAA", "stackhand-ed25519 %"]
    {
        assert!(text.parse::<PublicKey>().is_err(), "{text:?}");
    }
}

/// Answers with the keys of the context it sees.
struct Seen;

impl Handler for Seen {
    fn handle(&self, delivered: Delivered) -> BoxFuture<'_, Result<Value, Failure>> {
        let keys: Vec<String> = delivered.request.context.0.keys().cloned().collect();
        std::future::ready(Ok(json!(keys))).boxed()
    }
}

#[tokio::test]
async fn the_guard_lets_through_what_is_open_vouched_for_or_signed() {
    let host = Host::new();
    let command = host.signed(&target());
    let verifier = Arc::new(host.verifier);
    let guard = VerifyingHandler::new(Arc::new(Seen), service(), Arc::clone(&verifier));
    let unsigned = delivered(&target(), delete());
    let failure = guard.handle(unsigned.clone()).await.unwrap_err();
    assert_eq!(
        (failure.class.as_str(), &failure.kwargs["code"]),
        ("Forbidden", &json!("unsigned"))
    );
    let mut ping = unsigned.clone();
    ping.request.method = "ping".into();
    guard.handle(ping.clone()).await.unwrap();
    for origin in [Origin::Memory, Origin::Local { uid: 0, gid: 0, pid: 1 }] {
        guard.handle(Delivered { origin, ..unsigned.clone() }).await.unwrap();
    }
    assert_eq!(guard.handle(command.clone()).await.unwrap(), json!(["request_id"]));
    assert!(guard.handle(command).await.is_err(), "a replay");

    let closed = VerifyingHandler::new(Arc::new(Seen), service(), Arc::clone(&verifier));
    assert!(closed.open_to_all([]).handle(ping).await.is_err());
    let off = VerifyingHandler::new(Arc::new(Seen), service(), verifier).required(false);
    off.handle(unsigned).await.unwrap();
}

#[tokio::test]
async fn a_signing_transport_signs_for_our_own_exchange_alone() {
    let broker = MemoryBroker::new();
    let mut servers = Vec::new();
    for exchange in ["stackhand", "nova"] {
        let service = Service { exchange: exchange.into(), ..service() };
        servers.push(broker.transport().serve(service, Arc::new(Seen)).await.unwrap());
    }
    let signer = Arc::new(Signer::new(vector_key()));
    let bus = SigningTransport::new(Arc::new(broker.transport()), signer, "stackhand");
    let ours = bus.call(&target(), delete(), CallLimits::default()).await.unwrap();
    assert_eq!(ours, json!(["request_id", CONTEXT_KEY]));
    let theirs = Target { exchange: "nova".into(), ..target() };
    let theirs = bus.call(&theirs, delete(), CallLimits::default()).await.unwrap();
    assert_eq!(theirs, json!(["request_id"]));
}

#[test]
fn keys_are_sorted_at_every_depth_whatever_order_they_came_in() {
    let value = json!({ "b": [{ "z": 1, "a": { "é": 2, "e": null } }], "a": 1.5, "B": "\u{1f}/" });
    let mut text = String::new();
    canonical(&value, &mut text);
    assert_eq!(text, r#"{"B":"\u001f/","a":1.5,"b":[{"a":{"e":null,"é":2},"z":1}]}"#);
}

/// Changes one place of a string into something else.
fn changed(text: &str, at: usize, to: char) -> String {
    let mut chars: Vec<char> = text.chars().collect();
    if chars.is_empty() {
        return to.to_string();
    }
    let at = at % chars.len();
    chars[at] = if chars[at] == to { 'ß' } else { to };
    chars.into_iter().collect()
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(".{0,4}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn any_command_that_was_signed_is_accepted_once_over_the_wire(
        method in "[a-z_]{1,12}",
        args in prop::collection::btree_map(".{0,6}", any_json(), 0..4),
        namespace in prop::option::of("[a-z]{1,6}"),
    ) {
        let host = Host::new();
        let mut target = target();
        target.namespace = namespace;
        let mut request = Request::new(&method, Value::Object(args.into_iter().collect()));
        host.signer.sign(&target, &mut request);
        let body = crate::wire::encode_request(&target, &request, "u", None);
        let frame = crate::wire::decode_request(&body).unwrap();
        let command = Delivered { namespace: frame.namespace, ..delivered(&target, frame.request) };
        prop_assert!(host.verify(&command).is_ok());
        prop_assert_eq!(host.verify(&command), Err(Refusal::Replayed));
    }

    #[test]
    fn any_change_of_any_signed_part_is_refused(part in 0..8_usize, at in 0..200_usize, to in any::<char>()) {
        let host = Host::new();
        let target = target().in_namespace("own");
        let mut command = host.signed(&target);
        let context = &mut command.request.context.0;
        let mut change = |key: &str| {
            let text = context[CONTEXT_KEY][key].as_str().unwrap();
            context[CONTEXT_KEY][key] = json!(changed(text, at, to));
        };
        match part {
            0 => command.request.method = changed(&command.request.method, at, to),
            1 => command.namespace = Some(changed("own", at, to)),
            2 => command.version.minor += 1,
            3 => {
                let text = Value::Object(command.request.args.clone()).to_string();
                let Ok(Value::Object(args)) = serde_json::from_str(&changed(&text, at, to)) else {
                    return Ok(());
                };
                // White space, or another spelling of the same value, is no change.
                prop_assume!(args != command.request.args);
                command.request.args = args;
            }
            4 => { context.insert("request_id".into(), changed("req-1", at, to).into()); }
            5 => change("time"),
            6 => change("nonce"),
            _ => change("signature"),
        }
        prop_assert!(host.verify(&command).is_err());
    }

    #[test]
    fn nothing_in_the_signature_makes_the_verifier_panic(value in any_json()) {
        let host = Host::new();
        let mut command = host.signed(&target());
        command.request.context.0.insert(CONTEXT_KEY.into(), value);
        prop_assert!(host.verify(&command).is_err());
    }
}
