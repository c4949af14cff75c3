//! Implements TLS to PostgreSQL with the meaning of libpq's `sslmode`, and explains certificate
//! errors in plain words.

use crate::cluster::postgres::datastore_error::{DatastoreError, DatastoreFault};
use crate::config::{Datastore, SslMode};
use crate::domain::Side;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

/// Returns the TLS configuration for this server. Files are read again each time, so that a rotated
/// certificate needs no restart.
pub(in crate::cluster) fn client_config(
    side: Side,
    to: &Datastore,
) -> Result<ClientConfig, DatastoreError> {
    let fail =
        |text: String| DatastoreError::new(side, to, DatastoreFault::Tls, "preparing TLS", text);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    // libpq does the same: a given root certificate is checked under `require` too.
    let checks = match to.ssl_mode {
        SslMode::VerifyFull => Some(true),
        SslMode::VerifyCa => Some(false),
        SslMode::Require if to.ssl_root_cert.is_some() => Some(false),
        _ => None,
    };
    let verifier: Arc<dyn ServerCertVerifier> = match checks {
        None => Arc::new(AnyCertificate(provider.clone())),
        Some(check_name) => {
            let roots = match &to.ssl_root_cert {
                Some(path) => roots_of_file(path).map_err(fail)?,
                None => system_roots().map_err(fail)?,
            };
            let inner =
                WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                    .build()
                    .map_err(|e| fail(e.to_string()))?;
            Arc::new(Authority { inner, check_name })
        }
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| fail(e.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    match (&to.ssl_cert, &to.ssl_key) {
        (Some(cert), Some(key)) => {
            let chain = certificates(cert).map_err(fail)?;
            let key = PrivateKeyDer::from_pem_file(key)
                .map_err(|e| fail(format!("{}: {e}", key.display())))?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|e| fail(e.to_string()))
        }
        _ => Ok(builder.with_no_client_auth()),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|e| format!("{}: {e}", path.display()))
}

fn roots_of_file(path: &Path) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|e| format!("{}: {e}", path.display()))?;
    }
    if roots.is_empty() {
        return Err(format!("{}: no certificate in it", path.display()));
    }
    Ok(roots)
}

fn system_roots() -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    // A bundle may hold certificates that rustls does not accept as roots; the others are used.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        return Err("this system has no certificate authorities; give one in ssl_root_cert".into());
    }
    Ok(roots)
}

/// Writes the certificate authorities of this system as one PEM file, for programs that would look
/// for their own.
pub(in crate::cluster) fn write_system_authorities(file: &mut impl Write) -> io::Result<()> {
    for certificate in rustls_native_certs::load_native_certs().certs {
        let text = STANDARD.encode(&certificate);
        writeln!(file, "-----BEGIN CERTIFICATE-----")?;
        for line in text.as_bytes().chunks(64) {
            file.write_all(line)?;
            writeln!(file)?;
        }
        writeln!(file, "-----END CERTIFICATE-----")?;
    }
    file.flush()
}

/// `require` and `prefer`: encrypted, but the server's identity is not proven.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// `verify-ca` (any name) and `verify-full`.
#[derive(Debug)]
struct Authority {
    inner: Arc<WebPkiServerVerifier>,
    check_name: bool,
}

impl ServerCertVerifier for Authority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verdict =
            self.inner
                .verify_server_cert(end_entity, intermediates, server_name, ocsp, now);
        match verdict {
            // The chain is checked before the name, so a wrong name means that the chain was good.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.check_name => Ok(ServerCertVerified::assertion()),
            Ok(_) if self.check_name => {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                verdict
            }
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
