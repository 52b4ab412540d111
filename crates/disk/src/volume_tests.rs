//! The volume against a store in memory that can be told to fail.

use std::sync::{Arc, atomic::AtomicBool};

use proptest::prelude::*;
use vmseal_keys::Dek;
use vmseal_xts::Cipher;

use super::*;
use crate::store::Run;

const BASE: u64 = 8192;

#[derive(Default)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    full_at: AtomicU64,
    flush_fails: AtomicBool,
    flushes: AtomicU64,
    punched: Mutex<Vec<(u64, u64)>>,
}

impl Store for Arc<Memory> {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }
    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        let bytes = self.bytes.lock().unwrap();
        let from = bytes.get(at as usize..).unwrap_or_default();
        let got = from.len().min(buf.len());
        buf[..got].copy_from_slice(&from[..got]);
        Ok(got)
    }
    fn write_at(&self, at: u64, buf: &[u8]) -> io::Result<()> {
        let limit = self.full_at.load(Ordering::Relaxed);
        let end = at as usize + buf.len();
        if limit != 0 && end as u64 > limit {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let mut bytes = self.bytes.lock().unwrap();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[at as usize..end].copy_from_slice(buf);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        // As the kernel: reports a failure once.
        if self.flush_fails.swap(false, Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }
    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.punched.lock().unwrap().push((at, len));
        Ok(())
    }
    fn run_at(&self, _at: u64, end: u64) -> Run {
        Run { end, hole: false }
    }
}

pub(crate) struct Fixture {
    memory: Arc<Memory>,
    pub(crate) volume: Volume,
    key: [u8; 64],
}

pub(crate) fn fixture(stored: u64, change: impl FnOnce(&mut Layout)) -> Fixture {
    let memory = Arc::new(Memory::default());
    memory.bytes.lock().unwrap().resize((BASE + stored) as usize, 0);
    let mut layout = Layout {
        unit: 512,
        payload_offset: BASE,
        presented: 1 << 20,
        grows: true,
        read_only: false,
        discard: true,
    };
    change(&mut layout);
    let dek = Dek::generate().unwrap();
    let key = *dek.data_key();
    let cipher = Cipher::new(dek.data_key(), layout.unit as usize).unwrap();
    Fixture { volume: Volume::new(Box::new(memory.clone()), cipher, layout).unwrap(), memory, key }
}

impl Fixture {
    fn stored_plain(&self) -> Vec<u8> {
        let mut bytes = self.memory.bytes.lock().unwrap()[BASE as usize..].to_vec();
        Cipher::new(&self.key, self.volume.layout.unit as usize).unwrap().decrypt(0, &mut bytes).unwrap();
        bytes
    }
}

#[test]
fn what_is_written_lies_encrypted_at_its_place_and_is_read_back() {
    for unit in [512, 4096] {
        let f = fixture(1 << 20, |layout| layout.unit = unit);
        let plain = vec![0xa5; 8192];
        let mut buf = plain.clone();
        f.volume.write(12288, &mut buf).unwrap();
        let mut expected = plain.clone();
        Cipher::new(&f.key, unit as usize).unwrap().encrypt(24, &mut expected).unwrap();
        assert_eq!(f.memory.bytes.lock().unwrap()[(BASE + 12288) as usize..][..8192], expected[..]);
        f.volume.read(12288, &mut buf).unwrap();
        assert_eq!(buf, plain);
    }
}

#[test]
fn reads_past_the_stored_end_give_zeros_and_a_gap_is_filled_with_encrypted_zeros() {
    let f = fixture(0, |_| {});
    let mut buf = vec![1; 4096];
    f.volume.read(0, &mut buf).unwrap();
    assert_eq!(buf, [0; 4096]);
    f.volume.write(65536, &mut [9; 512]).unwrap();
    assert_eq!(f.volume.stored_bytes(), 66048);
    let plain = f.stored_plain();
    assert!(plain[..65536].iter().all(|b| *b == 0) && plain[65536..] == [9; 512]);
    let mut across = vec![7; 1024];
    f.volume.read(65536, &mut across).unwrap();
    assert_eq!(across, [[9; 512], [0; 512]].concat());
}

#[test]
fn half_a_unit_at_the_end_does_not_count_as_stored() {
    let f = fixture(700, |_| {});
    assert_eq!(f.volume.stored_bytes(), 512);
    f.volume.write(1024, &mut [3; 512]).unwrap();
    assert_eq!(f.stored_plain()[512..], [[0; 512], [3; 512]].concat());
}

#[test]
fn full_store_is_no_space_and_keeps_what_was_acknowledged() {
    let f = fixture(0, |_| {});
    f.volume.write(0, &mut [1; 4096]).unwrap();
    f.memory.full_at.store(BASE + 8192, Ordering::Relaxed);
    assert!(matches!(f.volume.write(8192, &mut [2; 4096]), Err(VolumeError::NoSpace(_))));
    let mut buf = vec![0; 12288];
    f.volume.read(0, &mut buf).unwrap();
    assert_eq!(buf, [[1; 4096].as_slice(), &[0; 8192]].concat());
    f.memory.full_at.store(0, Ordering::Relaxed);
    f.volume.write(8192, &mut [2; 4096]).unwrap();
    f.volume.read(0, &mut buf).unwrap();
    assert_eq!(buf, [[1; 4096], [0; 4096], [2; 4096]].concat());
}

#[test]
fn failed_flush_fails_for_ever() {
    let f = fixture(4096, |_| {});
    f.volume.flush().unwrap();
    f.memory.flush_fails.store(true, Ordering::Relaxed);
    assert!(matches!(f.volume.flush(), Err(VolumeError::FlushFailed)));
    assert!(matches!(f.volume.flush(), Err(VolumeError::FlushFailed)));
    assert_eq!(f.memory.flushes.load(Ordering::Relaxed), 2, "the medium is not asked again");
}

#[test]
fn fixed_volume_that_is_too_short_is_refused() {
    let memory = Arc::new(Memory::default());
    memory.bytes.lock().unwrap().resize((BASE + 4096 - 1) as usize, 0);
    let layout = Layout {
        unit: 512,
        payload_offset: BASE,
        presented: 4096,
        grows: false,
        read_only: false,
        discard: false,
    };
    let cipher = Cipher::new(Dek::generate().unwrap().data_key(), 512).unwrap();
    assert!(matches!(Volume::new(Box::new(memory), cipher, layout), Err(VolumeError::Truncated)));
}

#[test]
fn discards_follow_the_policy_and_stop_at_the_stored_end() {
    let f = fixture(8192, |_| {});
    f.volume.discard(4096, 65536).unwrap();
    f.volume.discard(16384, 512).unwrap();
    assert_eq!(*f.memory.punched.lock().unwrap(), [(BASE + 4096, 4096)]);
    let f = fixture(8192, |layout| layout.discard = false);
    f.volume.discard(0, 8192).unwrap();
    assert!(f.memory.punched.lock().unwrap().is_empty());
}

#[test]
fn extents_past_the_stored_end_are_holes() {
    let f = fixture(8192, |_| {});
    let all = [Extent { len: 4096, hole: false }, Extent { len: 4096, hole: true }];
    assert_eq!(f.volume.extents(4096, 8192, 9).unwrap(), all);
    assert_eq!(f.volume.extents(4096, 8192, 1).unwrap(), all[..1]);
}

#[test]
fn unaligned_out_of_range_and_forbidden_requests_change_nothing() {
    let f = fixture(4096, |_| {});
    assert!(matches!(f.volume.read(1, &mut [0; 512]), Err(VolumeError::Unaligned)));
    assert!(matches!(f.volume.write(0, &mut [0; 511]), Err(VolumeError::Unaligned)));
    assert!(matches!(f.volume.read(1 << 20, &mut [0; 512]), Err(VolumeError::OutOfRange)));
    assert!(matches!(f.volume.write_zeroes(u64::MAX - 511, 512), Err(VolumeError::OutOfRange)));
    assert!(matches!(f.volume.discard(512, u64::MAX - 511), Err(VolumeError::OutOfRange)));
    let f = fixture(4096, |layout| layout.read_only = true);
    assert!(matches!(f.volume.write(0, &mut [0; 512]), Err(VolumeError::ReadOnly)));
    assert!(matches!(f.volume.write_zeroes(0, 512), Err(VolumeError::ReadOnly)));
    assert!(matches!(f.volume.discard(0, 512), Err(VolumeError::ReadOnly)));
    assert!(f.memory.bytes.lock().unwrap().iter().all(|b| *b == 0));
}

proptest! {
    /// A growing volume is an array of zeros that remembers what was written to it.
    #[test]
    fn growing_volume_reads_like_a_plain_array(
        steps in proptest::collection::vec((0u64..64, 1u64..16, any::<u8>(), 0u8..3), 1..40)
    ) {
        let f = fixture(0, |layout| layout.presented = 80 * 512);
        let mut model = vec![0u8; 80 * 512];
        for (unit, units, byte, what) in steps {
            let (offset, len) = (unit * 512, units * 512);
            let range = offset as usize..(offset + len) as usize;
            match what {
                0 => {
                    f.volume.write(offset, &mut vec![byte; len as usize]).unwrap();
                    model[range].fill(byte);
                }
                1 => {
                    f.volume.write_zeroes(offset, len).unwrap();
                    model[range].fill(0);
                }
                _ => {
                    let mut buf = vec![byte; len as usize];
                    f.volume.read(offset, &mut buf).unwrap();
                    prop_assert_eq!(&buf, &model[range]);
                }
            }
        }
        let stored = f.stored_plain();
        prop_assert_eq!(&stored[..], &model[..stored.len()]);
        prop_assert!(model[stored.len()..].iter().all(|b| *b == 0));
    }
}

#[test]
fn disk_that_is_shown_larger_holds_zeros_or_stays_as_it_was() {
    let f = fixture(1 << 20, |layout| layout.grows = false);
    f.volume.write((1 << 20) - 512, &mut [7; 512]).unwrap();
    f.memory.full_at.store(BASE + (1 << 20) + (1 << 19), Ordering::Relaxed);
    let told = AtomicBool::new(false);
    let tell = || told.store(true, Ordering::Relaxed);
    assert!(matches!(f.volume.grow_to(2 << 20, tell), Err(VolumeError::NoSpace(_))));
    assert_eq!((f.volume.presented_bytes(), f.volume.stored_bytes()), (1 << 20, 1 << 20));
    assert!(!told.load(Ordering::Relaxed), "the next worker was told of it");
    assert!(matches!(f.volume.write(1 << 20, &mut [1; 512]), Err(VolumeError::OutOfRange)));
    f.memory.full_at.store(0, Ordering::Relaxed);
    let flushes = f.memory.flushes.load(Ordering::Relaxed);
    f.volume.grow_to(2 << 20, tell).unwrap();
    assert!(told.load(Ordering::Relaxed) && f.memory.flushes.load(Ordering::Relaxed) > flushes);
    let plain = f.stored_plain();
    assert!(plain.len() == 2 << 20 && plain[1 << 20..].iter().all(|byte| *byte == 0));
    f.volume.write((2 << 20) - 512, &mut [1; 512]).unwrap();
    for wrong in [1 << 20, (2 << 20) + 100] {
        assert!(matches!(f.volume.grow_to(wrong, || panic!("told")), Err(VolumeError::OutOfRange)));
    }
}

#[test]
fn volume_that_is_another_processes_is_read_as_far_as_that_one_wrote_and_not_written() {
    let f = fixture(4096, |_| {});
    f.volume.set_fenced(true);
    assert!(matches!(f.volume.write(0, &mut [1; 512]), Err(VolumeError::Fenced)));
    assert!(matches!(f.volume.write_zeroes(0, 512), Err(VolumeError::Fenced)));
    assert!(matches!(f.volume.discard(0, 512), Err(VolumeError::Fenced)));
    f.memory.bytes.lock().unwrap().resize(BASE as usize + 8192 + 100, 0);
    assert_eq!(f.volume.stored_bytes(), 4096);
    f.volume.remeasure().unwrap();
    assert_eq!(f.volume.stored_bytes(), 8192);
    f.volume.set_fenced(false);
    f.volume.write(0, &mut [1; 512]).unwrap();
}
