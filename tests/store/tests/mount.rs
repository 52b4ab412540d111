//! The store as the kernel shows it: what arrives, in which order, and what faults look like to a process. Needs root.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::{fd::AsRawFd, unix::fs::FileExt},
    thread,
};

use vmseal_test_store::{
    entry::Entry,
    fault::{Action, Fault, Kind},
    medium::Medium,
    mount::{Caching, Mounted},
};

fn mounted(len: usize, caching: Caching) -> Mounted {
    Mounted::new(Medium::new(vec![0; len]), caching).expect("the test store needs root and FUSE")
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn writes_flushes_holes_and_lengths_arrive_in_order() {
    for caching in [Caching::Pages, Caching::None] {
        let store = mounted(16384, caching);
        let file = store.open(0).unwrap();
        file.write_all_at(b"hello", 5000).unwrap();
        file.sync_data().unwrap();
        store.medium().mark(7);
        // SAFETY: an open descriptor and integers.
        let punched = unsafe {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            libc::fallocate(file.as_raw_fd(), mode, 4096, 4096)
        };
        assert_eq!(punched, 0);
        file.set_len(20480).unwrap();
        file.sync_all().unwrap();
        let log: Vec<_> = store
            .medium()
            .log()
            .into_iter()
            .map(|entry| match entry {
                Entry::Write { offset, data, .. } => Entry::Write { offset, data, thread: 0 },
                other => other,
            })
            .collect();
        let expected = [
            Entry::Write { offset: 5000, data: b"hello".to_vec(), thread: 0 },
            Entry::Flush,
            Entry::Mark(7),
            Entry::Punch { offset: 4096, len: 4096 },
            Entry::SetLen { len: 20480 },
            Entry::Flush,
        ];
        assert_eq!(log, expected, "{caching:?}");
        assert_eq!((&file).seek(SeekFrom::End(0)).unwrap(), 20480);
        let mut again = File::open(store.path()).unwrap();
        let mut all = Vec::new();
        again.read_to_end(&mut all).unwrap();
        assert_eq!(all, vec![0; 20480]);
    }
}

/// Memory as O_DIRECT wants it.
#[repr(align(4096))]
struct Page([u8; 4096]);

#[test]
fn direct_io_works_and_each_write_arrives_whole() {
    for caching in [Caching::Pages, Caching::None] {
        let store = mounted(1 << 20, caching);
        let file = store.open(libc::O_DIRECT).unwrap();
        file.write_all_at(&Page([3; 4096]).0, 8192).unwrap();
        let mut page = Page([0; 4096]);
        file.read_exact_at(&mut page.0, 8192).unwrap();
        assert!(page.0 == [3; 4096]);
        assert!(
            matches!(&store.medium().log()[..], [Entry::Write { offset: 8192, data, .. }] if data.len() == 4096)
        );
    }
}

#[test]
fn faults_are_seen_where_and_as_often_as_they_were_told_to() {
    let store = mounted(65536, Caching::None);
    let (file, medium) = (store.open(0).unwrap(), store.medium());
    medium.inject(Fault::on(Kind::Write, Action::Fail(libc::EIO)).within(4096..8192).after(1).times(1));
    file.write_all_at(&[1; 512], 4096).unwrap();
    file.write_all_at(&[2; 512], 0).unwrap();
    assert_eq!(errno(file.write_at(&[3; 512], 7680)), libc::EIO);
    file.write_all_at(&[4; 512], 7680).unwrap();
    medium.inject(Fault::on(Kind::Read, Action::Fail(libc::EIO)).within(0..1).times(1));
    assert_eq!(errno(file.read_at(&mut [0; 8], 0)), libc::EIO);
    assert_eq!(medium.failures(), 2);

    // A failed flush is said once, and the next one is a good one: nothing made it durable.
    medium.inject(Fault::on(Kind::Flush, Action::Fail(libc::EIO)).times(1));
    assert_eq!(errno(file.sync_data()), libc::EIO);
    file.sync_data().unwrap();
    let log = medium.log();
    assert!(log.ends_with(&[Entry::FlushFailed, Entry::Flush]), "{log:?}");
    medium.inject(Fault::on(Kind::Flush, Action::Lie));
    file.sync_data().unwrap();
    assert_eq!(medium.log().last(), Some(&Entry::FlushLied));
}

#[test]
fn full_store_takes_what_fits_and_more_when_there_is_room_again() {
    let store = mounted(4096, Caching::None);
    let (file, medium) = (store.open(0).unwrap(), store.medium());
    medium.set_capacity(Some(8192));
    assert_eq!(file.write_at(&[1; 4096], 6144).unwrap(), 2048);
    assert_eq!(errno(file.write_at(&[1; 512], 8192)), libc::ENOSPC);
    file.write_all_at(&[2; 512], 0).unwrap();
    medium.set_capacity(None);
    file.write_all_at(&[1; 512], 8192).unwrap();
    assert_eq!(medium.len().unwrap(), 8704);
}

#[test]
fn held_operations_wait_for_their_release_and_may_be_turned_round() {
    let store = mounted(4096, Caching::None);
    let medium = store.medium().clone();
    medium.inject(Fault::on(Kind::Write, Action::Hold).within(0..512).times(2));
    thread::scope(|scope| {
        for byte in 1..=2u8 {
            let file = store.open(0).unwrap();
            scope.spawn(move || file.write_all_at(&[byte; 512], 0).unwrap());
            medium.wait_held(usize::from(byte));
        }
        assert_eq!(medium.bytes(0..1), [0]);
        // Another range is not held up.
        store.open(0).unwrap().write_all_at(&[3; 512], 1024).unwrap();
        assert_eq!(medium.release_backwards(), 2);
    });
    assert_eq!(medium.bytes(0..1), [1], "the older came last");
    medium.inject(Fault::on(Kind::Write, Action::HoldAnswer).times(1));
    thread::scope(|scope| {
        let file = store.open(0).unwrap();
        let writer = scope.spawn(move || file.write_all_at(&[9; 512], 0).unwrap());
        medium.wait_held(1);
        assert_eq!(medium.bytes(0..1), [9], "done and not answered");
        assert!(!writer.is_finished());
        medium.release();
    });
}

#[test]
fn nothing_is_left_of_the_mount_when_its_last_descriptor_is_gone() {
    let mounts = || std::fs::read_to_string("/proc/self/mountinfo").unwrap().matches(" - fuse ").count();
    let before = mounts();
    let store = mounted(4096, Caching::None);
    let file = store.open(0).unwrap();
    assert_eq!(mounts(), before, "it is mounted nowhere");
    drop(store);
    file.write_all_at(&[1; 512], 0).unwrap();
    drop(file);
}
