//! What a queue and the driver say to each other. Source: linux/ublk_cmd.h.

use std::mem;

/// A request, as the driver describes it in the memory it shares.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct IoDesc {
    /// Operation in the lowest 8 bits, flags above.
    pub(super) op_flags: u32,
    /// Length in sectors of 512 bytes.
    pub(super) nr_sectors: u32,
    /// Where, in sectors of 512 bytes.
    pub(super) start_sector: u64,
    /// The address that was given for its data.
    pub(super) addr: u64,
}
const _: () = assert!(mem::size_of::<IoDesc>() == 24);

/// What goes with a command about one request.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct IoCmd {
    pub(super) q_id: u16,
    pub(super) tag: u16,
    /// Of a commit: bytes, or a negated errno.
    pub(super) result: i32,
    /// Where data of the next request with this tag is, or goes.
    pub(super) addr: u64,
}
const _: () = assert!(mem::size_of::<IoCmd>() == 16);

impl IoCmd {
    pub(super) fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0..2].copy_from_slice(&self.q_id.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.tag.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.result.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.addr.to_ne_bytes());
        bytes
    }
}

/// UBLK_MAX_QUEUE_DEPTH: how far apart the queues' descriptions lie.
const MAX_QUEUE_DEPTH: usize = 4096;
/// UBLKSRV_CMD_BUF_OFFSET is 0.
pub(super) fn descriptions_offset(queue: u16, page: usize) -> usize {
    usize::from(queue) * (MAX_QUEUE_DEPTH * mem::size_of::<IoDesc>()).next_multiple_of(page)
}

pub(super) const OP_READ: u32 = 0;
pub(super) const OP_WRITE: u32 = 1;
pub(super) const OP_FLUSH: u32 = 2;
pub(super) const OP_DISCARD: u32 = 3;
pub(super) const OP_WRITE_ZEROES: u32 = 5;
pub(super) const FLAG_FUA: u32 = 1 << 13;

const FETCH_REQ: u32 = 0x20;
const COMMIT_AND_FETCH_REQ: u32 = 0x21;
/// `_IOWR('u', 0, struct ublksrv_io_cmd)`.
const ENCODED: u32 = 3 << 30 | (mem::size_of::<IoCmd>() as u32) << 16 | (b'u' as u32) << 8;

/// The number of the command that asks for a first request.
pub(super) fn fetch(encoded: bool) -> u32 {
    FETCH_REQ | if encoded { ENCODED } else { 0 }
}

/// The number of the command that answers a request and asks for the next.
pub(super) fn commit_and_fetch(encoded: bool) -> u32 {
    COMMIT_AND_FETCH_REQ | if encoded { ENCODED } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_layout_are_those_of_the_header_file() {
        assert_eq!((fetch(true), commit_and_fetch(true)), (0xc010_7520, 0xc010_7521));
        assert_eq!((fetch(false), commit_and_fetch(false)), (0x20, 0x21));
        assert_eq!(descriptions_offset(2, 4096), 2 * 98304);
        let cmd = IoCmd { q_id: 1, tag: 2, result: -5, addr: 7 };
        // SAFETY: plain integers without padding, as the size says.
        let raw: [u8; 16] = unsafe { mem::transmute(cmd) };
        assert_eq!(cmd.bytes(), raw);
    }
}
