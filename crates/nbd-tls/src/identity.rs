//! Who we are to clients, and whose clients we believe: certificate, private key, authority. Files in, what TLS needs out.
//!
//! TLS 1.3 only, by aws-lc-rs; no resumption, so that each connection shows its certificate anew; no early data.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    os::{
        fd::FromRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject as _},
    server::{NoServerSessionStorage, VerifierBuilderError},
};
use zeroize::Zeroizing;

use crate::{
    clients::Clients,
    options::{KeySource, Options},
};

/// Longest file that is read: certificates and a key are a few thousand bytes.
const MOST_BYTES: u64 = 1 << 20;

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// A file or descriptor.
    #[error("{what} {from} cannot be read: {cause}")]
    Read {
        /// What it was to be.
        what: &'static str,
        /// Its path or number.
        from: String,
        /// Why.
        cause: io::Error,
    },
    /// Others may read the key.
    #[error(
        "the private key {} can be read by others than its owner (mode {mode:o}); run `chmod 0600` on it, and consider a new key",
        path.display()
    )]
    KeyOpen {
        /// Its path.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Somebody else's key.
    #[error("the private key {} belongs to user {owner}; it must be root's or your own", path.display())]
    KeyOwner {
        /// Its path.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// Not PEM, or nothing of the kind in it.
    #[error("{what} {from} holds none in PEM: {cause}")]
    Pem {
        /// What it was to be.
        what: &'static str,
        /// Its path or number.
        from: String,
        /// Why.
        cause: pem::Error,
    },
    /// A root that is none.
    #[error("a certificate in --client-ca cannot be an authority: {0}")]
    Root(rustls::Error),
    /// The verifier of clients.
    #[error("clients cannot be verified: {0}")]
    Verifier(#[from] VerifierBuilderError),
    /// Certificate and key do not belong together, or cannot be used.
    #[error("certificate and private key cannot be used: {0}")]
    Tls(#[from] rustls::Error),
}

/// Reads everything; needs no privilege afterwards.
///
/// # Errors
///
/// [`IdentityError`]: which file, and what to do.
pub fn load(options: &Options) -> Result<Arc<ServerConfig>, IdentityError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for authority in certificates("client CA", &options.client_ca)? {
        roots.add(authority).map_err(IdentityError::Root)?;
    }
    let clients = Clients::new(roots, options.allow.clone(), Arc::clone(&provider))?;
    let chain = certificates("certificate", &options.certificate)?;
    let key = private_key(&options.key)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(clients))
        .with_single_cert(chain, key)?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let from = path.display().to_string();
    let read = |cause| IdentityError::Read { what, from: from.clone(), cause };
    let bytes = File::open(path).and_then(|file| whole(&file)).map_err(read)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if found.is_empty() => Err(pem::Error::NoItemsFound),
        found => found,
    }
    .map_err(|cause| IdentityError::Pem { what, from: from.clone(), cause })
}

fn private_key(source: &KeySource) -> Result<PrivateKeyDer<'static>, IdentityError> {
    let what = "private key";
    let (from, file) = match source {
        KeySource::File(path) => (path.display().to_string(), open_key(path)?),
        KeySource::Descriptor(number) => {
            let from = format!("fd:{number}");
            // SAFETY: an integer.
            if unsafe { libc::fcntl(*number, libc::F_GETFD) } < 0 {
                return Err(IdentityError::Read { what, from, cause: io::Error::last_os_error() });
            }
            // SAFETY: it is open, and was handed over to be read to its end and closed; nothing else here uses it.
            (from, unsafe { File::from_raw_fd(*number) })
        }
    };
    let bytes = whole(&file).map_err(|cause| IdentityError::Read { what, from: from.clone(), cause })?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|cause| IdentityError::Pem { what, from, cause })
}

/// Opens a key's file, if nobody but its owner may read it.
fn open_key(path: &Path) -> Result<File, IdentityError> {
    let read = |cause| IdentityError::Read { what: "private key", from: path.display().to_string(), cause };
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(read)?;
    let about = file.metadata().map_err(read)?;
    // SAFETY: geteuid has no arguments and cannot fail.
    let own = unsafe { libc::geteuid() };
    if about.mode() & 0o077 != 0 {
        return Err(IdentityError::KeyOpen { path: path.to_owned(), mode: about.mode() & 0o7777 });
    }
    if ![0, own].contains(&about.uid()) {
        return Err(IdentityError::KeyOwner { path: path.to_owned(), owner: about.uid() });
    }
    Ok(file)
}

/// The whole of a short file, in memory that is cleared and never moved.
fn whole(file: &File) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(64 << 10));
    let room = bytes.capacity() as u64;
    if file.take(room).read_to_end(&mut bytes)? as u64 == room {
        // Longer than a key ever is; certificates may move.
        file.take(MOST_BYTES).read_to_end(&mut bytes)?;
    }
    match bytes.len() as u64 {
        ..MOST_BYTES => Ok(bytes),
        _ => Err(io::Error::new(io::ErrorKind::FileTooLarge, "too long for what it is to be")),
    }
}
