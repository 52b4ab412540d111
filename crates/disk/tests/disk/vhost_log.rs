//! What a live migration needs: every page of the guest that is written to is marked, and a stop means that all is done.

use std::{os::fd::AsRawFd, os::unix::fs::FileExt};

use vhost::{VhostBackend, VhostUserDirtyLogRegion};

use crate::{
    rig::{MIB, Spec},
    vhost_driver::*,
    vhost_user::{directory_in_memory, driver, rig, wait_for_line},
};

const PAGE: u64 = 4096;
/// A bit for each page up to the end of the guest's memory.
const LOG_BYTES: u64 = (GUEST + (64 << 20)) / PAGE / 8;

struct Log {
    file: std::fs::File,
}

impl Log {
    fn new() -> Self {
        Self { file: memfd(LOG_BYTES as usize) }
    }

    fn start(&self, driver: &mut Driver) {
        let region = VhostUserDirtyLogRegion {
            mmap_size: LOG_BYTES,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        };
        driver.frontend.set_log_base(0, Some(region)).unwrap();
        driver.frontend.set_features(driver.features | F_LOG_ALL).unwrap();
        driver.set_addresses(0, Some(GUEST + driver.used_at(0) as u64));
    }

    /// Marked pages of the guest's memory, from its start; takes the marks away.
    fn take(&self) -> Vec<usize> {
        let first = GUEST / PAGE / 8;
        let mut bytes = vec![0; (LOG_BYTES - first) as usize];
        self.file.read_exact_at(&mut bytes, first).unwrap();
        let mut before = vec![0; first as usize];
        self.file.read_exact_at(&mut before, 0).unwrap();
        assert!(before.iter().all(|byte| *byte == 0), "pages that are not there are marked");
        self.file.write_all_at(&vec![0; bytes.len()], first).unwrap();
        (0..bytes.len() * 8).filter(|page| bytes[page / 8] & 1 << (page % 8) != 0).collect()
    }
}

#[test]
fn pages_that_are_written_to_are_marked_and_no_others() {
    let memory = directory_in_memory("log");
    for directory in [None, Some(memory.0.clone())] {
        let rig = rig(&[Spec { directory, ..Spec::fixed(8 * MIB) }]);
        let mut driver = driver(&rig, 1, ALL);
        let log = Log::new();
        assert_eq!(driver.write(0, &[1; 8192]), 0);
        log.start(&mut driver);
        log.take();
        let page = |at: usize| at / PAGE as usize;
        let (data, header, used) =
            (page(driver.data_at(0, 0)), page(driver.header_at(0, 0)), page(driver.used_at(0)));
        // A write reads the guest's memory; its status and its place in the ring are written.
        assert_eq!(driver.write(0, &[2; 8192]), 0);
        let ring = [used, header];
        let without_ring = |pages: Vec<usize>| -> Vec<usize> {
            assert!(ring.iter().all(|page| pages.contains(page)), "{pages:?} without {ring:?}");
            pages.into_iter().filter(|page| !ring.contains(page)).collect()
        };
        assert_eq!(without_ring(log.take()), [0usize; 0]);
        let (status, read) = driver.read(0, 8192);
        assert_eq!((status, read), (0, vec![2; 8192]));
        assert_eq!(without_ring(log.take()), [data, data + 1]);
        // Indirect, in pieces, and larger than what the kernel reads at once.
        let shape = Shape { indirect: true, pieces: 5, merged: false };
        assert_eq!(driver.request(0, IN, 0, &[], 200 << 10, shape).0, 0);
        assert_eq!(without_ring(log.take()), (data..data + 50).collect::<Vec<_>>());
        assert_eq!(driver.request(0, GET_ID, 0, &[], 20, Shape::default()).0, 0);
        assert_eq!(without_ring(log.take()), [data]);
        // A read that fails may have written.
        assert_ne!(driver.read(8 * MIB / 512, 4096).0, 0);
        assert!(log.take().contains(&header));

        // The migration was given up: no more marks, and the log is not touched.
        driver.frontend.set_features(driver.features).unwrap();
        driver.set_addresses(0, None);
        log.take();
        assert_eq!(driver.read(0, 8192).0, 0);
        assert_eq!(log.take(), [0usize; 0]);
        // And begun again, with another log.
        let second = Log::new();
        second.start(&mut driver);
        assert_eq!(driver.read(0, 4096).0, 0);
        let marked = second.take();
        assert!(marked.contains(&data) && marked.contains(&used), "{marked:?}");
        assert_eq!(log.take(), [0usize; 0]);
    }
}

#[test]
fn log_that_is_too_short_stops_the_queue_instead_of_losing_a_page() {
    let rig = rig(&[Spec::fixed(8 * MIB)]);
    let mut driver = driver(&rig, 1, ALL);
    let short = memfd(4096);
    let region = VhostUserDirtyLogRegion { mmap_size: 4096, mmap_offset: 0, mmap_handle: short.as_raw_fd() };
    driver.frontend.set_log_base(0, Some(region)).unwrap();
    driver.frontend.set_features(driver.features | F_LOG_ALL).unwrap();
    let head = driver.lay_out(0, 0, IN, 0, &[], 4096, Shape::default());
    driver.offer(0, head);
    wait_for_line(&rig, "the dirty log does not reach all of guest memory");
}
