//! What a header's JSON says, with types. Consistency of sizes and references is checked in `layout`.
//!
//! In goes a JSON tree; out comes [`Metadata`], or the first thing that is missing or of the wrong type. Whether we
//! accept what it says is for `policy`.

use std::collections::BTreeMap;

use crate::{
    binary_header::BinaryHeader,
    error::Judged,
    fields::Fields,
    json::{Json, Parsed},
};

/// Keyslots a header can have.
pub const MAX_KEYSLOTS: u32 = 32;
/// Tokens a header can have.
pub const MAX_TOKENS: u32 = 32;
/// Segments a header can have.
pub const MAX_SEGMENTS: u32 = 32;
/// Digests a header can have.
pub const MAX_DIGESTS: u32 = 8;
/// Longest salt or digest that is read.
const MAX_SALT: usize = 1024;

/// A header whose format is sound: every size, reference and type. [`inspect`](crate::inspect()) and
/// [`Header::read`](crate::Header::read) judge what it says.
#[derive(Debug, Clone)]
pub struct Metadata {
    pub(crate) binary: BinaryHeader,
    pub(crate) json: Json,
    pub(crate) lossy: bool,
    /// Length of the file or device the header was read from.
    pub(crate) file_bytes: u64,
    /// What is to be said about the copies: damaged, older, different.
    pub(crate) notes: Vec<String>,
    /// One of the copies is to be written anew.
    pub(crate) needs_repair: bool,
    pub(crate) keyslots: BTreeMap<u32, Keyslot>,
    pub(crate) tokens: BTreeMap<u32, Token>,
    pub(crate) segments: BTreeMap<u32, Segment>,
    pub(crate) digests: BTreeMap<u32, Digest>,
    pub(crate) json_bytes: u64,
    pub(crate) keyslots_bytes: u64,
    pub(crate) requirements: Vec<String>,
    pub(crate) flags: Vec<String>,
}

/// A stretch of the header's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

#[derive(Debug, Clone)]
pub(crate) struct Keyslot {
    pub(crate) key_size: u64,
    pub(crate) area: Extent,
    pub(crate) kind: KeyslotKind,
}

#[derive(Debug, Clone)]
pub(crate) enum KeyslotKind {
    Luks2 {
        area_encryption: String,
        area_key_size: u64,
        stripes: u64,
        af_hash: String,
        kdf: Kdf,
    },
    Reencrypt {
        mode: String,
        direction: String,
        resilience: String,
    },
    /// A type that is known neither to us nor to libcryptsetup: kept, never used.
    Other(String),
}

#[derive(Debug, Clone)]
pub(crate) enum Kdf {
    Pbkdf2 { hash: String, iterations: u64, salt: Vec<u8> },
    Other(String),
}

impl Kdf {
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Pbkdf2 { .. } => "pbkdf2",
            Self::Other(name) => name,
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Token {
    pub(crate) kind: String,
    pub(crate) keyslots: Vec<u32>,
}

#[derive(Debug, Clone)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    /// `None`: to the end of the device.
    pub(crate) bytes: Option<u64>,
    pub(crate) flags: Vec<String>,
    pub(crate) kind: SegmentKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SegmentKind {
    Crypt { iv_tweak: u64, encryption: String, sector_size: u64, integrity: bool },
    Other(String),
}

impl Segment {
    pub(crate) fn is_backup(&self) -> bool {
        self.flags.iter().any(|flag| flag.starts_with("backup-"))
    }

    pub(crate) fn has_flag(&self, flag: &str) -> bool {
        self.flags.iter().any(|f| f == flag)
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Digest {
    pub(crate) keyslots: Vec<u32>,
    pub(crate) segments: Vec<u32>,
    pub(crate) kind: DigestKind,
}

#[derive(Debug, Clone)]
pub(crate) enum DigestKind {
    Pbkdf2 { hash: String, iterations: u64, salt: Vec<u8>, digest: Vec<u8> },
    Other(String),
}

impl Metadata {
    /// Reads the JSON of a copy whose checksum was right.
    pub(crate) fn parse(binary: BinaryHeader, parsed: Parsed, file_bytes: u64) -> Judged<Self> {
        let Parsed { value: json, lossy } = parsed;
        let top = Fields::of("", &json)?;
        let keyslots = each(&top, "keyslots", MAX_KEYSLOTS, keyslot)?;
        let tokens = each(&top, "tokens", MAX_TOKENS, |at| {
            Ok(Token { kind: at.text("type")?.to_owned(), keyslots: at.references("keyslots")? })
        })?;
        let segments = each(&top, "segments", MAX_SEGMENTS, segment)?;
        let digests = each(&top, "digests", MAX_DIGESTS, digest)?;
        let config = top.inner("config")?;
        let requirements = match config.any("requirements") {
            None => Vec::new(),
            Some(_) => config.inner("requirements").and_then(|at| match at.any("mandatory") {
                None => Ok(Vec::new()),
                Some(_) => at.texts("mandatory"),
            })?,
        };
        let flags = match config.any("flags") {
            None => Vec::new(),
            Some(_) => config.texts("flags")?,
        };
        let (json_bytes, keyslots_bytes) = (config.decimal("json_size")?, config.decimal("keyslots_size")?);
        Ok(Self {
            binary,
            lossy,
            file_bytes,
            notes: Vec::new(),
            needs_repair: false,
            keyslots,
            tokens,
            segments,
            digests,
            json_bytes,
            keyslots_bytes,
            requirements,
            flags,
            json,
        })
    }

    /// Where the keyslots area begins: behind both copies.
    pub(crate) fn area_offset(&self) -> u64 {
        2 * self.binary.copy_bytes()
    }

    /// The digest that proves a segment's key.
    pub(crate) fn digest_of_segment(&self, segment: u32) -> Option<(u32, &Digest)> {
        self.digests.iter().find(|(_, d)| d.segments.contains(&segment)).map(|(&number, d)| (number, d))
    }

    /// The reencryption's keyslot, if there is one.
    pub(crate) fn reencrypt_slot(&self) -> Option<u32> {
        self.keyslots
            .iter()
            .find(|(_, slot)| matches!(slot.kind, KeyslotKind::Reencrypt { .. }))
            .map(|(&number, _)| number)
    }

    /// Whether anything in the header belongs to a reencryption, consistent or not.
    pub(crate) fn hints_at_reencryption(&self) -> bool {
        self.reencrypt_slot().is_some()
            || self.requirements.iter().any(|name| name.starts_with("online-reencrypt"))
            || self
                .segments
                .values()
                .any(|segment| segment.is_backup() || segment.has_flag("in-reencryption"))
    }
}

/// Reads every numbered member of `name`.
fn each<T>(
    top: &Fields<'_>,
    name: &str,
    limit: u32,
    read: impl Fn(&Fields<'_>) -> Judged<T>,
) -> Judged<BTreeMap<u32, T>> {
    top.numbered(name, limit)?.iter().map(|(number, at)| Ok((*number, read(at)?))).collect()
}

fn keyslot(at: &Fields<'_>) -> Judged<Keyslot> {
    let kind = at.text("type")?;
    let key_size = at.int("key_size")?;
    let area = at.inner("area")?;
    let area_kind = area.text("type")?;
    let extent = Extent { offset: area.decimal("offset")?, bytes: area.decimal("size")? };
    let kind = match kind {
        "luks2" => {
            let (af, kdf) = (at.inner("af")?, at.inner("kdf")?);
            if area_kind != "raw" || af.text("type")? != "luks1" {
                return Ok(Keyslot { key_size, area: extent, kind: KeyslotKind::Other(kind.to_owned()) });
            }
            KeyslotKind::Luks2 {
                area_encryption: area.text("encryption")?.to_owned(),
                area_key_size: area.int("key_size")?,
                stripes: af.int("stripes")?,
                af_hash: af.text("hash")?.to_owned(),
                kdf: match kdf.text("type")? {
                    "pbkdf2" => Kdf::Pbkdf2 {
                        hash: kdf.text("hash")?.to_owned(),
                        iterations: kdf.int("iterations")?,
                        salt: kdf.base64("salt", 1..=MAX_SALT)?,
                    },
                    other => Kdf::Other(other.to_owned()),
                },
            }
        }
        "reencrypt" => KeyslotKind::Reencrypt {
            mode: at.text("mode")?.to_owned(),
            direction: at.text("direction")?.to_owned(),
            resilience: area_kind.to_owned(),
        },
        other => KeyslotKind::Other(other.to_owned()),
    };
    Ok(Keyslot { key_size, area: extent, kind })
}

fn segment(at: &Fields<'_>) -> Judged<Segment> {
    let kind = match at.text("type")? {
        "crypt" => SegmentKind::Crypt {
            iv_tweak: at.decimal("iv_tweak")?,
            encryption: at.text("encryption")?.to_owned(),
            sector_size: at.int("sector_size")?,
            integrity: at.any("integrity").is_some(),
        },
        other => SegmentKind::Other(other.to_owned()),
    };
    let bytes = match at.text("size")? {
        "dynamic" => None,
        _ => Some(at.decimal("size")?),
    };
    let flags = match at.any("flags") {
        None => Vec::new(),
        Some(_) => at.texts("flags")?,
    };
    Ok(Segment { offset: at.decimal("offset")?, bytes, flags, kind })
}

fn digest(at: &Fields<'_>) -> Judged<Digest> {
    let kind = match at.text("type")? {
        "pbkdf2" => DigestKind::Pbkdf2 {
            hash: at.text("hash")?.to_owned(),
            iterations: at.int("iterations")?,
            salt: at.base64("salt", 1..=MAX_SALT)?,
            digest: at.base64("digest", 1..=MAX_SALT)?,
        },
        other => DigestKind::Other(other.to_owned()),
    };
    Ok(Digest { keyslots: at.references("keyslots")?, segments: at.references("segments")?, kind })
}
