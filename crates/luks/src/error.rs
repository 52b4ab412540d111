//! What can be wrong with a header, and why an operation on one failed.

use std::{fmt, io};

/// What is wrong with a header, in words for an administrator. Quotes what the header says, escaped and shortened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defect(String);

impl Defect {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Shorthand of the modules that judge.
pub(crate) type Judged<T = ()> = Result<T, Defect>;

/// Returns early with a [`Defect`].
macro_rules! reject {
    ($($text:tt)*) => { return Err($crate::error::Defect::new(format!($($text)*))) };
}
pub(crate) use reject;

/// Text out of a header as it may stand in a message: quoted, escaped, at most 60 characters.
pub(crate) fn quoted(text: &str) -> String {
    let mut out = String::from("'");
    out.extend(text.chars().take(60).flat_map(char::escape_debug));
    if text.chars().nth(60).is_some() {
        out.push('…');
    }
    out.push('\'');
    out
}

/// Why something could not be done with a header. Holds no key bytes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LuksError {
    /// Reading or writing failed. Nothing can be assumed about what reached the disk.
    #[error("cannot {doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// How it failed.
        #[source]
        source: io::Error,
    },
    /// There is no LUKS header.
    #[error("not a LUKS volume: {0}")]
    NotLuks(Defect),
    /// A LUKS1 header: another format, which is imported and not served.
    #[error("LUKS1, import it")]
    Luks1,
    /// Neither copy of the metadata can be used.
    #[error("the LUKS2 header is damaged beyond repair: {0}")]
    Damaged(Defect),
    /// A consistent header that says what we do not accept.
    #[error("the LUKS2 header is refused: {0}")]
    Refused(Defect),
    /// A reencryption was begun and not finished.
    #[error("a reencryption of this volume is unfinished: finish it before anything else")]
    Reencrypting,
    /// The header's UUID is no disk id.
    #[error("the LUKS2 header's UUID {uuid} is no disk id")]
    Uuid {
        /// What stands there, quoted.
        uuid: String,
    },
    /// No header can be made like this.
    #[error("no header with a data unit of {unit_bytes} bytes and data at byte {payload_offset}: {reason}")]
    Geometry {
        /// Unit asked for.
        unit_bytes: u32,
        /// Offset asked for.
        payload_offset: u64,
        /// What would be possible.
        reason: &'static str,
    },
    /// The new metadata does not fit into the JSON area.
    #[error(
        "the header's metadata would take {bytes} bytes, and its area holds {limit}: remove recipients or tokens"
    )]
    Full {
        /// Bytes of the JSON.
        bytes: usize,
        /// Bytes there are.
        limit: usize,
    },
    /// Metadata that would not survive being written again.
    #[error("the header cannot be changed: {0}")]
    Frozen(Defect),
    /// What was read back is not what was written.
    #[error(
        "the {copy} copy of the header reads back otherwise than it was written: do not trust this storage"
    )]
    ReadBack {
        /// Which.
        copy: &'static str,
    },
    /// A keyslot cannot be made or opened.
    #[error("keyslot {slot}: {reason}")]
    Keyslot {
        /// Which.
        slot: u32,
        /// Why.
        reason: Defect,
    },
    /// The secret does not open the keyslot.
    #[error("keyslot {slot} does not open with this secret")]
    WrongSecret {
        /// Which.
        slot: u32,
    },
    /// The disk key is not the one this header was made for.
    #[error("the disk key does not match the header's digest")]
    WrongKey,
    /// No memory for secrets, or no randomness.
    #[error("{0}")]
    Secret(#[from] vmseal_keys::SecretError),
    /// The cipher refuses the key.
    #[error("the cipher refuses a keyslot's area key")]
    Cipher(#[source] vmseal_xts::XtsError),
}

impl LuksError {
    /// For `map_err` on I/O.
    pub(crate) fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}
