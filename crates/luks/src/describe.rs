//! What a header says, for people and for programs. Nothing in it is secret.

use std::fmt;

use serde::Serialize;

use crate::{
    error::quoted,
    metadata::{Kdf, KeyslotKind, Metadata, SegmentKind},
};

/// A header, described.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Description {
    /// LUKS version.
    pub version: u16,
    /// UUID: the disk id, where the volume is ours.
    pub uuid: String,
    /// Label.
    pub label: String,
    /// Sequence number of the copy that counts.
    pub sequence: u64,
    /// Bytes of one copy of the metadata.
    pub metadata_bytes: u64,
    /// Bytes of the keyslots area.
    pub keyslots_bytes: u64,
    /// Data segments, one line each.
    pub segments: Vec<String>,
    /// Keyslots, one line each.
    pub keyslots: Vec<String>,
    /// Tokens, one line each.
    pub tokens: Vec<String>,
    /// Digests, one line each.
    pub digests: Vec<String>,
    /// Flags of the configuration.
    pub flags: Vec<String>,
    /// What the header demands of its reader.
    pub requirements: Vec<String>,
    /// What is to be said about the copies.
    pub notes: Vec<String>,
    /// Whether a copy should be written anew.
    pub needs_repair: bool,
}

impl Description {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        let segments = metadata.segments.iter().map(|(number, segment)| {
            let to = segment.bytes.map_or("to the end".to_owned(), |bytes| format!("{bytes} bytes"));
            match &segment.kind {
                SegmentKind::Crypt { encryption, sector_size, .. } => format!(
                    "{number}: crypt, {}, units of {sector_size} bytes, from byte {}, {to}",
                    plain(encryption),
                    segment.offset
                ),
                SegmentKind::Other(kind) => {
                    format!("{number}: {}, from byte {}, {to}", plain(kind), segment.offset)
                }
            }
        });
        let keyslots = metadata.keyslots.iter().map(|(number, slot)| match &slot.kind {
            KeyslotKind::Luks2 { kdf, af_hash, .. } => format!(
                "{number}: luks2, key of {} bytes, {}, splitter {}",
                slot.key_size,
                derivation(kdf),
                plain(af_hash)
            ),
            KeyslotKind::Reencrypt { mode, direction, resilience } => {
                format!("{number}: reencrypt, {}, {}, {}", plain(mode), plain(direction), plain(resilience))
            }
            KeyslotKind::Other(kind) => format!("{number}: {}", plain(kind)),
        });
        let tokens = metadata.tokens.iter().map(|(number, token)| {
            let keyslots: Vec<_> = token.keyslots.iter().map(u32::to_string).collect();
            format!("{number}: {}, keyslots [{}]", plain(&token.kind), keyslots.join(" "))
        });
        let digests = metadata.digests.iter().map(|(number, digest)| {
            let segments: Vec<_> = digest.segments.iter().map(u32::to_string).collect();
            format!("{number}: segments [{}]", segments.join(" "))
        });
        Self {
            version: metadata.binary.version(),
            uuid: metadata.binary.uuid(),
            label: metadata.binary.label(),
            sequence: metadata.binary.sequence(),
            metadata_bytes: metadata.binary.copy_bytes(),
            keyslots_bytes: metadata.keyslots_bytes,
            segments: segments.collect(),
            keyslots: keyslots.collect(),
            tokens: tokens.collect(),
            digests: digests.collect(),
            flags: metadata.flags.clone(),
            requirements: metadata.requirements.clone(),
            notes: metadata.notes.clone(),
            needs_repair: metadata.needs_repair,
        }
    }
}

fn derivation(kdf: &Kdf) -> String {
    match kdf {
        Kdf::Pbkdf2 { hash, iterations, salt } => {
            format!("{} {}, {iterations} iterations, salt of {} bytes", kdf.name(), plain(hash), salt.len())
        }
        Kdf::Other(name) => plain(name),
    }
}

/// A word of the header as it may stand in a line of ours: as it is if it is plain, else quoted and escaped.
fn plain(word: &str) -> String {
    let harmless = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    if !word.is_empty() && word.len() <= 60 && word.chars().all(harmless) {
        word.to_owned()
    } else {
        quoted(word)
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "LUKS{}  uuid {}  label {}", self.version, plain(&self.uuid), quoted(&self.label))?;
        writeln!(
            f,
            "sequence {}, metadata 2 × {} bytes, keyslots area {} bytes",
            self.sequence, self.metadata_bytes, self.keyslots_bytes
        )?;
        for (name, lines) in [
            ("segment", &self.segments),
            ("keyslot", &self.keyslots),
            ("token", &self.tokens),
            ("digest", &self.digests),
            ("flag", &self.flags),
            ("requires", &self.requirements),
            ("note", &self.notes),
        ] {
            for line in lines {
                // Flags and requirements are the header's own words.
                let line = if matches!(name, "flag" | "requires") { plain(line) } else { line.clone() };
                writeln!(f, "{name} {line}")?;
            }
        }
        Ok(())
    }
}
