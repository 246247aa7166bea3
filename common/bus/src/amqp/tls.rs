//! TLS towards the broker: rustls with ring, trust from a file or from the system.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};

use crate::BusError;
use crate::amqp::AmqpOptions;

/// Where distributions keep the authorities they trust.
const SYSTEM_BUNDLES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// Builds the client side from options. Files are read now, so that mistakes show at start.
///
/// # Errors
///
/// [`BusError::Config`] naming the file and what is wrong with it.
pub(super) fn client_config(options: &AmqpOptions) -> Result<Arc<ClientConfig>, BusError> {
    let wrong = |what: String| BusError::Config(format!("TLS: {what}"));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = Arc::new(roots(options.tls_ca_file.as_deref()).map_err(wrong)?);
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider))
        .build()
        .map_err(|error| wrong(format!("cannot use the trusted certificates: {error}")))?;
    let verifier: Arc<dyn ServerCertVerifier> = if options.tls_enforce_hostname_verification {
        verifier
    } else {
        Arc::new(AnyName(verifier))
    };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let config = match (&options.tls_cert_file, &options.tls_key_file) {
        (Some(certificate), Some(key)) => {
            let chain = certificates(certificate).map_err(wrong)?;
            let secret = PrivateKeyDer::from_pem_file(key)
                .map_err(|error| wrong(format!("cannot read a key from {key}: {error}")))?;
            config.with_client_auth_cert(chain, secret).map_err(|error| {
                wrong(format!("the certificate {certificate} and key {key} do not fit: {error}"))
            })?
        }
        _ => config.with_no_client_auth(),
    };
    Ok(Arc::new(config))
}

fn roots(file: Option<&str>) -> Result<RootCertStore, String> {
    let file = match file {
        Some(file) => file,
        None => SYSTEM_BUNDLES.into_iter().find(|path| Path::new(path).exists()).ok_or(
            "this system has no bundle of trusted certificates; install ca-certificates \
             or set tls_ca_file",
        )?,
    };
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates(file)?);
    if roots.is_empty() {
        return Err(format!("{file} holds no certificate that can be trusted"));
    }
    Ok(roots)
}

fn certificates(file: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect)
        .map_err(|error| format!("cannot read certificates from {file}: {error}"))
}

/// Checks everything but the name, for brokers whose certificates carry none of ours.
struct AnyName(Arc<WebPkiServerVerifier>);

impl fmt::Debug for AnyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AnyName")
    }
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified =
            self.0.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        match verified {
            // The name is looked at last, after chain, validity and usage.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
