//! What may be read from a disk that was written, flushed, crashed: the write log of Crucible's `crutest`, per block.
//!
//! In go the beginnings and ends of what a client asked of a disk, in the order in which it saw them, and what it read;
//! out comes the first block that no correct disk could have given. It knows nothing of how the disk is made and does
//! no I/O.
//!
//! For each block of 512 bytes it keeps the *versions* that may still be there: what may be read now, and what may be
//! on the medium.
//!
//! | event | what may be read | what may be on the medium |
//! |---|---|---|
//! | a write begins | its version too | its version too |
//! | it is acknowledged | not what was over before it began | as before |
//! | it fails | as before: it may have been done, or not | as before |
//! | a flush is acknowledged | as before | not what could no longer be read when it began |
//! | power is lost | what may be on the medium | as before |
//! | a block is read | only what was read, if no write is under way | as before; only that, right after a loss of power |
//!
//! A discard is a write of bytes nobody knows.

use std::{
    collections::{BTreeMap, HashMap, hash_map::DefaultHasher},
    fmt,
    hash::{Hash, Hasher},
};

use crate::stamp::{BLOCK, Content, explain};

/// A write that was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WriteId(u64);

/// A flush that was begun.
#[derive(Debug)]
pub struct FlushId(u64);

/// A read that was begun.
#[derive(Debug)]
pub struct ReadId(u64);

/// What a write that is kept track of puts into a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    /// Bytes with this hash.
    Bytes(u64),
    /// Unspecified bytes: after a discard.
    Any,
}

impl Value {
    fn of(block: &[u8]) -> Self {
        let mut hasher = DefaultHasher::new();
        block.hash(&mut hasher);
        Self::Bytes(hasher.finish())
    }

    fn is(self, found: Self) -> bool {
        self == Self::Any || self == found
    }
}

/// What one write put, or may have put, into one block. Write 0 is what was there at the start.
#[derive(Debug, Clone, Copy)]
struct Version {
    write: u64,
    value: Value,
}

#[derive(Debug, Clone)]
struct Block {
    /// What may be read now.
    live: Vec<Version>,
    /// What may be on the medium.
    stored: Vec<Version>,
    /// Nothing was begun here since power was last lost: what is read is what is on the medium.
    settled: bool,
}

#[derive(Debug, Clone)]
struct Write {
    began: u64,
    /// When it was answered, well or not, or given up.
    ended: Option<u64>,
    offset: u64,
    blocks: u64,
}

#[derive(Debug, Clone)]
struct Read {
    first: u64,
    /// For each block what could be read when it began, and what was begun since.
    candidates: Vec<Vec<Version>>,
    began: u64,
}

/// Why a block cannot be what a correct disk gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Wrong {
    /// What an earlier write, or the start, had put there.
    Old {
        /// That write; 0 is the start.
        write: u64,
    },
    /// A block that belongs elsewhere.
    Misplaced {
        /// Where it belongs.
        from: u64,
        /// Which write had put it there.
        write: u64,
    },
    /// Not of one piece: a part of a write, and something else.
    Torn {
        /// The write that part of it is of.
        write: u64,
        /// How many of its 32 cells of 16 bytes.
        cells: usize,
    },
    /// Bytes that nobody wrote.
    Foreign,
}

/// A block that no correct disk could have given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Fault {
    /// Which block of 512 bytes.
    pub block: u64,
    /// What is wrong with it.
    pub wrong: Wrong,
    /// The writes any of which would have been right; 0 is what was there at the start.
    pub allowed: Vec<u64>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {} (byte {}) holds ", self.block, self.block * BLOCK)?;
        match self.wrong {
            Wrong::Old { write: 0 } => write!(f, "what was there at the start")?,
            Wrong::Old { write } => write!(f, "the old write {write}")?,
            Wrong::Misplaced { from, write } => write!(f, "what write {write} put into block {from}")?,
            Wrong::Torn { write, cells } => write!(f, "{} bytes of write {write} and others", cells * 16)?,
            Wrong::Foreign => write!(f, "bytes nobody wrote")?,
        }
        write!(f, "; right would be any of writes {:?}", self.allowed)
    }
}

/// The log of one disk.
#[derive(Debug, Clone)]
pub struct Verifier {
    blocks: Vec<Block>,
    writes: HashMap<u64, Write>,
    flushes: BTreeMap<u64, FlushBegun>,
    reads: BTreeMap<u64, Read>,
    /// What was written to a block without a stamp, to say of a wrong one how old it is.
    past: HashMap<(u64, u64), u64>,
    /// Counts events.
    now: u64,
    next_write: u64,
    next: u64,
    checked: u64,
}

/// Which writes could be read when the flush began, of each block that was not one thing for certain.
#[derive(Debug, Clone)]
struct FlushBegun {
    began: u64,
    live: Vec<(usize, Vec<u64>)>,
}

impl Verifier {
    /// A disk that holds these bytes, durably; a whole number of blocks.
    pub fn new(initial: &[u8]) -> Self {
        let mut past = HashMap::new();
        let blocks = initial
            .chunks(BLOCK as usize)
            .zip(0..)
            .map(|(bytes, number)| {
                let value = Value::of(bytes);
                remember(&mut past, number, bytes, 0);
                let version = Version { write: 0, value };
                Block { live: vec![version], stored: vec![version], settled: true }
            })
            .collect();
        Self {
            blocks,
            writes: HashMap::new(),
            flushes: BTreeMap::new(),
            reads: BTreeMap::new(),
            past,
            now: 0,
            next_write: 1,
            next: 0,
            checked: 0,
        }
    }

    /// The same disk, of which from this block on nothing is known at the start: where a file was not written yet.
    #[must_use]
    pub fn unknown_from(mut self, first: u64) -> Self {
        for block in self.blocks.iter_mut().skip(first as usize) {
            for version in block.live.iter_mut().chain(&mut block.stored) {
                version.value = Value::Any;
            }
        }
        self
    }

    /// Blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Blocks that were checked so far.
    pub fn checked(&self) -> u64 {
        self.checked
    }

    /// The number the next write will have, for its stamp.
    pub fn next_write(&self) -> u64 {
        self.next_write
    }

    /// A write of these bytes is about to be sent. Whole blocks within the disk.
    ///
    /// # Panics
    ///
    /// If they are not: that is a defect of the test.
    pub fn begin_write(&mut self, offset: u64, data: &[u8]) -> WriteId {
        assert!((data.len() as u64).is_multiple_of(BLOCK), "a write of whole blocks");
        let values: Vec<_> = data.chunks(BLOCK as usize).map(Value::of).collect();
        for (number, bytes) in (offset / BLOCK..).zip(data.chunks(BLOCK as usize)) {
            remember(&mut self.past, number, bytes, self.next_write);
        }
        self.begin(offset, &values)
    }

    /// A write of zeros.
    ///
    /// # Panics
    ///
    /// As [`Verifier::begin_write`].
    pub fn begin_write_zeroes(&mut self, offset: u64, bytes: u64) -> WriteId {
        self.begin_write(offset, &vec![0; bytes as usize])
    }

    /// A discard: afterwards any bytes may be read, until the range is written.
    ///
    /// # Panics
    ///
    /// As [`Verifier::begin_write`].
    pub fn begin_discard(&mut self, offset: u64, bytes: u64) -> WriteId {
        assert!(bytes.is_multiple_of(BLOCK), "whole blocks");
        self.begin(offset, &vec![Value::Any; (bytes / BLOCK) as usize])
    }

    fn begin(&mut self, offset: u64, values: &[Value]) -> WriteId {
        assert!(offset.is_multiple_of(BLOCK), "at a block");
        self.now += 1;
        let write = self.next_write;
        self.next_write += 1;
        let first = offset / BLOCK;
        for (number, value) in (first..).zip(values) {
            let version = Version { write, value: *value };
            let block = self.blocks.get_mut(number as usize).expect("a write within the disk");
            block.live.push(version);
            block.stored.push(version);
            block.settled = false;
            for read in self.reads.values_mut() {
                let at = number.checked_sub(read.first).map(|at| at as usize);
                if let Some(candidates) = at.and_then(|at| read.candidates.get_mut(at)) {
                    candidates.push(version);
                }
            }
        }
        let blocks = values.len() as u64;
        self.writes.insert(write, Write { began: self.now, ended: None, offset: first, blocks });
        WriteId(write)
    }

    /// The write was acknowledged.
    pub fn end_write(&mut self, write: WriteId) {
        self.acknowledged(write, false);
    }

    /// The write was acknowledged, and was to be durable then (FUA).
    pub fn end_durable_write(&mut self, write: WriteId) {
        self.acknowledged(write, true);
    }

    fn acknowledged(&mut self, WriteId(id): WriteId, durable: bool) {
        let Some((began, first, blocks)) = self.finish(id) else { return };
        let writes = &self.writes;
        let over = |version: &Version| version.write != id && was_over(writes, version.write, began);
        for block in self.blocks.iter_mut().skip(first as usize).take(blocks as usize) {
            block.live.retain(|version| !over(version));
            if durable {
                block.stored.retain(|version| !over(version));
            }
        }
        self.forget_old_writes();
    }

    /// The write was answered with an error, or its answer will never come: it was done, or in part, or not.
    pub fn fail_write(&mut self, WriteId(id): WriteId) {
        self.finish(id);
    }

    /// Ends a write; gives when it began and its blocks.
    fn finish(&mut self, id: u64) -> Option<(u64, u64, u64)> {
        self.now += 1;
        let write = self.writes.get_mut(&id)?;
        write.ended.get_or_insert(self.now);
        Some((write.began, write.offset, write.blocks))
    }

    /// A flush is about to be sent.
    pub fn begin_flush(&mut self) -> FlushId {
        self.now += 1;
        self.next += 1;
        let uncertain = self.blocks.iter().enumerate().filter(|(_, block)| block.stored.len() > 1);
        let live = uncertain.map(|(at, block)| (at, block.live.iter().map(|v| v.write).collect())).collect();
        self.flushes.insert(self.next, FlushBegun { began: self.now, live });
        FlushId(self.next)
    }

    /// The flush was acknowledged.
    pub fn end_flush(&mut self, FlushId(id): FlushId) {
        self.now += 1;
        let Some(begun) = self.flushes.remove(&id) else { return };
        let writes = &self.writes;
        for (at, live) in &begun.live {
            let Some(block) = self.blocks.get_mut(*at) else { continue };
            block.stored.retain(|version| {
                let since = writes.get(&version.write).is_some_and(|write| write.began > begun.began);
                since || live.contains(&version.write)
            });
        }
        self.forget_old_writes();
    }

    /// The flush failed: it promises nothing.
    pub fn fail_flush(&mut self, FlushId(id): FlushId) {
        self.flushes.remove(&id);
    }

    /// Power was lost: what was under way ended somewhere, and what was not on the medium is gone.
    pub fn crash(&mut self) {
        self.give_up();
        for block in &mut self.blocks {
            block.live.clone_from(&block.stored);
            block.settled = true;
        }
    }

    /// The process that served the disk ended, and what it gave to the kernel stays: only the answers are lost.
    pub fn lose_server(&mut self) {
        self.give_up();
    }

    fn give_up(&mut self) {
        self.now += 1;
        for write in self.writes.values_mut() {
            write.ended.get_or_insert(self.now);
        }
        self.flushes.clear();
        self.reads.clear();
    }

    /// A read is about to be sent.
    ///
    /// # Panics
    ///
    /// If it is not of whole blocks within the disk.
    pub fn begin_read(&mut self, offset: u64, bytes: u64) -> ReadId {
        assert!(offset.is_multiple_of(BLOCK) && bytes.is_multiple_of(BLOCK), "a read of whole blocks");
        self.now += 1;
        self.next += 1;
        let first = offset / BLOCK;
        let range = first as usize..(first + bytes / BLOCK) as usize;
        let blocks = self.blocks.get(range).expect("a read within the disk");
        let candidates = blocks.iter().map(|block| block.live.clone()).collect();
        self.reads.insert(self.next, Read { first, candidates, began: self.now });
        ReadId(self.next)
    }

    /// The read gave these bytes.
    ///
    /// # Errors
    ///
    /// The first block that no correct disk could have given.
    ///
    /// # Panics
    ///
    /// If it gave more or fewer than were asked for.
    pub fn end_read(&mut self, ReadId(id): ReadId, data: &[u8]) -> Result<(), Fault> {
        let Some(read) = self.reads.remove(&id) else { return Ok(()) };
        let quiet = read.began == self.now;
        self.now += 1;
        assert_eq!(data.len(), read.candidates.len() * BLOCK as usize, "as many bytes as were asked for");
        let blocks = data.chunks(BLOCK as usize).zip(&read.candidates);
        (read.first..)
            .zip(blocks)
            .try_for_each(|(number, (bytes, allowed))| self.check_block(number, bytes, allowed, quiet))
    }

    /// Checks bytes that were read while nothing else went on.
    ///
    /// # Errors
    ///
    /// As [`Verifier::end_read`].
    pub fn check_read(&mut self, offset: u64, data: &[u8]) -> Result<(), Fault> {
        let read = self.begin_read(offset, data.len() as u64);
        self.end_read(read, data)
    }

    /// Checks a block; with `pin`, what it is now is what it stays.
    fn check_block(
        &mut self,
        number: u64,
        bytes: &[u8],
        allowed: &[Version],
        pin: bool,
    ) -> Result<(), Fault> {
        self.checked += 1;
        let found = Value::of(bytes);
        if !allowed.iter().any(|version| version.value.is(found)) {
            let wrong = self.what_is_wrong(number, bytes, found);
            return Err(Fault { block: number, wrong, allowed: allowed.iter().map(|v| v.write).collect() });
        }
        let writes = &self.writes;
        let Some(block) = self.blocks.get_mut(number as usize).filter(|_| pin) else { return Ok(()) };
        let under_way =
            |version: &Version| writes.get(&version.write).is_some_and(|write| write.ended.is_none());
        if !block.live.iter().any(under_way) {
            block.live.retain(|version| version.value.is(found));
            if block.settled {
                block.stored.retain(|version| version.value.is(found));
            }
        }
        Ok(())
    }

    fn what_is_wrong(&self, number: u64, bytes: &[u8], found: Value) -> Wrong {
        if let Value::Bytes(hash) = found
            && let Some(write) = self.past.get(&(number, hash))
        {
            return Wrong::Old { write: *write };
        }
        match explain(bytes) {
            Content::Stamped { block, write } if block == number => Wrong::Old { write },
            Content::Stamped { block, write } => Wrong::Misplaced { from: block, write },
            Content::Torn { write, cells, .. } => Wrong::Torn { write, cells },
            Content::Zeros | Content::Foreign => Wrong::Foreign,
        }
    }

    /// Drops what no rule asks of any more, so that a long run does not grow without end.
    fn forget_old_writes(&mut self) {
        if self.writes.len() < 4096 {
            return;
        }
        let named: std::collections::HashSet<u64> = self
            .blocks
            .iter()
            .flat_map(|block| block.live.iter().chain(&block.stored))
            .map(|version| version.write)
            .collect();
        self.writes.retain(|id, write| write.ended.is_none() || named.contains(id));
    }
}

/// Whether a write had been answered before that moment. What was there at the start, and what is forgotten, was.
fn was_over(writes: &HashMap<u64, Write>, write: u64, moment: u64) -> bool {
    writes.get(&write).is_none_or(|write| write.ended.is_some_and(|ended| ended < moment))
}

fn remember(past: &mut HashMap<(u64, u64), u64>, block: u64, bytes: &[u8], write: u64) {
    if !matches!(explain(bytes), Content::Stamped { .. })
        && let Value::Bytes(hash) = Value::of(bytes)
    {
        past.insert((block, hash), write);
    }
}
