//! What the format allows and we refuse: a header's checksum finds accidents, and an attacker computes another.
//!
//! In goes sound [`Metadata`]; out comes what kind of volume it is, or why it is refused. Classes of attack:
//! CVE-2021-4122 (faked reencryption), CVE-2025-59054 and CVE-2025-58356 (null cipher out of a hostile header).

use crate::{
    error::{Judged, quoted, reject},
    metadata::{Digest, DigestKind, Kdf, Keyslot, KeyslotKind, Metadata, Segment, SegmentKind},
    reencrypt,
};

/// The one cipher of segments and of keyslot areas.
pub(crate) const CIPHER: &str = "aes-xts-plain64";
/// Stripes of the anti-forensic splitter; LUKS2 has no other number.
pub(crate) const STRIPES: u64 = 4000;
/// Fewest iterations of PBKDF2 (specification §3.2.1: cryptsetup goes no lower).
pub(crate) const MIN_ITERATIONS: u64 = 1000;
/// Most iterations that are computed: about ten seconds. A hostile header would ask for hours.
pub(crate) const MAX_ITERATIONS: u64 = 10_000_000;
/// 2^44 cipher blocks, the most one XTS key may ever cover (IEEE Std 1619).
const MAX_VOLUME_BYTES: u64 = 1 << 48;

/// What an accepted header describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One encrypted segment.
    Plain,
    /// A reencryption that was begun; only its key can tell whether it is genuine.
    Reencrypting,
}

/// Judges a sound header.
pub(crate) fn check(metadata: &Metadata) -> Judged<Kind> {
    for (&number, digest) in &metadata.digests {
        check_digest(number, digest)?;
    }
    for (&number, slot) in &metadata.keyslots {
        check_keyslot(number, slot)?;
    }
    if metadata.hints_at_reencryption() {
        reencrypt::check(metadata)?;
        return Ok(Kind::Reencrypting);
    }
    if let Some(name) = metadata.requirements.first() {
        reject!("config.requirements demands {}, which is not known here", quoted(name));
    }
    if metadata.segments.len() != 1 {
        // Without the requirement flag, cryptsetup opens such a volume without an error and with wrong data.
        reject!("there are {} segments and no reencryption that explains them", metadata.segments.len());
    }
    let segment = metadata.segments.get(&0);
    let Some(segment) = segment else { reject!("segments.0 is missing") };
    check_segment(0, segment)?;
    if segment_tweak(segment) != Some(0) {
        reject!("segments.0.iv_tweak is not 0");
    }
    if let Some(flag) = segment.flags.first() {
        reject!("segments.0 has the flag {}", quoted(flag));
    }
    check_extent(metadata, 0, segment)?;
    let digest = one_digest(metadata, 0)?;
    check_key_sizes(metadata, digest)?;
    Ok(Kind::Plain)
}

/// Encrypted, with our cipher and a unit we can serve.
pub(crate) fn check_segment(number: u32, segment: &Segment) -> Judged {
    let SegmentKind::Crypt { encryption, sector_size, integrity, .. } = &segment.kind else {
        let SegmentKind::Other(kind) = &segment.kind else { return Ok(()) };
        reject!("segments.{number} is {} and not encrypted", quoted(kind));
    };
    if encryption != CIPHER {
        reject!("segments.{number}.encryption is {}, accepted is only {CIPHER}", quoted(encryption));
    }
    if !matches!(sector_size, 512 | 4096) {
        reject!("segments.{number}.sector_size {sector_size} is neither 512 nor 4096");
    }
    if *integrity {
        reject!("segments.{number} has integrity tags, which are not served here");
    }
    Ok(())
}

/// A segment's first tweak, if it is encrypted.
pub(crate) fn segment_tweak(segment: &Segment) -> Option<u64> {
    match segment.kind {
        SegmentKind::Crypt { iv_tweak, .. } => Some(iv_tweak),
        SegmentKind::Other(_) => None,
    }
}

/// A segment of fixed size must be possible: not beyond the file it is in, nor beyond what one key may cover.
pub(crate) fn check_extent(metadata: &Metadata, number: u32, segment: &Segment) -> Judged {
    let Some(bytes) = segment.bytes else { return Ok(()) };
    if bytes > MAX_VOLUME_BYTES {
        reject!("segments.{number}.size {bytes} is more than one key may cover, {MAX_VOLUME_BYTES} bytes");
    }
    let in_this_file = segment.offset != 0;
    if in_this_file && segment.offset.saturating_add(bytes) > metadata.file_bytes {
        reject!("segments.{number} ends behind the end of the file, at {}", metadata.file_bytes);
    }
    Ok(())
}

/// The one digest of a segment; two could vouch for two keys.
pub(crate) fn one_digest(metadata: &Metadata, segment: u32) -> Judged<u32> {
    let mut digests = metadata.digests.iter().filter(|(_, digest)| digest.segments.contains(&segment));
    match (digests.next(), digests.next()) {
        (Some((&number, _)), None) => Ok(number),
        (None, _) => reject!("no digest vouches for the key of segments.{segment}"),
        (Some(_), Some(_)) => reject!("two digests vouch for the key of segments.{segment}"),
    }
}

/// Keyslots of a segment's key hold an AES-XTS key.
pub(crate) fn check_key_sizes(metadata: &Metadata, digest: u32) -> Judged {
    let slots = metadata.digests.get(&digest).map_or(&[][..], |digest| &digest.keyslots);
    for number in slots {
        let Some(slot) = metadata.keyslots.get(number) else { continue };
        let luks2 = matches!(slot.kind, KeyslotKind::Luks2 { .. });
        if luks2 && !matches!(slot.key_size, 32 | 64) {
            reject!("keyslots.{number}.key_size {} is no key size of {CIPHER}", slot.key_size);
        }
    }
    Ok(())
}

fn check_digest(number: u32, digest: &Digest) -> Judged {
    let DigestKind::Pbkdf2 { hash, iterations, digest, .. } = &digest.kind else {
        let DigestKind::Other(kind) = &digest.kind else { return Ok(()) };
        reject!("digests.{number}.type {} is not known", quoted(kind));
    };
    let bytes = match hash.as_str() {
        "sha256" => 32,
        "sha512" => 64,
        other => reject!("digests.{number}.hash {} is neither sha256 nor sha512", quoted(other)),
    };
    if digest.len() != bytes {
        reject!("digests.{number}.digest has {} bytes and {hash} has {bytes}", digest.len());
    }
    check_iterations(&format!("digests.{number}"), *iterations)
}

fn check_keyslot(number: u32, slot: &Keyslot) -> Judged {
    let KeyslotKind::Luks2 { area_encryption, area_key_size, stripes, kdf, .. } = &slot.kind else {
        return Ok(());
    };
    if !(1..=512).contains(&slot.key_size) {
        reject!("keyslots.{number}.key_size {} is not 1 to 512", slot.key_size);
    }
    if area_encryption != CIPHER {
        reject!(
            "keyslots.{number}.area.encryption is {}, accepted is only {CIPHER}",
            quoted(area_encryption)
        );
    }
    if !matches!(area_key_size, 32 | 64) {
        reject!("keyslots.{number}.area.key_size {area_key_size} is no key size of {CIPHER}");
    }
    if *stripes != STRIPES {
        reject!("keyslots.{number}.af.stripes is {stripes} and not {STRIPES}");
    }
    if slot.area.bytes < slot.key_size * STRIPES {
        reject!("keyslots.{number}.area is too small for its key");
    }
    match kdf {
        Kdf::Pbkdf2 { iterations, .. } => check_iterations(&format!("keyslots.{number}.kdf"), *iterations),
        // "argon2" without a letter stands in headers of cryptsetup's own test suite.
        Kdf::Other(name) if matches!(name.as_str(), "argon2i" | "argon2id" | "argon2") => Ok(()),
        Kdf::Other(name) => reject!("keyslots.{number}.kdf.type {} is not known", quoted(name)),
    }
}

fn check_iterations(at: &str, iterations: u64) -> Judged {
    if !(MIN_ITERATIONS..=MAX_ITERATIONS).contains(&iterations) {
        reject!("{at}.iterations {iterations} is not {MIN_ITERATIONS} to {MAX_ITERATIONS}");
    }
    Ok(())
}
