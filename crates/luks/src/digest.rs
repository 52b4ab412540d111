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

/// PBKDF2-HMAC-SHA-256 of a key, 32 bytes.
pub(crate) fn compute(key: &[u8; 64], salt: &[u8], iterations: u32) -> [u8; DIGEST_LEN] {
    let iterations = NonZeroU32::new(iterations).unwrap_or(NonZeroU32::MIN);
    let mut out = [0; DIGEST_LEN];
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, salt, key, &mut out);
    out
}

/// Whether `key` is the key of segment 0.
pub(crate) fn matches(metadata: &Metadata, key: &[u8; 64]) -> bool {
    let Some((_, digest)) = metadata.digest_of_segment(0) else { return false };
    let DigestKind::Pbkdf2 { hash, iterations, salt, digest } = &digest.kind else { return false };
    let algorithm = match hash.as_str() {
        "sha256" => pbkdf2::PBKDF2_HMAC_SHA256,
        "sha512" => pbkdf2::PBKDF2_HMAC_SHA512,
        "sha1" => pbkdf2::PBKDF2_HMAC_SHA1,
        _ => return false,
    };
    let Some(iterations) = u32::try_from(*iterations).ok().filter(|&n| u64::from(n) <= MAX_ITERATIONS) else {
        return false;
    };
    let Some(iterations) = NonZeroU32::new(iterations) else { return false };
    let mut computed = vec![0; digest.len()];
    pbkdf2::derive(algorithm, iterations, salt, key, &mut computed);
    constant_time::verify_slices_are_equal(&computed, digest).is_ok()
}
