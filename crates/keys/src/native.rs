//! KEKs of the native provider: derived from a key-derivation key (KDK), one for each key uuid.
//!
//! In goes a KDK of one generation; out comes a [`Kek`]. Where the KDK is kept and backed up is the provider's
//! business.

use std::fmt;

use vmseal_model::id::{KekId, KeyUuid, ProviderUuid};

use crate::{
    derive,
    kek::Kek,
    secret::{SecretBytes, SecretError},
};

/// One generation's key-derivation key of a native provider, 32 bytes in secret memory.
pub struct Kdk(SecretBytes<32>);

impl Kdk {
    /// A KDK that was unsealed or restored.
    pub fn new(secret: SecretBytes<32>) -> Self {
        Self(secret)
    }

    /// A new random KDK.
    ///
    /// # Errors
    ///
    /// [`SecretError`] if there is no secret memory or no randomness.
    pub fn generate() -> Result<Self, SecretError> {
        Ok(Self(SecretBytes::random()?))
    }

    /// The bytes, to be sealed or backed up. Whoever copies them answers for the copy.
    pub fn expose(&self) -> &[u8; 32] {
        self.0.expose()
    }
}

impl fmt::Debug for Kdk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kdk(..)")
    }
}

/// The `info` under which the KEK of `key` is derived from the KDK; the salt is the provider's uuid.
pub fn kek_info(key: KeyUuid) -> Vec<u8> {
    derive::info("nkp-kek", &[&key.to_bytes()])
}

/// The KEK of `key` (reach *placed*). `generation` says which KDK this is; it enters the id and not the derivation.
///
/// # Errors
///
/// [`SecretError`] if there is no secret memory.
pub fn try_native_kek(
    kdk: &Kdk,
    provider: ProviderUuid,
    generation: u32,
    key: KeyUuid,
) -> Result<Kek, SecretError> {
    let secret = derive::derive_key(kdk.expose(), &provider.to_bytes(), &kek_info(key))?;
    Ok(Kek::new(KekId::native(generation, key), secret))
}

/// [`try_native_kek`] where secret memory was reserved.
///
/// # Panics
///
/// If there is no more secret memory; the text names the limit.
pub fn native_kek(kdk: &Kdk, provider: ProviderUuid, generation: u32, key: KeyUuid) -> Kek {
    match try_native_kek(kdk, provider, generation, key) {
        Ok(kek) => kek,
        Err(error) => panic!("{error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kek_depends_on_kdk_provider_and_key_and_carries_the_generation() {
        let kdk = Kdk::new(SecretBytes::take_from(&mut { *b"VMSEAL-TEST-SECRET-kdk-012345678" }));
        let (provider, key) = (ProviderUuid::from_bytes([1; 16]), KeyUuid::from_bytes([2; 16]));
        let kek = native_kek(&kdk, provider, 7, key);
        assert_eq!(kek.id().as_native(), Some((7, key)));
        assert_eq!(native_kek(&kdk, provider, 8, key).expose(), kek.expose());
        assert_ne!(native_kek(&kdk, ProviderUuid::from_bytes([2; 16]), 7, key).expose(), kek.expose());
        assert_ne!(native_kek(&kdk, provider, 7, KeyUuid::from_bytes([1; 16])).expose(), kek.expose());
        assert_ne!(native_kek(&Kdk::generate().unwrap(), provider, 7, key).expose(), kek.expose());
        assert_eq!(kek_info(key), [b"vmseal/v1/nkp-kek\x10\x00".as_slice(), &[2; 16]].concat());
    }
}
