//! The format's own rules on sizes, offsets, overlaps and references.
//!
//! In goes [`Metadata`]; out comes nothing, or the first rule it breaks. What libcryptsetup refuses is refused here;
//! what it accepts and we do not is in `policy`.

use crate::{
    error::{Judged, quoted, reject},
    metadata::{Metadata, SegmentKind},
};

/// Alignment of the keyslots area, of its areas, and of what lies behind.
const PAGE: u64 = 4096;
/// Largest keyslots area the format allows.
const MAX_KEYSLOTS_BYTES: u64 = 128 << 20;

/// Checks the format. `detached`: the header is a file of its own, its data elsewhere; `None` takes either.
pub(crate) fn check(metadata: &Metadata, detached: Option<bool>) -> Judged {
    sizes(metadata)?;
    areas(metadata)?;
    segments(metadata, detached)?;
    references(metadata)
}

fn sizes(metadata: &Metadata) -> Judged {
    let json_bytes = metadata.binary.copy_bytes() - PAGE;
    if metadata.json_bytes != json_bytes {
        reject!("config.json_size is {}, and the JSON area has {json_bytes} bytes", metadata.json_bytes);
    }
    let keyslots_bytes = metadata.keyslots_bytes;
    if !keyslots_bytes.is_multiple_of(PAGE) || keyslots_bytes > MAX_KEYSLOTS_BYTES {
        reject!("config.keyslots_size {keyslots_bytes} is no multiple of 4096 up to 128 MiB");
    }
    let needed = metadata.area_offset() + keyslots_bytes;
    if metadata.file_bytes < needed {
        reject!("truncated: there are {} bytes and the header needs {needed}", metadata.file_bytes);
    }
    Ok(())
}

fn areas(metadata: &Metadata) -> Judged {
    let begin = metadata.area_offset();
    let end = begin + metadata.keyslots_bytes;
    let mut taken: Vec<(u64, u64, u32)> = Vec::new();
    for (&number, slot) in &metadata.keyslots {
        let area = slot.area;
        let Some(area_end) = area.offset.checked_add(area.bytes) else {
            reject!("keyslots.{number}.area ends beyond 64 bits");
        };
        if area.bytes == 0 || area.offset < begin || area_end > end {
            reject!("keyslots.{number}.area does not lie within the keyslots area, bytes {begin} to {end}");
        }
        taken.push((area.offset, area_end, number));
    }
    taken.sort_unstable();
    for pair in taken.windows(2) {
        if pair[1].0 < pair[0].1 {
            reject!("the areas of keyslots {} and {} overlap", pair[0].2, pair[1].2);
        }
    }
    Ok(())
}

fn segments(metadata: &Metadata, detached: Option<bool>) -> Judged {
    let header_end = metadata.area_offset() + metadata.keyslots_bytes;
    for (expected, (&number, segment)) in (0..).zip(&metadata.segments) {
        if number != expected {
            reject!("segments.{expected} is missing, and segments.{number} is there");
        }
        if let SegmentKind::Crypt { encryption, sector_size, .. } = &segment.kind {
            if encryption.is_empty() {
                reject!("segments.{number}.encryption is empty");
            }
            if *sector_size < 512 || !sector_size.is_power_of_two() {
                reject!("segments.{number}.sector_size {sector_size} is no power of two from 512");
            }
            let multiple = |bytes: u64| bytes.is_multiple_of(*sector_size);
            if !multiple(segment.offset) || !segment.bytes.is_none_or(multiple) {
                reject!("segments.{number} does not begin and end at a multiple of its sector_size");
            }
        }
        if segment.bytes == Some(0) {
            reject!("segments.{number}.size is 0");
        }
        if segment.bytes.is_some_and(|bytes| segment.offset.checked_add(bytes).is_none()) {
            reject!("segments.{number} ends beyond 64 bits");
        }
        // Offset 0 is how a detached header says that its data begins at the start of another device.
        let within_header = segment.offset < header_end && (segment.offset != 0 || detached == Some(false));
        if within_header {
            reject!(
                "segments.{number}.offset {} lies in the header, which ends at {header_end}",
                segment.offset
            );
        }
        let attached = detached == Some(false) || (detached.is_none() && segment.offset != 0);
        if attached && segment.offset > metadata.file_bytes {
            reject!(
                "truncated: segments.{number} begins at {} and there are {} bytes",
                segment.offset,
                metadata.file_bytes
            );
        }
    }
    if metadata.segments.values().all(|segment| segment.is_backup()) {
        reject!("there is no segment");
    }
    Ok(())
}

fn references(metadata: &Metadata) -> Judged {
    let mut claimed = Vec::new();
    for (&number, digest) in &metadata.digests {
        for slot in &digest.keyslots {
            if !metadata.keyslots.contains_key(slot) {
                reject!("digests.{number} names keyslot {slot}, which is not there");
            }
            if claimed.contains(slot) {
                reject!("keyslot {slot} belongs to two digests");
            }
            claimed.push(*slot);
        }
        for segment in &digest.segments {
            if !metadata.segments.contains_key(segment) {
                reject!("digests.{number} names segment {segment}, which is not there");
            }
        }
    }
    for (&number, token) in &metadata.tokens {
        if let Some(slot) = token.keyslots.iter().find(|slot| !metadata.keyslots.contains_key(slot)) {
            reject!("tokens.{number} ({}) names keyslot {slot}, which is not there", quoted(&token.kind));
        }
    }
    Ok(())
}
