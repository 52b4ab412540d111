//! AES-256-GCM (NIST SP 800-38D) with 12-byte initialisation vectors and 16-byte tags, and no others.
//!
//! Keys and plaintexts are read and written where they lie, which is in secret memory; there is no copy of either.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use vmseal_model::record::TAG_LEN;
use zeroize::Zeroize;

use crate::scrub::scrubbed;

/// Bytes of an initialisation vector.
pub const IV_LEN: usize = 12;

/// Why nothing was sealed or opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GcmError {
    /// Another length weakens GCM (SP 800-38D §8.2), so the product uses one only.
    #[error("initialisation vector has {bytes} bytes, 12 are expected")]
    IvLength {
        /// Its length.
        bytes: usize,
    },
    /// A short tag is easier to forge.
    #[error("tag has {bytes} bytes, 16 are expected")]
    TagLength {
        /// Its length.
        bytes: usize,
    },
    /// Plaintext and ciphertext differ in length.
    #[error("buffer for the plaintext has another length than the ciphertext")]
    BufferLength,
    /// More than GCM allows under one nonce.
    #[error("message is too long for AES-GCM")]
    TooLong,
    /// Wrong key, or something was changed.
    #[error("AES-GCM tag does not verify")]
    Tag,
}

/// Encrypts `buffer` where it lies; the tag is the result.
///
/// A nonce must never come twice under one key.
///
/// # Errors
///
/// [`GcmError::IvLength`], [`GcmError::TooLong`].
pub fn seal_in_place(
    key: &[u8; 32],
    iv: &[u8],
    aad: &[u8],
    buffer: &mut [u8],
) -> Result<[u8; TAG_LEN], GcmError> {
    let nonce = nonce(iv)?;
    scrubbed(|| {
        let tag = expand(key)
            .seal_in_place_separate_tag(nonce, Aad::from(aad), buffer)
            .map_err(|_| GcmError::TooLong)?;
        Ok(tag.as_ref().try_into().expect("AES-GCM gives 16-byte tags"))
    })
}

/// Decrypts `ciphertext` into `out`, which is zeroed if the tag does not verify.
///
/// # Errors
///
/// [`GcmError::Tag`] says no more than that; lengths are checked first.
pub fn open_into(
    key: &[u8; 32],
    iv: &[u8],
    aad: &[u8],
    ciphertext: &[u8],
    tag: &[u8],
    out: &mut [u8],
) -> Result<(), GcmError> {
    let nonce = nonce(iv)?;
    if tag.len() != TAG_LEN {
        return Err(GcmError::TagLength { bytes: tag.len() });
    }
    if ciphertext.len() != out.len() {
        return Err(GcmError::BufferLength);
    }
    let opened = scrubbed(|| expand(key).open_separate_gather(nonce, Aad::from(aad), ciphertext, tag, out));
    opened.map_err(|_| {
        out.zeroize();
        GcmError::Tag
    })
}

fn nonce(iv: &[u8]) -> Result<Nonce, GcmError> {
    Nonce::try_assume_unique_for_key(iv).map_err(|_| GcmError::IvLength { bytes: iv.len() })
}

fn expand(key: &[u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("AES-256 takes any 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u8; 32] = *b"VMSEAL-TEST-SECRET-gcm-012345678";

    #[test]
    fn other_iv_and_tag_lengths_are_refused() {
        let mut buffer = *b"plaintext";
        for bytes in [0, 8, 11, 13, 16] {
            let iv = vec![0; bytes];
            assert_eq!(seal_in_place(&KEY, &iv, b"", &mut buffer), Err(GcmError::IvLength { bytes }));
            assert_eq!(
                open_into(&KEY, &iv, b"", &[0; 9], &[0; 16], &mut buffer),
                Err(GcmError::IvLength { bytes })
            );
        }
        for bytes in [0, 4, 12, 15, 17] {
            let tag = vec![0; bytes];
            assert_eq!(
                open_into(&KEY, &[0; 12], b"", &[0; 9], &tag, &mut buffer),
                Err(GcmError::TagLength { bytes })
            );
        }
        assert_eq!(&buffer, b"plaintext");
        assert_eq!(
            open_into(&KEY, &[0; 12], b"", &[0; 8], &[0; 16], &mut buffer),
            Err(GcmError::BufferLength)
        );
    }

    #[test]
    fn output_is_zero_after_a_tag_that_does_not_verify() {
        let mut sealed = *b"plaintext";
        let tag = seal_in_place(&KEY, &[1; 12], b"aad", &mut sealed).unwrap();
        let mut out = [0xff; 9];
        assert_eq!(open_into(&KEY, &[1; 12], b"bad", &sealed, &tag, &mut out), Err(GcmError::Tag));
        assert_eq!(out, [0; 9]);
        assert_eq!(open_into(&KEY, &[1; 12], b"aad", &sealed, &tag, &mut out), Ok(()));
        assert_eq!(&out, b"plaintext");
    }
}
