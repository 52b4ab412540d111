//! The key of a VM's home: everything of it that is not a disk.

use std::fmt;

use crate::secret::{SecretBytes, SecretError};

/// What a home's key record wraps: 32 bytes, one per VM.
///
/// Lives in secret memory; zeroed on drop.
pub struct HomeKey(SecretBytes<{ HomeKey::LEN }>);

impl HomeKey {
    /// Length in bytes.
    pub const LEN: usize = 32;

    /// A new random key.
    ///
    /// # Errors
    ///
    /// [`SecretError`] if there is no secret memory or no randomness.
    pub fn generate() -> Result<Self, SecretError> {
        Ok(Self(SecretBytes::random()?))
    }

    /// A key that was made or opened elsewhere.
    pub fn from_secret(secret: SecretBytes<{ HomeKey::LEN }>) -> Self {
        Self(secret)
    }

    /// Copies a payload into secret memory; `None` if it has not 32 bytes or there is no secret memory for it.
    pub fn from_payload_slice(payload: &[u8]) -> Option<Self> {
        let payload: &[u8; Self::LEN] = payload.try_into().ok()?;
        let mut secret = SecretBytes::try_zeroed().ok()?;
        secret.expose_mut().copy_from_slice(payload);
        Some(Self(secret))
    }

    /// The 32 bytes, as they are wrapped.
    pub fn payload(&self) -> &[u8; Self::LEN] {
        self.0.expose()
    }
}

impl fmt::Debug for HomeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HomeKey(..)")
    }
}
