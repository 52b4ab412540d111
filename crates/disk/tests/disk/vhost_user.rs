//! A disk as a guest has it over vhost-user: every request, in every shape, under every agreement.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use vhost::{
    VhostBackend,
    vhost_user::{VhostUserFrontend, message::VhostUserConfigFlags},
};
use vmseal_model::control::ExportKind;

use crate::{
    rig::{MIB, Plan, Rig, Scratch, Spec, kill, pattern, wait_gone},
    vhost_driver::*,
};

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Disks that are shown by vhost-user.
pub(crate) fn rig(specs: &[Spec]) -> Rig {
    let mut plan = Plan::new(specs);
    plan.disks.iter_mut().for_each(|disk| disk.setup.export = ExportKind::VhostUser);
    plan.start()
}

pub(crate) fn connect(socket: &Path) -> UnixStream {
    UnixStream::connect(socket).unwrap()
}

pub(crate) fn driver(rig: &Rig, queues: usize, wanted: u64) -> Driver {
    Driver::new(connect(&rig.disk().socket), queues, wanted)
}

/// Kills the worker; the next one takes its place.
pub(crate) fn kill_worker(rig: &Rig) {
    let pid = rig.status().worker_pid;
    kill(pid, libc::SIGKILL);
    // Its listening socket is the next one's; what it had accepted itself is lost.
    wait_gone(pid);
}

/// Waits until the log has a line: what a queue says when it stops has no other way to a test.
pub(crate) fn wait_for_line(rig: &Rig, text: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !rig.log().contains(text) {
        assert!(Instant::now() < deadline, "no line {text:?}\n{}", rig.log());
        std::thread::yield_now();
    }
}

/// A directory in memory, where an access is a copy and done at once.
pub(crate) fn directory_in_memory(name: &str) -> Scratch {
    let path = PathBuf::from(format!("/dev/shm/vmseal-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir(&path).unwrap();
    Scratch(path)
}

#[test]
fn requests_of_every_shape_do_what_they_say() {
    for unit in [512, 4096] {
        for wanted in [ALL, !F_EVENT_IDX, !F_INDIRECT, !(F_EVENT_IDX | F_INDIRECT)] {
            let rig = rig(&[Spec { unit, ..Spec::fixed(8 * MIB) }]);
            let mut driver = driver(&rig, 1, wanted);
            let mut model = vec![0; 8 << 20];
            let shapes = [(1, false), (4, false), (1, true), (4, true)]
                .into_iter()
                .flat_map(|(pieces, merged)| [false, true].map(|indirect| Shape { indirect, pieces, merged }))
                .filter(|shape| !shape.indirect || wanted & F_INDIRECT != 0);
            for (round, shape) in shapes.enumerate() {
                let len = [4096, 65536, 20480, 12288][round % 4];
                let (sector, data) = (round as u64 * 256 + 8, pattern(round as u64 + 1, len));
                let (status, _, written) = driver.request(0, OUT, sector, &data, 0, shape);
                assert_eq!((status, written), (OK, 1), "{shape:?} on units of {unit}");
                model[sector as usize * 512..][..len].copy_from_slice(&data);
                let (status, read, written) = driver.request(0, IN, sector, &[], len, shape);
                assert_eq!((status, written as usize), (OK, len + 1), "{shape:?}");
                assert!(read == data, "{shape:?} on units of {unit} reads something else");
            }
            assert_eq!(driver.ranged(WRITE_ZEROES, 16, 16, 0), OK);
            model[16 * 512..32 * 512].fill(0);
            assert_eq!(driver.request(0, FLUSH, 0, &[], 0, Shape::default()).0, OK);
            assert!(rig.disk().stored_plain() == model);
            let status = &rig.status().disks[0];
            assert!(status.read_bytes > 0 && status.written_bytes > 0, "{status:?}");
        }
    }
}

#[test]
fn disks_in_memory_and_on_a_file_system_serve_the_same() {
    let memory = directory_in_memory("same");
    for directory in [None, Some(memory.0.clone())] {
        let rig = rig(&[Spec { directory, ..Spec::fixed(8 * MIB) }]);
        let mut driver = driver(&rig, 1, ALL);
        let data = pattern(3, 200 << 10);
        assert_eq!(driver.write(100, &data), OK);
        let (status, read) = driver.read(100, 200 << 10);
        assert_eq!(status, OK);
        assert!(read == data);
        drop(driver);
        assert!(rig.disk().stored_plain()[51200..][..200 << 10] == data);
    }
}

#[test]
fn guest_learns_its_serial_number_and_what_the_disk_is() {
    let mut plan =
        Plan::new(&[Spec::fixed(8 * MIB), Spec { unit: 4096, discard: false, ..Spec::fixed(MIB) }]);
    plan.disks.iter_mut().for_each(|disk| disk.setup.export = ExportKind::VhostUser);
    plan.disks[0].setup.serial = "WD-1234".into();
    let rig = plan.start();
    let mut first = driver(&rig, 1, ALL);
    let (status, id, written) = first.request(0, GET_ID, 0, &[], 20, Shape::default());
    assert_eq!((status, written), (OK, 21));
    assert_eq!(id, b"WD-1234\0\0\0\0\0\0\0\0\0\0\0\0\0");
    let config = first.config();
    assert_eq!(config[..8], (8 * MIB / 512).to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_ne!(first.features & (1 << 13), 0, "discard");
    drop(first);
    let other = &rig.plan.disks[1];
    let mut second = Driver::new(connect(&other.socket), 1, ALL);
    let (status, id, _) = second.request(0, GET_ID, 0, &[], 20, Shape::default());
    assert_eq!((status, &id[..]), (OK, &other.id.to_string().as_bytes()[..20]));
    assert_eq!(second.config()[20..24], 4096u32.to_le_bytes());
    assert_eq!(second.features & (1 << 13), 0, "no discard");
    assert_eq!(second.ranged(DISCARD, 0, 8, 0), UNSUPPORTED);
}

#[test]
fn requests_that_cannot_be_carried_out_are_answered_with_an_error() {
    let rig = rig(&[Spec { unit: 4096, ..Spec::fixed(MIB) }]);
    let mut driver = driver(&rig, 1, ALL);
    let before = rig.disk().stored();
    let end = MIB / 512;
    for (name, sector, len) in [
        ("past_the_end", end, 4096),
        ("across_the_end", end - 8, 8192),
        ("not_whole_sectors", 0, 100),
        ("not_whole_units", 0, 512),
        ("between_units", 1, 4096),
        ("sector_times_512_overflows", u64::MAX, 4096),
        ("offset_and_length_overflow", u64::MAX / 512, 4096),
    ] {
        assert_eq!(driver.read(sector, len).0, IO_ERROR, "read {name}");
        assert_eq!(driver.write(sector, &vec![1; len]), IO_ERROR, "write {name}");
    }
    for (name, kind, sector, sectors, flags, expected) in [
        ("discard_past_the_end", DISCARD, end, 8, 0, IO_ERROR),
        ("discard_with_unmap", DISCARD, 0, 8, 1, UNSUPPORTED),
        ("discard_longer_than_allowed", DISCARD, 0, u32::MAX, 0, IO_ERROR),
        ("zeroes_past_the_end", WRITE_ZEROES, end, 8, 0, IO_ERROR),
        ("zeroes_longer_than_allowed", WRITE_ZEROES, 0, 1 << 17, 0, IO_ERROR),
        ("zeroes_with_unknown_flag", WRITE_ZEROES, 0, 8, 2, UNSUPPORTED),
        ("zeroes_between_units", WRITE_ZEROES, 1, 8, 0, IO_ERROR),
    ] {
        assert_eq!(driver.ranged(kind, sector, sectors, flags), expected, "{name}");
    }
    assert_eq!(driver.request(0, 99, 0, &[], 0, Shape::default()).0, UNSUPPORTED);
    assert_eq!(driver.request(0, DISCARD, 0, &[0; 15], 0, Shape::default()).0, IO_ERROR);
    assert_eq!(driver.request(0, DISCARD, 0, &[0; 32], 0, Shape::default()).0, IO_ERROR, "two ranges");
    assert!(rig.disk().stored() == before);
    assert_eq!(driver.ranged(WRITE_ZEROES, 0, 8, 1), OK, "unmap is a wish");
    assert_eq!(driver.ranged(DISCARD, 8, 8, 0), OK);
    assert_eq!(driver.write(0, &[7; 4096]), OK);
    assert_eq!(driver.read(0, 4096), (OK, vec![7; 4096]));
}

#[test]
fn read_only_disk_is_read_and_nothing_else() {
    let rig = rig(&[Spec { read_only: true, ..Spec::fixed(MIB) }]);
    let before = rig.disk().stored();
    let mut driver = driver(&rig, 1, ALL);
    assert_ne!(driver.features & (1 << 5), 0, "RO");
    assert_eq!(driver.features & (1 << 13 | 1 << 14), 0, "no discard, no zeros");
    assert_eq!(driver.read(0, 4096), (OK, vec![0; 4096]));
    assert_eq!(driver.write(0, &[1; 4096]), IO_ERROR);
    assert_eq!(driver.ranged(WRITE_ZEROES, 0, 8, 0), UNSUPPORTED);
    assert_eq!(driver.request(0, FLUSH, 0, &[], 0, Shape::default()).0, OK);
    assert!(rig.disk().stored() == before);
}

#[test]
fn many_requests_on_many_queues_are_all_answered_once() {
    for spec in [Spec::fixed(32 * MIB), Spec::growing(32 * MIB)] {
        for wanted in [ALL, !F_EVENT_IDX] {
            let rig = rig(std::slice::from_ref(&spec));
            let mut driver = driver(&rig, 4, wanted);
            // Each slot of each queue has 512 KiB of its own.
            let place = |queue: usize, slot: u16| (queue as u64 * u64::from(SLOTS) + u64::from(slot)) * 1024;
            for round in 0..6u64 {
                for queue in 0..4 {
                    for slot in 0..SLOTS {
                        let data =
                            pattern(round << 16 | (queue as u64) << 8 | u64::from(slot), 4096 << (slot % 6));
                        let shape = Shape { indirect: slot % 2 == 0, pieces: 3, merged: slot % 3 == 0 };
                        let head = driver.lay_out(queue, slot, OUT, place(queue, slot), &data, 0, shape);
                        driver.offer(queue, head);
                    }
                }
                for queue in 0..4 {
                    let mut heads: Vec<u16> = (0..SLOTS)
                        .map(|_| driver.next_used(queue, Duration::from_secs(20)).expect("no answer").0)
                        .collect();
                    heads.sort_unstable();
                    assert!(heads.iter().enumerate().all(|(i, head)| *head == i as u16 * 8), "{heads:?}");
                    for slot in 0..SLOTS {
                        assert_eq!(driver.status(queue, slot, 0, Shape::default()), OK);
                    }
                }
            }
            for queue in 0..4usize {
                for slot in 0..SLOTS {
                    let data = pattern(5 << 16 | (queue as u64) << 8 | u64::from(slot), 4096 << (slot % 6));
                    let (status, read, _) =
                        driver.request(queue, IN, place(queue, slot), &[], data.len(), Shape::default());
                    assert_eq!(status, OK);
                    assert!(read == data, "queue {queue}, slot {slot}");
                }
                assert_eq!(driver.next_used(queue, Duration::from_millis(1)), None, "an answer to nothing");
            }
        }
    }
}

#[test]
fn write_cache_is_switched_and_stays_so_over_a_crash() {
    let mut rig = rig(&[Spec::fixed(MIB)]);
    let mut driver = driver(&rig, 1, ALL);
    assert_eq!(driver.config()[32], 1);
    assert!(driver.set_writeback(false));
    assert_eq!(driver.config()[32], 0);
    assert_eq!(driver.write(0, &[5; 4096]), OK);
    kill_worker(&rig);
    driver.reconnect(connect(&rig.disk().socket));
    assert_eq!(driver.config()[32], 0, "forgotten with the worker that knew");
    assert!(driver.set_writeback(true));
    assert_eq!(driver.config()[32], 1);
    assert!(driver.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[9]).is_err());
    assert!(driver.frontend.set_config(0, VhostUserConfigFlags::WRITABLE, &[0; 8]).is_err());
    assert_eq!(driver.read(0, 4096), (OK, vec![5; 4096]));
    drop(driver);
    assert!(matches!(rig.stop(true), vmseal_model::control::ControlReply::Stopping));
    assert!(rig.wait_for_keeper().success());
}

#[test]
fn queue_that_is_stopped_says_where_it_was_and_goes_on_there() {
    let rig = rig(&[Spec::fixed(8 * MIB)]);
    let mut driver = driver(&rig, 2, ALL);
    for round in 0..300u64 {
        assert_eq!(driver.write(round % 16 * 8, &[round as u8; 4096]), OK);
    }
    // Not told of, so not taken while disabled.
    driver.frontend.set_vring_enable(0, false).unwrap();
    let head = driver.lay_out(0, 1, IN, 0, &[], 4096, Shape::default());
    driver.offer(0, head);
    assert_eq!(driver.next_used(0, Duration::from_millis(50)), None);
    assert_eq!(driver.request(1, IN, 0, &[], 4096, Shape::default()).0, OK, "the other queue runs");
    driver.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(driver.next_used(0, Duration::from_secs(20)).unwrap().0, head);
    // Everything that was offered before a stop is done when it is answered, and no more is.
    for slot in 0..SLOTS {
        let head =
            driver.lay_out(0, slot, OUT, u64::from(slot) * 8, &[slot as u8; 4096], 0, Shape::default());
        driver.offer(0, head);
    }
    let base = driver.frontend.get_vring_base(0).unwrap() as u16;
    let used = driver.memory.word(driver.used_at(0) + 2).load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(base, used, "taken and not given back");
    let late = driver.queues[0].available.wrapping_sub(base);
    driver.start_queue(0);
    driver.queues[0].kick.write(1).unwrap();
    for _ in 0..SLOTS {
        driver.next_used(0, Duration::from_secs(20)).unwrap_or_else(|| panic!("{late} were late"));
    }
    let (_, read) = driver.read(0, usize::from(SLOTS) * 4096);
    assert!(read.chunks(4096).enumerate().all(|(slot, piece)| piece.iter().all(|byte| *byte == slot as u8)));
}

#[test]
fn memory_changes_under_queues_that_run() {
    let rig = rig(&[Spec::fixed(8 * MIB)]);
    let mut driver = driver(&rig, 1, ALL);
    assert_eq!(driver.write(0, &[1; 4096]), OK);
    let extra = memfd(1 << 20);
    let region = vhost::VhostUserMemoryRegionInfo {
        guest_phys_addr: 0x1_0000_0000,
        memory_size: 1 << 20,
        userspace_addr: 0x1_0000_0000,
        mmap_offset: 0,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&extra),
    };
    assert_eq!(driver.frontend.get_max_mem_slots().unwrap(), 256);
    driver.frontend.add_mem_region(&region).unwrap();
    // The data lie in the new region now.
    let head = driver.lay_out(0, 0, IN, 0, &[], 4096, Shape::default());
    driver.descriptor(0, 1, 0x1_0000_0000 + 8192, 4096, NEXT | WRITE, 2);
    driver.offer(0, head);
    assert!(driver.next_used(0, Duration::from_secs(20)).is_some());
    let mut read = [0; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&extra, &mut read, 8192).unwrap();
    assert_eq!(read, [1; 4096]);
    assert!(driver.frontend.add_mem_region(&region).is_err(), "twice");
    driver.frontend.remove_mem_region(&region).unwrap();
    assert!(driver.frontend.remove_mem_region(&region).is_err());
    assert_eq!(driver.read(0, 4096), (OK, vec![1; 4096]));
    driver.frontend.set_mem_table(&[driver.memory.region()]).unwrap();
    assert_eq!(driver.read(0, 4096), (OK, vec![1; 4096]));
    driver.frontend.reset_device().unwrap();
}
