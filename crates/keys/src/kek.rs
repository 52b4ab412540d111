//! A key-encryption key and its name.

use std::fmt;

use vmseal_model::id::KekId;

use crate::secret::SecretBytes;

/// A KEK as a key provider gave it: 32 bytes in secret memory, and the id it has there.
pub struct Kek {
    id: KekId,
    secret: SecretBytes<32>,
    unwrap_only: bool,
}

impl Kek {
    /// A KEK that may wrap and unwrap.
    pub fn new(id: KekId, secret: SecretBytes<32>) -> Self {
        Self { id, secret, unwrap_only: false }
    }

    /// The same KEK after it was rotated out: what it wrapped still opens, nothing new is wrapped under it.
    pub fn unwrap_only(self) -> Self {
        Self { unwrap_only: true, ..self }
    }

    /// Whether it was rotated out.
    pub fn is_unwrap_only(&self) -> bool {
        self.unwrap_only
    }

    /// Its id at its provider.
    pub fn id(&self) -> &KekId {
        &self.id
    }

    /// The bytes. Whoever copies them answers for the copy.
    pub fn expose(&self) -> &[u8; 32] {
        self.secret.expose()
    }
}

impl fmt::Debug for Kek {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kek({}{})", self.id, if self.unwrap_only { ", unwrap only" } else { "" })
    }
}
