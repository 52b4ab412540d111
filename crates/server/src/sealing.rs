//! What the server seals of its own under the root key: its CA's private key, answers that hold a secret.
//!
//! (KDKs are sealed by the provider that has them.) Here is also how the root key is found. A database without its
//! root key is not opened: a new one would lose every native key silently.

use std::{
    io,
    path::{Path, PathBuf},
};

use vmseal_keys::{SecretBytes, SecretError, derive, gcm, random_bytes};
use vmseal_provider::{RootKey, RootKeyError};
use zeroize::Zeroizing;

const FORMAT: u8 = 1;
const SALT_LEN: usize = 16;
const TAG_LEN: usize = 16;
const OVERHEAD: usize = 1 + SALT_LEN + gcm::IV_LEN + TAG_LEN;

/// Reads the root key; makes it if there is none and no database needs it.
pub fn load_root_key(path: &Path, needed: bool) -> Result<RootKey, RootKeyMissing> {
    let loaded = if needed { RootKey::load(path) } else { RootKey::load_or_create(path) };
    loaded.map_err(|error| match error {
        RootKeyError::Io { source, .. } if needed && source.kind() == io::ErrorKind::NotFound => {
            RootKeyMissing::Lost { path: path.to_owned() }
        }
        other => RootKeyMissing::Unusable(other),
    })
}

/// Seals and opens, each value for its purpose.
pub struct Sealer(SecretBytes<32>);

impl Sealer {
    /// Under this root key.
    pub fn of(root: &RootKey) -> Result<Self, SecretError> {
        Ok(Self(root.derive("server-seal")?))
    }

    /// Seals `plain` for `purpose` and `about`; it opens with the same two only.
    ///
    /// The result is format (1), salt (16), initialisation vector (12), tag (16), ciphertext.
    pub fn seal(&self, purpose: &str, about: &[u8], plain: &[u8]) -> Result<Vec<u8>, SealError> {
        let salt = random_bytes::<SALT_LEN>()?;
        let iv = random_bytes::<{ gcm::IV_LEN }>()?;
        let key = self.key(purpose, about, &salt)?;
        // Where the ciphertext will be, the plaintext is for a moment; no copy of it stays.
        let mut out = Vec::with_capacity(OVERHEAD + plain.len());
        out.push(FORMAT);
        out.extend_from_slice(&salt);
        out.extend_from_slice(&iv);
        out.extend_from_slice(&[0; TAG_LEN]);
        out.extend_from_slice(plain);
        let (head, body) = out.split_at_mut(OVERHEAD);
        let tag = gcm::seal_in_place(key.expose(), &iv, &head[..1], body)?;
        head[OVERHEAD - TAG_LEN..].copy_from_slice(&tag);
        Ok(out)
    }

    /// Opens what [`Sealer::seal`] made; it is zeroed when dropped.
    pub fn open(&self, purpose: &str, about: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let (head, body) = sealed.split_at_checked(OVERHEAD).ok_or(SealError::Shape)?;
        let (format, rest) = head.split_at(1);
        let (salt, rest) = rest.split_at(SALT_LEN);
        let (iv, tag) = rest.split_at(gcm::IV_LEN);
        if format != [FORMAT] {
            return Err(SealError::Shape);
        }
        let mut out = Zeroizing::new(vec![0; body.len()]);
        gcm::open_into(self.key(purpose, about, salt)?.expose(), iv, format, body, tag, &mut out)?;
        Ok(out)
    }

    fn key(&self, purpose: &str, about: &[u8], salt: &[u8]) -> Result<SecretBytes<32>, SecretError> {
        derive::derive_key(self.0.expose(), salt, &derive::info(purpose, &[about]))
    }
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer(..)")
    }
}

/// Why there is no root key.
#[derive(Debug, thiserror::Error)]
pub enum RootKeyMissing {
    /// The database is there, the key is not.
    #[error(
        "the root key {path} is gone, and the database needs it: put it back from your backup. Without it the keys of \
         native providers come back from their PKCS#12 backups only: move the state directory away and import them"
    )]
    Lost {
        /// Where it should be.
        path: PathBuf,
    },
    /// It is there and cannot be used.
    #[error(transparent)]
    Unusable(RootKeyError),
}

/// Why something was not sealed or opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// Not what the server seals.
    #[error("a sealed value has the wrong shape: it was damaged or edited")]
    Shape,
    /// Another root key, or changed.
    #[error(
        "a sealed value does not open under this root key: it was made under another one, or was changed"
    )]
    Cipher(#[from] gcm::GcmError),
    /// No secret memory or randomness.
    #[error(transparent)]
    Memory(#[from] SecretError),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("vmseal-sealing-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn sealed_value_opens_for_its_purpose_and_object_only() {
        let dir = scratch("seal");
        let sealer = Sealer::of(&load_root_key(&dir.join("root.key"), false).unwrap()).unwrap();
        let sealed = sealer.seal("ca", b"main", b"plain").unwrap();
        let again = Sealer::of(&load_root_key(&dir.join("root.key"), true).unwrap()).unwrap();
        assert_eq!(again.open("ca", b"main", &sealed).unwrap().as_slice(), b"plain");
        assert!(again.open("ca", b"other", &sealed).is_err());
        assert!(again.open("answer", b"main", &sealed).is_err());
        for at in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[at] ^= 1;
            assert!(again.open("ca", b"main", &bad).is_err(), "byte {at}");
        }
        assert!(again.open("ca", b"main", &sealed[..OVERHEAD - 1]).is_err());
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn lost_root_key_of_a_database_is_not_made_anew() {
        let dir = scratch("lost");
        let path = dir.join("root.key");
        assert!(matches!(load_root_key(&path, true), Err(RootKeyMissing::Lost { .. })));
        assert!(!path.exists());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
