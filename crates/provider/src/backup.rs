//! The native provider's backup: one password-protected PKCS#12 file with every generation's KDK.
//!
//! In goes a provider and a password, out come bytes; and back, from bytes that anybody may have made. Only
//! [`verify_backup`] makes the [`VerifiedBackup`] that marks generations as backed up, and it wants the bytes as they
//! were read back from where they are kept: an export that was interrupted, lost or mistyped never counts.
//!
//! Format, and how stock openssl reads it: `docs/formats/native-backup.md`.

use vmseal_keys::Kdk;
use vmseal_model::id::{ProviderId, ProviderUuid};

pub use crate::backup_error::BackupError;
use crate::{
    label::BagLabel,
    native::{Generation, NativeProvider, same_key},
    p12::{self, Cost, SecretBagRef},
};

/// Shortest password that protects a backup, in characters.
pub const MIN_PASSWORD_CHARS: usize = 8;

/// A backup of every generation of `provider`, those included that have none yet.
///
/// It takes a good part of a second, on purpose. It marks nothing: hand the bytes over to be kept, read them back, and give those to
/// [`verify_backup`].
///
/// # Errors
///
/// [`BackupError::PasswordEmpty`], [`BackupError::PasswordTooShort`], [`BackupError::PasswordControlCharacter`]; the
/// rest is want of memory.
pub fn export(provider: &NativeProvider, password: &str, now_ms: i64) -> Result<Vec<u8>, BackupError> {
    export_at(provider, password, now_ms, Cost::STANDARD)
}

pub(crate) fn export_at(
    provider: &NativeProvider,
    password: &str,
    now_ms: i64,
    cost: Cost,
) -> Result<Vec<u8>, BackupError> {
    check_password(password)?;
    let bag = |generation| -> Result<SecretBagRef<'_>, BackupError> {
        let label = label(provider, generation, now_ms);
        let friendly_name = label.friendly_name().ok_or(BackupError::Time { ms: now_ms })?;
        Ok(SecretBagRef {
            secret: generation.kdk().expose(),
            friendly_name,
            local_key_id: label.local_key_id(),
        })
    };
    let bags: Result<Vec<_>, _> = provider.generations().iter().map(bag).collect();
    p12::write(&bags?, password, cost)
}

/// What a backup holds, without its keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupSummary {
    /// The provider's name.
    pub provider: ProviderId,
    /// The provider's uuid.
    pub uuid: ProviderUuid,
    /// Its generations, ascending.
    pub generations: Vec<u32>,
    /// When it was made, milliseconds since 1970, to the second.
    pub exported_ms: i64,
}

/// Opens a backup and says what it holds; its keys are dropped.
///
/// # Errors
///
/// [`BackupError`].
pub fn dry_run(file: &[u8], password: &str) -> Result<BackupSummary, BackupError> {
    Ok(open(file, password)?.summary)
}

/// The provider in a backup, to be stored. Its generations count as backed up at the time of the backup.
///
/// Where the provider is there already, [`NativeProvider::adopt_missing`] takes what is missing.
///
/// # Errors
///
/// [`BackupError`].
pub fn import(file: &[u8], password: &str) -> Result<NativeProvider, BackupError> {
    let Opened { summary, keys } = open(file, password)?;
    let at = summary.exported_ms;
    let generations =
        keys.into_iter().map(|(number, kdk)| Generation::new(number, kdk, at, Some(at))).collect();
    NativeProvider::from_generations(summary.provider, summary.uuid, generations)
        .ok_or(BackupError::NotABackup { why: "its generations do not count up from 1" })
}

/// A backup that was opened and holds the very keys of a provider. Made by [`verify_backup`] and nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedBackup {
    summary: BackupSummary,
}

impl VerifiedBackup {
    /// The provider's uuid.
    pub fn uuid(&self) -> ProviderUuid {
        self.summary.uuid
    }

    /// The generations in it, ascending.
    pub fn generations(&self) -> &[u32] {
        &self.summary.generations
    }

    /// When it was made, milliseconds since 1970.
    pub fn exported_ms(&self) -> i64 {
        self.summary.exported_ms
    }
}

/// Opens a backup and compares every key in it with the provider's, in constant time.
///
/// Generations made after the backup are not in it, and not in the result.
///
/// # Errors
///
/// [`BackupError`]: the file does not open, or is another provider's, or holds a key that `provider` does not have.
pub fn verify_backup(
    file: &[u8],
    password: &str,
    provider: &NativeProvider,
) -> Result<VerifiedBackup, BackupError> {
    let Opened { summary, keys } = open(file, password)?;
    if summary.uuid != provider.uuid() || summary.provider != *provider.id() {
        return Err(BackupError::OtherProvider {
            expected: provider.uuid(),
            expected_name: provider.id().clone(),
            found: summary.uuid,
            found_name: summary.provider,
        });
    }
    for (number, kdk) in &keys {
        let name = provider.id().clone();
        match provider.generation(*number) {
            None => return Err(BackupError::UnknownGeneration { provider: name, generation: *number }),
            Some(ours) if !same_key(ours.kdk(), kdk) => {
                return Err(BackupError::OtherKey { provider: name, generation: *number });
            }
            Some(_) => {}
        }
    }
    Ok(VerifiedBackup { summary })
}

/// A file whose password was right and whose bags make sense together.
struct Opened {
    summary: BackupSummary,
    /// By generation, ascending, none twice.
    keys: Vec<(u32, Kdk)>,
}

fn open(file: &[u8], password: &str) -> Result<Opened, BackupError> {
    let mut keys = Vec::new();
    let mut first: Option<BagLabel> = None;
    for bag in p12::read(file, password)? {
        let label = BagLabel::parse(&bag.friendly_name, &bag.local_key_id)
            .ok_or(BackupError::NotABackup { why: "a bag's name or id is not one that vmseal writes" })?;
        let number = label.generation;
        let first = first.get_or_insert_with(|| label.clone());
        if label != (BagLabel { generation: number, ..first.clone() }) {
            return Err(BackupError::NotABackup { why: "its bags belong to different providers or exports" });
        }
        keys.push((number, Kdk::new(bag.secret)));
    }
    keys.sort_by_key(|(number, _)| *number);
    let numbers: Vec<u32> = keys.iter().map(|(number, _)| *number).collect();
    if numbers.contains(&0) || numbers.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(BackupError::NotABackup { why: "it holds one generation twice, or generation 0" });
    }
    let BagLabel { name, uuid, exported_ms, .. } =
        first.ok_or(BackupError::NotABackup { why: "it holds no key" })?;
    Ok(Opened { summary: BackupSummary { provider: name, uuid, generations: numbers, exported_ms }, keys })
}

fn label(provider: &NativeProvider, generation: &Generation, exported_ms: i64) -> BagLabel {
    BagLabel {
        name: provider.id().clone(),
        uuid: provider.uuid(),
        generation: generation.number(),
        exported_ms,
    }
}

/// What protects a file for ever must be worth trying for long.
fn check_password(password: &str) -> Result<(), BackupError> {
    let characters = password.chars().count();
    if characters == 0 {
        return Err(BackupError::PasswordEmpty);
    }
    if characters < MIN_PASSWORD_CHARS {
        return Err(BackupError::PasswordTooShort { characters });
    }
    if password.chars().any(char::is_control) {
        return Err(BackupError::PasswordControlCharacter);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
