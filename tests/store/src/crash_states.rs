//! Every image a loss of power may leave: from what was stored at first and the log of what happened since.
//!
//! What was flushed is there, in order. Of what came since the last flush, any part may be there: each prefix of the
//! log; each write torn between its sectors, from either end; and any choice of the writes since a flush, all choices
//! while there are few ([`CrashStates::exhaustive`]), so many at random beyond ([`CrashStates::samples`]). A sector of
//! 512 bytes is old or new, never both. A file that grew may have its new length and not yet its bytes, which are zeros
//! then.
//!
//! What a failed flush should have made durable is in doubt for good: no later flush makes it durable.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    entry::Entry,
    image::{Image, SECTOR},
    seed::Random,
};

/// One way to crash.
#[derive(Debug)]
pub struct CrashState {
    /// Which kind.
    pub kind: CrashKind,
    /// Entries of the log that had happened.
    pub position: usize,
    /// The last mark before that: how far the user of the store was for certain.
    pub mark: u64,
    /// What is stored.
    pub image: Image,
}

/// How a crash differs from a plain end of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CrashKind {
    /// Everything up to there, nothing after.
    Prefix,
    /// The last write is there only in part.
    Torn {
        /// Sectors of it that are there.
        there: std::ops::Range<u64>,
        /// Sectors it has.
        of: u64,
    },
    /// Of the entries since the last flush, only these (counted from the first of them).
    Chosen {
        /// Which are there.
        there: Vec<usize>,
        /// How many there were.
        of: usize,
    },
}

/// An entry that is not on the medium for certain.
struct Pending {
    sectors: BTreeMap<u64, [u8; SECTOR as usize]>,
    /// The length it sets.
    len: Option<u64>,
    /// Where it ends: the file is at least that long with it.
    end: u64,
    /// Whether it makes the file longer.
    grows: bool,
    /// In doubt for good, since a flush of it failed.
    doubtful: bool,
}

/// The crashes of a log. An iterator, the earliest first.
pub struct CrashStates<'a> {
    log: &'a [Entry],
    random: Random,
    exhaustive: usize,
    samples: usize,
    /// Entry that is next.
    position: usize,
    mark: u64,
    /// What is on the medium for certain.
    durable: Arc<Vec<u8>>,
    pending: Vec<Pending>,
    /// Everything up to here, the cache included.
    current: Image,
    /// Made and not yet given.
    ready: std::collections::VecDeque<CrashState>,
    begun: bool,
    ended: bool,
}

impl<'a> CrashStates<'a> {
    /// All crashes of `log`, which began with the bytes `base` on the medium.
    pub fn new(base: Vec<u8>, log: &'a [Entry], random: Random) -> Self {
        let durable = Arc::new(base);
        Self {
            log,
            random,
            exhaustive: 8,
            samples: 64,
            position: 0,
            mark: 0,
            current: Image::new(durable.clone()),
            durable,
            pending: Vec::new(),
            ready: std::collections::VecDeque::new(),
            begun: false,
            ended: false,
        }
    }

    /// Up to how many entries between two flushes every choice of them is made (2 to that power).
    #[must_use]
    pub fn exhaustive(self, entries: usize) -> Self {
        Self { exhaustive: entries, ..self }
    }

    /// How many choices are made at random where there are more.
    #[must_use]
    pub fn samples(self, samples: usize) -> Self {
        Self { samples, ..self }
    }

    fn state(&self, kind: CrashKind, image: Image) -> CrashState {
        CrashState { kind, position: self.position, mark: self.mark, image }
    }

    /// Takes the next entry and makes what a crash after it, or in it, may leave.
    fn step(&mut self) {
        let Some(entry) = self.log.get(self.position) else {
            self.choices();
            self.ended = true;
            return;
        };
        match entry {
            Entry::Mark(mark) => self.mark = *mark,
            Entry::Flush => {
                self.choices();
                self.make_durable();
            }
            Entry::FlushFailed => {
                self.choices();
                self.pending.iter_mut().for_each(|pending| pending.doubtful = true);
            }
            Entry::FlushLied => {}
            entry => {
                let pending = self.explode(entry);
                self.tears(&pending);
                self.position += 1;
                apply(&mut self.current, &pending, 0..u64::MAX);
                self.pending.push(pending);
                let image = self.current.clone();
                self.ready.push_back(self.state(CrashKind::Prefix, image));
                return;
            }
        }
        self.position += 1;
    }

    /// An entry as sectors, those it covers in part filled with what is there now.
    fn explode(&self, entry: &Entry) -> Pending {
        let (mut sectors, mut len, mut written_to) = (BTreeMap::new(), None, 0);
        let mut cover = |offset: u64, bytes: &mut dyn Iterator<Item = u8>, count: u64| {
            for number in offset / SECTOR..(offset + count).div_ceil(SECTOR) {
                let mut sector = self.current.sector(number);
                let (begin, end) =
                    ((number * SECTOR).max(offset), ((number + 1) * SECTOR).min(offset + count));
                let within =
                    &mut sector[(begin - number * SECTOR) as usize..(end - number * SECTOR) as usize];
                within.iter_mut().zip(&mut *bytes).for_each(|(to, from)| *to = from);
                sectors.insert(number, sector);
            }
        };
        let now = self.current.len;
        match entry {
            Entry::Write { offset, data, .. } => {
                cover(*offset, &mut data.iter().copied(), data.len() as u64);
                written_to = offset + data.len() as u64;
            }
            Entry::Punch { offset, len } => cover(*offset, &mut std::iter::repeat(0), *len),
            Entry::SetLen { len: to } => {
                // What was cut off is zeros if the file grows again.
                cover(*to, &mut std::iter::repeat(0), now.saturating_sub(*to));
                len = Some(*to);
            }
            _ => {}
        }
        Pending { sectors, len, end: written_to, grows: written_to > now, doubtful: false }
    }

    /// The entry at `position` in part, after everything before it.
    fn tears(&mut self, pending: &Pending) {
        let of = pending.sectors.len() as u64;
        if matches!(self.log.get(self.position), Some(Entry::SetLen { .. })) {
            return;
        }
        let mut parts: Vec<_> = (1..of).flat_map(|at| [0..at, at..of]).collect();
        if pending.grows {
            parts.push(0..0);
        }
        for there in parts {
            let mut image = self.current.clone();
            apply(&mut image, pending, there.clone());
            self.ready.push_back(self.state(CrashKind::Torn { there, of }, image));
        }
    }

    /// Choices of what is pending; all of it was made already. None of it was too, but earlier: by now its user may
    /// have been told that something is durable.
    fn choices(&mut self) {
        let of = self.pending.len();
        let doubtful = self.pending.iter().any(|pending| pending.doubtful);
        let whole = |chosen: &[bool]| !doubtful && chosen.iter().all(|chosen| *chosen);
        if of <= self.exhaustive {
            for mask in 0u64..1 << of {
                let chosen: Vec<bool> = (0..of).map(|bit| mask >> bit & 1 == 1).collect();
                if !whole(&chosen) {
                    self.choose(&chosen);
                }
            }
        } else {
            for _ in 0..self.samples {
                // Some that lose a few, some that keep a few.
                let keep = 1 + self.random.below(7);
                let chosen: Vec<bool> = (0..of).map(|_| self.random.chance(keep, 8)).collect();
                if !whole(&chosen) {
                    self.choose(&chosen);
                }
            }
        }
    }

    fn choose(&mut self, chosen: &[bool]) {
        let mut image = Image::new(self.durable.clone());
        for (pending, _) in self.pending.iter().zip(chosen).filter(|(_, chosen)| **chosen) {
            apply(&mut image, pending, 0..u64::MAX);
        }
        let there = chosen.iter().enumerate().filter(|(_, chosen)| **chosen).map(|(at, _)| at).collect();
        let state = self.state(CrashKind::Chosen { there, of: chosen.len() }, image);
        self.ready.push_back(state);
    }

    /// A flush was done: what is pending is on the medium, but for what is in doubt.
    fn make_durable(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        // Held no longer, so that the bytes need not be copied.
        self.current = Image::new(Arc::default());
        let durable = Arc::make_mut(&mut self.durable);
        let mut doubtful: Vec<Pending> = Vec::new();
        for entry in pending {
            if entry.doubtful {
                doubtful.push(entry);
                continue;
            }
            let len = entry.len.unwrap_or(durable.len() as u64).max(entry.end);
            durable.resize(len as usize, 0);
            for (number, bytes) in &entry.sectors {
                let at = (number * SECTOR) as usize;
                let there = durable.len().saturating_sub(at).min(SECTOR as usize);
                if there > 0 {
                    durable[at..at + there].copy_from_slice(&bytes[..there]);
                }
                // Written over: whether the older is there does not matter any more.
                for old in &mut doubtful {
                    old.sectors.remove(number);
                }
            }
        }
        doubtful.retain(|old| !old.sectors.is_empty() || old.len.is_some());
        self.pending = doubtful;
        let mut current = Image::new(self.durable.clone());
        for pending in &self.pending {
            apply(&mut current, pending, 0..u64::MAX);
        }
        // What is read now is what is in the cache; in doubt is only what a crash leaves of it.
        self.current = current;
    }
}

/// Puts some sectors of an entry (counted within it) and its length on an image.
fn apply(image: &mut Image, pending: &Pending, there: std::ops::Range<u64>) {
    for (count, (number, bytes)) in (0..).zip(&pending.sectors) {
        if there.contains(&count) {
            image.put(*number, *bytes);
        }
    }
    image.len = pending.len.unwrap_or(image.len).max(pending.end);
}

impl Iterator for CrashStates<'_> {
    type Item = CrashState;

    fn next(&mut self) -> Option<CrashState> {
        if !self.begun {
            self.begun = true;
            return Some(self.state(CrashKind::Prefix, self.current.clone()));
        }
        while self.ready.is_empty() && !self.ended {
            self.step();
        }
        self.ready.pop_front()
    }
}
