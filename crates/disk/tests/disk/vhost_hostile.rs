//! Front ends and guests that mean harm, or are broken. Their queue or connection ends; the worker does not, and the
//! other disk of the VM hears nothing of it.

use std::{
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::atomic::Ordering,
    time::Duration,
};

use vhost::{VhostBackend, vhost_user::VhostUserFrontend};

use crate::{
    rig::{MIB, Rig, Spec},
    vhost_driver::*,
    vhost_user::{connect, rig, wait_for_line},
};

/// Two disks; the second one's guest works while the first one's misbehaves.
struct Pair {
    rig: Rig,
    good: Driver,
    worker: i32,
    rounds: u8,
}

impl Pair {
    fn new() -> Self {
        let rig = rig(&[Spec::fixed(8 * MIB), Spec::fixed(MIB)]);
        let good = Driver::new(connect(&rig.plan.disks[1].socket), 1, ALL);
        let worker = rig.status().worker_pid;
        Self { rig, good, worker, rounds: 0 }
    }

    fn bad(&self) -> Driver {
        Driver::new(connect(&self.rig.disk().socket), 2, ALL)
    }

    /// The second disk does what it did before, in the same process.
    fn check(&mut self, about: &str) {
        self.rounds = self.rounds.wrapping_add(1);
        assert_eq!(self.good.write(0, &[self.rounds; 4096]), 0, "after {about}");
        assert_eq!(self.good.read(0, 4096), (0, vec![self.rounds; 4096]), "after {about}");
        assert_eq!(self.rig.status().worker_pid, self.worker, "after {about}");
    }
}

/// What a bad guest does to its ring, and what is said about it.
type Deed = (&'static str, fn(&mut Driver), &'static str);

const END: u64 = GUEST + (64 << 20);

const DEEDS: [Deed; 18] = [
    ("head_out_of_range", |d| d.offer(0, SIZE), "descriptor 128 is not in its table"),
    (
        "available_index_jumps",
        |d| {
            d.memory.word(0x1000 + 2).store(SIZE + 1, Ordering::SeqCst);
            d.queues[0].kick.write(1).unwrap();
        },
        "the available index jumped by 129",
    ),
    (
        "next_out_of_range",
        |d| {
            d.descriptor(0, 0, GUEST, 16, NEXT, 999);
            d.offer(0, 0);
        },
        "descriptor 999 is not in its table",
    ),
    (
        "loop_of_one",
        |d| {
            d.descriptor(0, 0, GUEST, 16, NEXT, 0);
            d.offer(0, 0);
        },
        "has no end",
    ),
    (
        "loop_of_two",
        |d| {
            d.descriptor(0, 0, GUEST, 16, NEXT, 1);
            d.descriptor(0, 1, GUEST, 16, NEXT, 0);
            d.offer(0, 0);
        },
        "has no end",
    ),
    (
        "loop_of_writable_ones",
        |d| {
            d.descriptor(0, 0, GUEST, 16, NEXT | WRITE, 0);
            d.offer(0, 0);
        },
        "has no end",
    ),
    (
        "address_outside",
        |d| {
            d.descriptor(0, 0, 0x1000, 16, NEXT, 1);
            d.offer(0, 0);
        },
        "outside guest memory",
    ),
    (
        "address_past_the_end",
        |d| {
            d.descriptor(0, 0, END - 8, 16, NEXT, 1);
            d.offer(0, 0);
        },
        "outside guest memory",
    ),
    (
        "address_overflows",
        |d| {
            d.descriptor(0, 0, u64::MAX - 7, 16, NEXT, 1);
            d.offer(0, 0);
        },
        "outside guest memory",
    ),
    (
        "length_of_4_gib",
        |d| {
            d.descriptor(0, 0, GUEST, u32::MAX, WRITE, 0);
            d.offer(0, 0);
        },
        "outside guest memory",
    ),
    (
        "no_header",
        |d| {
            d.descriptor(0, 0, GUEST + 0x4000, 15, NEXT, 1);
            d.descriptor(0, 1, GUEST + 0x4020, 1, WRITE, 0);
            d.offer(0, 0);
        },
        "a request without a header",
    ),
    (
        "no_status",
        |d| {
            d.descriptor(0, 0, GUEST + 0x4000, 16, 0, 0);
            d.offer(0, 0);
        },
        "a request without room for its status",
    ),
    (
        "empty_status",
        |d| {
            d.descriptor(0, 0, GUEST + 0x4000, 16, NEXT, 1);
            d.descriptor(0, 1, GUEST + 0x4020, 0, WRITE, 0);
            d.offer(0, 0);
        },
        "a request without room for its status",
    ),
    (
        "readable_after_writable",
        |d| {
            d.descriptor(0, 0, GUEST + 0x4020, 1, NEXT | WRITE, 1);
            d.descriptor(0, 1, GUEST + 0x4000, 16, 0, 0);
            d.offer(0, 0);
        },
        "a readable descriptor follows a writable one",
    ),
    (
        "indirect_within_indirect",
        |d| {
            d.memory.write(0x8000, &descriptor(GUEST + 0x8000, 16, INDIRECT, 0));
            d.descriptor(0, 0, GUEST + 0x8000, 16, INDIRECT, 0);
            d.offer(0, 0);
        },
        "an indirect table is not as it must be",
    ),
    (
        "indirect_of_odd_length",
        |d| {
            d.descriptor(0, 0, GUEST + 0x8000, 24, INDIRECT, 0);
            d.offer(0, 0);
        },
        "an indirect table is not as it must be",
    ),
    (
        "indirect_and_next",
        |d| {
            d.descriptor(0, 0, GUEST + 0x8000, 16, INDIRECT | NEXT, 1);
            d.offer(0, 0);
        },
        "an indirect table is not as it must be",
    ),
    (
        "indirect_loop",
        |d| {
            d.memory.write(0x8000, &descriptor(GUEST, 16, NEXT, 0));
            d.descriptor(0, 0, GUEST + 0x8000, 16, INDIRECT, 0);
            d.offer(0, 0);
        },
        "has no end",
    ),
];

#[test]
fn guest_that_breaks_the_rules_of_the_ring_stops_its_own_queue() {
    let mut pair = Pair::new();
    for (name, deed, line) in DEEDS {
        let mut bad = pair.bad();
        let lines = pair.rig.log().matches(line).count();
        let error = eventfd();
        bad.frontend.set_vring_err(0, &error).unwrap();
        deed(&mut bad);
        assert!(readable(&error, Duration::from_secs(20)), "{name}: the front end is not told");
        assert_eq!(pair.rig.log().matches(line).count(), lines + 1, "{name}: {}", pair.rig.log());
        // The device's other queue goes on, and so does this one once it is set up anew.
        assert_eq!(bad.request(1, IN, 0, &[], 4096, Shape::default()).0, 0, "{name}");
        bad.frontend.get_vring_base(0).unwrap();
        bad.memory.write(0, &[0; 0x3000]);
        (bad.queues[0].available, bad.queues[0].used) = (0, 0);
        bad.start_queue(0);
        assert_eq!(bad.read(0, 4096).0, 0, "{name}");
        drop(bad);
        pair.check(name);
    }
}

#[test]
fn indirect_tables_that_were_not_agreed_on_stop_the_queue() {
    let mut pair = Pair::new();
    let mut bad = Driver::new(connect(&pair.rig.disk().socket), 1, !F_INDIRECT);
    let head = bad.lay_out(0, 0, IN, 0, &[], 512, Shape { indirect: true, ..Shape::default() });
    bad.offer(0, head);
    wait_for_line(&pair.rig, "an indirect table is not as it must be");
    pair.check("indirect");
}

#[test]
fn memory_that_is_cut_short_stops_the_device_and_not_the_worker() {
    let mut pair = Pair::new();
    for keep in [0, 8 << 10, 1 << 20] {
        let mut bad = pair.bad();
        assert_eq!(bad.write(0, &[1; 4096]), 0);
        let head = bad.lay_out(0, 0, IN, 0, &[], 64 << 10, Shape::default());
        // The test must not touch what it takes away: kick first, cut in the middle of the work or before it.
        let (memory, kick) = (bad.memory.file.try_clone().unwrap(), bad.queues[0].kick.try_clone().unwrap());
        bad.offer(0, head);
        // SAFETY: an open descriptor and a number.
        assert_eq!(unsafe { libc::ftruncate(memory.as_raw_fd(), keep) }, 0);
        for _ in 0..3 {
            kick.write(1).unwrap();
            pair.check("a cut");
        }
        let _ = bad.frontend.get_vring_base(0);
        let _ = bad.frontend.get_vring_base(1);
        drop(bad);
        pair.check("a cut");
    }
    wait_for_line(&pair.rig, "shared memory was taken away");
}

#[test]
fn write_whose_memory_was_taken_away_is_not_said_to_be_done() {
    let mut pair = Pair::new();
    let mut bad = pair.bad();
    assert_eq!(bad.write(0, &[1; 4096]), 0);
    // Data in an area of its own, ring and status in the other.
    let far = memfd(1 << 20);
    let area = vhost::VhostUserMemoryRegionInfo {
        guest_phys_addr: END,
        memory_size: 1 << 20,
        userspace_addr: END,
        mmap_offset: 0,
        mmap_handle: far.as_raw_fd(),
    };
    bad.frontend.set_mem_table(&[bad.memory.region(), area]).unwrap();
    let head = bad.lay_out(0, 0, OUT, 8, &[2; 4096], 0, Shape::default());
    bad.descriptor(0, head + 1, END, 4096, NEXT, head + 2);
    far.set_len(0).unwrap();
    bad.offer(0, head);
    let (used, _) = bad.next_used(0, Duration::from_secs(20)).expect("an answer");
    assert_eq!((used, bad.status(0, 0, 0, Shape::default())), (head, 1));
    wait_for_line(&pair.rig, "shared memory was taken away");
    pair.check("an area that is gone");
}

/// Whether the other end hangs up, whatever it says before.
fn wait_closed(mut stream: &UnixStream) -> bool {
    use std::io::{ErrorKind, Read};
    loop {
        match stream.read(&mut [0; 64]) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == ErrorKind::ConnectionReset,
        }
    }
}

/// A message that ends the connection, or is refused where an answer is asked for.
fn raw(pair: &Pair) -> UnixStream {
    let stream = connect(&pair.rig.disk().socket);
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

#[test]
fn messages_that_are_none_end_the_connection() {
    let mut pair = Pair::new();
    let memory = memfd(1 << 20);
    let words = |words: &[u64]| -> Vec<u8> { words.iter().flat_map(|word| word.to_ne_bytes()).collect() };
    let table = |regions: &[[u64; 4]]| -> Vec<u8> {
        let mut body = words(&[regions.len() as u64]);
        body.extend(regions.iter().flat_map(|region| words(region)));
        body
    };
    let megabyte = 1 << 20;
    let cases: Vec<(&str, u32, u32, Vec<u8>, usize)> = vec![
        ("code_unknown", 999, 1, vec![], 0),
        ("code_of_another_device", 19, 1, words(&[0]), 0),
        ("postcopy_not_offered", 28, 1, vec![], 0),
        ("version_0", 1, 0, vec![], 0),
        ("version_3", 1, 3, vec![], 0),
        ("a_reply", 1, 5, vec![], 0),
        ("reserved_flags", 1, 0x101, vec![], 0),
        ("body_where_none_belongs", 1, 1, vec![0; 8], 0),
        ("body_missing", 2, 1, vec![], 0),
        ("body_too_long", 2, 1, vec![0; 16], 0),
        ("body_cut", 8, 1, vec![0; 7], 0),
        ("descriptors_where_none_belong", 1, 1, vec![], 3),
        ("features_not_offered", 2, 1, words(&[1 << 35]), 0),
        ("protocol_features_not_offered", 16, 1, words(&[1 << 40]), 0),
        ("table_without_descriptors", 5, 1, table(&[[0, megabyte, 0, 0]]), 0),
        ("table_with_too_many_descriptors", 5, 1, table(&[[0, megabyte, 0, 0]]), 2),
        ("table_count_huge", 5, 1, words(&[0xffff_ffff]), 1),
        ("table_overlaps", 5, 1, table(&[[0, megabyte, 0, 0], [4096, 4096, 1 << 30, 0]]), 2),
        ("table_overlaps_user", 5, 1, table(&[[0, megabyte, 0, 0], [1 << 30, 4096, 4096, 0]]), 2),
        ("region_longer_than_its_file", 5, 1, table(&[[0, megabyte + 1, 0, 0]]), 1),
        ("region_offset_past_its_file", 5, 1, table(&[[0, 4096, 0, megabyte]]), 1),
        ("region_empty", 5, 1, table(&[[0, 0, 0, 0]]), 1),
        ("region_overflows", 5, 1, table(&[[u64::MAX - 10, 4096, 0, 0]]), 1),
        ("region_offset_overflows", 5, 1, table(&[[0, 4096, 0, u64::MAX - 10]]), 1),
        ("region_huge", 5, 1, table(&[[0, u64::MAX, 0, 0]]), 1),
        ("queue_number_huge", 8, 1, words(&[16 | 128 << 32]), 0),
        ("queue_base_too_large", 10, 1, words(&[1 << 48]), 0),
        ("get_base_of_no_queue", 11, 1, words(&[255]), 0),
        ("kick_without_descriptor", 12, 1, words(&[0]), 0),
        ("kick_by_polling", 12, 1, words(&[0x100]), 0),
        ("kick_with_two_descriptors", 12, 1, words(&[0]), 2),
        ("kick_is_a_file", 12, 1, words(&[0]), 1),
        ("call_is_a_file", 13, 1, words(&[0]), 1),
        ("call_of_no_queue", 13, 1, words(&[0x1ff]), 0),
        ("enable_with_2", 18, 1, words(&[2 << 32]), 0),
        ("channel_is_a_file", 21, 1, vec![], 1),
        (
            "config_length_lies",
            25,
            1,
            [32u32, 8, 0].iter().flat_map(|w| w.to_ne_bytes()).chain([0; 4]).collect(),
            0,
        ),
        (
            "config_written_at_its_end",
            25,
            1,
            [4000u32, 1, 0].iter().flat_map(|w| w.to_ne_bytes()).chain([0; 1]).collect(),
            0,
        ),
        ("inflight_for_no_queue", 31, 1, words(&[0, 0, 0]), 0),
        ("inflight_for_too_many", 31, 1, words(&[0, 0, 0x0080_ffff]), 0),
        ("inflight_of_odd_size", 31, 1, words(&[0, 0, 0x0081_0001]), 0),
        ("inflight_without_descriptor", 32, 1, words(&[4096, 0, 0x0080_0001]), 0),
        ("inflight_longer_than_its_file", 32, 1, words(&[1 << 40, 0, 0x0080_0001]), 1),
        ("inflight_shorter_than_its_queues", 32, 1, words(&[64, 0, 0x0080_0010]), 1),
        ("inflight_askew", 32, 1, words(&[65536, 4097, 0x0080_0001]), 1),
        ("log_without_descriptor", 6, 1, words(&[4096, 0]), 0),
        ("log_longer_than_its_file", 6, 1, words(&[1 << 30, 0]), 1),
        ("region_to_remove_is_not_there", 38, 1, words(&[0, 0, 4096, 0, 0]), 0),
        ("region_to_add_without_descriptor", 37, 1, words(&[0, 0, 4096, 0, 0]), 0),
    ];
    for (name, code, flags, body, fds) in cases {
        let stream = raw(&pair);
        send_raw(&stream, code, flags, &body, &vec![&memory as &dyn AsRawFd; fds]);
        assert!(wait_closed(&stream), "{name}: the connection goes on");
        drop(stream);
        pair.check(name);
    }
    // A header that promises more than there may be, one that is cut, and one that is followed by silence.
    for bytes in [&[1, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff][..], &[1, 0, 0][..]] {
        let stream = raw(&pair);
        send_bytes(&stream, bytes, &[]);
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(wait_closed(&stream));
    }
    pair.check("headers");
}

#[test]
fn descriptors_that_come_in_floods_are_closed() {
    let mut pair = Pair::new();
    let open = |pid: i32| std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let before = open(pair.worker);
    let file = memfd(4096);
    for count in [64, 65, 250] {
        for _ in 0..20 {
            let stream = raw(&pair);
            send_raw(&stream, 1, 1, &[], &vec![&file as &dyn AsRawFd; count]);
            assert!(wait_closed(&stream), "{count} descriptors");
        }
    }
    pair.check("floods");
    let left = open(pair.worker);
    assert!(left <= before + 2, "{left} descriptors are open, {before} were");
}

#[test]
fn second_connection_to_a_disk_is_turned_away() {
    let mut pair = Pair::new();
    let mut first = pair.bad();
    let second = raw(&pair);
    assert!(wait_closed(&second));
    assert_eq!(first.write(0, &[3; 4096]), 0);
    wait_for_line(&pair.rig, "the disk has a vhost-user connection already");
    pair.check("a second connection");
}

#[test]
fn front_ends_that_vanish_anywhere_leave_nothing_behind() {
    let mut pair = Pair::new();
    for round in 0..20u64 {
        let mut bad = pair.bad();
        for slot in 0..SLOTS {
            let head = bad.lay_out(
                0,
                slot,
                OUT,
                round * 128 + u64::from(slot) * 8,
                &[round as u8; 4096],
                0,
                Shape::default(),
            );
            bad.offer(0, head);
        }
        // Without a word, with requests in flight.
        drop(bad);
    }
    pair.check("vanished front ends");
    assert_eq!(pair.bad().frontend.get_queue_num().unwrap(), 16);
    pair.check("the last one");
}
