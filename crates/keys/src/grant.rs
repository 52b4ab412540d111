//! KEKs on their way from the server to an agent: sealed to a key the agent made for this session.
//!
//! In goes a KEK and the session's public key; out comes an HPKE message that may pass through TLS, protobuf and
//! logs of either. The agent opens it straight into secret memory. What `info` and `aad` say is the protocol's
//! business.

use std::fmt;

use crate::{
    hpke_x25519::{self, KEY_LEN, Refused, TAG_LEN},
    secret::{SecretBytes, SecretError},
};

/// An agent's key pair for one session. The private key lives in secret memory and is never written down.
pub struct SessionKey {
    private: SecretBytes<KEY_LEN>,
    public: [u8; KEY_LEN],
}

impl SessionKey {
    /// A new key pair.
    ///
    /// # Errors
    ///
    /// [`GrantError::Memory`] if there is no secret memory or no randomness.
    pub fn generate() -> Result<Self, GrantError> {
        Ok(Self::from_private(SecretBytes::random()?))
    }

    /// The pair of a private key that was made elsewhere: 32 bytes, clamped as RFC 7748 §5 says when used.
    pub fn from_private(private: SecretBytes<KEY_LEN>) -> Self {
        let public = hpke_x25519::public_of(private.expose());
        Self { private, public }
    }

    /// The X25519 public key.
    pub fn public(&self) -> [u8; KEY_LEN] {
        self.public
    }

    /// Opens a KEK that was sealed by [`seal_to`] with the same `info` and `aad`.
    ///
    /// # Errors
    ///
    /// [`GrantError::Open`] if it was sealed to another session, for another purpose, or changed on the way.
    pub fn open(
        &self,
        info: &[u8],
        aad: &[u8],
        enc: &[u8],
        sealed: &[u8],
    ) -> Result<SecretBytes<32>, GrantError> {
        let enc: &[u8; KEY_LEN] = enc.try_into().map_err(|_| GrantError::Shape)?;
        let (ciphertext, tag) = sealed.split_at_checked(32).ok_or(GrantError::Shape)?;
        let tag: &[u8; TAG_LEN] = tag.try_into().map_err(|_| GrantError::Shape)?;
        let mut secret = SecretBytes::<32>::try_zeroed()?;
        secret.expose_mut().copy_from_slice(ciphertext);
        hpke_x25519::open_in_place(self.private.expose(), info, aad, enc, secret.expose_mut(), tag)?;
        Ok(secret)
    }
}

impl fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionKey(..)")
    }
}

/// Seals a KEK to a session's public key: the encapsulated key (32 bytes), then ciphertext and tag (48 bytes).
///
/// Source: HPKE, RFC 9180 §6.1, base mode; DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM.
///
/// # Errors
///
/// [`GrantError::PublicKey`] if `public` is no usable key.
pub fn seal_to(
    public: &[u8; KEY_LEN],
    info: &[u8],
    aad: &[u8],
    secret: &[u8; 32],
) -> Result<(Vec<u8>, Vec<u8>), GrantError> {
    let mut buffer = SecretBytes::<32>::try_zeroed()?;
    buffer.expose_mut().copy_from_slice(secret);
    let (enc, tag) = hpke_x25519::seal_in_place(public, info, aad, buffer.expose_mut())?;
    let mut sealed = buffer.expose().to_vec();
    sealed.extend_from_slice(&tag);
    Ok((enc.to_vec(), sealed))
}

/// Why a KEK was not sealed or opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GrantError {
    /// Lengths are not those of a grant.
    #[error("key grant has the wrong length")]
    Shape,
    /// `info` is longer than 4096 bytes.
    #[error("key grant has an info text that is too long")]
    Info,
    /// Not a usable X25519 key.
    #[error("the session's public key is no usable X25519 key")]
    PublicKey,
    /// Another session, another purpose, or changed.
    #[error("key grant does not open: it was made for another session or was changed; ask for the key again")]
    Open,
    /// No secret memory, or no randomness.
    #[error(transparent)]
    Memory(#[from] SecretError),
}

impl From<Refused> for GrantError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Info => Self::Info,
            Refused::Key => Self::PublicKey,
            Refused::Message => Self::Open,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEK: [u8; 32] = *b"VMSEAL-TEST-SECRET-kek-012345678";

    #[test]
    fn grant_opens_in_its_own_session_only() {
        let session = SessionKey::generate().unwrap();
        let (enc, sealed) = seal_to(&session.public(), b"info", b"aad", &KEK).unwrap();
        assert_eq!((enc.len(), sealed.len()), (32, 48));
        assert_eq!(session.open(b"info", b"aad", &enc, &sealed).unwrap().expose(), &KEK);
        let other = SessionKey::generate().unwrap();
        assert!(matches!(other.open(b"info", b"aad", &enc, &sealed), Err(GrantError::Open)));
        assert!(matches!(session.open(b"inf", b"aad", &enc, &sealed), Err(GrantError::Open)));
        assert!(matches!(session.open(b"info", b"aae", &enc, &sealed), Err(GrantError::Open)));
    }

    #[test]
    fn grant_with_any_changed_byte_is_refused() {
        let session = SessionKey::generate().unwrap();
        let (enc, sealed) = seal_to(&session.public(), b"info", b"aad", &KEK).unwrap();
        for at in 0..enc.len() {
            let mut bad = enc.clone();
            // Bit 255 of an X25519 key is ignored (RFC 7748 §5), so flip another one.
            bad[at] ^= 1;
            assert!(session.open(b"info", b"aad", &bad, &sealed).is_err(), "enc byte {at}");
        }
        for at in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[at] ^= 0x80;
            assert!(matches!(session.open(b"info", b"aad", &enc, &bad), Err(GrantError::Open)), "byte {at}");
        }
    }

    #[test]
    fn grant_of_the_wrong_length_is_refused() {
        let session = SessionKey::generate().unwrap();
        let (enc, sealed) = seal_to(&session.public(), b"", b"", &KEK).unwrap();
        for (enc, sealed) in [(&enc[..31], &sealed[..]), (&enc, &sealed[..47]), (&enc, &[]), (&[], &sealed)] {
            assert!(matches!(session.open(b"", b"", enc, sealed), Err(GrantError::Shape)));
        }
        let long = [sealed.as_slice(), &[0]].concat();
        assert!(matches!(session.open(b"", b"", &enc, &long), Err(GrantError::Shape)));
        let info = vec![0; 70_000];
        assert!(matches!(seal_to(&session.public(), &info, b"", &KEK), Err(GrantError::Info)));
        assert!(matches!(session.open(&info, b"", &enc, &sealed), Err(GrantError::Info)));
    }

    #[test]
    fn public_key_of_low_order_is_refused() {
        let mut one = [0; 32];
        one[0] = 1;
        for public in [[0; 32], one] {
            assert!(matches!(seal_to(&public, b"", b"", &KEK), Err(GrantError::PublicKey)));
        }
        let session = SessionKey::generate().unwrap();
        assert!(matches!(session.open(b"", b"", &one, &[0; 48]), Err(GrantError::PublicKey)));
    }

    #[test]
    fn private_key_gives_the_public_key_of_rfc_7748() {
        // RFC 7748 §6.1, Alice.
        let mut private = [
            0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2, 0x66, 0x45,
            0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5, 0x1d, 0xb9, 0x2c, 0x2a,
        ];
        let public = [
            0x85, 0x20, 0xf0, 0x09, 0x89, 0x30, 0xa7, 0x54, 0x74, 0x8b, 0x7d, 0xdc, 0xb4, 0x3e, 0xf7, 0x5a,
            0x0d, 0xbf, 0x3a, 0x0d, 0x26, 0x38, 0x1a, 0xf4, 0xeb, 0xa4, 0xa9, 0x8e, 0xaa, 0x9b, 0x4e, 0x6a,
        ];
        assert_eq!(SessionKey::from_private(SecretBytes::take_from(&mut private)).public(), public);
    }
}
