//! A reencryption that was begun and not finished: genuine in shape, or refused.
//!
//! In goes sound [`Metadata`] with anything of a reencryption in it; out comes nothing, or why it is refused. Genuine is
//! what libcryptsetup writes for mode `reencrypt`, old key to new key over the same bytes. Everything that ends or
//! begins in clear text is refused: a faked "crashed decryption" made a victim's next unlock write plaintext
//! (CVE-2021-4122). Shape is not proof: its digest is keyed by both volume keys, so recovery needs them first.

use std::collections::BTreeSet;

use crate::{
    error::{Judged, quoted, reject},
    metadata::{KeyslotKind, Metadata, Segment, SegmentKind},
    policy,
};

/// The only version of reencryption metadata that has a digest and needs no data shift.
const REQUIREMENT: &str = "online-reencrypt-v2";
const SECTOR: u64 = 512;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    Backward,
}

/// A backup segment: what the volume was, or will be.
#[derive(PartialEq, Eq)]
struct Side {
    digest: u32,
    encryption: (String, u64),
}

/// Refuses what is not a genuine unfinished reencryption from key to key.
pub(crate) fn check(metadata: &Metadata) -> Judged {
    check_requirement(metadata)?;
    let direction = check_slot(metadata)?;
    let (&previous_number, previous) = backup(metadata, "backup-previous")?;
    let (&final_number, after) = backup(metadata, "backup-final")?;
    let known = [previous_number, final_number];
    let mut backups = metadata.segments.iter().filter(|(_, segment)| segment.is_backup());
    if let Some((number, segment)) = backups.find(|(number, _)| !known.contains(number)) {
        let flag = segment.flags.first().map_or(String::new(), |flag| quoted(flag));
        reject!("segments.{number} has the flag {flag}, which a reencryption in place does not have");
    }
    if previous.offset != after.offset || previous.bytes != after.bytes {
        reject!("the reencryption would move data");
    }
    let from = side(metadata, previous_number, previous)?;
    let to = side(metadata, final_number, after)?;
    check_progress(metadata, direction, previous, &from, &to)
}

fn check_requirement(metadata: &Metadata) -> Judged {
    match metadata.requirements.as_slice() {
        [name] if name == REQUIREMENT => Ok(()),
        [] => reject!("it has parts of a reencryption and config.requirements does not say so"),
        [name] if name == "online-reencrypt" => {
            reject!("its reencryption is of the version without a digest (CVE-2021-4122)")
        }
        names => match names.iter().find(|name| *name != REQUIREMENT) {
            Some(name) => reject!("config.requirements demands {}, which is not known here", quoted(name)),
            None => reject!("config.requirements names {REQUIREMENT} twice"),
        },
    }
}

fn check_slot(metadata: &Metadata) -> Judged<Direction> {
    let mut found = None;
    for (&number, slot) in &metadata.keyslots {
        if let KeyslotKind::Reencrypt { mode, direction, resilience } = &slot.kind
            && found.replace((number, slot, mode, direction, resilience)).is_some()
        {
            reject!("there are two reencrypt keyslots");
        }
    }
    let Some((number, slot, mode, direction, resilience)) = found else {
        reject!("a reencryption is demanded and there is no reencrypt keyslot");
    };
    if mode != "reencrypt" {
        reject!("keyslots.{number}.mode is {}: the volume would be partly in clear text", quoted(mode));
    }
    if !matches!(resilience.as_str(), "none" | "checksum" | "journal") {
        reject!("keyslots.{number}.area.type {} is not accepted", quoted(resilience));
    }
    if slot.key_size != 1 {
        reject!("keyslots.{number}.key_size is {} and not 1", slot.key_size);
    }
    let vouching: Vec<_> = metadata.digests.values().filter(|d| d.keyslots.contains(&number)).collect();
    if !matches!(vouching.as_slice(), [digest] if digest.keyslots == [number] && digest.segments.is_empty()) {
        reject!("keyslots.{number} has no digest of its own, so its reencryption cannot be proved");
    }
    match direction.as_str() {
        "forward" => Ok(Direction::Forward),
        "backward" => Ok(Direction::Backward),
        other => reject!("keyslots.{number}.direction {} is not known", quoted(other)),
    }
}

fn backup<'a>(metadata: &'a Metadata, flag: &str) -> Judged<(&'a u32, &'a Segment)> {
    let mut found = metadata.segments.iter().filter(|(_, segment)| segment.has_flag(flag));
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        (None, _) => reject!("a reencryption is demanded and there is no segment {flag}"),
        (Some(_), Some(_)) => reject!("there are two segments {flag}"),
    }
}

fn side(metadata: &Metadata, number: u32, segment: &Segment) -> Judged<Side> {
    policy::check_segment(number, segment)?;
    policy::check_extent(metadata, number, segment)?;
    if policy::segment_tweak(segment) != Some(0) {
        reject!("segments.{number}.iv_tweak is not 0");
    }
    if segment.flags.len() != 1 {
        reject!("segments.{number} has more than one flag");
    }
    let digest = policy::one_digest(metadata, number)?;
    policy::check_key_sizes(metadata, digest)?;
    Ok(Side { digest, encryption: encryption(segment) })
}

fn encryption(segment: &Segment) -> (String, u64) {
    match &segment.kind {
        SegmentKind::Crypt { encryption, sector_size, .. } => (encryption.clone(), *sector_size),
        SegmentKind::Other(kind) => (kind.clone(), 0),
    }
}

/// How far a segment in use is, in the order in which a forward reencryption leaves them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Under the new key.
    Done,
    /// Being rewritten: either key may be right, unit by unit, and the reencrypt keyslot's area says which.
    Hot,
    /// Under the old key.
    Waiting,
}

/// The segments in use lie one behind the other over the whole volume, each under the old or the new key, and the part
/// that is done lies where the direction says.
fn check_progress(
    metadata: &Metadata,
    direction: Direction,
    whole: &Segment,
    from: &Side,
    to: &Side,
) -> Judged {
    let mut expected = Some(whole.offset);
    let mut stages = Vec::new();
    for (&number, segment) in metadata.segments.iter().filter(|(_, segment)| !segment.is_backup()) {
        policy::check_segment(number, segment)?;
        policy::check_extent(metadata, number, segment)?;
        if expected != Some(segment.offset) {
            reject!("segments.{number} does not begin where the one before ends");
        }
        if policy::segment_tweak(segment) != Some((segment.offset - whole.offset) / SECTOR) {
            reject!("segments.{number}.iv_tweak does not fit its offset");
        }
        stages.extend(stage(metadata, number, segment, from, to)?);
        expected = segment.bytes.and_then(|bytes| segment.offset.checked_add(bytes));
    }
    let end = whole.bytes.and_then(|bytes| whole.offset.checked_add(bytes));
    if expected != end {
        reject!("the segments do not cover the volume");
    }
    if direction == Direction::Backward {
        stages.reverse();
    }
    // Each stage at most once, in its order.
    if stages.windows(2).any(|pair| pair[0] >= pair[1]) {
        reject!("the segments do not lie as a reencryption in its direction leaves them");
    }
    Ok(())
}

/// The stage of a segment in use; `None` where old and new are the same and there is nothing to tell.
fn stage(
    metadata: &Metadata,
    number: u32,
    segment: &Segment,
    from: &Side,
    to: &Side,
) -> Judged<Option<Stage>> {
    let encryption = encryption(segment);
    match segment.flags.as_slice() {
        [] => {
            let this = Side { digest: policy::one_digest(metadata, number)?, encryption };
            match (this == *to, this == *from) {
                (true, true) => Ok(None),
                (true, false) => Ok(Some(Stage::Done)),
                (false, true) => Ok(Some(Stage::Waiting)),
                (false, false) => {
                    reject!("segments.{number} is neither what the volume was nor what it will be")
                }
            }
        }
        [flag] if flag == "in-reencryption" => {
            let digests = metadata.digests.iter().filter(|(_, digest)| digest.segments.contains(&number));
            let vouching: BTreeSet<u32> = digests.map(|(&digest, _)| digest).collect();
            let one_of_both = encryption == to.encryption || encryption == from.encryption;
            if !one_of_both || vouching != BTreeSet::from([from.digest, to.digest]) {
                reject!(
                    "segments.{number} is in reencryption and not between what it was and what it will be"
                );
            }
            Ok(Some(Stage::Hot))
        }
        [flag] => reject!("segments.{number} has the flag {}", quoted(flag)),
        [_, ..] => reject!("segments.{number} has more than one flag"),
    }
}
