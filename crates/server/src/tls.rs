//! TLS of both ports: 1.3 only, by aws-lc-rs, with a certificate of the installation's own authority.

use std::sync::{Arc, PoisonError, RwLock};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::PrivateKeyDer,
    server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier},
    sign::CertifiedKey,
};

use crate::ca::{Ca, CaError};

/// The server's certificate, replaced while it serves.
#[derive(Debug)]
pub struct Presented(RwLock<Arc<CertifiedKey>>);

impl Presented {
    /// A new certificate for these names.
    pub fn new(ca: &Ca, names: &[String], now_ms: i64) -> Result<Self, TlsError> {
        Ok(Self(RwLock::new(certify(ca, names, now_ms)?)))
    }

    /// Replaces it by a new one.
    pub fn renew(&self, ca: &Ca, names: &[String], now_ms: i64) -> Result<(), TlsError> {
        let new = certify(ca, names, now_ms)?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }
}

impl ResolvesServerCert for Presented {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

fn certify(ca: &Ca, names: &[String], now_ms: i64) -> Result<Arc<CertifiedKey>, TlsError> {
    let made = ca.server_certificate(names, now_ms)?;
    let key = PrivateKeyDer::from(made.key);
    Ok(Arc::new(CertifiedKey::from_der(made.chain, key, &provider())?))
}

fn provider() -> CryptoProvider {
    aws_lc_rs::default_provider()
}

/// For the HTTPS API: nobody is asked for a certificate.
pub fn https(presented: Arc<Presented>) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(presented);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// For the agents' gate: who has a certificate must have one of `ca`; who has none can only join.
pub fn gate(presented: Arc<Presented>, ca: &Ca) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(provider());
    let mut roots = RootCertStore::empty();
    roots.add(ca.der().clone())?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .map_err(|e| TlsError::Verifier(e.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(presented);
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The authority made no certificate.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// rustls refused.
    #[error("TLS cannot be set up")]
    Rustls(#[from] rustls::Error),
    /// The verifier of clients cannot be built.
    #[error("TLS cannot be set up: {0}")]
    Verifier(String),
}
