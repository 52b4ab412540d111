//! Joining a server: a one-line token in, the host's identity on disk out.
//!
//! The token names the server's CA by its fingerprint. A first handshake only fetches the certificate chain and sends
//! nothing; the secret goes over a second one, verified against that CA. The host's private key is made here and
//! leaves in no form. Joining again with a token of the same server changes nothing and spends nothing.

use std::{path::Path, sync::Arc, time::Duration};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use rcgen::{CertificateParams, DnType, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;
use vmseal_api::{
    agent::v1::{JoinRequest, agent_gate_client::AgentGateClient},
    join::{JOIN_TOKEN_PREFIX, JoinClaims, SERVER_NAME},
};
use vmseal_model::id::HostId;
use zeroize::Zeroizing;

use crate::{
    causes::causes,
    identity::{HostIdentity, IdentityError, JoinedHost, hostname, machine_id},
    session,
};

/// How long each of the two connections may take.
const ANSWER: Duration = Duration::from_secs(15);
/// Longest token that is read.
const MAX_TOKEN: usize = 8192;

/// How joining ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Joined {
    /// The host is new to the server.
    Now(HostId),
    /// It had joined this server before; the token was not used.
    Before(HostId),
}

/// Why it did not.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// Not what `vmseal host add` prints.
    #[error("this is no join token ({reason}); copy the whole line that 'vmseal host add' printed")]
    Token {
        /// What is wrong.
        reason: &'static str,
    },
    /// The host belongs to another server.
    #[error(
        "this host has joined the server at {server} as host {host}; to have it join another one, stop vmseal-agent \
         and remove {}", pki.display()
    )]
    OtherServer {
        /// Which.
        server: String,
        /// As which.
        host: HostId,
        /// The directory of its identity.
        pki: std::path::PathBuf,
    },
    /// Nobody there, or something else than a TLS server.
    #[error(
        "the vmseal server at {address} cannot be reached: {reason}; is it running, and is the port open?"
    )]
    Unreachable {
        /// Where.
        address: String,
        /// Why.
        reason: String,
    },
    /// Somebody else.
    #[error(
        "the server at {address} does not have the certificate authority that the token names; somebody stands in \
         between, or the server was set up anew: make a new token with 'vmseal host add'"
    )]
    Authority {
        /// Where.
        address: String,
    },
    /// It said no.
    #[error("the vmseal server at {address} refused: {reason}")]
    Refused {
        /// Where.
        address: String,
        /// In its words.
        reason: String,
    },
    /// The answer is not one.
    #[error("the answer of the vmseal server at {address} is not understood: {reason}")]
    Answer {
        /// Where.
        address: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// No key.
    #[error("cannot make the host's key")]
    Key(#[from] rcgen::Error),
    /// TLS.
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    /// The files.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Joins, and keeps the identity under `state_dir`.
///
/// # Errors
///
/// [`JoinError`]; the host is as before.
pub async fn join(token: &str, state_dir: &Path) -> Result<Joined, JoinError> {
    let claims = claims(token)?;
    if let Some(joined) = JoinedHost::load(state_dir)? {
        // An identity that cannot be read whole is no reason to believe that the host has joined.
        return if joined.ca_sha256 == claims.ca_sha256 && HostIdentity::load(state_dir)?.is_some() {
            Ok(Joined::Before(joined.host))
        } else {
            let pki = crate::identity::pki_dir(state_dir);
            Err(JoinError::OtherServer { server: joined.server, host: joined.host, pki })
        };
    }
    let address = claims.address.clone();
    let ca_pem = fetch_authority(&claims).await?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut request = CertificateParams::default();
    request.distinguished_name.push(DnType::CommonName, hostname());
    let csr_pem = request.serialize_request(&key)?.pem()?;

    let unreachable = |reason: String| JoinError::Unreachable { address: address.clone(), reason };
    let channel = session::channel(&address, &ca_pem, None).map_err(|e| unreachable(causes(&*e)))?;
    let channel = channel.connect().await.map_err(|e| unreachable(causes(&e)))?;
    let request = JoinRequest {
        secret: claims.secret.expose().to_owned(),
        csr_pem,
        hostname: hostname(),
        machine_id: machine_id(),
    };
    let reply = timeout(ANSWER, AgentGateClient::new(channel).join(request))
        .await
        .map_err(|e| unreachable(e.to_string()))?
        .map_err(|status| JoinError::Refused {
            address: address.clone(),
            reason: status.message().to_owned(),
        })?
        .into_inner();
    let wrong = |reason| JoinError::Answer { address: address.clone(), reason };
    let host = reply.host_id.parse().map_err(|_| wrong("it gives no host id"))?;
    if !reply.certificate_pem.contains("BEGIN CERTIFICATE") {
        return Err(wrong("it gives no certificate"));
    }
    let identity = HostIdentity {
        host: JoinedHost { host, server: address, ca_sha256: claims.ca_sha256 },
        certificate_pem: reply.certificate_pem,
        key_pem: key.serialize_pem(),
        ca_pem,
    };
    identity.save(state_dir)?;
    Ok(Joined::Now(host))
}

/// The inside of a token.
fn claims(token: &str) -> Result<JoinClaims, JoinError> {
    let wrong = |reason| JoinError::Token { reason };
    let token = token.trim();
    if token.len() > MAX_TOKEN {
        return Err(wrong("it is too long"));
    }
    let packed = token.strip_prefix(JOIN_TOKEN_PREFIX).ok_or(wrong("it does not begin with 'vmseal1.'"))?;
    let json = Zeroizing::new(URL_SAFE_NO_PAD.decode(packed).map_err(|_| wrong("it is cut off or altered"))?);
    let mut claims: JoinClaims =
        serde_json::from_slice(&json).map_err(|_| wrong("it is cut off or altered"))?;
    claims.ca_sha256.make_ascii_lowercase();
    let hex = claims.ca_sha256.len() == 64 && claims.ca_sha256.bytes().all(|b| b.is_ascii_hexdigit());
    let address = claims.address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    if hex && address { Ok(claims) } else { Err(wrong("it names no address or no certificate authority")) }
}

/// The CA certificate that the token names, out of the server's chain, as PEM.
async fn fetch_authority(claims: &JoinClaims) -> Result<String, JoinError> {
    let address = &claims.address;
    let unreachable = |reason: String| JoinError::Unreachable { address: address.clone(), reason };
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = Arc::new(DangerFetchChain { provider: Arc::clone(&provider) });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = ServerName::try_from(SERVER_NAME).expect("the server's name is a DNS name");
    let handshake = async {
        let tcp = TcpStream::connect(address.as_str()).await?;
        TlsConnector::from(Arc::new(config)).connect(name, tcp).await
    };
    let stream = timeout(ANSWER, handshake)
        .await
        .map_err(|e| unreachable(e.to_string()))?
        .map_err(|e| unreachable(causes(&e)))?;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let authority = chain.iter().find(|certificate| sha256_hex(certificate) == claims.ca_sha256);
    authority.map(pem).ok_or_else(|| JoinError::Authority { address: address.clone() })
}

fn sha256_hex(bytes: &[u8]) -> String {
    let digest = ::aws_lc_rs::digest::digest(&::aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

fn pem(der: &CertificateDer<'_>) -> String {
    let packed = STANDARD.encode(der);
    let mut text = "-----BEGIN CERTIFICATE-----\n".to_owned();
    for line in packed.as_bytes().chunks(64) {
        text.extend(line.iter().map(|b| char::from(*b)));
        text.push('\n');
    }
    text + "-----END CERTIFICATE-----\n"
}

/// Accepts whoever answers, for a handshake that sends nothing and only looks at the chain. Who it is shows in the
/// fingerprint of the CA, and in the second handshake, which that CA verifies.
#[derive(Debug)]
struct DangerFetchChain {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for DangerFetchChain {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
