//! From a password to keys: RFC 7292 appendix B for the MAC, PBKDF2 (RFC 8018 §5.2) for the safe.
//!
//! The same password enters both, but not as the same bytes: UTF-16, big-endian, with a final zero for the MAC
//! (surrogate pairs outside the BMP), UTF-8 without one for PBKDF2. OpenSSL does the same.

use std::num::NonZeroU32;

use aws_lc_rs::{digest, hmac, pbkdf2};
use zeroize::Zeroizing;

/// PBKDF2 iterations of a written file.
pub(crate) const PBES2_ITERATIONS: u32 = 600_000;

/// Input block of SHA-256, `v` of appendix B.
const BLOCK: usize = 64;
/// Purpose of the derived bytes: a MAC key (appendix B.3).
const ID_MAC: u8 = 3;

/// The MAC key of a file.
pub(super) fn mac_key(password: &str, salt: &[u8], iterations: NonZeroU32) -> hmac::Key {
    let raw = mac_key_bytes(password, salt, iterations);
    hmac::Key::new(hmac::HMAC_SHA256, raw.as_slice())
}

/// Appendix B.2 for SHA-256 and 32 bytes of output, which is one round of its outer loop.
pub(super) fn mac_key_bytes(password: &str, salt: &[u8], iterations: NonZeroU32) -> Zeroizing<[u8; 32]> {
    let password = bmp_with_zero(password);
    let mut hash = digest::Context::new(&digest::SHA256);
    hash.update(&[ID_MAC; BLOCK]);
    fill_blocks(&mut hash, salt);
    fill_blocks(&mut hash, &password);
    let mut out = Zeroizing::new([0u8; 32]);
    out.copy_from_slice(hash.finish().as_ref());
    for _ in 1..iterations.get() {
        let next = digest::digest(&digest::SHA256, out.as_slice());
        out.copy_from_slice(next.as_ref());
    }
    out
}

/// Feeds `bytes`, repeated up to a multiple of the block.
fn fill_blocks(hash: &mut digest::Context, bytes: &[u8]) {
    let padded = bytes.len().next_multiple_of(BLOCK);
    let mut repeated: Zeroizing<Vec<u8>> = Zeroizing::new(Vec::with_capacity(padded));
    repeated.extend(bytes.iter().cycle().take(padded));
    hash.update(&repeated);
}

/// UTF-16, big-endian, with the final zero that appendix B.1 wants.
fn bmp_with_zero(password: &str) -> Zeroizing<Vec<u8>> {
    let mut out = Zeroizing::new(Vec::with_capacity(2 * password.len() + 2));
    for unit in password.encode_utf16() {
        out.extend_from_slice(&unit.to_be_bytes());
    }
    out.extend_from_slice(&[0, 0]);
    out
}

/// The AES-256 key of a safe.
pub(super) fn safe_key(password: &str, salt: &[u8], iterations: NonZeroU32) -> Zeroizing<[u8; 32]> {
    let mut out = Zeroizing::new([0u8; 32]);
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, salt, password.as_bytes(), out.as_mut_slice());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pkcs12_mac_key_agrees_with_openssl_for_any_script() {
        // `openssl kdf -keylen 32 -kdfopt digest:SHA256 -kdfopt hexpass:… -kdfopt hexsalt:… -kdfopt iter:… -kdfopt
        // id:3 PKCS12KDF`, OpenSSL 3.0.19.
        let salt = *b"sixteen byte slt";
        for (password, iterations, expected) in VECTORS {
            let key = mac_key_bytes(password, &salt, NonZeroU32::new(*iterations).unwrap());
            let hex: String = key.iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(hex, *expected, "{password}");
        }
    }

    const VECTORS: &[(&str, u32, &str)] = &[
        ("correct horse", 1, "e567767658ba7954fe9a7c55ae34c069f9a5e0832330f806d76684db919dc94e"),
        ("Prüfung-Ωmega", 1000, "590a13a71358ba7c9f280c8e5a73ba21bab2223ebffe9f2683fb6f261e46e720"),
        ("schlüssel 🔑 lang", 1000, "fd5e329e605b7fb23d7449fd2b1cab9b25492df1c3a032cf3d2e1979ea4327f7"),
    ];
}
