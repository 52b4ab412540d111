//! One io_uring that can do the operations in [`OPCODES`] on the descriptors it was given, and nothing else, whoever
//! writes entries.
//!
//! It watches descriptors, keeps entries that found no place, and outlives its process as long as the kernel needs.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use io_uring::{
    IoUring, cqueue, opcode, squeue,
    types::{Fixed, SubmitArgs, Timespec},
};

use super::Outbox;
use crate::{flush_gate::Bell, sandbox};

/// What the ring may do.
pub const OPCODES: [u8; 8] = [
    opcode::Readv::CODE,
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::WriteFixed::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::PollRemove::CODE,
];

/// Entries of the ring.
pub(super) const ENTRIES: u32 = 128;
/// Most watched descriptors.
const MAX_WATCHED: usize = 6;

/// Places in the ring's table of descriptors.
pub(super) const STORE: Fixed = Fixed(0);
const BELL: Fixed = Fixed(1);
const WITNESS: Fixed = Fixed(2);
const FIRST_WATCHED: u32 = 3;
const TABLE: usize = FIRST_WATCHED as usize + MAX_WATCHED;

/// Marks of user data; without one it is the lane's own.
const POLL: u64 = 1 << 63;
const REMOVAL: u64 = 1 << 62;
const BELL_DATA: u64 = POLL | 0xffff_ffff;

const POLL_EVENTS: u32 = (libc::POLLIN | libc::POLLRDHUP) as u32;

/// A descriptor in every ring's table, so that it is open as long as a request of this process is under way.
///
/// A process that was killed is gone before its requests are: what it had given to the kernel is still written. Nobody
/// may write to the same places before that is over, and whoever has the other end of this socket sees when.
static WORKER_LIVES: OnceLock<OwnedFd> = OnceLock::new();

/// Keeps this descriptor open until the last request of this process is over, even after its end.
pub fn keep_while_requests_last(witness: OwnedFd) {
    // Once a process; a second one would be closed at its end, which is early and not wrong for rings there were before.
    let _ = WORKER_LIVES.set(witness);
}

/// Whether a ring is not to be had: not compiled in, switched off by sysctl or policy, or the limit of pinned memory is
/// reached, in which all processes of a user share.
pub(super) fn is_not_to_be_had(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EACCES | libc::ENOMEM))
}

pub(super) struct Uring {
    ring: IoUring,
    bell_armed: bool,
    /// Entries that found no place in the ring.
    backlog: VecDeque<squeue::Entry>,
    watched: [Option<Watch>; MAX_WATCHED],
    completions: Vec<(u64, i32, bool)>,
    /// Whether the kernel has pinned the memory it was given.
    pinned: bool,
}

struct Watch {
    key: u32,
    /// Told apart from an older watch in the same place.
    generation: u32,
    armed: bool,
}

impl Uring {
    /// A ring on this store, with memory to pin.
    ///
    /// # Errors
    ///
    /// The kernel's: see [`is_not_to_be_had`].
    ///
    /// # Safety
    ///
    /// The memory lives as long as the ring. So do the descriptors.
    pub(super) unsafe fn new(
        store: BorrowedFd<'_>,
        bell: &Arc<Bell>,
        memory: libc::iovec,
    ) -> io::Result<Self> {
        let ring = build()?;
        let mut files = [-1; TABLE];
        files[STORE.0 as usize] = store.as_raw_fd();
        files[BELL.0 as usize] = bell.as_fd().as_raw_fd();
        if let Some(witness) = WORKER_LIVES.get() {
            files[WITNESS.0 as usize] = witness.as_fd().as_raw_fd();
        }
        ring.submitter().register_files(&files)?;
        // SAFETY: passed on.
        let pinned = match unsafe { ring.submitter().register_buffers(&[memory]) } {
            Ok(()) => true,
            // All disk processes of a host share one limit of pinned memory. Without, a write takes a little longer.
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => false,
            Err(error) => return Err(error),
        };
        // SAFETY: the descriptor is open as long as the ring lives.
        sandbox::ring::restrict(unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) }, &OPCODES, 0)?;
        Ok(Self {
            ring,
            bell_armed: false,
            backlog: VecDeque::new(),
            watched: Default::default(),
            completions: Vec::new(),
            pinned,
        })
    }

    /// Whether the kernel has pinned the memory it was given.
    pub(super) fn is_pinned(&self) -> bool {
        self.pinned
    }

    /// What the kernel says to an entry as it is.
    #[cfg(test)]
    pub(super) fn tried(&mut self, entry: squeue::Entry) -> i32 {
        // SAFETY: the caller keeps what the entry points to until this returns.
        unsafe { self.ring.submission().push(&entry).unwrap() };
        self.ring.submit_and_wait(1).unwrap();
        self.ring.completion().next().unwrap().result()
    }

    /// Puts an entry into the ring, to be handed over by [`Uring::enter`]. `data` is below 2^62.
    ///
    /// # Safety
    ///
    /// What the entry points to is kept until its completion was taken.
    pub(super) unsafe fn push(&mut self, entry: squeue::Entry, data: u64) {
        let entry = entry.flags(squeue::Flags::FIXED_FILE).user_data(data);
        // SAFETY: passed on; descriptors are in the ring's table.
        let full = unsafe { !self.backlog.is_empty() || self.ring.submission().push(&entry).is_err() };
        if full {
            self.backlog.push_back(entry);
        }
    }

    pub(super) fn watch(&mut self, fd: BorrowedFd<'_>, key: u32) -> io::Result<()> {
        // A generation of the process is enough: 2^28 watches later the old one's last word is long read.
        static GENERATIONS: AtomicU32 = AtomicU32::new(0);
        let free = self.watched.iter().position(Option::is_none);
        let place = free.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        self.ring.submitter().register_files_update(FIRST_WATCHED + place as u32, &[fd.as_raw_fd()])?;
        let generation = GENERATIONS.fetch_add(1, Ordering::Relaxed) & 0x0fff_ffff;
        self.watched[place] = Some(Watch { key, generation, armed: false });
        Ok(())
    }

    pub(super) fn unwatch(&mut self, key: u32) {
        for place in 0..MAX_WATCHED {
            let Some(watch) = self.watched[place].take_if(|watch| watch.key == key) else { continue };
            if watch.armed {
                let remove = opcode::PollRemove::new(watch_data(place, watch.generation)).build();
                // SAFETY: it points to nothing.
                unsafe { self.push(remove, REMOVAL) };
            }
            let none = self.ring.submitter().register_files_update(FIRST_WATCHED + place as u32, &[-1]);
            debug_assert!(none.is_ok(), "a place of the table cannot be cleared: {none:?}");
        }
    }

    /// Watches what is watched and was heard of since.
    pub(super) fn arm_watches(&mut self) {
        for place in 0..MAX_WATCHED {
            let Some(watch) = self.watched[place].as_mut().filter(|watch| !watch.armed) else { continue };
            watch.armed = true;
            let data = watch_data(place, watch.generation);
            let poll = opcode::PollAdd::new(Fixed(FIRST_WATCHED + place as u32), POLL_EVENTS).multi(true);
            // SAFETY: it points to nothing.
            unsafe { self.push(poll.build(), data) };
        }
    }

    /// Ends a wait when the bell rings.
    pub(super) fn arm_bell(&mut self) {
        if !self.bell_armed {
            self.bell_armed = true;
            let poll = opcode::PollAdd::new(BELL, POLL_EVENTS).multi(true).build();
            // SAFETY: it points to nothing.
            unsafe { self.push(poll, BELL_DATA) };
        }
    }

    /// Hands over what was pushed, and waits for a completion if asked: at most `seconds` if there are some, and then
    /// gives false.
    pub(super) fn enter(&mut self, wait: bool, seconds: Option<u64>) -> io::Result<bool> {
        loop {
            while let Some(entry) = self.backlog.front() {
                // SAFETY: as in `push`.
                if unsafe { self.ring.submission().push(entry).is_err() } {
                    break;
                }
                self.backlog.pop_front();
            }
            let waits = wait && self.backlog.is_empty();
            let entered = match seconds.filter(|_| waits && self.ring.params().is_feature_ext_arg()) {
                Some(seconds) => {
                    let limit = Timespec::new().sec(seconds);
                    self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&limit))
                }
                None => self.ring.submit_and_wait(usize::from(waits)),
            };
            match entered {
                Ok(_) if self.backlog.is_empty() => return Ok(true),
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::ETIME) => return Ok(false),
                    // The kernel is short of something for the moment, or wants completions taken first.
                    Some(libc::EAGAIN | libc::EBUSY) => return Ok(true),
                    _ => return Err(error),
                },
            }
        }
    }

    /// Takes completions: gives those of the lane's own entries, notes what it watches.
    pub(super) fn take(&mut self, outbox: &mut Outbox, mut own: impl FnMut(u64, i32)) {
        let mut completions = std::mem::take(&mut self.completions);
        completions
            .extend(self.ring.completion().map(|c| (c.user_data(), c.result(), cqueue::more(c.flags()))));
        for (data, result, more) in completions.drain(..) {
            if data & REMOVAL != 0 {
                continue;
            }
            if data == BELL_DATA {
                self.bell_armed = more;
            } else if data & POLL != 0 {
                self.heard(data, result, more, outbox);
            } else {
                own(data, result);
            }
        }
        self.completions = completions;
    }

    fn heard(&mut self, data: u64, result: i32, more: bool, outbox: &mut Outbox) {
        let place = (data & 0xff) as usize;
        let watch = self.watched.get_mut(place).and_then(Option::as_mut);
        let Some(watch) = watch.filter(|watch| watch_data(place, watch.generation) == data) else { return };
        watch.armed = more;
        if result != -libc::ECANCELED && !outbox.ready.contains(&watch.key) {
            outbox.ready.push_back(watch.key);
        }
    }
}

impl Drop for Uring {
    /// A ring ends some time after its descriptor is closed. What it was given is let go of now: sockets are to be closed
    /// when their owner closes them.
    fn drop(&mut self) {
        let keys: Vec<u32> = self.watched.iter().flatten().map(|watch| watch.key).collect();
        keys.into_iter().for_each(|key| self.unwatch(key));
        let _ = self.enter(false, None);
        let _ = self.ring.submitter().register_files_update(0, &[-1; TABLE]);
    }
}

fn watch_data(place: usize, generation: u32) -> u64 {
    POLL | u64::from(generation) << 8 | place as u64
}

/// A ring that is not enabled yet. Old kernels do not know the flags that save work; they get one without.
fn build() -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_r_disabled().setup_cqsize(4 * ENTRIES).dontfork();
    let plain = builder.clone();
    builder.setup_single_issuer().setup_defer_taskrun().setup_coop_taskrun().setup_taskrun_flag();
    match builder.build(ENTRIES) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => plain.build(ENTRIES),
        other => other,
    }
}
