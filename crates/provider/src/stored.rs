//! KDKs at rest: each sealed under the server's root key, to be kept in its store.
//!
//! In goes a provider, out come rows, and back. A row moved to another provider or generation does not open.
//!
//! `sealed` is, in bytes: `"VMSK"` ‖ version 1 (u16) ‖ zero (u16) ‖ nonce (12) ‖ ciphertext (32) ‖ tag (16), numbers
//! little-endian; AES-256-GCM under the root key, with provider uuid ‖ generation (u32) as associated data.

use vmseal_keys::{
    Kdk, SecretBytes, SecretError,
    gcm::{self, GcmError},
    random_bytes,
};
use vmseal_model::id::{ProviderId, ProviderUuid};
use zeroize::Zeroizing;

use crate::{
    native::{Generation, NativeProvider},
    root_key::RootKey,
};

const HEADER: [u8; 8] = *b"VMSK\x01\x00\x00\x00";
const NONCE_LEN: usize = 12;
const KDK_LEN: usize = 32;
const TAG_LEN: usize = 16;

/// Bytes of a sealed KDK.
pub const SEALED_LEN: usize = HEADER.len() + NONCE_LEN + KDK_LEN + TAG_LEN;

/// One generation as a row of the store. Nothing in it is secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredGeneration {
    /// Its number.
    pub number: u32,
    /// When it was made, milliseconds since 1970.
    pub created_ms: i64,
    /// When a backup of it was first verified.
    pub backed_up_at_ms: Option<i64>,
    /// The KDK under the root key.
    pub sealed: Vec<u8>,
}

impl NativeProvider {
    /// All generations, sealed, each with a fresh nonce.
    ///
    /// # Errors
    ///
    /// [`StoreError::Memory`].
    pub fn seal_for_store(&self, root: &RootKey) -> Result<Vec<StoredGeneration>, StoreError> {
        self.generations().iter().map(|generation| seal(self.uuid(), generation, root)).collect()
    }

    /// The provider from its rows, in any order.
    ///
    /// # Errors
    ///
    /// [`StoreError`] names the generation that does not open.
    pub fn open_from_store(
        id: ProviderId,
        uuid: ProviderUuid,
        rows: &[StoredGeneration],
        root: &RootKey,
    ) -> Result<Self, StoreError> {
        let opened: Result<Vec<_>, _> = rows.iter().map(|row| open(&id, uuid, row, root)).collect();
        let name = id.clone();
        Self::from_generations(id, uuid, opened?).ok_or(StoreError::Generations { provider: name })
    }
}

fn seal(
    provider: ProviderUuid,
    generation: &Generation,
    root: &RootKey,
) -> Result<StoredGeneration, StoreError> {
    let nonce: [u8; NONCE_LEN] = random_bytes()?;
    let mut kdk = Zeroizing::new([0u8; KDK_LEN]);
    kdk.copy_from_slice(generation.kdk().expose());
    let aad = associated_data(provider, generation.number());
    let tag = gcm::seal_in_place(root.expose(), &nonce, &aad, kdk.as_mut_slice())
        .expect("the nonce has 12 bytes and the message 32");
    let sealed = [HEADER.as_slice(), &nonce, kdk.as_slice(), &tag].concat();
    Ok(StoredGeneration {
        number: generation.number(),
        created_ms: generation.created_ms(),
        backed_up_at_ms: generation.backed_up_at_ms(),
        sealed,
    })
}

fn open(
    id: &ProviderId,
    provider: ProviderUuid,
    row: &StoredGeneration,
    root: &RootKey,
) -> Result<Generation, StoreError> {
    let generation = row.number;
    let format = || StoreError::Format { provider: id.clone(), generation };
    let sealed: &[u8; SEALED_LEN] = row.sealed.as_slice().try_into().map_err(|_| format())?;
    let rest = sealed.strip_prefix(&HEADER).ok_or_else(format)?;
    let (nonce, rest) = rest.split_at(NONCE_LEN);
    let (ciphertext, tag) = rest.split_at(KDK_LEN);
    let mut kdk = SecretBytes::try_zeroed()?;
    let aad = associated_data(provider, generation);
    gcm::open_into(root.expose(), nonce, &aad, ciphertext, tag, kdk.expose_mut())
        .map_err(|source| StoreError::Integrity { provider: id.clone(), generation, source })?;
    Ok(Generation::new(generation, Kdk::new(kdk), row.created_ms, row.backed_up_at_ms))
}

fn associated_data(provider: ProviderUuid, generation: u32) -> Vec<u8> {
    [provider.to_bytes().as_slice(), &generation.to_le_bytes()].concat()
}

/// Why a provider could not be stored or read back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Not the bytes that this version writes.
    #[error(
        "the stored key of provider {provider}, generation {generation}, is not in a format this version reads"
    )]
    Format {
        /// Which provider.
        provider: ProviderId,
        /// Which generation.
        generation: u32,
    },
    /// Another root key, or a row that was changed or moved.
    #[error(
        "the stored key of provider {provider}, generation {generation}, does not open: the root key is another one \
         than it was sealed under, or the row was changed; import the provider's backup to bring it back"
    )]
    Integrity {
        /// Which provider.
        provider: ProviderId,
        /// Which generation.
        generation: u32,
        /// What AES-GCM said.
        #[source]
        source: GcmError,
    },
    /// Rows that cannot all be right.
    #[error("the store holds no generation of provider {provider}, or one of them twice")]
    Generations {
        /// Which provider.
        provider: ProviderId,
    },
    /// Secret memory or randomness could not be had.
    #[error("no key could be sealed or opened")]
    Memory(#[from] SecretError),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{kdk_bytes, provider};

    fn root() -> RootKey {
        let mut bytes = *b"VMSEAL-TEST-SECRET-root-01234567";
        RootKey::from_secret(SecretBytes::take_from(&mut bytes))
    }

    fn reopen(
        provider: &NativeProvider,
        rows: &[StoredGeneration],
        root: &RootKey,
    ) -> Result<NativeProvider, StoreError> {
        NativeProvider::open_from_store(provider.id().clone(), provider.uuid(), rows, root)
    }

    #[test]
    fn stored_provider_reads_back_in_any_order_of_rows() {
        let provider = provider(3);
        let mut rows = provider.seal_for_store(&root()).unwrap();
        rows[1].backed_up_at_ms = Some(17);
        rows.reverse();
        let back = reopen(&provider, &rows, &root()).unwrap();
        let numbers: Vec<_> = back.generations().iter().map(Generation::number).collect();
        assert_eq!(numbers, [1, 2, 3]);
        for generation in back.generations() {
            assert_eq!(*generation.kdk().expose(), kdk_bytes(generation.number()));
        }
        assert_eq!(back.current().unwrap().number(), 2);
    }

    #[test]
    fn stored_row_shows_no_key_and_never_repeats() {
        let provider = provider(1);
        let [row] = provider.seal_for_store(&root()).unwrap().try_into().unwrap();
        assert_eq!(row.sealed.len(), SEALED_LEN);
        assert!(!row.sealed.windows(6).any(|w| w == b"VMSEAL"));
        assert_ne!(provider.seal_for_store(&root()).unwrap()[0].sealed, row.sealed);
    }

    #[test]
    fn stored_row_changed_or_moved_is_refused() {
        let provider = provider(2);
        let rows = provider.seal_for_store(&root()).unwrap();
        for at in 0..SEALED_LEN {
            let mut rows = rows.clone();
            rows[0].sealed[at] ^= 1;
            assert!(reopen(&provider, &rows, &root()).is_err(), "byte {at} flipped");
        }
        let mut swapped = rows.clone();
        (swapped[0].number, swapped[1].number) = (2, 1);
        assert!(matches!(reopen(&provider, &swapped, &root()), Err(StoreError::Integrity { .. })));
        let other = ProviderUuid::from_bytes([9; 16]);
        let moved = NativeProvider::open_from_store(provider.id().clone(), other, &rows, &root());
        assert!(matches!(moved, Err(StoreError::Integrity { .. })));
        let wrong_root = RootKey::from_secret(SecretBytes::random().unwrap());
        let refused = reopen(&provider, &rows, &wrong_root).unwrap_err();
        assert!(refused.to_string().contains("import the provider's backup"), "{refused}");
    }

    #[test]
    fn stored_rows_that_cannot_all_be_right_are_refused() {
        let provider = provider(1);
        let rows = provider.seal_for_store(&root()).unwrap();
        assert!(matches!(reopen(&provider, &[], &root()), Err(StoreError::Generations { .. })));
        let twice = [rows[0].clone(), rows[0].clone()];
        assert!(matches!(reopen(&provider, &twice, &root()), Err(StoreError::Generations { .. })));
        let short = [StoredGeneration { sealed: rows[0].sealed[1..].to_vec(), ..rows[0].clone() }];
        assert!(matches!(reopen(&provider, &short, &root()), Err(StoreError::Format { .. })));
    }
}
