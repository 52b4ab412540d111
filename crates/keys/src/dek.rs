//! The key of one disk.

use std::fmt;

use crate::secret::{SecretBytes, SecretError};

/// What a disk's key record wraps: the two AES-256 keys of XTS (64 bytes), then the slot secret (32 bytes).
///
/// Lives in secret memory; a move copies a handle and not the key; zeroed on drop.
pub struct Dek(SecretBytes<{ Dek::LEN }>);

impl Dek {
    /// Length in bytes: data key, tweak key (IEEE Std 1619), slot secret.
    pub const LEN: usize = 96;

    /// A new random key whose halves differ, as SP 800-38E wants it.
    ///
    /// # Errors
    ///
    /// [`SecretError`] if there is no secret memory or no randomness.
    pub fn generate() -> Result<Self, SecretError> {
        loop {
            let dek = Self(SecretBytes::random()?);
            let (data, tweak) = dek.data_key().split_at(32);
            // Equal halves come once in 2^256 draws; a generator that gives them twice gives no randomness.
            if aws_lc_rs::constant_time::verify_slices_are_equal(data, tweak).is_err() {
                return Ok(dek);
            }
        }
    }

    /// A key that was made or opened elsewhere.
    pub fn from_secret(secret: SecretBytes<{ Dek::LEN }>) -> Self {
        Self(secret)
    }

    /// Copies a payload into secret memory; `None` if it has not 96 bytes or there is no secret memory for it.
    pub fn from_payload_slice(payload: &[u8]) -> Option<Self> {
        let payload: &[u8; Self::LEN] = payload.try_into().ok()?;
        let mut secret = SecretBytes::try_zeroed().ok()?;
        secret.expose_mut().copy_from_slice(payload);
        Some(Self(secret))
    }

    /// The 64 bytes of AES-256-XTS, which are the LUKS2 volume key.
    pub fn data_key(&self) -> &[u8; 64] {
        self.0.expose().first_chunk().expect("64 of 96 bytes")
    }

    /// The 32 bytes that open the LUKS2 keyslots of a reencryption.
    pub fn slot_secret(&self) -> &[u8; 32] {
        self.0.expose().last_chunk().expect("32 of 96 bytes")
    }

    /// All 96 bytes, as they are wrapped.
    pub fn payload(&self) -> &[u8; Self::LEN] {
        self.0.expose()
    }
}

impl fmt::Debug for Dek {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dek(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_where_the_format_says() {
        let payload: Vec<u8> = (0..96).collect();
        let dek = Dek::from_payload_slice(&payload).unwrap();
        assert_eq!(dek.data_key()[..], payload[..64]);
        assert_eq!(dek.slot_secret()[..], payload[64..]);
        assert_eq!(dek.payload()[..], payload[..]);
        assert!(Dek::from_payload_slice(&payload[1..]).is_none());
        assert!(Dek::from_payload_slice(&[0; 97]).is_none());
    }

    #[test]
    fn generated_keys_differ_in_every_part() {
        let (a, b) = (Dek::generate().unwrap(), Dek::generate().unwrap());
        assert!(!a.0.ct_eq(&b.0));
        assert_ne!(a.data_key()[..32], a.data_key()[32..]);
        assert_ne!(a.slot_secret(), b.slot_secret());
        assert_eq!(format!("{a:?}"), "Dek(..)");
    }
}
