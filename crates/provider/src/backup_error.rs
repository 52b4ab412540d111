//! Why a backup of the native provider was not made, not read or not accepted.

use vmseal_keys::SecretError;
use vmseal_model::id::{ProviderId, ProviderUuid};

use crate::backup::MIN_PASSWORD_CHARS;

/// Why a backup could not be exported, read or verified. Holds names and numbers, never a password or key bytes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackupError {
    /// Export without a password would write the keys in clear.
    #[error("a backup needs a password: without one the file would hold the provider's keys in clear")]
    PasswordEmpty,
    /// Whoever has the file may try passwords for ever.
    #[error(
        "the backup password has {characters} characters, at least {MIN_PASSWORD_CHARS} are needed: \
         whoever gets the file can try passwords as long as they like"
    )]
    PasswordTooShort {
        /// How many it has.
        characters: usize,
    },
    /// A line end or another control character, which stock tools cannot be given.
    #[error(
        "the backup password holds a control character; stock openssl could not be given such a password"
    )]
    PasswordControlCharacter,
    /// Larger than any backup.
    #[error("the file has {bytes} bytes; a vmseal backup has at most {} bytes", crate::p12::MAX_FILE_BYTES)]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// It ends before its own length says.
    #[error("the file ends early: it is a truncated copy, use another one")]
    Truncated,
    /// Something else, or damaged beyond recognition.
    #[error("not a vmseal backup: {why}")]
    NotABackup {
        /// What told.
        why: &'static str,
    },
    /// PKCS#12 as such, with an algorithm that no vmseal backup uses.
    #[error("not a vmseal backup: its {what} is {oid}, vmseal writes {expected}")]
    Unsupported {
        /// Which part.
        what: &'static str,
        /// The object identifier found, or `none`.
        oid: String,
        /// What would have been right.
        expected: &'static str,
    },
    /// Refused before any of them is computed.
    #[error(
        "the file asks for {iterations} iterations of key derivation, at most {} are accepted; it was not written by vmseal",
        crate::p12::MAX_ITERATIONS
    )]
    TooManyIterations {
        /// The sum over the file, saturating.
        iterations: u64,
    },
    /// The integrity code does not fit: the password is wrong, or the file was changed.
    #[error("wrong password, or the file was changed after it was written")]
    WrongPassword,
    /// A good backup of another provider.
    #[error("this is a backup of provider {found_name} ({found}), not of {expected_name} ({expected})")]
    OtherProvider {
        /// The provider it was compared with.
        expected: ProviderUuid,
        /// Its name.
        expected_name: ProviderId,
        /// The provider it is of.
        found: ProviderUuid,
        /// Its name in the file.
        found_name: ProviderId,
    },
    /// A backup of this provider by name and UUID, with another key in it.
    #[error("generation {generation} in the backup is not the key that provider {provider} uses")]
    OtherKey {
        /// The provider it was compared with.
        provider: ProviderId,
        /// The generation that differs.
        generation: u32,
    },
    /// A generation that this provider does not have: the provider's own data may be older than the backup.
    #[error(
        "the backup holds generation {generation}, which provider {provider} does not have; import it instead"
    )]
    UnknownGeneration {
        /// The provider it was compared with.
        provider: ProviderId,
        /// The generation.
        generation: u32,
    },
    /// A time that cannot be written.
    #[error("the time {ms} ms cannot be written into a backup")]
    Time {
        /// Milliseconds since 1970.
        ms: i64,
    },
    /// Secret memory or randomness could not be had.
    #[error("the backup could not be processed")]
    Memory(#[from] SecretError),
    /// The cryptographic library refused, which it does for want of memory or randomness only.
    #[error("the cryptographic library failed while processing the backup")]
    Library(#[from] aws_lc_rs::error::Unspecified),
}
