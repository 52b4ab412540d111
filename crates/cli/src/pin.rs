//! Whom to believe: the server's own CA, seen once at login, shown by its fingerprint, accepted by a person, and the
//! only one ever after. No public CA and no system store has a say.

use std::{fmt, str::FromStr, sync::Arc};

use aws_lc_rs::digest;
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs as provider, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    version::TLS13,
};

use crate::error::CliError;

/// SHA-256 of a certificate (DER).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Of this certificate.
    pub(crate) fn of(der: &[u8]) -> Self {
        let digest = digest::digest(&digest::SHA256, der);
        Self(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
    }
}

impl fmt::Display for Fingerprint {
    /// As `openssl x509 -fingerprint -sha256` prints it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02X}", if i == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

impl FromStr for Fingerprint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || "a CA fingerprint is 64 hexadecimal digits (SHA-256), with or without colons".to_owned();
        let digits: Vec<u32> = text
            .chars()
            .filter(|c| *c != ':')
            .map(|c| c.to_digit(16).ok_or_else(wrong))
            .collect::<Result<_, _>>()?;
        let bytes: Vec<u8> =
            digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, d| byte << 4 | *d as u8)).collect();
        if digits.len() != 64 {
            return Err(wrong());
        }
        Ok(Self(bytes.try_into().map_err(|_| wrong())?))
    }
}

/// TLS 1.3 with this CA and no other.
pub(crate) fn pinned(ca_der: &[u8]) -> Result<Arc<ClientConfig>, CliError> {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from(ca_der.to_vec()))
        .map_err(|e| CliError::failed(format!("the server's CA certificate cannot be used: {e}")))?;
    let config = builder()?.with_root_certificates(roots).with_no_client_auth();
    Ok(Arc::new(config))
}

/// TLS 1.3 that believes anybody: for looking at the chain, before a single byte of ours is sent.
pub(crate) fn danger_look_only() -> Result<Arc<ClientConfig>, CliError> {
    let verifier = Arc::new(LookOnly { provider: Arc::new(provider::default_provider()) });
    Ok(Arc::new(builder()?.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth()))
}

fn builder() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, CliError> {
    ClientConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(|e| CliError::failed(format!("TLS 1.3 is not to be had: {e}")))
}

/// Whether the handshake failed because the other side is not the one that was accepted.
pub(crate) fn is_other_peer(error: &std::io::Error) -> bool {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    matches!(inner, Some(rustls::Error::InvalidCertificate(_)))
}

#[derive(Debug)]
struct LookOnly {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for LookOnly {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not offered".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprint_is_read_as_openssl_prints_it() {
        let print = Fingerprint::of(b"abc");
        // FIPS 180-4 example: SHA-256 of "abc".
        assert_eq!("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad".parse(), Ok(print));
        assert!(print.to_string().starts_with("BA:78:16:BF:"));
        assert_eq!(print.to_string().parse(), Ok(print));
    }

    #[test]
    fn fingerprint_of_another_length_is_refused() {
        for bad in ["", "ba78", &"a".repeat(63), &"a".repeat(65), &"g".repeat(64), &"ä".repeat(64)] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
    }
}
