//! The certificate authority of this installation: ECDSA P-256, its private key sealed under the root key.
//!
//! It signs two things: certificates of hosts that joined, and the certificate of the server's own ports. A host's
//! certificate is good for as long as the host is known by its digest; removing the host ends it at once. The
//! server's certificate is made anew at every start and before it expires: agents and clients trust the authority.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, pem::PemObject as _};
use vmseal_keys::{SecretError, random_bytes};
use vmseal_model::id::HostId;

use crate::{
    digest::sha256_hex,
    sealing::{SealError, Sealer},
};

const DAY_MS: i64 = 24 * 3_600_000;
const CA_DAYS: i64 = 20 * 365;
const HOST_DAYS: i64 = 10 * 365;
/// How long a server certificate is good.
pub const SERVER_DAYS: i64 = 365;
const PURPOSE: &str = "ca-key";

/// The authority, able to sign.
pub struct Ca {
    der: CertificateDer<'static>,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A host's certificate.
pub struct HostCertificate {
    /// PEM.
    pub pem: String,
    /// SHA-256 of the DER, hexadecimal digits.
    pub sha256: String,
    /// When it expires.
    pub expires_ms: i64,
}

/// The server's certificate, with its key.
pub struct ServerCertificate {
    /// The certificate, then the authority's: a host that joins takes that out of the handshake.
    pub chain: Vec<CertificateDer<'static>>,
    /// PKCS#8.
    pub key: PrivatePkcs8KeyDer<'static>,
}

impl Ca {
    /// Reads the authority from `dir`, or makes it if there is none and no database needs it.
    pub fn open(
        dir: &Path,
        sealer: &Sealer,
        server_id: &str,
        needed: bool,
        now_ms: i64,
    ) -> Result<Self, CaError> {
        let (certificate, key) = (dir.join("ca.pem"), dir.join("ca.key"));
        let read = |path: &Path| match fs::read(path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(CaError::File { path: path.to_owned(), source }),
        };
        match (read(&certificate)?, read(&key)?) {
            (Some(pem), Some(sealed)) => {
                let pem = String::from_utf8_lossy(&pem).into_owned();
                let pkcs8 = sealer.open(PURPOSE, pem.as_bytes(), &sealed)?;
                Self::of(pem, &PrivatePkcs8KeyDer::from(pkcs8.as_slice()))
            }
            // The key is written first.
            (None, lone) if !needed => {
                let (pem, pair) = create(server_id, now_ms)?;
                let sealed = sealer.seal(PURPOSE, pem.as_bytes(), pair.serialized_der())?;
                if lone.is_some() {
                    fs::remove_file(&key).map_err(|source| CaError::File { path: key.clone(), source })?;
                }
                write(&key, &sealed, 0o600)?;
                write(&certificate, pem.as_bytes(), 0o644)?;
                Self::of(pem, &PrivatePkcs8KeyDer::from(pair.serialized_der()))
            }
            (None, _) => Err(CaError::Lost { path: certificate }),
            (_, None) => Err(CaError::Lost { path: key }),
        }
    }

    fn of(pem: String, key: &PrivatePkcs8KeyDer<'_>) -> Result<Self, CaError> {
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| CaError::Pem(e.to_string()))?;
        let pair = KeyPair::from_pkcs8_der_and_sign_algo(key, &PKCS_ECDSA_P256_SHA256)?;
        let issuer = Issuer::from_ca_cert_der(&der, pair)?;
        Ok(Self { der, pem, issuer })
    }

    /// Its certificate, PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Its certificate, DER.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// SHA-256 of its certificate (DER), hexadecimal digits: what join tokens carry.
    pub fn fingerprint(&self) -> String {
        sha256_hex(&self.der)
    }

    /// Signs the public key of a host's request; nothing else of the request is taken over.
    pub fn sign_host(&self, csr_pem: &str, host: HostId, now_ms: i64) -> Result<HostCertificate, CaError> {
        let request = CertificateSigningRequestParams::from_pem(csr_pem).map_err(CaError::Request)?;
        if request.public_key.algorithm() != &PKCS_ECDSA_P256_SHA256 {
            return Err(CaError::Algorithm);
        }
        let expires_ms = now_ms.saturating_add(HOST_DAYS * DAY_MS);
        let mut params = leaf(&host.to_string(), ExtendedKeyUsagePurpose::ClientAuth, now_ms, expires_ms)?;
        params.distinguished_name.push(DnType::OrganizationName, "vmseal host");
        let certificate = params.signed_by(&request.public_key, &self.issuer)?;
        Ok(HostCertificate { pem: certificate.pem(), sha256: sha256_hex(certificate.der()), expires_ms })
    }

    /// A certificate for the server under these names and addresses, with a new key.
    pub fn server_certificate(&self, names: &[String], now_ms: i64) -> Result<ServerCertificate, CaError> {
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let expires_ms = now_ms.saturating_add(SERVER_DAYS * DAY_MS);
        let mut params = leaf("vmseal server", ExtendedKeyUsagePurpose::ServerAuth, now_ms, expires_ms)?;
        params.subject_alt_names = CertificateParams::new(names.to_vec())?.subject_alt_names;
        let certificate = params.signed_by(&pair, &self.issuer)?;
        Ok(ServerCertificate {
            chain: vec![certificate.der().clone(), self.der.clone()],
            key: PrivatePkcs8KeyDer::from(pair.serialize_der()),
        })
    }
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ca({})", self.fingerprint())
    }
}

fn create(server_id: &str, now_ms: i64) -> Result<(String, KeyPair), CaError> {
    let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("vmseal CA {server_id}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid(&mut params, now_ms, now_ms.saturating_add(CA_DAYS * DAY_MS))?;
    let certificate: Certificate = params.self_signed(&pair)?;
    Ok((certificate.pem(), pair))
}

fn leaf(
    name: &str,
    usage: ExtendedKeyUsagePurpose,
    now_ms: i64,
    expires_ms: i64,
) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    valid(&mut params, now_ms, expires_ms)?;
    Ok(params)
}

fn valid(params: &mut CertificateParams, now_ms: i64, expires_ms: i64) -> Result<(), CaError> {
    let at =
        |ms: i64| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_millis(u64::try_from(ms).unwrap_or(0));
    // A host whose clock is an hour behind must not refuse it.
    params.not_before = at(now_ms - 3_600_000);
    params.not_after = at(expires_ms);
    let mut serial = random_bytes::<16>()?;
    // A serial number is positive and starts with no zero byte (RFC 5280 §4.1.2.2).
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(())
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), CaError> {
    let at = |source| CaError::File { path: path.to_owned(), source };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(at)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(at)?;
    match path.parent() {
        Some(dir) => File::open(dir).and_then(|d| d.sync_all()).map_err(at),
        None => Ok(()),
    }
}

/// Why there is no authority, or why it did not sign.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaError {
    /// One half is gone.
    #[error(
        "{path} is gone, and hosts trust it: put it back from your backup. Without it every host has to join again: \
         then move the state directory away and import the providers"
    )]
    Lost {
        /// What.
        path: PathBuf,
    },
    /// It cannot be read or written.
    #[error("the certificate authority's file {path} cannot be used")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not a certificate.
    #[error("ca.pem does not read: {0}")]
    Pem(String),
    /// Another root key, or changed.
    #[error("the certificate authority's private key does not open")]
    Sealed(#[from] SealError),
    /// The request does not read, or its signature is wrong.
    #[error("the certificate request is not valid")]
    Request(#[source] rcgen::Error),
    /// The request is for another kind of key.
    #[error("the certificate request is not for an ECDSA P-256 key")]
    Algorithm,
    /// The library did not sign.
    #[error("the certificate was not made")]
    Sign(#[from] rcgen::Error),
    /// No randomness.
    #[error(transparent)]
    Memory(#[from] SecretError),
}
