//! Replaces both copies so that a crash between any two writes leaves one whole copy.
//!
//! In go a file and what both copies shall say; the secondary is written and flushed first, then the primary, then both
//! are read back.

use std::{fs::File, os::unix::fs::FileExt};

use vmseal_keys::random_bytes;

use crate::{
    binary_header::Place,
    copies::{self, Found, Loaded},
    create::json_area,
    error::{Defect, LuksError},
    json::Json,
    source::AtFile,
};

/// One of the two copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copy {
    /// At byte 0.
    Primary,
    /// Behind the primary.
    Secondary,
}

/// What [`repair`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Both copies were whole and the same.
    Nothing,
    /// Both were written anew from the one that counts.
    From(Copy),
}

/// Writes a damaged, older or different copy anew from the one that counts.
///
/// # Errors
///
/// [`LuksError::NotLuks`], [`LuksError::Luks1`], [`LuksError::Damaged`] if no copy is whole; nothing is written then.
pub fn repair(file: &File, detached: bool) -> Result<Repair, LuksError> {
    let loaded = load(file, detached)?;
    if !loaded.metadata.needs_repair {
        return Ok(Repair::Nothing);
    }
    let from = if loaded.place == Place::Primary { Copy::Primary } else { Copy::Secondary };
    write_area(file, &loaded, &loaded.json_area)?;
    Ok(Repair::From(from))
}

/// The copy that counts, or why there is none.
pub(crate) fn load(file: &File, detached: bool) -> Result<Loaded, LuksError> {
    match copies::load(&mut AtFile(file), Some(detached)).map_err(LuksError::io("read the LUKS2 header"))? {
        Found::NotLuks(why) => Err(LuksError::NotLuks(why)),
        Found::Luks1 => Err(LuksError::Luks1),
        Found::Damaged(why) => Err(LuksError::Damaged(why)),
        Found::Whole(loaded) => Ok(*loaded),
    }
}

/// Writes new metadata into both copies, sequence number one higher.
pub(crate) fn replace(file: &File, loaded: &Loaded, json: &Json) -> Result<(), LuksError> {
    if loaded.metadata.lossy {
        let why = "it holds bytes that are no UTF-8 and would be lost";
        return Err(LuksError::Frozen(Defect::new(why)));
    }
    let area = json_area(json, loaded.metadata.binary.copy_bytes())?;
    write_area(file, loaded, &area)
}

fn write_area(file: &File, loaded: &Loaded, area: &[u8]) -> Result<(), LuksError> {
    let binary = &loaded.metadata.binary;
    let Some(sequence) = binary.sequence().checked_add(1) else {
        return Err(LuksError::Frozen(Defect::new("its sequence number cannot rise any more")));
    };
    let mut written = Vec::new();
    // The secondary first: should the machine stop between the two, the primary, older and whole, or the secondary,
    // newer and whole, is there; never neither.
    for place in [Place::Secondary(binary.copy_bytes()), Place::Primary] {
        let salt = random_bytes()?;
        let bytes = binary.for_place(place, sequence, &salt).sealed(area);
        file.write_all_at(&bytes, place.offset()).map_err(LuksError::io("write the LUKS2 header"))?;
        file.sync_data().map_err(LuksError::io("flush the LUKS2 header"))?;
        written.push((place, bytes));
    }
    for (place, bytes) in written {
        let mut back = vec![0; bytes.len()];
        file.read_exact_at(&mut back, place.offset()).map_err(LuksError::io("read the LUKS2 header back"))?;
        if back != bytes {
            return Err(LuksError::ReadBack { copy: place.name() });
        }
    }
    Ok(())
}
