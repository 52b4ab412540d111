//! Both engines against a plain array of bytes, with memory in every shape a guest can offer.

use std::{
    fs::{File, OpenOptions},
    os::fd::AsFd,
};

use proptest::{collection::vec, prelude::*};
use vmseal_keys::Dek;
use vmseal_xts::Cipher;

use super::*;
use crate::{
    flush_gate::Bell,
    store::{FileStore, Run, Store},
    volume::Layout,
};

const BASE: u64 = 8192;
const SIZE: u64 = 1 << 20;

/// A file store that says it lies in memory.
struct InMemory(FileStore);

impl Store for InMemory {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read_at(at, buf)
    }
    fn write_at(&self, at: u64, buf: &[u8]) -> io::Result<()> {
        self.0.write_at(at, buf)
    }
    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }
    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.0.punch(at, len)
    }
    fn run_at(&self, at: u64, end: u64) -> Run {
        self.0.run_at(at, end)
    }
}

fn scratch() -> File {
    static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("vmseal-lane-{}-{number}", std::process::id()));
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

fn lane(kind: EngineKind, change: impl FnOnce(&mut Layout)) -> Lane {
    let mut layout = Layout {
        unit: 512,
        payload_offset: BASE,
        presented: SIZE,
        grows: true,
        read_only: false,
        discard: false,
    };
    change(&mut layout);
    let mut store = FileStore::new(scratch(), false).unwrap();
    if !layout.grows {
        store.extend_to(BASE + layout.presented).unwrap();
    }
    store.go_direct(layout.unit);
    let store: Box<dyn Store> =
        if kind == EngineKind::Ring { Box::new(store) } else { Box::new(InMemory(store)) };
    let cipher = Cipher::new(Dek::generate().unwrap().data_key(), layout.unit as usize).unwrap();
    let lane = Lane::new(Arc::new(Volume::new(store, cipher, layout).unwrap())).unwrap();
    assert_eq!(lane.engine(), kind, "a scratch folder on tmpfs, or no io_uring: this test needs a disk");
    lane
}

/// Cuts a buffer into segments of the given lengths, the last one as long as what is left.
fn cut(buf: &mut [u8], lengths: &[usize]) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut at = 0;
    for length in lengths.iter().copied().chain([usize::MAX]) {
        let len = length.min(buf.len() - at);
        segments.push(Segment { base: buf[at..].as_mut_ptr(), len });
        at += len;
    }
    segments
}

fn outcomes(lane: &mut Lane, count: usize) -> Vec<Done> {
    let mut done = Vec::new();
    while done.len() < count {
        lane.wait().unwrap();
        done.extend(std::iter::from_fn(|| lane.next_done()));
    }
    done.sort_by_key(|done| done.token);
    done
}

fn one(lane: &mut Lane, operation: Operation, offset: u64, length: u64, segments: Vec<Segment>) -> Done {
    // SAFETY: the outcome is waited for, and the callers' buffers live on.
    unsafe { lane.submit(Request { token: 7, operation, offset, length, segments }) };
    if let Some(done) = lane.next_done() {
        return done;
    }
    outcomes(lane, 1).remove(0)
}

const KINDS: [EngineKind; 2] = [EngineKind::Ring, EngineKind::Blocking];

#[derive(Debug, Clone)]
struct Step {
    operation: u8,
    at: u64,
    units: u64,
    cuts: Vec<usize>,
    skew: usize,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (
        0u8..8,
        0u64..SIZE / 512,
        prop_oneof![3 => 1u64..9, 1 => 1u64..1500],
        vec(0usize..3000, 0..6),
        0usize..600,
    )
        .prop_map(|(operation, at, units, cuts, skew)| Step {
            operation,
            at: at * 512,
            units: units.min(SIZE / 512 - at),
            cuts,
            skew,
        });
    vec(step, 1..20)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn lane_does_what_an_array_of_bytes_does(steps in steps(), grows: bool, ring: bool, four: bool) {
        let kind = if ring { EngineKind::Ring } else { EngineKind::Blocking };
        let unit: u64 = if four { 4096 } else { 512 };
        let mut lane = lane(kind, |layout| { layout.grows = grows; layout.unit = unit; });
        let mut model = vec![0u8; SIZE as usize];
        if !grows {
            // What was never written reads as noise; zeros make it known.
            one(&mut lane, Operation::WriteZeroes { fua: false }, 0, SIZE, vec![]).result.unwrap();
        }
        let mut stamp = 0u8;
        for step in steps {
            let (at, length) = (step.at / unit * unit, (step.units * 512).next_multiple_of(unit));
            let length = length.min(SIZE - at);
            let range = at as usize..(at + length) as usize;
            let mut buf = vec![0u8; length as usize + step.skew];
            let memory = &mut buf[step.skew..];
            let fua = step.operation % 2 == 0;
            match step.operation {
                0..3 => {
                    stamp = stamp.wrapping_add(1);
                    memory.iter_mut().enumerate().for_each(|(i, byte)| *byte = stamp ^ (i / 100) as u8);
                    model[range].copy_from_slice(memory);
                    let before = memory.to_vec();
                    let segments = cut(memory, &step.cuts);
                    let done = one(&mut lane, Operation::Write { fua }, at, length, segments);
                    prop_assert!(done.result.is_ok(), "{:?}", done.result);
                    prop_assert!(*memory == before[..], "a write changed the client's memory");
                }
                3 => {
                    model[range].fill(0);
                    let done = one(&mut lane, Operation::WriteZeroes { fua }, at, length, vec![]);
                    prop_assert!(done.result.is_ok(), "{:?}", done.result);
                }
                4 => prop_assert!(one(&mut lane, Operation::Flush, 0, 0, vec![]).result.is_ok()),
                _ => {
                    let segments = cut(memory, &step.cuts);
                    let done = one(&mut lane, Operation::Read, at, length, segments);
                    prop_assert!(done.result.is_ok(), "{:?}", done.result);
                    prop_assert!(*memory == model[range], "read at {at}, {length} bytes");
                }
            }
        }
    }
}

#[test]
fn many_requests_under_way_all_end_and_end_right() {
    for kind in KINDS {
        let mut lane = lane(kind, |layout| layout.grows = false);
        let mut buffers: Vec<Vec<u8>> = (0..300).map(|i| vec![i as u8; 2048]).collect();
        for (index, buffer) in buffers.iter_mut().enumerate() {
            let (offset, segments) = (index as u64 * 2048, cut(buffer, &[512]));
            let operation = Operation::Write { fua: index % 50 == 0 };
            // SAFETY: the buffers live until everything is done.
            unsafe {
                lane.submit(Request { token: index as u64, operation, offset, length: 2048, segments });
            }
        }
        let done = outcomes(&mut lane, 300);
        assert!(done.iter().enumerate().all(|(at, d)| d.token == at as u64 && d.result.is_ok()));
        assert_eq!(lane.in_flight(), 0);
        let mut all = vec![0; 300 * 2048];
        let length = all.len() as u64;
        let segments = cut(&mut all, &[]);
        one(&mut lane, Operation::Read, 0, length, segments).result.unwrap();
        assert!(all.chunks(2048).enumerate().all(|(i, piece)| piece.iter().all(|byte| *byte == i as u8)));
    }
}

#[test]
fn requests_outside_the_rules_are_answered_and_touch_nothing() {
    for kind in KINDS {
        let mut lane = lane(kind, |layout| layout.read_only = true);
        let mut buf = [9u8; 1024];
        let mut ask = |operation, offset, length, memory: usize| {
            let segments = cut(&mut buf[..memory], &[]);
            one(&mut lane, operation, offset, length, segments).result
        };
        let read = Operation::Read;
        assert!(matches!(ask(read, 100, 512, 512), Err(VolumeError::Unaligned)));
        assert!(matches!(ask(read, 0, 1024, 512), Err(VolumeError::Unaligned)));
        assert!(matches!(ask(read, SIZE, 512, 512), Err(VolumeError::OutOfRange)));
        assert!(matches!(ask(read, u64::MAX - 511, 512, 512), Err(VolumeError::OutOfRange)));
        for operation in [Operation::Write { fua: false }, Operation::WriteZeroes { fua: true }] {
            let memory = if matches!(operation, Operation::Write { .. }) { 512 } else { 0 };
            assert!(matches!(ask(operation, 0, 512, memory), Err(VolumeError::ReadOnly)));
        }
        assert!(matches!(ask(Operation::Discard, 0, 512, 0), Err(VolumeError::ReadOnly)));
        assert!(ask(Operation::Flush, 0, 0, 0).is_ok());
        assert_eq!(buf, [9; 1024]);
    }
}

#[test]
fn watched_descriptor_is_ready_each_time_it_rings_and_never_once_unwatched() {
    for kind in KINDS {
        let mut lane = lane(kind, |_| {});
        let bell = Bell::new().unwrap();
        lane.watch(bell.as_fd(), 5).unwrap();
        lane.poll().unwrap();
        assert_eq!(lane.next_ready(), None);
        // The counter is never read: each ring is news.
        for _ in 0..3 {
            bell.ring();
            lane.wait().unwrap();
            assert_eq!(lane.next_ready(), Some(5));
            assert_eq!(lane.next_ready(), None);
        }
        lane.unwatch(5);
        bell.ring();
        lane.poll().unwrap();
        assert_eq!(lane.next_ready(), None);
        // The place is free again, and what is readable already is ready once.
        for key in 0..20 {
            lane.watch(bell.as_fd(), key).unwrap();
            lane.wait().unwrap();
            assert_eq!(lane.next_ready(), Some(key));
            lane.unwatch(key);
        }
    }
}

#[test]
fn flush_waits_for_another_lane_and_then_is_done() {
    let mut lane = lane(EngineKind::Ring, |_| {});
    let other = Arc::new(Bell::new().unwrap());
    let Engine::Ring(ring) = &lane.engine else { unreachable!("asked for") };
    let volume = ring.volume().clone();
    assert_eq!(volume.flushes.begin(&other), crate::flush_gate::Begun::Now);
    // SAFETY: a flush has no memory.
    unsafe {
        lane.submit(Request {
            token: 1,
            operation: Operation::Flush,
            offset: 0,
            length: 0,
            segments: vec![],
        });
    }
    lane.poll().unwrap();
    assert!(lane.next_done().is_none());
    assert!(volume.flushes.end(Ok(())));
    let done = outcomes(&mut lane, 1);
    assert!(done[0].result.is_ok());
    // And once one failed, none is good.
    assert_eq!(volume.flushes.begin(&other), crate::flush_gate::Begun::Now);
    volume.flushes.end(Err(io::Error::from_raw_os_error(libc::EIO)));
    let done = one(&mut lane, Operation::Flush, 0, 0, vec![]);
    assert!(matches!(done.result, Err(VolumeError::FlushFailed)));
}

#[test]
fn ring_opens_nothing_and_takes_no_descriptor_of_its_own_accord() {
    let mut lane = lane(EngineKind::Ring, |_| {});
    let Engine::Ring(ring) = &mut lane.engine else { unreachable!("asked for") };
    use io_uring::{opcode, types};
    let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/etc/passwd".as_ptr()).build();
    let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build();
    let mut byte = [0u8; 1];
    let free = opcode::Read::new(types::Fd(0), byte.as_mut_ptr(), 1).build();
    for entry in [open, socket, free] {
        assert_eq!(ring.uring().tried(entry), -libc::EACCES);
    }
}
