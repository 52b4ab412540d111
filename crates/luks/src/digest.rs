//! The proof that a key is a header's: PBKDF2 over the 64-byte volume key (specification §3.4).
//!
//! In go a key and what the header says; out comes yes or no. The key stays where it is.

use std::num::NonZeroU32;

use aws_lc_rs::{constant_time, pbkdf2};

use crate::{
    metadata::{DigestKind, Metadata},
    policy::MAX_ITERATIONS,
};

/// Iterations of a digest made here: a random 512-bit key needs no stretching.
pub const ITERATIONS: u32 = 1000;
/// Bytes of a digest made here.
pub const DIGEST_LEN: usize = 32;

/// PBKDF2 (RFC 8018 §5.2) of `secret` into `out`; `None` if this hash or so many iterations are not computed here.
pub(crate) fn derive(hash: &str, iterations: u64, salt: &[u8], secret: &[u8], out: &mut [u8]) -> Option<()> {
    let algorithm = match hash {
        "sha256" => pbkdf2::PBKDF2_HMAC_SHA256,
        "sha512" => pbkdf2::PBKDF2_HMAC_SHA512,
        _ => return None,
    };
    let iterations = u32::try_from(iterations).ok().filter(|&n| u64::from(n) <= MAX_ITERATIONS)?;
    pbkdf2::derive(algorithm, NonZeroU32::new(iterations)?, salt, secret, out);
    Some(())
}

/// PBKDF2-HMAC-SHA-256 of a key, 32 bytes.
pub(crate) fn compute(key: &[u8; 64], salt: &[u8], iterations: u32) -> [u8; DIGEST_LEN] {
    let iterations = NonZeroU32::new(iterations).unwrap_or(NonZeroU32::MIN);
    let mut out = [0; DIGEST_LEN];
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, salt, key, &mut out);
    out
}

/// Whether `key` is the key of segment 0. Compares in constant time.
pub(crate) fn matches(metadata: &Metadata, key: &[u8; 64]) -> bool {
    let Some((_, digest)) = metadata.digest_of_segment(0) else { return false };
    let DigestKind::Pbkdf2 { hash, iterations, salt, digest } = &digest.kind else { return false };
    let mut computed = vec![0; digest.len()];
    derive(hash, *iterations, salt, key, &mut computed).is_some()
        && constant_time::verify_slices_are_equal(&computed, digest).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derivation_is_what_rfc_7914_prints_for_pbkdf2() {
        let mut out = [0; 64];
        derive("sha256", 1, b"salt", b"passwd", &mut out).unwrap();
        assert_eq!(out[..8], [0x55, 0xac, 0x04, 0x6e, 0x56, 0xe3, 0x08, 0x9f]);
        assert_eq!(out[60..], [0xd3, 0xa1, 0x97, 0x83][..]);
        assert_eq!(compute(&[7; 64], b"salt", 1).len(), DIGEST_LEN);
    }

    #[test]
    fn hashes_and_iteration_counts_that_are_not_computed_give_nothing() {
        for (hash, iterations) in
            [("sha1", 1000), ("", 1000), ("sha256", 0), ("sha256", MAX_ITERATIONS + 1), ("sha256", u64::MAX)]
        {
            assert_eq!(
                derive(hash, iterations, b"salt", b"secret", &mut [0; 32]),
                None,
                "{hash} {iterations}"
            );
        }
    }
}
