//! The verifier accepts everything a correct disk does, and finds each thing a wrong one does.

use proptest::{prelude::*, test_runner::Config};
use vmseal_test_store::{
    seed::Random,
    stamp::{BLOCK, stamped},
    verifier::{Fault, Verifier, Wrong},
};

const BLOCKS: u64 = 48;

/// How a disk is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Defect {
    None,
    /// Acknowledges a write and does not do it.
    LosesAWrite,
    /// Says that a flush is done when nothing was made durable.
    LiesAboutAFlush,
    /// A loss of power leaves a block half old and half new.
    TearsWithinABlock,
    /// A write goes to another place.
    Misdirects,
    /// Two blocks change places.
    Swaps,
    /// Power comes back with a block as it was before it was made durable.
    RollsBack,
}

/// A disk with a cache: reads see everything, a loss of power leaves what was flushed and any part of the rest.
struct Disk {
    cache: Vec<u8>,
    medium: Vec<u8>,
    /// What each block held on the medium before it was last made durable.
    before: Vec<u8>,
    defect: Defect,
    /// When the defect shows: at the how manieth occasion.
    occasions: u64,
    shown: bool,
}

impl Disk {
    fn new(initial: &[u8], defect: Defect, occasions: u64) -> Self {
        let own = || initial.to_vec();
        Self { cache: own(), medium: own(), before: own(), defect, occasions, shown: false }
    }

    fn occasion(&mut self, defect: Defect) -> bool {
        if self.defect != defect || self.shown {
            return false;
        }
        self.shown = self.occasions == 0;
        self.occasions = self.occasions.saturating_sub(1);
        self.shown
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if self.occasion(Defect::LosesAWrite) {
            return;
        }
        let mut at = offset as usize;
        if self.occasion(Defect::Misdirects) {
            at = if at == 0 { BLOCK as usize } else { at - BLOCK as usize };
            at = at.min(self.cache.len() - data.len());
        }
        self.cache[at..at + data.len()].copy_from_slice(data);
        if self.occasion(Defect::Swaps) {
            let (low, high) = self.cache.split_at_mut(BLOCK as usize);
            low.swap_with_slice(&mut high[..BLOCK as usize]);
        }
    }

    fn flush(&mut self) {
        if self.occasion(Defect::LiesAboutAFlush) {
            return;
        }
        let size = BLOCK as usize;
        for at in (0..self.cache.len()).step_by(size) {
            if self.cache[at..at + size] != self.medium[at..at + size] {
                self.before[at..at + size].copy_from_slice(&self.medium[at..at + size]);
            }
        }
        self.medium.copy_from_slice(&self.cache);
    }

    fn crash(&mut self, random: &mut Random) {
        let size = BLOCK as usize;
        for at in (0..self.cache.len()).step_by(size) {
            if random.chance(1, 2) {
                self.medium[at..at + size].copy_from_slice(&self.cache[at..at + size]);
            }
        }
        let changed: Vec<usize> = (0..self.cache.len())
            .step_by(size)
            .filter(|at| self.cache[*at..*at + size] != self.medium[*at..*at + size])
            .collect();
        if let Some(at) = changed.first()
            && self.occasion(Defect::TearsWithinABlock)
        {
            self.medium[*at..*at + 256].copy_from_slice(&self.cache[*at..*at + 256]);
        }
        if self.occasion(Defect::RollsBack) {
            self.medium.copy_from_slice(&self.before);
        }
        self.cache.copy_from_slice(&self.medium);
        self.before.copy_from_slice(&self.medium);
    }
}

/// Works on a disk and looks at all of it after each crash and at the end.
fn work(seed: u64, defect: Defect, steps: usize) -> Result<u64, Fault> {
    let mut random = Random::new(seed);
    let initial = stamped(0, BLOCKS, 0xffff);
    let (mut disk, mut log) = (Disk::new(&initial, defect, random.below(6)), Verifier::new(&initial));
    let mut under_way = Vec::new();
    for _ in 0..steps {
        match random.below(20) {
            0..=8 => {
                let blocks = 1 + random.below(6);
                let first = random.below(BLOCKS - blocks + 1);
                let data = stamped(first, blocks, log.next_write());
                let write = log.begin_write(first * BLOCK, &data);
                disk.write(first * BLOCK, &data);
                match random.below(4) {
                    // Its answer comes later, beside that of others.
                    0 => under_way.push(write),
                    1 if defect == Defect::None => log.fail_write(write),
                    _ => log.end_write(write),
                }
            }
            9 => {
                let first = random.below(BLOCKS);
                let write = log.begin_write_zeroes(first * BLOCK, BLOCK);
                disk.write(first * BLOCK, &[0; BLOCK as usize]);
                disk.flush();
                log.end_durable_write(write);
            }
            10 => {
                let first = random.below(BLOCKS);
                let write = log.begin_discard(first * BLOCK, BLOCK);
                disk.write(first * BLOCK, &[random.next_u64() as u8; BLOCK as usize]);
                log.end_write(write);
            }
            11..=13 => under_way.drain(..).for_each(|write| log.end_write(write)),
            14..=16 => {
                let flush = log.begin_flush();
                disk.flush();
                log.end_flush(flush);
            }
            17 => {
                disk.crash(&mut random);
                log.crash();
                under_way.clear();
                log.check_read(0, &disk.cache)?;
            }
            18 => log.lose_server(),
            _ => {
                let first = random.below(BLOCKS - 8);
                let at = (first * BLOCK) as usize;
                let (read, data) =
                    (log.begin_read(first * BLOCK, 8 * BLOCK), disk.cache[at..at + 4096].to_vec());
                log.end_read(read, &data)?;
            }
        }
    }
    disk.crash(&mut random);
    log.crash();
    log.check_read(0, &disk.cache)?;
    Ok(log.checked())
}

proptest! {
    #![proptest_config(Config { cases: 400, ..Config::default() })]

    #[test]
    fn a_correct_disk_is_accepted_whatever_is_done(seed: u64, steps in 0usize..200) {
        work(seed, Defect::None, steps).map_err(|fault| TestCaseError::fail(fault.to_string()))?;
    }
}

/// What 300 workloads (always the same) find of a defect. A workload may end before it shows, or hide it: a lost write
/// that is written over, or a lie about a flush that is followed by another flush, does no harm.
fn found(defect: Defect) -> Vec<Wrong> {
    (0..300).filter_map(|seed| work(seed, defect, 150).err()).map(|fault| fault.wrong).collect()
}

#[test]
fn a_lost_write_is_found() {
    let found = found(Defect::LosesAWrite);
    assert!(found.len() > 100, "in {} of 300", found.len());
    assert!(found.iter().all(|wrong| matches!(wrong, Wrong::Old { .. } | Wrong::Foreign)), "{found:?}");
}

#[test]
fn old_data_after_a_flush_is_found() {
    let lies = found(Defect::LiesAboutAFlush);
    assert!(lies.len() > 15, "in {} of 300", lies.len());
    let rolled_back = found(Defect::RollsBack);
    assert!(rolled_back.len() > 100, "in {} of 300", rolled_back.len());
    assert!(lies.iter().chain(&rolled_back).all(|wrong| matches!(wrong, Wrong::Old { .. } | Wrong::Foreign)));
}

#[test]
fn a_block_torn_within_its_512_bytes_is_found() {
    let found = found(Defect::TearsWithinABlock);
    assert!(found.len() > 100, "in {} of 300", found.len());
    assert!(found.iter().any(|wrong| matches!(wrong, Wrong::Torn { cells: 16, .. })), "{found:?}");
}

#[test]
fn a_misdirected_write_and_swapped_blocks_are_found() {
    for defect in [Defect::Misdirects, Defect::Swaps] {
        let found = found(defect);
        assert!(found.len() > 200, "{defect:?} in {} of 300", found.len());
        assert!(found.iter().any(|wrong| matches!(wrong, Wrong::Misplaced { .. })), "{defect:?}: {found:?}");
    }
}

#[test]
fn writes_in_flight_at_a_crash_are_any_of_them_or_what_was_before() {
    let initial = stamped(0, 1, 99);
    let mut log = Verifier::new(&initial);
    let block = |log: &mut Verifier| {
        let data = stamped(0, 1, log.next_write());
        (log.begin_write(0, &data), data)
    };
    let (one, first) = block(&mut log);
    log.end_write(one);
    let flush = log.begin_flush();
    log.end_flush(flush);
    let (_two, second) = block(&mut log);
    let (_three, third) = block(&mut log);
    log.crash();
    for (content, right) in [(&initial, false), (&first, true), (&second, true), (&third, true)] {
        let read = log.clone().check_read(0, content);
        assert_eq!(read.is_ok(), right, "{read:?}");
    }
    // What was read after the crash is what is there.
    log.check_read(0, &second).unwrap();
    let fault = log.check_read(0, &third).unwrap_err();
    assert_eq!((fault.block, fault.wrong, fault.allowed), (0, Wrong::Old { write: 3 }, vec![2]));
}

#[test]
fn what_was_flushed_is_there_after_a_crash_and_nothing_older() {
    let initial = stamped(0, 1, 99);
    let mut log = Verifier::new(&initial);
    let data = stamped(0, 1, log.next_write());
    let write = log.begin_write(0, &data);
    log.end_write(write);
    let failed = log.begin_flush();
    log.fail_flush(failed);
    let after_a_failed_flush = log.clone();
    let flush = log.begin_flush();
    log.end_flush(flush);
    for (mut log, old_is_right) in [(after_a_failed_flush, true), (log, false)] {
        assert_eq!(
            log.clone().check_read(0, &initial).unwrap_err().wrong,
            Wrong::Old { write: 99 },
            "no crash yet"
        );
        log.crash();
        log.clone().check_read(0, &data).unwrap();
        assert_eq!(log.check_read(0, &initial).is_ok(), old_is_right);
    }
}

#[test]
fn a_read_beside_a_write_gives_either() {
    let initial = stamped(0, 1, 99);
    let mut log = Verifier::new(&initial);
    let read = log.begin_read(0, BLOCK);
    let data = stamped(0, 1, log.next_write());
    let write = log.begin_write(0, &data);
    log.end_write(write);
    let mut other = log.clone();
    log.end_read(read, &initial).unwrap();
    assert!(log.check_read(0, &initial).is_err(), "it began when the write was over");
    let read = other.begin_read(0, BLOCK);
    other.end_read(read, &data).unwrap();
}

#[test]
fn a_fault_says_what_is_where() {
    let mut log = Verifier::new(&stamped(0, 2, 7));
    let data = stamped(0, 2, log.next_write());
    let write = log.begin_write(0, &data);
    log.end_write(write);
    let swapped = [&data[512..], &data[..512]].concat();
    assert_eq!(
        log.check_read(0, &swapped).unwrap_err().to_string(),
        "block 0 (byte 0) holds what write 1 put into block 1; right would be any of writes [1]"
    );
    let old = log.check_read(512, &stamped(1, 1, 7)).unwrap_err();
    assert_eq!(old.to_string(), "block 1 (byte 512) holds the old write 7; right would be any of writes [1]");
}
