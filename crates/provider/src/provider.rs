//! What every key provider can do, whatever it rests on.
//!
//! Calls block; a caller on an async runtime gives them a thread of their own.

use vmseal_keys::Kek;
use vmseal_model::{
    id::{KekId, ProviderId},
    record::RecipientKind,
};

use crate::native::NativeError;

/// A source of KEKs.
pub trait KeyProvider: Send + Sync {
    /// The name by which it stands in key records.
    fn id(&self) -> &ProviderId;

    /// What it rests on.
    fn kind(&self) -> ProviderKind;

    /// Whether keys can be had, and what to do if not.
    fn status(&self) -> ProviderStatus;

    /// A KEK that never was there before, to wrap under.
    ///
    /// # Errors
    ///
    /// [`ProviderError`] if the provider gives no new keys now.
    fn new_kek(&self) -> Result<Kek, ProviderError>;

    /// The KEK of this id. It is [`Kek::unwrap_only`] if it has been superseded.
    ///
    /// # Errors
    ///
    /// [`ProviderError`] if there is no such key.
    fn get_kek(&self, id: &KekId) -> Result<Kek, ProviderError>;
}

/// What a provider rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProviderKind {
    /// Keys derived by the server from a KDK of its own.
    Native,
}

impl ProviderKind {
    /// The word for people and programs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
        }
    }

    /// The kind of recipient that a KEK of such a provider makes in a key record.
    pub fn recipient_kind(self) -> RecipientKind {
        match self {
            Self::Native => RecipientKind::Native,
        }
    }
}

/// How a provider is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProviderStatus {
    /// What can be had of it.
    pub health: Health,
    /// One line for people; what to do, where there is something to do.
    pub detail: String,
}

/// What can be had of a provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Health {
    /// New keys and old ones.
    Usable,
    /// New keys and old ones, but a generation waits for its backup.
    UsableBackupDue,
    /// Old keys only: nothing new before the first verified backup.
    NotBackedUp,
}

impl Health {
    /// Whether new KEKs can be had.
    pub fn gives_new_keys(self) -> bool {
        !matches!(self, Self::NotBackedUp)
    }
}

/// Why a provider gave no KEK.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProviderError {
    /// The native provider.
    #[error(transparent)]
    Native(#[from] NativeError),
}
