//! The owner block: which host holds a volume, and in what state. Information; the lock decides.
//!
//! In go 4096 bytes from byte 15 MiB of the file with the header, and back. Layout, little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | magic `VMSOWNER` |
//! | 8..10 | version, 1 |
//! | 10..12 | state: 0 free, 1 held, 2 handing over |
//! | 12..16 | zero |
//! | 16..32 | host that holds it, or held it last |
//! | 32..40 | generation: one more at each take-over |
//! | 40..56 | host it is handed to; zero unless handing over |
//! | 56..4064 | zero |
//! | 4064..4096 | SHA-256 of bytes 0 to 4063 |

use std::io;

use aws_lc_rs::digest::{SHA256, digest};
use vmseal_model::id::HostId;

use crate::{OWNER_BLOCK_LEN, OWNER_BLOCK_OFFSET, source::HeaderFile};

const MAGIC: [u8; 8] = *b"VMSOWNER";
const VERSION: u16 = 1;
/// Where the checksum begins.
const SUM: usize = OWNER_BLOCK_LEN - 32;
const NOBODY: HostId = HostId::from_bytes([0; 16]);

/// What the holder of a volume says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum OwnerState {
    /// Nobody holds it.
    Free = 0,
    /// A host serves it.
    Held = 1,
    /// A host serves it and is giving it to another.
    HandingOver = 2,
}

/// Which host holds a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnerBlock {
    /// The host that holds it, or held it last; zero in a volume nobody ever held.
    pub host: HostId,
    /// One more at each take-over.
    pub generation: u64,
    /// What that host does with it.
    pub state: OwnerState,
    /// To whom it is given, while [`OwnerState::HandingOver`].
    pub hand_over_to: Option<HostId>,
}

/// Why a block says nothing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum OwnerError {
    /// Other bytes stand there.
    #[error("byte 15 MiB of the volume holds no owner block")]
    Magic,
    /// Written by a later release.
    #[error("the owner block has version {version}, known is {VERSION}")]
    Version {
        /// What it says.
        version: u16,
    },
    /// Torn or damaged.
    #[error("the owner block's checksum is wrong")]
    Checksum,
    /// A value that no release writes.
    #[error("the owner block's {field} is out of range")]
    Field {
        /// Which.
        field: &'static str,
    },
    /// Cannot be read at all.
    #[error("the owner block cannot be read: {kind}")]
    Unreadable {
        /// How.
        kind: io::ErrorKind,
    },
}

impl OwnerBlock {
    /// A volume nobody ever held.
    pub const NEVER_HELD: Self =
        Self { host: NOBODY, generation: 0, state: OwnerState::Free, hand_over_to: None };

    /// Held by `host`, as the take-over after `self`.
    pub fn taken_by(&self, host: HostId) -> Self {
        Self {
            host,
            generation: self.generation.saturating_add(1),
            state: OwnerState::Held,
            hand_over_to: None,
        }
    }

    /// Given up by its holder.
    pub fn released(&self) -> Self {
        Self { state: OwnerState::Free, hand_over_to: None, ..*self }
    }

    /// On its way from its holder to `to`.
    pub fn handing_over(&self, to: HostId) -> Self {
        Self { state: OwnerState::HandingOver, hand_over_to: Some(to), ..*self }
    }

    /// The 4096 bytes.
    pub fn encode(&self) -> [u8; OWNER_BLOCK_LEN] {
        let mut block = [0; OWNER_BLOCK_LEN];
        block[0..8].copy_from_slice(&MAGIC);
        block[8..10].copy_from_slice(&VERSION.to_le_bytes());
        block[10..12].copy_from_slice(&(self.state as u16).to_le_bytes());
        block[16..32].copy_from_slice(&self.host.to_bytes());
        block[32..40].copy_from_slice(&self.generation.to_le_bytes());
        block[40..56].copy_from_slice(&self.hand_over_to.unwrap_or(NOBODY).to_bytes());
        let sum = digest(&SHA256, &block[..SUM]);
        block[SUM..].copy_from_slice(sum.as_ref());
        block
    }

    /// What a block says. All zeros: [`OwnerBlock::NEVER_HELD`].
    ///
    /// # Errors
    ///
    /// [`OwnerError`]; a reader then knows nothing of the holder, and the lock decides all the same.
    pub fn decode(block: &[u8; OWNER_BLOCK_LEN]) -> Result<Self, OwnerError> {
        if block.iter().all(|&b| b == 0) {
            return Ok(Self::NEVER_HELD);
        }
        if block[0..8] != MAGIC {
            return Err(OwnerError::Magic);
        }
        if &block[SUM..] != digest(&SHA256, &block[..SUM]).as_ref() {
            return Err(OwnerError::Checksum);
        }
        let u16_at = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
        let host_at = |at: usize| HostId::from_bytes(block[at..at + 16].try_into().expect("16 bytes"));
        if u16_at(8) != VERSION {
            return Err(OwnerError::Version { version: u16_at(8) });
        }
        let state = match u16_at(10) {
            0 => OwnerState::Free,
            1 => OwnerState::Held,
            2 => OwnerState::HandingOver,
            _ => return Err(OwnerError::Field { field: "state" }),
        };
        if block[12..16].iter().chain(&block[56..SUM]).any(|&b| b != 0) {
            return Err(OwnerError::Field { field: "reserved bytes" });
        }
        let (host, to) = (host_at(16), host_at(40));
        if state != OwnerState::Free && host == NOBODY {
            return Err(OwnerError::Field { field: "host" });
        }
        if (state == OwnerState::HandingOver) != (to != NOBODY) {
            return Err(OwnerError::Field { field: "receiving host" });
        }
        let generation = u64::from_le_bytes(block[32..40].try_into().expect("eight bytes"));
        Ok(Self { host, generation, state, hand_over_to: (to != NOBODY).then_some(to) })
    }

    /// Reads the block out of the file with the header. A file that ends before it was never held.
    ///
    /// # Errors
    ///
    /// As [`OwnerBlock::decode`], or [`OwnerError::Unreadable`].
    pub fn read(file: &(impl HeaderFile + ?Sized)) -> Result<Self, OwnerError> {
        let mut block = [0; OWNER_BLOCK_LEN];
        match file.get(OWNER_BLOCK_OFFSET, &mut block) {
            Ok(()) => Self::decode(&block),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Self::NEVER_HELD),
            Err(error) => Err(OwnerError::Unreadable { kind: error.kind() }),
        }
    }

    /// Writes the block into the file with the header, and waits until it is on the disk. The caller holds the lock.
    ///
    /// Never to be used on the data of a detached header: the guest's own bytes stand there.
    ///
    /// # Errors
    ///
    /// What the kernel says; the block may then be torn, which [`OwnerBlock::decode`] finds.
    pub fn write(&self, file: &(impl HeaderFile + ?Sized)) -> io::Result<()> {
        file.put(OWNER_BLOCK_OFFSET, &self.encode())?;
        file.settle()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: HostId = HostId::from_bytes([0xa; 16]);
    const B: HostId = HostId::from_bytes([0xb; 16]);

    #[test]
    fn every_state_reads_back() {
        let held = OwnerBlock::NEVER_HELD.taken_by(A);
        assert_eq!((held.generation, held.state), (1, OwnerState::Held));
        for block in [OwnerBlock::NEVER_HELD, held, held.handing_over(B), held.released(), held.taken_by(B)] {
            assert_eq!(OwnerBlock::decode(&block.encode()), Ok(block));
        }
        assert_eq!(OwnerBlock::decode(&[0; OWNER_BLOCK_LEN]), Ok(OwnerBlock::NEVER_HELD));
    }

    #[test]
    fn layout_is_as_published() {
        let block =
            OwnerBlock { generation: 0x0102, ..OwnerBlock::NEVER_HELD.taken_by(A) }.handing_over(B).encode();
        assert_eq!(&block[..16], b"VMSOWNER\x01\x00\x02\x00\x00\x00\x00\x00");
        assert_eq!(block[16..32], [0xa; 16]);
        assert_eq!(block[32..40], [2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(block[40..56], [0xb; 16]);
    }

    #[test]
    fn any_flipped_bit_is_an_error() {
        let whole = OwnerBlock::NEVER_HELD.taken_by(A).encode();
        for at in 0..OWNER_BLOCK_LEN {
            let mut bad = whole;
            bad[at] ^= 0x10;
            assert!(OwnerBlock::decode(&bad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn value_out_of_range_is_refused_although_the_checksum_is_right() {
        let sealed = |change: &dyn Fn(&mut [u8; OWNER_BLOCK_LEN])| {
            let mut block = OwnerBlock::NEVER_HELD.taken_by(A).encode();
            change(&mut block);
            let sum = digest(&SHA256, &block[..SUM]);
            block[SUM..].copy_from_slice(sum.as_ref());
            OwnerBlock::decode(&block)
        };
        assert_eq!(sealed(&|b| b[10] = 3), Err(OwnerError::Field { field: "state" }));
        assert_eq!(sealed(&|b| b[8] = 2), Err(OwnerError::Version { version: 2 }));
        assert_eq!(sealed(&|b| b[16..32].fill(0)), Err(OwnerError::Field { field: "host" }));
        assert_eq!(sealed(&|b| b[40] = 1), Err(OwnerError::Field { field: "receiving host" }));
        assert_eq!(sealed(&|b| b[10] = 2), Err(OwnerError::Field { field: "receiving host" }));
        assert_eq!(sealed(&|b| b[60] = 1), Err(OwnerError::Field { field: "reserved bytes" }));
    }
}
