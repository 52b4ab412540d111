//! Derivation and MAC: HKDF-SHA-512 (RFC 5869) and HMAC-SHA-512 (RFC 2104), and the texts that name a purpose.
//!
//! In goes key material by reference; out comes what the caller's buffer holds, which for a key lies in secret
//! memory. Contexts and stack are cleared before a function returns.

use aws_lc_rs::{constant_time, hkdf, hmac};
use vmseal_model::{id::RecordId, record::MAC_LEN};

use crate::{
    scrub::scrubbed,
    secret::{SecretBytes, SecretError},
};

/// Most bytes HKDF-SHA-512 gives: 255 × 64.
pub const MAX_OUTPUT: usize = 255 * 64;

/// More was asked for than HKDF-SHA-512 can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes were asked of HKDF-SHA-512, which gives at most {MAX_OUTPUT}")]
pub struct TooMuch {
    /// Bytes asked for.
    pub bytes: usize,
}

/// Fills `out` with HKDF-SHA-512 of `ikm`. An empty salt is the one of RFC 5869 §2.2.
///
/// # Errors
///
/// [`TooMuch`] if `out` is longer than [`MAX_OUTPUT`].
pub fn hkdf(ikm: &[u8], salt: &[u8], info: &[u8], out: &mut [u8]) -> Result<(), TooMuch> {
    struct Length(usize);
    impl hkdf::KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }
    let bytes = out.len();
    if bytes > MAX_OUTPUT {
        return Err(TooMuch { bytes });
    }
    scrubbed(|| {
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA512, salt).extract(ikm);
        prk.expand(&[info], Length(bytes)).and_then(|okm| okm.fill(out)).map_err(|_| TooMuch { bytes })
    })
}

/// Derives a key of `N` bytes into secret memory.
///
/// # Errors
///
/// [`SecretError`] if there is no secret memory.
pub fn derive_key<const N: usize>(
    ikm: &[u8],
    salt: &[u8],
    info: &[u8],
) -> Result<SecretBytes<N>, SecretError> {
    let mut key = SecretBytes::try_zeroed()?;
    hkdf(ikm, salt, info, key.expose_mut()).expect("a secret has at most 4096 bytes, within what HKDF gives");
    Ok(key)
}

/// HMAC-SHA-512 of `message`, all 64 bytes.
pub fn hmac_sha512(key: &[u8], message: &[u8]) -> [u8; 64] {
    scrubbed(|| {
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA512, key), message);
        tag.as_ref().try_into().expect("SHA-512 gives 64 bytes")
    })
}

/// The `info` of a purpose: `vmseal/v1/` + purpose, then each id with its length in two bytes, little-endian.
pub fn info(purpose: &str, ids: &[&[u8]]) -> Vec<u8> {
    let mut out = b"vmseal/v1/".to_vec();
    out.extend_from_slice(purpose.as_bytes());
    for id in ids {
        let len = u16::try_from(id.len()).expect("ids in an info text are at most 1024 bytes");
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(id);
    }
    out
}

/// The `info` under which a recipient's wrap key is derived from its KEK and salt.
pub fn wrap_key_info(record: RecordId) -> Vec<u8> {
    info("wrap", &[&record.to_bytes()])
}

/// The MAC of a record: first 32 bytes of HMAC-SHA-512 over `covered`, under a key derived from the payload.
pub(crate) fn record_mac(
    payload: &[u8],
    record: RecordId,
    covered: &[u8],
) -> Result<[u8; MAC_LEN], SecretError> {
    let key: SecretBytes<64> = derive_key(payload, &[], &info("record-mac", &[&record.to_bytes()]))?;
    let full = hmac_sha512(key.expose(), covered);
    Ok(*full.first_chunk().expect("32 of 64 bytes"))
}

/// Whether both are equal, in time that depends on their length only.
pub(crate) fn equal(a: &[u8], b: &[u8]) -> bool {
    constant_time::verify_slices_are_equal(a, b).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_text_gives_each_id_its_length() {
        let record = RecordId::from_bytes(*b"0123456789abcdef");
        assert_eq!(wrap_key_info(record), b"vmseal/v1/wrap\x10\x000123456789abcdef");
        assert_eq!(info("x", &[b"a", b""]), b"vmseal/v1/x\x01\x00a\x00\x00");
    }

    #[test]
    fn more_than_hkdf_can_give_is_refused() {
        let mut out = vec![0; MAX_OUTPUT + 1];
        assert_eq!(hkdf(b"k", b"", b"", &mut out), Err(TooMuch { bytes: MAX_OUTPUT + 1 }));
        assert_eq!(hkdf(b"k", b"", b"", &mut out[1..]), Ok(()));
    }
}
