//! Replaces both copies so that a crash at any point leaves one whole copy.
//!
//! In go a file and what both copies shall say. The copy that does not count is written first: usually the secondary,
//! but the primary where only the secondary is whole. Each is flushed and read back before the other is touched.

use vmseal_keys::random_bytes;

use crate::{
    binary_header::Place,
    copies::{self, Found, Loaded},
    create::json_area,
    error::{Defect, LuksError},
    json::{Json, Parsed},
    layout,
    metadata::Metadata,
    policy,
    source::{AtFile, HeaderFile},
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
pub fn repair(file: &(impl HeaderFile + ?Sized), detached: bool) -> Result<Repair, LuksError> {
    let loaded = load(file, detached)?;
    if !loaded.metadata.needs_repair {
        return Ok(Repair::Nothing);
    }
    let from = if loaded.place == Place::Primary { Copy::Primary } else { Copy::Secondary };
    write_area(file, &loaded, &loaded.json_area)?;
    Ok(Repair::From(from))
}

/// The copy that counts, or why there is none.
pub(crate) fn load(file: &(impl HeaderFile + ?Sized), detached: bool) -> Result<Loaded, LuksError> {
    match copies::load(&mut AtFile(file), Some(detached)).map_err(LuksError::io("read the LUKS2 header"))? {
        Found::NotLuks(why) => Err(LuksError::NotLuks(why)),
        Found::Luks1 => Err(LuksError::Luks1),
        Found::Damaged(why) => Err(LuksError::Damaged(why)),
        Found::Whole(loaded) => Ok(*loaded),
    }
}

/// Writes new metadata into both copies, sequence number one higher.
pub(crate) fn replace(
    file: &(impl HeaderFile + ?Sized),
    loaded: &Loaded,
    json: &Json,
) -> Result<(), LuksError> {
    if loaded.metadata.lossy {
        let why = "it holds bytes that are no UTF-8 and would be lost";
        return Err(LuksError::Frozen(Defect::new(why)));
    }
    let area = json_area(json, loaded.metadata.binary.copy_bytes())?;
    // Nothing is written that this crate would refuse to read.
    let parsed = Parsed { value: json.clone(), lossy: false };
    Metadata::parse(loaded.metadata.binary.clone(), parsed, loaded.metadata.file_bytes)
        .and_then(|metadata| layout::check(&metadata, None).and_then(|()| policy::check(&metadata)))
        .map_err(LuksError::Frozen)?;
    write_area(file, loaded, &area)
}

fn write_area(file: &(impl HeaderFile + ?Sized), loaded: &Loaded, area: &[u8]) -> Result<(), LuksError> {
    let Some(sequence) = loaded.metadata.binary.sequence().checked_add(1) else {
        return Err(LuksError::Frozen(Defect::new("its sequence number cannot rise any more")));
    };
    for (place, bytes) in plan(loaded, area, sequence, [random_bytes()?, random_bytes()?]) {
        write_through(file, place.offset(), &bytes).map_err(LuksError::io("write the LUKS2 header"))?;
        let mut back = vec![0; bytes.len()];
        file.get(place.offset(), &mut back).map_err(LuksError::io("read the LUKS2 header back"))?;
        if back != bytes {
            return Err(LuksError::ReadBack { copy: place.name() });
        }
    }
    Ok(())
}

/// Both new copies in the order in which they are written. The one that counts comes last: it may be the only whole one.
fn plan(loaded: &Loaded, area: &[u8], sequence: u64, salts: [[u8; 64]; 2]) -> [(Place, Vec<u8>); 2] {
    let binary = &loaded.metadata.binary;
    let other = match loaded.place {
        Place::Primary => Place::Secondary(binary.copy_bytes()),
        Place::Secondary(_) => Place::Primary,
    };
    let copy = |place, salt| (place, binary.for_place(place, sequence, salt).sealed(area));
    [copy(other, &salts[0]), copy(loaded.place, &salts[1])]
}

/// Writes and waits for the disk. A failure is final: the kernel may have dropped what was not yet written.
pub(crate) fn write_through(
    file: &(impl HeaderFile + ?Sized),
    offset: u64,
    bytes: &[u8],
) -> std::io::Result<()> {
    file.put(offset, bytes)?;
    file.settle()
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use vmseal_keys::{Dek, SecretBytes};
    use vmseal_model::id::DiskId;

    use super::*;
    use crate::{
        Geometry, HEADER_BYTES, Salts, create_with,
        source::{AtCursor, Source},
        token::VmsealToken,
    };

    fn volume() -> Vec<u8> {
        let mut key = [0; 96];
        (0u8..).zip(&mut key).for_each(|(n, byte)| *byte = n);
        let salts = Salts { digest: [1; 32], copies: [[2; 64], [3; 64]] };
        let token = VmsealToken { records: vec![b"old".to_vec()] };
        let dek = Dek::from_secret(SecretBytes::take_from(&mut key));
        create_with(&dek, DiskId::from_bytes([4; 16]), &Geometry::attached(512), &token, &salts).unwrap()
    }

    /// A volume whose first bytes are in memory and whose rest is zeros.
    struct Sparse<'a>(&'a mut [u8]);

    impl Source for Sparse<'_> {
        fn len(&mut self) -> std::io::Result<u64> {
            Ok(HEADER_BYTES)
        }
        fn read_at(&mut self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
            out.fill(0);
            let from = self.0.get(offset as usize..).unwrap_or(&[]);
            let len = from.len().min(out.len());
            AtCursor(&mut Cursor::new(&from[..len])).read_at(0, &mut out[..len])
        }
    }

    fn loaded(bytes: &mut [u8]) -> Loaded {
        match copies::load(&mut Sparse(bytes), Some(false)).unwrap() {
            Found::Whole(loaded) => *loaded,
            Found::Damaged(why) | Found::NotLuks(why) => panic!("no copy survived: {why}"),
            Found::Luks1 => panic!("LUKS1"),
        }
    }

    fn record(loaded: &Loaded) -> Vec<u8> {
        let token = VmsealToken::find(loaded.metadata.json.get("tokens").unwrap()).unwrap();
        token.records[0].clone()
    }

    /// Every state a crash can leave while `bytes` is rewritten: any prefix of whole 512-byte sectors of the first
    /// copy, then of the second.
    fn crash_everywhere(mut bytes: Vec<u8>) {
        let before = loaded(&mut bytes);
        let mut json = before.metadata.json.clone();
        let new = VmsealToken { records: vec![b"new".to_vec()] };
        new.store(json.object_mut("tokens").unwrap(), 32).unwrap();
        let area = json_area(&json, before.metadata.binary.copy_bytes()).unwrap();
        let sequence = before.metadata.binary.sequence() + 1;
        let plan = plan(&before, &area, sequence, [[8; 64], [9; 64]]);
        let mut seen_new = false;
        for (place, copy) in &plan {
            let at = place.offset() as usize;
            for sector in 0..copy.len() / 512 {
                let to = sector * 512 + 512;
                bytes[at + sector * 512..at + to].copy_from_slice(&copy[sector * 512..to]);
                let record = record(&loaded(&mut bytes));
                assert!(record == b"new" || record == b"old" && !seen_new, "sector {sector} of {place:?}");
                seen_new |= record == b"new";
            }
            assert!(seen_new, "the first copy alone carries the change");
        }
        assert!(!loaded(&mut bytes).metadata.needs_repair);
    }

    #[test]
    fn torn_rewrite_leaves_the_old_or_the_new_token() {
        crash_everywhere(volume());
    }

    #[test]
    fn torn_rewrite_of_a_header_with_one_whole_copy_leaves_one() {
        let mut damaged = volume();
        damaged[5000] ^= 1;
        crash_everywhere(damaged);
        let mut damaged = volume();
        damaged[(64 << 10) + 5000] ^= 1;
        crash_everywhere(damaged);
        let mut gone = volume();
        gone[..4096].fill(0);
        crash_everywhere(gone);
    }
}
