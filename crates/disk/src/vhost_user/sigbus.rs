//! What happens when the front end takes shared memory away: a file that is cut short turns every access to what was
//! behind its end into SIGBUS, which would end this process and with it the other disks of the VM.
//!
//! A handler that knows which addresses are shared puts empty private memory in their place, and marks the area as
//! lost; its device then stops. Faults anywhere else go to whoever handled them before.

use std::{
    mem,
    sync::{
        Mutex, Once, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

/// Most shared areas of this process.
const MAX_AREAS: usize = 4096;

/// One area. `end` is zero while the place is free, `generation` odd while it changes.
struct Area {
    generation: AtomicUsize,
    start: AtomicUsize,
    end: AtomicUsize,
    lost: AtomicBool,
}

static AREAS: [Area; MAX_AREAS] = [const {
    Area {
        generation: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; MAX_AREAS];
/// Places from here on were never used.
static HIGHEST: AtomicUsize = AtomicUsize::new(0);
/// Held while places are taken and given back; the handler does without.
static CHANGING: Mutex<()> = Mutex::new(());
static INSTALL: Once = Once::new();
/// Who handled SIGBUS before. Written once, before our handler can run.
static mut BEFORE: mem::MaybeUninit<libc::sigaction> = mem::MaybeUninit::uninit();

impl Area {
    /// Changes it while CHANGING is held.
    fn change(&self, change: impl FnOnce(&Self)) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        change(self);
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Its bounds, if they belong together: the place may be given to another area meanwhile, but not that of the area that
    /// was touched, for who touches it holds its guard.
    fn bounds(&self) -> Option<(usize, usize)> {
        let before = self.generation.load(Ordering::SeqCst);
        let bounds = (self.start.load(Ordering::SeqCst), self.end.load(Ordering::SeqCst));
        let same = before.is_multiple_of(2) && before == self.generation.load(Ordering::SeqCst);
        same.then_some(bounds)
    }
}

/// Protects one area until it is dropped, which must be before the area is unmapped.
#[derive(Debug)]
pub(crate) struct Guard {
    place: usize,
}

impl Guard {
    /// `None` if there are too many.
    pub(crate) fn over(start: usize, len: usize) -> Option<Self> {
        install();
        let _changing = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
        let place = AREAS.iter().position(|area| area.end.load(Ordering::Relaxed) == 0)?;
        let (area, end) = (AREAS.get(place)?, start.checked_add(len)?);
        area.change(|area| {
            area.lost.store(false, Ordering::SeqCst);
            area.start.store(start, Ordering::SeqCst);
            area.end.store(end, Ordering::SeqCst);
        });
        HIGHEST.fetch_max(place + 1, Ordering::Release);
        Some(Self { place })
    }

    pub(crate) fn is_lost(&self) -> bool {
        AREAS.get(self.place).is_some_and(|area| area.lost.load(Ordering::Relaxed))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _changing = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(area) = AREAS.get(self.place) {
            area.change(|area| area.end.store(0, Ordering::SeqCst));
        }
    }
}

fn install() {
    INSTALL.call_once(|| {
        // SAFETY: the handler below is async-signal-safe: it reads atomics and makes one system call. BEFORE is written
        // here only, before the handler is in place.
        unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = on_bus_error as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut action.sa_mask);
            let before = (&raw mut BEFORE).cast::<libc::sigaction>();
            libc::sigaction(libc::SIGBUS, std::ptr::null(), before);
            libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
        }
    });
}

extern "C" fn on_bus_error(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo; of SIGBUS it holds an address.
    let address = unsafe { (*info).si_addr() } as usize;
    let known = HIGHEST.load(Ordering::Acquire).min(MAX_AREAS);
    for area in &AREAS[..known] {
        let Some((start, end)) = area.bounds() else { continue };
        if (start..end).contains(&address) {
            area.lost.store(true, Ordering::Relaxed);
            // SAFETY: replaces pages of our own mapping. All of it, for huge pages cannot be replaced in parts.
            let put = unsafe {
                libc::mmap(
                    start as *mut libc::c_void,
                    end - start,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    -1,
                    0,
                )
            };
            if put != libc::MAP_FAILED {
                return;
            }
        }
    }
    // SAFETY: puts back what was there; the access is made again and meets it.
    unsafe { libc::sigaction(libc::SIGBUS, (&raw const BEFORE).cast(), std::ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

    use super::super::mapping::Mapping;

    fn memory(len: i64) -> OwnedFd {
        // SAFETY: a C string and numbers; the descriptor is new.
        unsafe {
            let fd = OwnedFd::from_raw_fd(libc::memfd_create(c"cut".as_ptr(), libc::MFD_CLOEXEC));
            assert_eq!(libc::ftruncate(fd.as_raw_fd(), len), 0);
            fd
        }
    }

    #[test]
    fn memory_that_is_cut_short_is_lost_and_nothing_else() {
        let (cut, whole) = (memory(8 * 4096), memory(4096));
        let cut_map = Mapping::of_file(cut.as_fd(), 0, 8 * 4096).unwrap();
        let whole_map = Mapping::of_file(whole.as_fd(), 0, 4096).unwrap();
        // SAFETY: within the mappings; the descriptor is open.
        unsafe {
            cut_map.start().add(5 * 4096).write_volatile(3);
            assert!(!cut_map.is_lost());
            assert_eq!(libc::ftruncate(cut.as_raw_fd(), 4096), 0);
            assert_eq!(cut_map.start().add(5 * 4096).read_volatile(), 0);
            cut_map.start().add(6 * 4096).write_volatile(4);
            assert_eq!(cut_map.start().add(6 * 4096).read_volatile(), 4);
            whole_map.start().write_volatile(1);
        }
        assert!(cut_map.is_lost());
        assert!(!whole_map.is_lost());
    }
}
