//! The configuration space of the disk (VIRTIO 1.2 §5.2.4), as bytes.

use vmseal_model::control::MAX_QUEUES;

use crate::volume::Layout;

/// Most data segments of a request: with header and status a request fits into a queue of 128, which is QEMU's size.
pub const SEG_MAX: u32 = 126;
/// Most sectors of one request that writes zeros, which is as much work as any write: 32 MiB.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 16;
/// Most sectors of one discard.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Bytes that can be asked for; what no field is in is zero.
pub const LEN: usize = 256;
/// Where the one field is that a driver may write.
const WRITEBACK: u32 = 32;

/// The space of a disk with this layout.
pub fn space(layout: &Layout, writeback: bool) -> [u8; LEN] {
    let mut space = [0; LEN];
    let mut put = |offset: usize, bytes: &[u8]| {
        if let Some(field) = space.get_mut(offset..offset + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    };
    // Whatever the logical block, aligned 4 KiB are one access of the medium.
    let (exponent, blocks) = if layout.unit == 512 { (3, 8u16) } else { (0, 1) };
    let sectors_per_unit = (layout.unit / 512) as u32;
    put(0, &(layout.presented / 512).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(layout.unit as u32).to_le_bytes());
    put(24, &[exponent, 0]);
    put(26, &blocks.to_le_bytes());
    put(WRITEBACK as usize, &[u8::from(writeback)]);
    put(34, &MAX_QUEUES.to_le_bytes());
    if !layout.read_only {
        if layout.discard {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &1u32.to_le_bytes());
            put(44, &sectors_per_unit.to_le_bytes());
        }
        put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        // Byte 56 stays zero: zeros are never made by giving space back, for a hole does not read as zeros.
    }
    space
}

/// A part of the space; `None` outside of it.
pub fn read(space: &[u8; LEN], offset: u32, len: u32) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    space.get(start..start.checked_add(usize::try_from(len).ok()?)?)
}

/// What a write to the space asks for: whether to write back. `None` if it is to anything else.
pub fn written(offset: u32, bytes: &[u8]) -> Option<bool> {
    match (offset, bytes) {
        (WRITEBACK, [value @ (0 | 1)]) => Some(*value == 1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(unit: u64) -> Layout {
        Layout { unit, payload_offset: 0, presented: 8 << 20, grows: false, read_only: false, discard: true }
    }

    fn word(space: &[u8; LEN], offset: u32) -> u32 {
        u32::from_le_bytes(read(space, offset, 4).unwrap().try_into().unwrap())
    }

    #[test]
    fn fields_stand_where_the_standard_has_them() {
        let space = space(&layout(512), true);
        assert_eq!((word(&space, 0), word(&space, 4)), (16384, 0));
        assert_eq!(word(&space, 12), SEG_MAX);
        assert_eq!(word(&space, 20), 512);
        assert_eq!(read(&space, 24, 8).unwrap(), [3, 0, 8, 0, 0, 0, 0, 0]);
        assert_eq!(read(&space, 32, 4).unwrap(), [1, 0, MAX_QUEUES as u8, 0]);
        assert_eq!((word(&space, 36), word(&space, 40), word(&space, 44)), (MAX_DISCARD_SECTORS, 1, 1));
        assert_eq!((word(&space, 48), word(&space, 52), word(&space, 56)), (MAX_WRITE_ZEROES_SECTORS, 1, 0));
        let space = super::space(&layout(4096), false);
        assert_eq!((word(&space, 20), word(&space, 44)), (4096, 8));
        assert_eq!(read(&space, 24, 9).unwrap(), [0, 0, 1, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn what_cannot_be_done_has_no_limits() {
        let read_only = space(&Layout { read_only: true, ..layout(512) }, true);
        assert_eq!(read(&read_only, 36, 24).unwrap(), [0; 24]);
        let no_discard = space(&Layout { discard: false, ..layout(512) }, true);
        assert_eq!(read(&no_discard, 36, 12).unwrap(), [0; 12]);
        assert_eq!(word(&no_discard, 48), MAX_WRITE_ZEROES_SECTORS);
    }

    #[test]
    fn nothing_outside_the_space_is_read_and_one_field_is_written() {
        let space = space(&layout(512), true);
        assert!(read(&space, 0, 256).is_some());
        for (offset, len) in [(0, 257), (256, 1), (u32::MAX, 1), (255, u32::MAX)] {
            assert_eq!(read(&space, offset, len), None, "{len} at {offset}");
        }
        assert_eq!(written(32, &[0]), Some(false));
        assert_eq!(written(32, &[1]), Some(true));
        for (offset, bytes) in [(32, &[2][..]), (32, &[]), (32, &[1, 0]), (31, &[1]), (0, &[0; 8])] {
            assert_eq!(written(offset, bytes), None, "{bytes:?} at {offset}");
        }
    }
}
