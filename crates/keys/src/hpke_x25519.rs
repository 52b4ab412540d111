//! HPKE (RFC 9180) in base mode: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM; one message a key exchange.
//!
//! Plaintext is sealed and opened where it lies, in secret memory. Private keys come in by reference; the copies the
//! library makes zero themselves, and its stack is cleared.

use hpke::{
    Deserializable, Kem, OpModeR, OpModeS, Serializable,
    aead::{AeadTag, AesGcm256},
    inout::InOutBuf,
    kdf::HkdfSha256,
    kem::X25519HkdfSha256,
    setup_receiver, setup_sender,
};

use crate::{derive::equal, scrub::scrubbed};

/// Bytes of a public key, a private key and an encapsulated key.
pub(crate) const KEY_LEN: usize = 32;
/// Bytes of a tag.
pub(crate) const TAG_LEN: usize = 16;
/// Most bytes of `info`; the library's own limit is just under 2^16.
const MAX_INFO: usize = 4096;

type PublicKey = <X25519HkdfSha256 as Kem>::PublicKey;
type PrivateKey = <X25519HkdfSha256 as Kem>::PrivateKey;
type EncappedKey = <X25519HkdfSha256 as Kem>::EncappedKey;

/// What HPKE refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// `info` is too long.
    Info,
    /// The peer's public or encapsulated key is no usable X25519 key.
    Key,
    /// The message does not open.
    Message,
}

/// The public key of a private one, which is any 32 random bytes.
pub(crate) fn public_of(private: &[u8; KEY_LEN]) -> [u8; KEY_LEN] {
    scrubbed(|| {
        let private = PrivateKey::from_bytes(private).expect("any 32 bytes are an X25519 private key");
        X25519HkdfSha256::sk_to_pk(&private).to_bytes().into()
    })
}

/// Encrypts `buffer` in place to `public`; gives the encapsulated key and the tag.
pub(crate) fn seal_in_place(
    public: &[u8; KEY_LEN],
    info: &[u8],
    aad: &[u8],
    buffer: &mut [u8],
) -> Result<([u8; KEY_LEN], [u8; TAG_LEN]), Refused> {
    if info.len() > MAX_INFO {
        return Err(Refused::Info);
    }
    // The zero point makes every shared secret zero; the library refuses it too, after the exchange.
    if equal(public, &[0; KEY_LEN]) {
        return Err(Refused::Key);
    }
    scrubbed(|| {
        let public = PublicKey::from_bytes(public).map_err(|_| Refused::Key)?;
        let (enc, mut context) =
            setup_sender::<AesGcm256, HkdfSha256, X25519HkdfSha256>(&OpModeS::Base, &public, info)
                .map_err(|_| Refused::Key)?;
        let tag = context.seal_inout_detached(InOutBuf::from(buffer), aad).map_err(|_| Refused::Message)?;
        Ok((enc.to_bytes().into(), tag.to_bytes().into()))
    })
}

/// Decrypts `buffer` in place with `private`. What it holds after an error is not to be used.
pub(crate) fn open_in_place(
    private: &[u8; KEY_LEN],
    info: &[u8],
    aad: &[u8],
    enc: &[u8; KEY_LEN],
    buffer: &mut [u8],
    tag: &[u8; TAG_LEN],
) -> Result<(), Refused> {
    if info.len() > MAX_INFO {
        return Err(Refused::Info);
    }
    scrubbed(|| {
        let private = PrivateKey::from_bytes(private).map_err(|_| Refused::Key)?;
        let enc = EncappedKey::from_bytes(enc).map_err(|_| Refused::Key)?;
        let tag = AeadTag::<AesGcm256>::from_bytes(tag).map_err(|_| Refused::Message)?;
        let mut context =
            setup_receiver::<AesGcm256, HkdfSha256, X25519HkdfSha256>(&OpModeR::Base, &private, &enc, info)
                .map_err(|_| Refused::Key)?;
        context.open_inout_detached(InOutBuf::from(buffer), aad, &tag).map_err(|_| Refused::Message)
    })
}
