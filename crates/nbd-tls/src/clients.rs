//! Which client may use the export: one with a valid certificate of the given authority and, if there is a list, with one
//! of the listed names.

use std::{fmt, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, UnixTime},
    server::{
        VerifierBuilderError, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use webpki::EndEntityCert;

use crate::subject::common_name;

/// Most names of a certificate that are shown in a line.
const SHOWN: usize = 4;

/// rustls' check of a certificate, then ours of its names.
#[derive(Debug)]
pub struct Clients {
    chain: Arc<dyn ClientCertVerifier>,
    allowed: Vec<String>,
}

impl Clients {
    /// Clients of these authorities; of these names only, unless there are none.
    ///
    /// # Errors
    ///
    /// No authority among `roots`.
    pub fn new(
        roots: RootCertStore,
        allowed: Vec<String>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, VerifierBuilderError> {
        let chain = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
        Ok(Self { chain, allowed })
    }
}

impl ClientCertVerifier for Clients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        if self.allowed.is_empty() {
            return Ok(verified);
        }
        let names = Names::of(end_entity);
        if self.allowed.iter().any(|allowed| names.has(allowed)) {
            return Ok(verified);
        }
        Err(CertificateError::Other(OtherError(Arc::new(NotAllowed(names)))).into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// What a certificate calls its holder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    common: Option<String>,
    dns: Vec<String>,
}

impl Names {
    /// Those in a certificate; none if it cannot be read.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let Ok(certificate) = EndEntityCert::try_from(certificate) else { return Self::default() };
        let common = common_name(certificate.subject()).map(str::to_owned);
        Self { common, dns: certificate.valid_dns_names().map(str::to_owned).collect() }
    }

    /// Whether this is one of them. DNS names ignore case, and a wildcard is a name like another: it stands for a
    /// server's names, not for whom a client may be.
    fn has(&self, name: &str) -> bool {
        self.common.as_deref() == Some(name) || self.dns.iter().any(|dns| dns.eq_ignore_ascii_case(name))
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.common {
            Some(common) => write!(f, "CN {common:?}")?,
            None => f.write_str("no CN")?,
        }
        self.dns.iter().take(SHOWN).try_for_each(|dns| write!(f, ", DNS {dns:?}"))
    }
}

/// A valid certificate of somebody who is not on the list.
#[derive(Debug, thiserror::Error)]
#[error("its certificate is valid, but none of its names ({0}) was given with --allow")]
pub struct NotAllowed(Names);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_is_the_common_name_or_a_dns_name_and_nothing_like_it() {
        let names = Names { common: Some("hv1".into()), dns: vec!["HV1.example".into(), "*.wild".into()] };
        for name in ["hv1", "hv1.example", "*.wild"] {
            assert!(names.has(name), "{name}");
        }
        for name in ["HV1", "hv1.example.org", "example", "a.wild", ""] {
            assert!(!names.has(name), "{name}");
        }
        assert!(!Names::default().has(""));
    }

    #[test]
    fn names_are_shown_on_one_line_whatever_is_in_them() {
        let names = Names { common: Some("a\nb".into()), dns: vec!["c".into(); 9] };
        assert_eq!(names.to_string(), "CN \"a\\nb\", DNS \"c\", DNS \"c\", DNS \"c\", DNS \"c\"");
    }
}
