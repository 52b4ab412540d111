//! A page of memory that outlives a worker: which disks had a flush that failed, what the sandbox stopped, what the worker
//! may do with its volumes, and how large they are shown.
//!
//! The keeper makes it and hands it to each worker as the last descriptor; it never looks inside. A failed flush is
//! told by the kernel once: a worker that starts afresh would hear "durable" about pages that were lost, so it begins
//! with what the last one wrote here. Only a new start of the VM, which opens the volume anew, begins without.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
    },
};

use vmseal_model::control::Phase;

/// Bytes of the page.
const BYTES: usize = 4096;
/// Disks it has a byte for, from its start on.
const DISKS: usize = 256;
/// Where the words for the sandbox's report lie.
const REPORT: usize = 1024;
/// Where the phase lies, and how long it may stay drained.
const PHASE: usize = 1032;
/// Where each disk's size lies, if it was changed.
const PRESENTED: usize = 2048;
const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// Their numbers on the page are one more than their places here: zero is none.
const PHASES: [Phase; 6] = [
    Phase::Serving,
    Phase::Waiting,
    Phase::Activating,
    Phase::Drained,
    Phase::HandingOver,
    Phase::HandedOver,
];

/// The memory, mapped; shared with every worker of the same keeper.
#[derive(Debug)]
pub struct SharedPage {
    base: NonNull<u8>,
}

// SAFETY: the memory is reached by atomic operations only.
unsafe impl Send for SharedPage {}
// SAFETY: as above.
unsafe impl Sync for SharedPage {}

impl SharedPage {
    /// A descriptor of a new page, all zeros. Its size never changes, and it closes on exec.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn create() -> io::Result<OwnedFd> {
        // SAFETY: the name is NUL-terminated; on success the descriptor is new and ours alone.
        let file = unsafe {
            let fd =
                libc::memfd_create(c"vmseal-latch".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            File::from_raw_fd(fd)
        };
        file.set_len(BYTES as u64)?;
        // SAFETY: flags of a descriptor that is open.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SEALS) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(file.into())
    }

    /// The page behind a descriptor of [`SharedPage::create`].
    ///
    /// # Errors
    ///
    /// The kernel's; `InvalidInput` if it is another thing, or one that could be made shorter.
    pub fn map(fd: BorrowedFd<'_>) -> io::Result<Arc<Self>> {
        // SAFETY: F_GET_SEALS takes no argument.
        let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
        let bytes = File::from(fd.try_clone_to_owned()?).metadata()?.len();
        if seals < 0 || seals & SEALS != SEALS || bytes != BYTES as u64 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: a new mapping of a file that has this size and keeps it.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(base.cast()) {
            Some(base) if base.as_ptr() != libc::MAP_FAILED.cast() => Ok(Arc::new(Self { base })),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn flush_failed(&self, disk: usize) -> &AtomicU8 {
        assert!(disk < DISKS, "a setup has fewer disks");
        // SAFETY: within the page, which is mapped as long as `self` lives; everybody uses atomics.
        unsafe { AtomicU8::from_ptr(self.base.as_ptr().add(disk)) }
    }

    fn word(&self, index: usize) -> &AtomicU32 {
        // SAFETY: within the page and aligned; as above.
        unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(REPORT).cast::<u32>().add(index & 1)) }
    }

    fn phase_word(&self, index: usize) -> &AtomicU32 {
        // SAFETY: within the page and aligned; as above.
        unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(PHASE).cast::<u32>().add(index & 1)) }
    }

    /// What the worker before, or this one, may do with the volumes; none if that was never changed. What a later program
    /// wrote and this one does not know writes nothing and lets nothing go.
    pub fn phase(&self) -> Option<Phase> {
        let place = (self.phase_word(0).load(Ordering::Acquire) as usize).checked_sub(1)?;
        Some(PHASES.get(place).copied().unwrap_or(Phase::HandingOver))
    }

    /// Says it to the next worker too.
    pub fn set_phase(&self, phase: Phase) {
        let place = PHASES.iter().position(|other| *other == phase).unwrap_or_default();
        self.phase_word(0).store(place as u32 + 1, Ordering::Release);
    }

    /// How long it may stay drained, in milliseconds.
    pub fn drained_ms(&self) -> u32 {
        self.phase_word(1).load(Ordering::Acquire)
    }

    /// The same, to be set.
    pub fn set_drained_ms(&self, limit: u32) {
        self.phase_word(1).store(limit, Ordering::Release);
    }

    /// How many bytes are shown of the disk at this place of the setup, if it was changed since the start.
    ///
    /// # Panics
    ///
    /// If no setup has so many disks.
    pub fn presented(&self, disk: usize) -> Option<u64> {
        Some(self.presented_word(disk).load(Ordering::Acquire)).filter(|bytes| *bytes != 0)
    }

    /// Changes it, for the next worker.
    ///
    /// # Panics
    ///
    /// If no setup has so many disks.
    pub fn set_presented(&self, disk: usize, bytes: u64) {
        self.presented_word(disk).store(bytes, Ordering::Release);
    }

    fn presented_word(&self, disk: usize) -> &AtomicU64 {
        assert!(disk < DISKS, "a setup has fewer disks");
        // SAFETY: 256 words end with the page, and it begins aligned; as above.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(PRESENTED).cast::<u64>().add(disk)) }
    }

    /// Notes that the sandbox stopped a system call. Async-signal-safe.
    pub fn note_stopped(&self, system_call: u32) {
        self.word(1).store(system_call, Ordering::Relaxed);
        self.word(0).fetch_add(1, Ordering::Release);
    }

    /// How many system calls the sandbox stopped, and which was the last.
    pub fn stopped(&self) -> (u32, Option<u32>) {
        let count = self.word(0).load(Ordering::Acquire);
        (count, (count > 0).then(|| self.word(1).load(Ordering::Relaxed)))
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and nobody has a reference into it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), BYTES) };
    }
}

/// Whether a flush of one disk failed, now or in an earlier worker. Once set it stays.
#[derive(Debug)]
pub struct FlushLatch(Place);

#[derive(Debug)]
enum Place {
    Own(AtomicU8),
    Shared { page: Arc<SharedPage>, disk: usize },
}

impl FlushLatch {
    /// The latch of the disk at this place of the setup.
    ///
    /// # Panics
    ///
    /// If no setup has so many disks.
    pub fn shared(page: Arc<SharedPage>, disk: usize) -> Self {
        assert!(disk < DISKS, "a setup has fewer disks");
        Self(Place::Shared { page, disk })
    }

    /// One that is forgotten with this process: for a job, which ends at its first failed flush.
    pub fn own() -> Self {
        Self(Place::Own(AtomicU8::new(0)))
    }

    /// Whether a flush failed.
    pub fn is_set(&self) -> bool {
        self.byte().load(Ordering::Acquire) != 0
    }

    /// Says that a flush failed.
    pub fn set(&self) {
        self.byte().store(1, Ordering::Release);
    }

    fn byte(&self) -> &AtomicU8 {
        match &self.0 {
            Place::Own(byte) => byte,
            Place::Shared { page, disk } => page.flush_failed(*disk),
        }
    }
}

impl Default for FlushLatch {
    fn default() -> Self {
        Self::own()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_one_worker_wrote_the_next_one_reads_disk_by_disk() {
        let fd = SharedPage::create().unwrap();
        let first = SharedPage::map(fd.as_fd()).unwrap();
        let latches: Vec<_> = (0..3).map(|disk| FlushLatch::shared(first.clone(), disk)).collect();
        assert!(latches.iter().all(|latch| !latch.is_set()));
        assert_eq!(first.stopped(), (0, None));
        latches[1].set();
        assert_eq!((first.phase(), first.presented(255)), (None, None));
        first.set_phase(Phase::HandedOver);
        first.set_drained_ms(7);
        first.set_presented(255, 512);
        first.note_stopped(41);
        first.note_stopped(257);
        drop((first, latches));
        let second = SharedPage::map(fd.as_fd()).unwrap();
        let set: Vec<_> = (0..3).map(|disk| FlushLatch::shared(second.clone(), disk).is_set()).collect();
        assert_eq!(set, [false, true, false]);
        assert_eq!(second.stopped(), (2, Some(257)));
        assert_eq!((second.phase(), second.drained_ms()), (Some(Phase::HandedOver), 7));
        assert_eq!([0, 254, 255].map(|disk| second.presented(disk)), [None, None, Some(512)]);
    }

    #[test]
    fn own_latch_starts_clear_and_stays_set() {
        let latch = FlushLatch::own();
        assert!(!latch.is_set());
        latch.set();
        assert!(latch.is_set());
    }

    #[test]
    fn what_could_become_shorter_is_not_mapped() {
        let null = File::open("/dev/null").unwrap();
        assert!(SharedPage::map(null.as_fd()).is_err());
        // SAFETY: a NUL-terminated name; the descriptor is new.
        let unsealed =
            unsafe { File::from_raw_fd(libc::memfd_create(c"vmseal-latch".as_ptr(), libc::MFD_CLOEXEC)) };
        unsealed.set_len(BYTES as u64).unwrap();
        assert!(SharedPage::map(unsealed.as_fd()).is_err());
        let sealed = File::from(SharedPage::create().unwrap());
        assert!(sealed.set_len(0).is_err() && sealed.set_len(8192).is_err());
    }
}
