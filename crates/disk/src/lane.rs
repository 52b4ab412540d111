//! One queue's way to its volume: requests in, outcomes out, in any order. One thread, no locks on the way.
//!
//! A front (NBD, vhost-user-blk) takes requests from its client, submits them here and answers what is done.
//! Encryption is the copy between the client's memory and what the store is given; a read is decrypted where it lies.
//! Nothing is held back: a write that is done is in the kernel, and a flush that is done is on the medium.
//!
//! Three engines. [`ring`] keeps many requests under way on an io_uring that may do nothing but this (see
//! [`uring::OPCODES`]). [`remote`] does so at the helper of a network store; [`requests`] is what the two have in common.
//! [`blocking`] does each at once: for stores in memory, where there is nothing to wait for, and for hosts that switched
//! io_uring off.

mod blocking;
mod bounce;
mod pieces;
mod remote;
mod requests;
mod ring;
#[cfg(test)]
mod tests;
pub mod uring;

use std::{
    collections::VecDeque,
    fmt, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use self::{blocking::Blocking, remote::Remote, ring::Ring};
use crate::{
    descriptors,
    gate::{Pass, Way},
    log,
    volume::{Volume, VolumeError},
};

/// A piece of the client's memory.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    /// Its first byte.
    pub base: *mut u8,
    /// Its bytes.
    pub len: usize,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Volume to memory.
    Read,
    /// Memory to volume.
    Write {
        /// Done only when durable.
        fua: bool,
    },
    /// Encrypted zeros to volume.
    WriteZeroes {
        /// Done only when durable.
        fua: bool,
    },
    /// Gives space back, where the disk's policy says so.
    Discard,
    /// Everything that was done before is durable.
    Flush,
}

/// One request.
#[derive(Debug)]
pub struct Request {
    /// The front's own number for it.
    pub token: u64,
    /// What.
    pub operation: Operation,
    /// Where, in bytes of the disk.
    pub offset: u64,
    /// How much, in bytes.
    pub length: u64,
    /// Memory of [`Operation::Read`] and [`Operation::Write`], as long as `length` in all; else empty.
    pub segments: Vec<Segment>,
}

impl Request {
    /// Whether it may be carried out on this volume at all.
    fn check(&self, volume: &Volume) -> Result<(), VolumeError> {
        match self.operation {
            Operation::Read | Operation::Write { .. } => {
                let total = self.segments.iter().try_fold(0u64, |sum, s| sum.checked_add(s.len as u64));
                if total != Some(self.length) {
                    return Err(VolumeError::Unaligned);
                }
            }
            Operation::Flush => return Ok(()),
            Operation::WriteZeroes { .. } | Operation::Discard => {}
        }
        if self.operation == Operation::Read {
            volume.check(self.offset, self.length)
        } else {
            volume.check_write(self.offset, self.length)
        }
    }
}

/// How one request went.
#[derive(Debug)]
pub struct Done {
    /// The front's number for it.
    pub token: u64,
    /// The outcome.
    pub result: Result<(), VolumeError>,
}

/// Which engine a lane has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring, many requests under way.
    Ring,
    /// pread and pwrite, one after another.
    Blocking,
    /// A helper's, many requests under way.
    Remote,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ring => "io_uring",
            Self::Blocking => "pread/pwrite",
            Self::Remote => "store helper",
        })
    }
}

/// One queue's way to its volume.
pub struct Lane {
    engine: Engine,
    outbox: Outbox,
    volume: Arc<Volume>,
    pass: Arc<Pass>,
    watches_gate: bool,
}

enum Engine {
    Ring(Box<Ring>),
    Blocking(Box<Blocking>),
    Remote(Box<Remote>),
}

/// What a lane has to say: requests that are done, descriptors that became readable.
#[derive(Default)]
struct Outbox {
    done: VecDeque<Done>,
    ready: VecDeque<u32>,
}

impl Outbox {
    fn is_empty(&self) -> bool {
        self.done.is_empty() && self.ready.is_empty()
    }
}

/// The key of the gate's bell among what is watched. Fronts use small ones.
const GATE: u32 = u32::MAX;

/// Said once a process.
static SAID_BLOCKING: AtomicBool = AtomicBool::new(false);

impl Lane {
    /// A lane to this volume, for the calling thread.
    ///
    /// # Errors
    ///
    /// No memory or no descriptor left. That io_uring cannot be had is no error.
    pub fn new(volume: Arc<Volume>) -> io::Result<Self> {
        let gated = volume.clone();
        let engine = if let Some(link) = volume.store().link().cloned() {
            Engine::Remote(Box::new(Remote::new(volume, link)?))
        } else if volume.store().ring_fd().is_none() {
            Engine::Blocking(Box::new(Blocking::new(volume)?))
        } else {
            match Ring::new(volume.clone()) {
                Ok(ring) => Engine::Ring(Box::new(ring)),
                Err(error) if uring::is_not_to_be_had(&error) => {
                    if !SAID_BLOCKING.swap(true, Ordering::Relaxed) {
                        log::line(format_args!(
                            "io_uring cannot be used ({error}): disks are served one request at a time per queue; see \
                             kernel.io_uring_disabled, and LimitMEMLOCK of vmseal-agent"
                        ));
                    }
                    Engine::Blocking(Box::new(Blocking::new(volume)?))
                }
                Err(error) => return Err(error),
            }
        };
        let pass = gated.gate().pass()?;
        Ok(Self { engine, outbox: Outbox::default(), volume: gated, pass, watches_gate: false })
    }

    /// Which engine it has.
    pub fn engine(&self) -> EngineKind {
        match &self.engine {
            Engine::Ring(_) => EngineKind::Ring,
            Engine::Blocking(_) => EngineKind::Blocking,
            Engine::Remote(_) => EngineKind::Remote,
        }
    }

    /// Takes a request. It may be done when this returns: see [`Lane::next_done`].
    ///
    /// # Safety
    ///
    /// Segments stay valid, for writing too if it is a read, until its [`Done`] was taken or [`Lane::drain`] returned.
    /// Others may change them meanwhile.
    pub unsafe fn submit(&mut self, request: Request) {
        match &mut self.engine {
            // SAFETY: passed on.
            Engine::Ring(ring) => unsafe { ring.submit(request, &mut self.outbox) },
            // SAFETY: passed on.
            Engine::Blocking(blocking) => unsafe { blocking.submit(&request, &mut self.outbox) },
            // SAFETY: passed on.
            Engine::Remote(remote) => unsafe { remote.submit(request, &mut self.outbox) },
        }
    }

    /// The next request that is done.
    pub fn next_done(&mut self) -> Option<Done> {
        self.outbox.done.pop_front()
    }

    /// Requests that were submitted and are not done.
    pub fn in_flight(&self) -> usize {
        match &self.engine {
            Engine::Ring(ring) => ring.in_flight(),
            Engine::Blocking(_) => 0,
            Engine::Remote(remote) => remote.in_flight(),
        }
    }

    /// Whether it should be given more: memory and places are bounded, and its volume's gate may be shut. A wait ends
    /// when that opens.
    pub fn has_room(&mut self) -> bool {
        self.has_room_for(Way::Open)
    }

    /// The same for requests that need no more than this of the gate.
    pub fn has_room_for(&mut self, needs: Way) -> bool {
        if self.is_full() {
            return false;
        }
        let entered = self.volume.gate().enter(&self.pass, needs);
        if !entered && !self.watches_gate {
            let pass = self.pass.clone();
            // Without, it is looked at again when something else happens.
            self.watches_gate = self.watch(pass.as_fd(), GATE).is_ok();
        }
        entered
    }

    /// Whether memory or places are used up.
    pub fn is_full(&self) -> bool {
        match &self.engine {
            Engine::Ring(ring) => !ring.has_room(),
            Engine::Blocking(_) => false,
            Engine::Remote(remote) => !remote.has_room(),
        }
    }

    /// How far the volume's gate is open; no request may be taken on the strength of this.
    pub fn way(&self) -> Way {
        self.volume.gate().way()
    }

    /// To be called before waiting for something other than this lane, with everything answered.
    pub fn rest(&mut self) {
        if self.in_flight() == 0 {
            self.volume.gate().leave(&self.pass);
        }
    }

    /// Waits until the gate was moved so that a request passes, or the other end of `stream` hangs up; gives whether it
    /// passes.
    pub fn wait_for_gate(&mut self, stream: &UnixStream, passes: impl Fn(&Volume) -> bool) -> bool {
        self.rest();
        loop {
            self.pass.hush();
            if passes(&self.volume) {
                return true;
            }
            if descriptors::moved_or_hung_up(self.pass.as_fd(), stream) {
                return false;
            }
        }
    }

    /// Watches a descriptor until [`Lane::unwatch`]: its key is ready whenever it *becomes* readable, and once if it is
    /// already. It must stay open until then.
    ///
    /// # Errors
    ///
    /// Too many, or the kernel's.
    pub fn watch(&mut self, fd: BorrowedFd<'_>, key: u32) -> io::Result<()> {
        match &mut self.engine {
            Engine::Ring(ring) => ring.watch(fd, key),
            Engine::Blocking(blocking) => blocking.watch(fd, key),
            Engine::Remote(remote) => remote.watch(fd, key),
        }
    }

    /// Watches it no more.
    pub fn unwatch(&mut self, key: u32) {
        match &mut self.engine {
            Engine::Ring(ring) => ring.unwatch(key),
            Engine::Blocking(blocking) => blocking.unwatch(key),
            Engine::Remote(remote) => remote.unwatch(key),
        }
        self.outbox.ready.retain(|ready| *ready != key);
    }

    /// Hands over what was submitted, and waits until something is done or ready.
    ///
    /// # Errors
    ///
    /// The kernel's; the lane is of no use then.
    pub fn wait(&mut self) -> io::Result<()> {
        if self.outbox.is_empty() {
            self.rest();
        }
        self.turn(true)
    }

    /// Hands over what was submitted, and looks what is done or ready.
    ///
    /// # Errors
    ///
    /// As [`Lane::wait`].
    pub fn poll(&mut self) -> io::Result<()> {
        self.turn(false)
    }

    fn turn(&mut self, wait: bool) -> io::Result<()> {
        match &mut self.engine {
            Engine::Ring(ring) => ring.turn(wait, &mut self.outbox),
            Engine::Blocking(blocking) => blocking.turn(wait, &mut self.outbox),
            Engine::Remote(remote) => remote.turn(wait, &mut self.outbox),
        }
    }

    /// The next watched descriptor that became readable. What is behind it has to be taken until there is no more; an
    /// eventfd need not be read.
    pub fn next_ready(&mut self) -> Option<u32> {
        self.outbox.ready.pop_front()
    }

    /// Waits until nothing is under way. What is done then has still to be taken.
    pub fn drain(&mut self) {
        match &mut self.engine {
            Engine::Ring(ring) => ring.drain(&mut self.outbox),
            Engine::Blocking(_) => {}
            Engine::Remote(remote) => remote.drain(&mut self.outbox),
        }
    }
}

impl Drop for Lane {
    /// The kernel must not write into memory that is somebody else's by then.
    fn drop(&mut self) {
        self.drain();
        self.volume.gate().forget(&self.pass);
    }
}
