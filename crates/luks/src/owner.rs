//! The owner block: which host holds a volume, and in what state. Information; the lock decides.
//!
//! In go 4096 bytes from each of two places of the file with the header, and back. Layout, little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | magic `VMSOWNER` |
//! | 8..10 | version, 1 |
//! | 10..12 | state: 0 free, 1 held, 2 handed over and not taken yet |
//! | 12..16 | zero |
//! | 16..32 | host that holds it, or held it last |
//! | 32..40 | generation: one more at each change of the block |
//! | 40..56 | host it is handed to; zero unless handed over |
//! | 56..4064 | zero |
//! | 4064..4096 | SHA-256 of bytes 0 to 4063 |
//!
//! Two copies, so that a write that is cut short costs nothing: [`OwnerBlock::read`] and [`OwnerBlock::write`]. Which
//! states a host may take a volume in: [`OwnerBlock::claimed_by`].

use std::io;

use aws_lc_rs::digest::{SHA256, digest};
use vmseal_model::id::HostId;

use crate::{OWNER_BLOCK_LEN, OWNER_BLOCK_OFFSET, OWNER_COPY_OFFSET, source::HeaderFile};

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
    /// The host that had it writes it no more, and another may take it; until that one does, it may take it back.
    HandedOver = 2,
}

/// Which host holds a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnerBlock {
    /// The host that holds it, or held it last; zero in a volume nobody ever held.
    pub host: HostId,
    /// One more at each change of the block.
    pub generation: u64,
    /// What that host does with it.
    pub state: OwnerState,
    /// To whom it is given, while [`OwnerState::HandedOver`].
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
    /// Nothing but zeros, beside a copy that is damaged.
    #[error("it is blank")]
    Blank,
    /// What no torn write leaves behind.
    #[error("both copies of the owner block are damaged ({first}; {second})")]
    Damaged {
        /// The copy at 15 MiB.
        first: Box<OwnerError>,
        /// The other.
        second: Box<OwnerError>,
    },
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

impl OwnerError {
    /// Whether a block may be written anew over this: it says nothing, neither to us nor to a later release.
    pub fn is_rubble(&self) -> bool {
        match self {
            Self::Damaged { first, second } => {
                [first, second].iter().all(|copy| !matches!(***copy, Self::Version { .. }))
            }
            _ => false,
        }
    }
}

impl OwnerBlock {
    /// A volume nobody ever held.
    pub const NEVER_HELD: Self =
        Self { host: NOBODY, generation: 0, state: OwnerState::Free, hand_over_to: None };

    /// Held by `host`, as the take-over after `self`.
    pub fn taken_by(&self, host: HostId) -> Self {
        Self { host, generation: self.next(), state: OwnerState::Held, hand_over_to: None }
    }

    /// Given up by its holder.
    pub fn released(&self) -> Self {
        Self { generation: self.next(), state: OwnerState::Free, hand_over_to: None, ..*self }
    }

    /// Given by `host`, who has its lock, to `to`. From then on `host` writes nothing, unless it takes it back.
    pub fn handed_over(&self, host: HostId, to: HostId) -> Self {
        Self { host, generation: self.next(), state: OwnerState::HandedOver, hand_over_to: Some(to) }
    }

    /// The start of a VM by `host`, who has the lock: so whoever held the volume has ended. `host` is none before it has
    /// an id; the block then stays as it is.
    ///
    /// # Errors
    ///
    /// [`ClaimError::HandedOver`] to another host: that is about to take the volume, and nobody has the lock meanwhile.
    pub fn started_by(&self, host: Option<HostId>) -> Result<Self, ClaimError> {
        match (self.hand_over_to, host) {
            (Some(to), host) if host != Some(to) && host != Some(self.host) => {
                Err(ClaimError::HandedOver { from: self.host, to, generation: self.generation })
            }
            (_, Some(host)) => Ok(self.taken_by(host)),
            (_, None) => Ok(*self),
        }
    }

    /// The next process for a guest that has been running on `host` all the time, and whose process before this one is
    /// lost. Between the two the lock was free.
    ///
    /// # Errors
    ///
    /// [`ClaimError::Since`] if another host had the volume meanwhile: what this guest remembers of it is not so any more.
    pub fn gone_on_by(&self, host: Option<HostId>) -> Result<Self, ClaimError> {
        match host {
            Some(host) if self.host != host && *self != Self::NEVER_HELD => {
                Err(ClaimError::Since { host: self.host, generation: self.generation })
            }
            host => self.started_by(host),
        }
    }

    fn next(&self) -> u64 {
        self.generation.saturating_add(1)
    }

    /// The take-over by `host`, who has the lock already. `ended` is a host whose process somebody vouches has ended, and
    /// that did not run the guest since.
    ///
    /// What is free is taken, what was handed to `host`, and what `host` had itself or handed away without anybody taking
    /// it. What another host holds is not, although its lock is free: it ended without handing over.
    ///
    /// # Errors
    ///
    /// [`ClaimError`]: who has it, and what to do.
    pub fn claimed_by(&self, host: HostId, ended: Option<HostId>) -> Result<Self, ClaimError> {
        let holder = match (self.state, self.hand_over_to) {
            (OwnerState::Free, _) => return Ok(self.taken_by(host)),
            (OwnerState::HandedOver, Some(to)) if self.host != host => to,
            _ => self.host,
        };
        if holder == host || ended == Some(holder) {
            return Ok(self.taken_by(host));
        }
        let generation = self.generation;
        Err(match self.hand_over_to {
            Some(to) => ClaimError::HandedOver { from: self.host, to, generation },
            None => ClaimError::Held { host: holder, generation },
        })
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
            2 => OwnerState::HandedOver,
            _ => return Err(OwnerError::Field { field: "state" }),
        };
        if block[12..16].iter().chain(&block[56..SUM]).any(|&b| b != 0) {
            return Err(OwnerError::Field { field: "reserved bytes" });
        }
        let (host, to) = (host_at(16), host_at(40));
        if state != OwnerState::Free && host == NOBODY {
            return Err(OwnerError::Field { field: "host" });
        }
        if (state == OwnerState::HandedOver) != (to != NOBODY) {
            return Err(OwnerError::Field { field: "receiving host" });
        }
        let generation = u64::from_le_bytes(block[32..40].try_into().expect("eight bytes"));
        Ok(Self { host, generation, state, hand_over_to: (to != NOBODY).then_some(to) })
    }

    /// Reads the block. A file that ends before it was never held.
    ///
    /// Of two whole copies the one with the higher generation counts; at the same generation the first, which is the only
    /// one in volumes of older releases. One whole copy counts whatever the other is: each is written only while the other
    /// is whole. A first copy of zeros beside a torn second one is a volume whose very first write was cut short.
    ///
    /// # Errors
    ///
    /// [`OwnerError::Damaged`] if neither copy says anything, or [`OwnerError::Unreadable`]. Whoever wants to take the
    /// volume over then knows nothing of who has it, and must not.
    pub fn read(medium: &(impl HeaderFile + ?Sized)) -> Result<Self, OwnerError> {
        Copies::read(medium)?.block
    }

    /// Writes the block, and waits until it is on the disk: first the copy that does not count, then the other. The caller
    /// holds the lock. At every moment one copy is whole, and what a torn write leaves is the block before or this one.
    ///
    /// Never to be used on the data of a detached header: the guest's own bytes stand there.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn write(&self, medium: &(impl HeaderFile + ?Sized)) -> io::Result<()> {
        let order = match Copies::read(medium) {
            Ok(Copies { first_counts: false, .. }) => [OWNER_BLOCK_OFFSET, OWNER_COPY_OFFSET],
            _ => [OWNER_COPY_OFFSET, OWNER_BLOCK_OFFSET],
        };
        let block = self.encode();
        for place in order {
            medium.put(place, &block)?;
            medium.settle()?;
            let mut back = [0; OWNER_BLOCK_LEN];
            medium.get(place, &mut back)?;
            if back != block {
                return Err(io::Error::other("an owner block does not read back as it was written"));
            }
        }
        Ok(())
    }
}

/// Both copies, as they are.
struct Copies {
    block: Result<OwnerBlock, OwnerError>,
    /// Whether the first one is what the block was read from.
    first_counts: bool,
}

impl Copies {
    fn read(medium: &(impl HeaderFile + ?Sized)) -> Result<Self, OwnerError> {
        let copy = |place| {
            let mut block = [0; OWNER_BLOCK_LEN];
            match medium.get(place, &mut block) {
                Ok(()) => Ok(block),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok([0; OWNER_BLOCK_LEN]),
                Err(error) => Err(OwnerError::Unreadable { kind: error.kind() }),
            }
        };
        Ok(Self::of(&copy(OWNER_BLOCK_OFFSET)?, &copy(OWNER_COPY_OFFSET)?))
    }

    fn of(first: &[u8; OWNER_BLOCK_LEN], second: &[u8; OWNER_BLOCK_LEN]) -> Self {
        let blank = |copy: &[u8; OWNER_BLOCK_LEN]| copy.iter().all(|&byte| byte == 0);
        let (first_counts, block) = match (OwnerBlock::decode(first), OwnerBlock::decode(second)) {
            (Ok(one), Ok(two)) if two.generation > one.generation => (false, Ok(two)),
            (Ok(one), Ok(_)) => (true, Ok(one)),
            (Ok(one), Err(_)) => (true, Ok(one)),
            (Err(_), Ok(two)) if !blank(second) => (false, Ok(two)),
            (Err(first), Ok(_)) => {
                (false, Err(OwnerError::Damaged { first: first.into(), second: OwnerError::Blank.into() }))
            }
            (Err(first), Err(second)) => {
                (false, Err(OwnerError::Damaged { first: first.into(), second: second.into() }))
            }
        };
        Self { block, first_counts }
    }
}

/// Why a host must not take a volume, although it has the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClaimError {
    /// Another host has it, or had it and ended.
    #[error(
        "host {host} holds the volume (generation {generation}) and has not handed it over: start the VM there, or make \
         sure that it cannot write any more (host off or fenced) and take it over from that host"
    )]
    Held {
        /// Who.
        host: HostId,
        /// Of the block.
        generation: u64,
    },
    /// It was given to a third one.
    #[error(
        "host {from} handed the volume over to host {to} (generation {generation}), which has not taken it yet: start the \
         VM there, or take it back on host {from}"
    )]
    HandedOver {
        /// Who had it.
        from: HostId,
        /// Who may take it.
        to: HostId,
        /// Of the block.
        generation: u64,
    },
    /// While nobody here had the lock.
    #[error(
        "host {host} had the volume since (generation {generation}): the guest that runs here would write over what was \
         written there. Power it off (virsh destroy); it may be started again after that"
    )]
    Since {
        /// Who.
        host: HostId,
        /// Of the block.
        generation: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: HostId = HostId::from_bytes([0xa; 16]);
    const B: HostId = HostId::from_bytes([0xb; 16]);

    #[test]
    fn guest_goes_on_only_where_no_other_host_had_its_volume() {
        let held = OwnerBlock::NEVER_HELD.taken_by(A);
        for block in [OwnerBlock::NEVER_HELD, held, held.released(), held.handed_over(A, B)] {
            assert_eq!(block.gone_on_by(Some(A)), Ok(block.taken_by(A)), "{block:?}");
        }
        let moved = held.taken_by(B);
        for block in [moved, moved.released(), moved.handed_over(B, A)] {
            let since = ClaimError::Since { host: B, generation: block.generation };
            assert_eq!(block.gone_on_by(Some(A)), Err(since), "{block:?}");
            assert!(block.started_by(Some(A)).is_ok(), "a start afresh has no memory of it");
        }
        assert_eq!(moved.gone_on_by(None), Ok(moved));
    }

    #[test]
    fn every_state_reads_back() {
        let held = OwnerBlock::NEVER_HELD.taken_by(A);
        assert_eq!((held.generation, held.state), (1, OwnerState::Held));
        for block in [OwnerBlock::NEVER_HELD, held, held.handed_over(A, B), held.released(), held.taken_by(B)]
        {
            assert_eq!(OwnerBlock::decode(&block.encode()), Ok(block));
        }
        assert_eq!(OwnerBlock::decode(&[0; OWNER_BLOCK_LEN]), Ok(OwnerBlock::NEVER_HELD));
    }

    #[test]
    fn layout_is_as_published() {
        let block = OwnerBlock { generation: 0x0101, ..OwnerBlock::NEVER_HELD }.handed_over(A, B).encode();
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
