//! The anti-forensic splitter of LUKS (TKS1, Fruhwirth 2005): a 64-byte key over 4000 stripes, so that one lost sector
//! loses the key.
//!
//! In go a key, an area cipher and randomness; out comes the encrypted area, and back. Stripes in clear exist only one
//! sector at a time, in secret memory: all 4000 together are the key.

use aws_lc_rs::digest::{Algorithm, Context, SHA256, SHA512};
use vmseal_keys::{SecretBytes, SecretError};
use vmseal_xts::{Cipher, XtsError};

use crate::policy::STRIPES;

/// Bytes of a key, hence of a stripe.
const KEY: usize = 64;
const SECTOR: usize = 512;
/// Bytes of the split key. A whole number of sectors: 500.
pub(crate) const MATERIAL: usize = KEY * STRIPES as usize;

/// Why splitting or merging failed.
#[derive(Debug)]
pub(crate) enum AfError {
    Secret(SecretError),
    Cipher(XtsError),
}

impl From<SecretError> for AfError {
    fn from(error: SecretError) -> Self {
        Self::Secret(error)
    }
}

impl From<XtsError> for AfError {
    fn from(error: XtsError) -> Self {
        Self::Cipher(error)
    }
}

/// The diffuser's hash, by its name in a header.
pub(crate) fn hash(name: &str) -> Option<&'static Algorithm> {
    match name {
        "sha256" => Some(&SHA256),
        "sha512" => Some(&SHA512),
        _ => None,
    }
}

/// Splits `key` and encrypts the stripes. The result has [`MATERIAL`] bytes.
pub(crate) fn split(key: &[u8; KEY], hash: &'static Algorithm, cipher: &Cipher) -> Result<Vec<u8>, AfError> {
    let mut area = Vec::with_capacity(MATERIAL);
    let mut mixed = SecretBytes::<KEY>::try_zeroed()?;
    let last = MATERIAL - KEY;
    for at in (0..MATERIAL).step_by(SECTOR) {
        let mut sector = SecretBytes::<SECTOR>::random()?;
        for (stripe, offset) in sector.expose_mut().chunks_exact_mut(KEY).zip((at..).step_by(KEY)) {
            if offset == last {
                stripe.copy_from_slice(mixed.expose());
                xor(stripe, key);
            } else {
                xor(mixed.expose_mut(), stripe);
                diffuse(mixed.expose_mut(), hash);
            }
        }
        cipher.encrypt((at / SECTOR) as u64, sector.expose_mut())?;
        area.extend_from_slice(sector.expose());
    }
    Ok(area)
}

/// Decrypts the stripes and merges them.
pub(crate) fn merge(
    area: &[u8; MATERIAL],
    hash: &'static Algorithm,
    cipher: &Cipher,
) -> Result<SecretBytes<KEY>, AfError> {
    let mut mixed = SecretBytes::<KEY>::try_zeroed()?;
    let mut sector = SecretBytes::<SECTOR>::try_zeroed()?;
    for (number, encrypted) in (0..).zip(area.chunks_exact(SECTOR)) {
        sector.expose_mut().copy_from_slice(encrypted);
        cipher.decrypt(number, sector.expose_mut())?;
        for (stripe, offset) in
            sector.expose().chunks_exact(KEY).zip((number as usize * SECTOR..).step_by(KEY))
        {
            xor(mixed.expose_mut(), stripe);
            if offset != MATERIAL - KEY {
                diffuse(mixed.expose_mut(), hash);
            }
        }
    }
    Ok(mixed)
}

fn xor(into: &mut [u8], other: &[u8]) {
    into.iter_mut().zip(other).for_each(|(a, b)| *a ^= b);
}

/// H of the LUKS diffuser: each block of the hash's length becomes hash(number as u32 big-endian ‖ block).
fn diffuse(key: &mut [u8; KEY], hash: &'static Algorithm) {
    for (number, block) in (0u32..).zip(key.chunks_mut(hash.output_len())) {
        let mut context = Context::new(hash);
        context.update(&number.to_be_bytes());
        context.update(block);
        let len = block.len();
        block.copy_from_slice(&context.finish().as_ref()[..len]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_splits_and_merges_under_its_cipher_only() {
        let mut area_key = [0; 64];
        area_key[0] = 1;
        let cipher = Cipher::new(&area_key, SECTOR).unwrap();
        area_key[1] = 1;
        let other = Cipher::new(&area_key, SECTOR).unwrap();
        let key = [0x5a; KEY];
        for hash in [&SHA256, &SHA512] {
            let mut area: Box<[u8; MATERIAL]> =
                split(&key, hash, &cipher).unwrap().into_boxed_slice().try_into().unwrap();
            assert_eq!(merge(&area, hash, &cipher).unwrap().expose(), &key);
            assert_ne!(merge(&area, hash, &other).unwrap().expose(), &key);
            area[70_000] ^= 1;
            assert_ne!(merge(&area, hash, &cipher).unwrap().expose(), &key);
        }
    }
}
