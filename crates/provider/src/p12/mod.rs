//! PKCS#12 (RFC 7292) as far as a backup of the native provider needs it: secret bags in one encrypted safe.
//!
//! In goes a list of [`SecretBag`]s and a password, out come the bytes of a file, and back. Written is one layout:
//! password integrity by HMAC-SHA-256, one safe under PBES2 (PBKDF2-HMAC-SHA-256, AES-256-CBC). Nothing else is read;
//! certificates, private keys and old algorithms are refused by name. What the bags mean is [`crate::backup`]'s.
//!
//! Layout as bytes: `docs/formats/native-backup.md`.

mod asn1;
mod kdf;
mod read;
mod write;

pub(crate) use kdf::PBES2_ITERATIONS;
pub(crate) use read::read;
pub(crate) use write::write;

use vmseal_keys::SecretBytes;

/// Largest file that is looked at.
pub(crate) const MAX_FILE_BYTES: usize = 1 << 20;
/// Most iterations, of the MAC and of PBES2 together, that a file may ask of its reader: a few seconds.
pub(crate) const MAX_ITERATIONS: u64 = 10_000_000;
/// Most bags that are read.
pub(crate) const MAX_BAGS: usize = 256;

/// How much work a password guess costs. Written files use [`Cost::STANDARD`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    /// PBKDF2 iterations, two SHA-256 compressions each.
    pub(crate) pbes2: u32,
    /// Iterations of the MAC's key derivation, one compression each.
    pub(crate) mac: u32,
}

impl Cost {
    /// The MAC tells a right password from a wrong one too, so it must not be the cheaper way to try passwords: it
    /// has twice the iterations of PBKDF2, at half the work each.
    pub(crate) const STANDARD: Self = Self { pbes2: PBES2_ITERATIONS, mac: 2 * PBES2_ITERATIONS };
}

/// One secret with its two attributes.
pub(crate) struct SecretBag {
    /// 32 bytes.
    pub(crate) secret: SecretBytes<32>,
    /// What people read; UTF-8 here, BMPString in the file.
    pub(crate) friendly_name: String,
    /// What programs read.
    pub(crate) local_key_id: Vec<u8>,
}

/// The same, borrowed, to be written.
pub(crate) struct SecretBagRef<'a> {
    pub(crate) secret: &'a [u8; 32],
    pub(crate) friendly_name: String,
    pub(crate) local_key_id: Vec<u8>,
}

#[cfg(test)]
mod tests;
