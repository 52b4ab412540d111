//! One recipient of a key record: a payload wrapped under a KEK or to a recovery key, and back.
//!
//! In goes a payload in secret memory and what wraps it; out comes a [`Recipient`], and the other way round. The
//! head and the recipient's name are authenticated with it, so a recipient fits one record only. Whole records, with
//! key check and MAC, are in `record`.

use vmseal_model::{
    id::{KekId, ProviderId},
    record::{
        DISK_PAYLOAD_LEN, HOME_PAYLOAD_LEN, Recipient, RecipientSeal, RecordHead, Role, TAG_LEN, WrappedKek,
    },
};

use crate::{
    dek::Dek,
    derive, gcm,
    home_key::HomeKey,
    hpke_x25519,
    kek::Kek,
    secret::SecretBytes,
    wrap::{Freshness, RECOVERY_INFO, WrapError, Wrapping, associated_data},
};

/// What opens a recipient.
pub enum Opener<'a> {
    /// Kinds 1 to 4. For 3 and 4 it is the per-VM KEK, unwrapped by the broker or the key server.
    Kek(&'a Kek),
    /// Kind 5.
    Recovery {
        /// The private key.
        private: &'a SecretBytes<32>,
        /// Its name in records.
        id: &'a KekId,
    },
}

impl Opener<'_> {
    pub(crate) fn kek_id(&self) -> &KekId {
        match self {
            Self::Kek(kek) => kek.id(),
            Self::Recovery { id, .. } => id,
        }
    }
}

/// A key that a record can wrap.
pub trait Wrappable: Sized {
    /// Role of its records.
    const ROLE: Role;
    /// What is wrapped.
    fn bytes(&self) -> &[u8];
    /// Wraps it for a new recipient of the record with this head.
    fn wrap(
        &self,
        head: &RecordHead,
        provider: &ProviderId,
        wrapping: &Wrapping<'_>,
        fresh: Freshness,
    ) -> Result<Recipient, WrapError>;
    /// Unwraps it. The result is not to be used before key check and MAC.
    fn unwrap(head: &RecordHead, recipient: &Recipient, opener: &Opener<'_>) -> Result<Self, WrapError>;
}

macro_rules! wrappable {
    ($key:ty, $role:expr, $len:expr) => {
        impl Wrappable for $key {
            const ROLE: Role = $role;

            fn bytes(&self) -> &[u8] {
                self.payload()
            }

            fn wrap(
                &self,
                head: &RecordHead,
                provider: &ProviderId,
                wrapping: &Wrapping<'_>,
                fresh: Freshness,
            ) -> Result<Recipient, WrapError> {
                wrap::<{ $len }>(head, self.payload(), provider, wrapping, fresh)
            }

            fn unwrap(
                head: &RecordHead,
                recipient: &Recipient,
                opener: &Opener<'_>,
            ) -> Result<Self, WrapError> {
                Ok(Self::from_secret(unwrap::<{ $len }>(head, recipient, opener)?))
            }
        }
    };
}

wrappable!(Dek, Role::Disk, DISK_PAYLOAD_LEN);
wrappable!(HomeKey, Role::Home, HOME_PAYLOAD_LEN);

/// Wraps `payload` for a new recipient of the record with this head.
///
/// Source: AES-256-GCM, NIST SP 800-38D §7.1, under HKDF(KEK, salt); HPKE for recovery. Associated data is the head
/// and the recipient's name.
fn wrap<const N: usize>(
    head: &RecordHead,
    payload: &[u8; N],
    provider: &ProviderId,
    wrapping: &Wrapping<'_>,
    fresh: Freshness,
) -> Result<Recipient, WrapError> {
    let id = wrapping.recipient_id(provider);
    let aad = associated_data(head, &id);
    let mut buffer = SecretBytes::<N>::try_zeroed()?;
    buffer.expose_mut().copy_from_slice(payload);
    let (kek, wrapped_kek) = match wrapping {
        Wrapping::Kek(kek) | Wrapping::Native(kek) => (kek, None),
        Wrapping::Wrapped { kek, wrapped } | Wrapping::InKms { kek, wrapped } => {
            check_wrapped_kek(wrapped)?;
            (kek, Some(wrapped.clone()))
        }
        Wrapping::Recovery { public, .. } => {
            let (enc, tag) = hpke_x25519::seal_in_place(public, RECOVERY_INFO, &aad, buffer.expose_mut())
                .map_err(|_| WrapError::RecoveryKey)?;
            let wrapped_payload = [buffer.expose().as_slice(), &tag].concat();
            return Ok(Recipient { id, seal: RecipientSeal::Hpke { enc }, wrapped_payload });
        }
    };
    if kek.is_unwrap_only() {
        return Err(WrapError::UnwrapOnly { kek: kek.id().clone() });
    }
    let key: SecretBytes<32> =
        derive::derive_key(kek.expose(), &fresh.salt, &derive::wrap_key_info(head.record))?;
    let tag = gcm::seal_in_place(key.expose(), &fresh.nonce, &aad, buffer.expose_mut())
        .expect("a 12-byte nonce and a payload of at most 96 bytes");
    Ok(Recipient {
        id,
        seal: RecipientSeal::Gcm { salt: fresh.salt, nonce: fresh.nonce, wrapped_kek },
        wrapped_payload: [buffer.expose().as_slice(), &tag].concat(),
    })
}

/// Unwraps into secret memory. The result is not to be used before key check and MAC.
fn unwrap<const N: usize>(
    head: &RecordHead,
    recipient: &Recipient,
    opener: &Opener<'_>,
) -> Result<SecretBytes<N>, WrapError> {
    let integrity = || WrapError::Integrity { record: head.record, kek: recipient.id.kek.clone() };
    let aad = associated_data(head, &recipient.id);
    let (ciphertext, tag) = recipient.wrapped_payload.split_last_chunk::<TAG_LEN>().ok_or_else(integrity)?;
    let mut payload = SecretBytes::<N>::try_zeroed()?;
    match (&recipient.seal, opener) {
        (RecipientSeal::Gcm { salt, nonce, .. }, Opener::Kek(kek)) => {
            let key: SecretBytes<32> =
                derive::derive_key(kek.expose(), salt, &derive::wrap_key_info(head.record))?;
            gcm::open_into(key.expose(), nonce, &aad, ciphertext, tag, payload.expose_mut())
                .map_err(|_| integrity())?;
        }
        (RecipientSeal::Hpke { enc }, Opener::Recovery { private, .. }) => {
            let ciphertext: &[u8; N] = ciphertext.try_into().map_err(|_| integrity())?;
            payload.expose_mut().copy_from_slice(ciphertext);
            hpke_x25519::open_in_place(private.expose(), RECOVERY_INFO, &aad, enc, payload.expose_mut(), tag)
                .map_err(|_| integrity())?;
        }
        (RecipientSeal::Gcm { .. }, Opener::Recovery { .. })
        | (RecipientSeal::Hpke { .. }, Opener::Kek(_)) => {
            return Err(WrapError::NotARecipient {
                record: head.record,
                provider: recipient.id.provider.clone(),
                kek: opener.kek_id().clone(),
            });
        }
    }
    Ok(payload)
}

fn check_wrapped_kek(wrapped: &WrappedKek) -> Result<(), WrapError> {
    let iv_len = match wrapped.algorithm {
        1 => gcm::IV_LEN,
        2 => 0,
        _ => return Err(WrapError::Unwritable { field: "wrapping algorithm" }),
    };
    if wrapped.iv.len() != iv_len {
        return Err(WrapError::Unwritable { field: "IV of the wrapped KEK" });
    }
    // GCM: 32 bytes and a tag; KWP (SP 800-38F §6.3): 32 bytes and a semiblock.
    if wrapped.wrapped.len() != if wrapped.algorithm == 1 { 32 + TAG_LEN } else { 40 } {
        return Err(WrapError::Unwritable { field: "length of the wrapped KEK" });
    }
    if wrapped.wrapping_key.is_empty() || wrapped.wrapping_key.len() > KekId::MAX_LEN {
        return Err(WrapError::Unwritable { field: "id of the wrapping key" });
    }
    Ok(())
}
