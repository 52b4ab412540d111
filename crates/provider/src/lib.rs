//! Key providers: where key-encryption keys (KEKs) come from.
//!
//! In go ids of keys, passwords and the bytes of backups; out come KEKs in secret memory, sealed key-derivation keys
//! for the server's store, backups and runbooks. What is stored where and who may ask is the server's business: apart
//! from the root key's file nothing here reads or writes a file, and nothing looks at a clock.
//!
//! | module | what |
//! |---|---|
//! | [`provider`] | what every kind of provider can do |
//! | [`native`] | the native provider: KDK generations and the KEKs derived from them |
//! | [`root_key`], [`stored`] | its KDKs at rest |
//! | [`backup`] | its PKCS#12 backup: export, verify, import |
//! | [`runbook`] | how to get a disk's data back with stock tools alone |

pub mod backup;
mod backup_error;
mod label;
pub mod native;
mod p12;
pub mod provider;
pub mod root_key;
pub mod runbook;
pub mod stored;

pub use backup::{BackupSummary, VerifiedBackup, dry_run, export, import, verify_backup};
pub use backup_error::BackupError;
pub use native::{Generation, GenerationState, NativeError, NativeProvider};
pub use provider::{Health, KeyProvider, ProviderError, ProviderKind, ProviderStatus};
pub use root_key::{RootKey, RootKeyError};
pub use runbook::{Runbook, RunbookError, RunbookFiles};
pub use stored::{StoreError, StoredGeneration};

#[cfg(test)]
mod fixture;
