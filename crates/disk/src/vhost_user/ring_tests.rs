//! A driver in the same process, which plays by the rules or does not.

use proptest::prelude::*;

use super::{super::mapping::Mapping, *};
use crate::vhost_user::memory::RegionSpec;

const SIZE: u16 = 8;
const GUEST: u64 = 0x1000;
const LEN: usize = 1 << 16;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;

struct Driver {
    memory: Arc<GuestMemory>,
}

impl Driver {
    fn new() -> Self {
        let spec = RegionSpec { guest: GUEST, len: LEN as u64, user: 0, offset: 0 };
        let mapping = Mapping::anonymous(LEN).unwrap();
        Self { memory: Arc::new(GuestMemory::default().with_mapping(spec, mapping).unwrap()) }
    }

    fn ring(&self, features: RingFeatures) -> Ring {
        Ring::new(self.memory.clone(), addresses(), u32::from(SIZE), features, 0).unwrap()
    }

    fn half(&self, at: u64) -> &AtomicU16 {
        // SAFETY: within the mapping, at an even offset.
        unsafe { AtomicU16::from_ptr(self.memory.whole(GUEST + at, 2).unwrap().cast()) }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        for (place, byte) in bytes.iter().enumerate() {
            // SAFETY: within the mapping.
            unsafe { self.memory.whole(GUEST + at + place as u64, 1).unwrap().write_volatile(*byte) };
        }
    }

    fn descriptor(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let parts =
            [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        self.put(table + 16 * u64::from(index), &parts.concat());
    }

    fn offer(&self, at: u16, head: u16) {
        self.half(AVAILABLE + 4 + 2 * u64::from(at % SIZE)).store(head, Ordering::Relaxed);
        self.half(AVAILABLE + 2).store(at.wrapping_add(1), Ordering::Release);
    }
}

fn addresses() -> RingAddresses {
    RingAddresses { descriptors: 0, available: AVAILABLE, used: USED }
}

fn all() -> RingFeatures {
    RingFeatures { event_idx: true, indirect: true }
}

#[test]
fn rings_that_do_not_lie_in_memory_are_refused() {
    let driver = Driver::new();
    let ring = |at, size| Ring::new(driver.memory.clone(), at, size, all(), 0).map(drop);
    for size in [0, 3, 7, 2048, 65536, u32::MAX] {
        assert_eq!(ring(addresses(), size), Err(RingError::Size(size)));
    }
    let end = LEN as u64;
    for (name, at) in [
        ("descriptors_askew", RingAddresses { descriptors: 8, ..addresses() }),
        ("descriptors_outside", RingAddresses { descriptors: end, ..addresses() }),
        ("descriptors_across_the_end", RingAddresses { descriptors: end - 64, ..addresses() }),
        ("available_askew", RingAddresses { available: 1, ..addresses() }),
        ("available_across_the_end", RingAddresses { available: end - 20, ..addresses() }),
        ("used_askew", RingAddresses { used: 2, ..addresses() }),
        ("used_across_the_end", RingAddresses { used: end - 64, ..addresses() }),
        ("used_overflows", RingAddresses { used: u64::MAX - 3, ..addresses() }),
    ] {
        assert!(matches!(ring(at, u32::from(SIZE)), Err(RingError::Address(_))), "{name}");
    }
    assert!(ring(addresses(), 8).is_ok());
}

#[test]
fn chains_are_taken_in_order_and_given_back_around_the_end_of_the_indices() {
    let driver = Driver::new();
    let start = u16::MAX - 2;
    driver.half(AVAILABLE + 2).store(start, Ordering::Relaxed);
    driver.half(USED + 2).store(start, Ordering::Relaxed);
    let mut ring = Ring::new(driver.memory.clone(), addresses(), 8, all(), start).unwrap();
    for round in 0..6 {
        let at = start.wrapping_add(round);
        assert_eq!(ring.next_head(), Ok(None));
        driver.offer(at, round);
        assert_eq!(ring.next_head(), Ok(Some(round)));
        ring.push_used(round, 7);
        assert_eq!(driver.half(USED + 2).load(Ordering::Relaxed), at, "seen before it is published");
        ring.publish();
        assert_eq!(driver.half(USED + 2).load(Ordering::Relaxed), at.wrapping_add(1));
        assert_eq!(driver.half(USED + 4 + 8 * u64::from(at % SIZE)).load(Ordering::Relaxed), round);
    }
}

#[test]
fn driver_is_told_when_it_wishes_and_not_else() {
    let driver = Driver::new();
    let mut ring = driver.ring(all());
    let wish = AVAILABLE + 4 + 2 * u64::from(SIZE);
    let mut give = |count: u16, told_at: u16| {
        driver.half(wish).store(told_at, Ordering::Relaxed);
        (0..count).for_each(|_| _ = ring.push_used(0, 0));
        ring.publish();
        ring.must_tell()
    };
    assert!(give(1, 0));
    assert!(!give(1, 0), "wish is passed");
    assert!(!give(3, 5), "wish is not reached");
    assert!(give(1, 5));
    assert!(give(200, 100), "passed in a batch");
    assert!(!give(0, 206), "nothing is new");
    let mut ring = driver.ring(RingFeatures { event_idx: false, indirect: false });
    ring.push_used(0, 0);
    ring.publish();
    driver.half(AVAILABLE).store(1, Ordering::Relaxed);
    assert!(!ring.must_tell());
    driver.half(AVAILABLE).store(0, Ordering::Relaxed);
    ring.push_used(0, 0);
    ring.publish();
    assert!(ring.must_tell());
}

#[test]
fn asking_to_be_told_sees_what_came_in_between() {
    let driver = Driver::new();
    for event_idx in [true, false] {
        let mut ring = driver.ring(RingFeatures { event_idx, indirect: false });
        driver.half(AVAILABLE + 2).store(0, Ordering::Relaxed);
        ring.ask_for_silence();
        assert_eq!(driver.half(USED).load(Ordering::Relaxed), u16::from(!event_idx));
        assert!(!ring.ask_to_be_told());
        assert_eq!(driver.half(USED).load(Ordering::Relaxed), 0);
        driver.offer(0, 3);
        assert!(ring.ask_to_be_told());
        assert_eq!(ring.next_head(), Ok(Some(3)));
        assert!(!ring.ask_to_be_told());
        if event_idx {
            assert_eq!(driver.half(USED + 4 + 8 * u64::from(SIZE)).load(Ordering::Relaxed), 1);
        }
    }
}

#[test]
fn neighbouring_descriptors_become_one_piece() {
    let driver = Driver::new();
    let ring = driver.ring(all());
    let table = 0x2000;
    driver.descriptor(table, 0, GUEST + 0x4000, 0x100, F_NEXT, 1);
    driver.descriptor(table, 1, GUEST + 0x4100, 0x200, F_NEXT, 2);
    driver.descriptor(table, 2, GUEST + 0x5000, 0x10, F_NEXT | F_WRITE, 3);
    driver.descriptor(table, 3, GUEST + 0x6000, 0, F_NEXT | F_WRITE, 4);
    driver.descriptor(table, 4, GUEST + 0x5010, 0x10, F_WRITE, 0);
    driver.descriptor(0, 5, GUEST + table, 80, F_INDIRECT, 0);
    let mut chain = Chain::default();
    ring.walk(5, &mut chain).unwrap();
    let lens = |pieces: &[Piece]| pieces.iter().map(|piece| (piece.guest, piece.len)).collect::<Vec<_>>();
    assert_eq!(lens(&chain.readable), [(GUEST + 0x4000, 0x300)]);
    assert_eq!(lens(&chain.writable), [(GUEST + 0x5000, 0x20)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever stands in the rings, a walk ends, and what it gives lies in memory.
    #[test]
    fn any_bytes_give_an_error_or_pieces_of_guest_memory(
        tables in proptest::collection::vec(any::<u8>(), 0x1000),
        near in proptest::collection::vec((0u16..12, 0u64..0x1_2000, 0u32..0x3000, 0u16..8, 0u16..12), 0..24),
        event_idx: bool,
        indirect: bool,
        rounds in 1usize..40,
    ) {
        let driver = Driver::new();
        driver.put(0, &tables);
        // Random bytes alone are hardly ever a chain; these nearly are.
        for (index, address, len, flags, next) in near {
            driver.descriptor(0, index % SIZE, address, len, flags, next);
            driver.descriptor(0x1000, index, address, len, flags, next);
        }
        let next = driver.half(AVAILABLE + 2).load(Ordering::Relaxed).wrapping_sub(SIZE);
        let features = RingFeatures { event_idx, indirect };
        let mut ring = Ring::new(driver.memory.clone(), addresses(), u32::from(SIZE), features, next).unwrap();
        let mut chain = Chain::default();
        for _ in 0..rounds {
            let Ok(Some(head)) = ring.next_head() else { break };
            prop_assert!(head < SIZE);
            if ring.walk(head, &mut chain).is_ok() {
                for piece in chain.readable.iter().chain(&chain.writable) {
                    prop_assert!(piece.len > 0);
                    prop_assert_eq!(driver.memory.whole(piece.guest, piece.len as u64), Some(piece.base));
                }
            }
            ring.push_used(head, 1);
            ring.publish();
            ring.must_tell();
            ring.ask_to_be_told();
        }
    }
}
