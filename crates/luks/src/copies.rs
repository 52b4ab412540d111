//! The two copies of the metadata: which is whole, which is newer, which one counts.
//!
//! In goes a source of bytes; out comes the [`Metadata`] of the copy that counts, with notes on the other. Nothing is
//! written.

use std::io;

use crate::{
    binary_header::{BINARY_HEADER_LEN, BinaryHeader, COPY_SIZES, PRIMARY_MAGIC, Place},
    error::{Defect, Judged},
    json, layout,
    metadata::Metadata,
    source::Source,
};

/// What reading both copies came to.
pub(crate) enum Found {
    /// Bytes of some other kind.
    NotLuks(Defect),
    /// A LUKS1 header.
    Luks1,
    /// Copies were there and none can be used.
    Damaged(Defect),
    /// At least one copy is whole.
    Whole(Box<Loaded>),
}

/// The copy that counts.
pub(crate) struct Loaded {
    pub(crate) metadata: Metadata,
    /// Where it was read.
    pub(crate) place: Place,
    /// Its JSON area as it was read.
    pub(crate) json_area: Vec<u8>,
}

/// One copy that passed the format's checks.
struct OneCopy {
    metadata: Metadata,
    json_area: Vec<u8>,
}

/// Reads both copies and takes the newer whole one, the primary if they are as new.
pub(crate) fn load(source: &mut dyn Source, detached: Option<bool>) -> io::Result<Found> {
    let file_bytes = source.len()?;
    let head = read_head(source, file_bytes, 0)?;
    let claims = head.get(..6) == Some(&PRIMARY_MAGIC[..]);
    if claims && head.get(6..8) == Some(&[0, 1][..]) {
        return Ok(Found::Luks1);
    }
    let primary = read_copy(source, file_bytes, Place::Primary, detached)?;
    // A whole primary says where the secondary is, and none elsewhere counts: anybody could have left one there.
    let only = primary.as_ref().ok().map(|copy| copy.metadata.binary.copy_bytes());
    let (secondary, place) = read_secondary(source, file_bytes, &head, only, detached)?;
    Ok(match (primary, secondary) {
        (Ok(primary), Ok(secondary)) => {
            let (first, second) = (primary.sequence(), secondary.sequence());
            if second > first {
                let note = format!("the primary copy is older ({first}, the secondary has {second})");
                choose(secondary, place, Some(note))
            } else if second < first {
                let note = format!("the secondary copy is older ({second}, the primary has {first})");
                choose(primary, Place::Primary, Some(note))
            } else if primary.json_area == secondary.json_area {
                choose(primary, Place::Primary, None)
            } else {
                let note = format!("the copies differ and have the same sequence number {first}");
                choose(primary, Place::Primary, Some(note))
            }
        }
        (Ok(primary), Err(why)) => {
            choose(primary, Place::Primary, Some(format!("the secondary copy is damaged: {why}")))
        }
        (Err(why), Ok(secondary)) => {
            choose(secondary, place, Some(format!("the primary copy is damaged: {why}")))
        }
        (Err(why), Err(_)) if !claims && place == Place::Secondary(0) => Found::NotLuks(why),
        (Err(why), Err(other)) => Found::Damaged(if why == other {
            Defect::new(format!("both copies: {why}"))
        } else {
            Defect::new(format!("primary copy: {why}; secondary copy: {other}"))
        }),
    })
}

impl OneCopy {
    fn sequence(&self) -> u64 {
        self.metadata.binary.sequence()
    }
}

/// Takes a copy; a note on the other one says that it is not the same header.
fn choose(copy: OneCopy, place: Place, note: Option<String>) -> Found {
    let OneCopy { mut metadata, json_area } = copy;
    metadata.needs_repair = note.is_some();
    metadata.notes.extend(note);
    Found::Whole(Box::new(Loaded { metadata, place, json_area }))
}

/// The secondary copy and where it is; `Secondary(0)` if nothing claims to be one. `only`: look there and nowhere else.
fn read_secondary(
    source: &mut dyn Source,
    file_bytes: u64,
    primary_head: &[u8],
    only: Option<u64>,
    detached: Option<bool>,
) -> io::Result<(Judged<OneCopy>, Place)> {
    // A primary torn in its later sectors still says where the secondary is, and that is tried first.
    let said = BinaryHeader::claimed(primary_head, Place::Primary).map(|head| head.copy_bytes());
    let said = said.filter(|size| COPY_SIZES.contains(size));
    let mut offsets: Vec<u64> = said.into_iter().chain(COPY_SIZES).collect();
    if let Some(only) = only {
        offsets = vec![only];
    }
    let mut failure = None;
    for offset in offsets {
        let place = Place::Secondary(offset);
        let head = read_head(source, file_bytes, offset)?;
        if BinaryHeader::claimed(&head, place).is_none() {
            continue;
        }
        match read_copy(source, file_bytes, place, detached)? {
            Ok(copy) => return Ok((Ok(copy), place)),
            Err(why) => failure = failure.or(Some((Err(why), place))),
        }
    }
    Ok(failure.unwrap_or((Err(Defect::new("there is none")), Place::Secondary(0))))
}

/// The bytes a binary header would have at `offset`; fewer where the file ends.
fn read_head(source: &mut dyn Source, file_bytes: u64, offset: u64) -> io::Result<Vec<u8>> {
    let there = file_bytes.saturating_sub(offset).min(BINARY_HEADER_LEN as u64);
    let mut head = vec![0; there as usize];
    source.read_at(offset, &mut head)?;
    Ok(head)
}

fn read_copy(
    source: &mut dyn Source,
    file_bytes: u64,
    place: Place,
    detached: Option<bool>,
) -> io::Result<Judged<OneCopy>> {
    let head = read_head(source, file_bytes, place.offset())?;
    let Some(binary) = BinaryHeader::claimed(&head, place) else {
        let short = head.len() < BINARY_HEADER_LEN;
        return Ok(Err(Defect::new(if short {
            format!("truncated: there are {file_bytes} bytes")
        } else {
            "there is no LUKS magic".to_owned()
        })));
    };
    if let Err(why) = binary.check_fields(place) {
        return Ok(Err(why));
    }
    let area_offset = place.offset() + BINARY_HEADER_LEN as u64;
    let area_bytes = binary.copy_bytes() - BINARY_HEADER_LEN as u64;
    if file_bytes < area_offset + area_bytes {
        return Ok(Err(Defect::new(format!("truncated: there are {file_bytes} bytes"))));
    }
    let mut json_area = vec![0; area_bytes as usize];
    source.read_at(area_offset, &mut json_area)?;
    Ok(judge(binary, json_area, file_bytes, detached))
}

fn judge(
    binary: BinaryHeader,
    json_area: Vec<u8>,
    file_bytes: u64,
    detached: Option<bool>,
) -> Judged<OneCopy> {
    binary.check_sum(&json_area)?;
    let parsed = json::parse_area(&json_area)?;
    let metadata = Metadata::parse(binary, parsed, file_bytes)?;
    layout::check(&metadata, detached)?;
    Ok(OneCopy { metadata, json_area })
}
