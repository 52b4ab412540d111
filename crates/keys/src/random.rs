//! Random bytes of the system's generator, for keys (in place) and for ids, salts and nonces.

use aws_lc_rs::rand::{SecureRandom, SystemRandom};

use crate::secret::SecretError;

/// Fills `out`, wherever it lies, without a copy elsewhere.
pub(crate) fn fill(out: &mut [u8]) -> Result<(), SecretError> {
    SystemRandom::new().fill(out).map_err(|_| SecretError::Random)
}

/// Random bytes that are no secret: ids, salts, nonces. For keys there is
/// [`SecretBytes::random`](crate::secret::SecretBytes::random).
///
/// # Errors
///
/// [`SecretError::Random`] if the system gives none.
pub fn random_bytes<const N: usize>() -> Result<[u8; N], SecretError> {
    let mut out = [0; N];
    fill(&mut out)?;
    Ok(out)
}
