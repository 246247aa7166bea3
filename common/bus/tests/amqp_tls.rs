//! TLS towards a real broker, with certificates made on the spot.

#![expect(clippy::disallowed_methods, reason = "runs openssl to make certificates")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use stackhand_bus::amqp::{AmqpOptions, AmqpTransport};
use stackhand_bus::{BusError, LinkState, Transport};
use stackhand_testkit::broker::{Broker, BrokerSettings, TlsFiles};
use support::*;

const LIMIT: Duration = Duration::from_secs(20);

fn openssl(folder: &Path, arguments: &str) {
    let output =
        Command::new("openssl").args(arguments.split(' ')).current_dir(folder).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "openssl {arguments}: {said}");
}

/// An authority, a certificate for the broker under `broker.example` only, one for a client,
/// and an authority that nobody knows.
fn make_certificates(folder: &Path) {
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    for authority in ["ca", "stranger"] {
        openssl(
            folder,
            &format!(
                "req -x509 {key} -days 2 -subj /CN={authority} -keyout {authority}.key -out {authority}.pem"
            ),
        );
    }
    for (name, usage) in [("broker", "serverAuth"), ("client", "clientAuth")] {
        std::fs::write(
            folder.join(format!("{name}.ext")),
            format!("subjectAltName=DNS:{name}.example\nextendedKeyUsage={usage}\n"),
        )
        .unwrap();
        openssl(folder, &format!("req {key} -subj /CN={name} -keyout {name}.key -out {name}.csr"));
        openssl(
            folder,
            &format!(
                "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
                 -extfile {name}.ext -out {name}.pem"
            )
            .replace("  ", " "),
        );
    }
}

#[test]
fn a_broker_is_trusted_by_authority_and_by_name() {
    let folder = tempfile::tempdir().unwrap();
    make_certificates(folder.path());
    let file = |name: &str| folder.path().join(name);
    let broker = Broker::start_with(&BrokerSettings {
        nodes: 1,
        tls: Some(TlsFiles {
            ca: file("ca.pem"),
            certificate: file("broker.pem"),
            key: file("broker.key"),
            verify_client: true,
        }),
    });
    let url = format!("rabbits://guest:guest@127.0.0.1:{}/", broker.tls_port(0));
    let path = |name: &str| Some(file(name).display().to_string());
    // The certificate is for broker.example, and this machine's resolver does not know it: the
    // name is checked by the case that must fail over it.
    let trusting = AmqpOptions {
        tls_ca_file: path("ca.pem"),
        tls_cert_file: path("client.pem"),
        tls_key_file: path("client.key"),
        tls_enforce_hostname_verification: false,
        ..AmqpOptions::default()
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let server = serve(&url, &trusting, "t-tls", 4).await;
        let client = transport(&url, &trusting);
        let args = json!({"blob": "x".repeat(1024 * 1024)});
        assert_eq!(call(&client, "t-tls", "echo", args.clone()).await.unwrap(), args);

        for (wrong, reason) in [
            (
                AmqpOptions { tls_enforce_hostname_verification: true, ..trusting.clone() },
                "not valid for name",
            ),
            (
                AmqpOptions { tls_ca_file: path("stranger.pem"), ..trusting.clone() },
                "UnknownIssuer",
            ),
        ] {
            let client = transport(&url, &wrong);
            let mut link = client.link();
            let told = link.wait_for(
                |state| matches!(state, LinkState::Down { reason: told } if told.contains(reason)),
            );
            let told = tokio::time::timeout(LIMIT, told).await;
            assert!(told.is_ok(), "{reason}: {:?}", client.link().borrow());
            let refused = call(&client, "t-tls", "echo", json!({})).await;
            assert!(matches!(refused, Err(BusError::Refused { .. })), "{refused:?}");
        }

        // The broker wants a certificate of ours.
        let nameless = AmqpOptions { tls_cert_file: None, tls_key_file: None, ..trusting.clone() };
        let client = transport(&url, &nameless);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(matches!(*client.link().borrow(), LinkState::Down { .. }));

        for wrong in [
            AmqpOptions { tls_ca_file: path("nowhere.pem"), ..trusting.clone() },
            AmqpOptions { tls_ca_file: path("ca.key"), ..trusting.clone() },
            AmqpOptions { tls_key_file: path("ca.pem"), ..trusting.clone() },
            AmqpOptions { tls_key_file: path("ca.key"), ..trusting.clone() },
        ] {
            let refused = AmqpTransport::connect(url.parse().unwrap(), &wrong);
            assert!(matches!(refused, Err(BusError::Config(_))), "{refused:?}");
        }
        drop(server);
    });
}
