//! Keeps many requests under way on one io_uring.
//!
//! A request is cut into pieces, each one entry of the ring. Reads go straight into the client's memory where the store
//! takes its addresses, and are decrypted there; everything else goes through bounce memory of this lane, small pieces
//! through memory the kernel has pinned. What finds no bounce memory waits, in turn with the others, so that one huge
//! request holds up nobody.
//!
//! The ring can do the operations in [`OPCODES`] on descriptors it was given, and nothing else, whoever writes entries.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Arc, OnceLock},
};

use io_uring::{
    IoUring, cqueue, opcode,
    register::Restriction,
    squeue,
    types::{Fixed, SubmitArgs, Timespec},
};
use slab::Slab;

use super::{
    Done, Operation, Outbox, Request,
    pieces::{self, Place},
};
use crate::{
    aligned::Aligned,
    flush_gate::{Begun, Bell},
    volume::{Volume, VolumeError},
};

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

/// Entries of the ring, and so the most pieces under way.
const ENTRIES: u32 = 128;
/// Most requests in the lane.
const MAX_REQUESTS: usize = 256;
/// Bytes and number of bounce buffers the kernel has pinned.
const SMALL: usize = 16 << 10;
const SMALLS: usize = 32;
/// Bytes and number of large ones, which take no room until used and give it back when there is nothing to do.
const LARGE: usize = 256 << 10;
const LARGES: usize = 8;
/// How long a lane without work keeps large bounce memory: giving it back and taking it again costs as much as a request.
const IDLE_SECONDS: u64 = 1;
/// Most watched descriptors.
const MAX_WATCHED: usize = 6;

/// Places in the ring's table of descriptors.
const STORE: Fixed = Fixed(0);
const BELL: Fixed = Fixed(1);
const WITNESS: Fixed = Fixed(2);
const FIRST_WATCHED: u32 = 3;

/// Marks of user data: the rest is a piece's place, or the watch's.
const POLL: u64 = 1 << 63;
const REMOVAL: u64 = 1 << 62;
const BELL_DATA: u64 = POLL | 0xffff_ffff;

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

/// Whether io_uring is not to be had here at all: not compiled in, or switched off by sysctl or policy.
pub(super) fn is_switched_off(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EACCES))
}

/// Whether this host lets us have rings.
pub fn is_available() -> bool {
    IoUring::new(1).is_ok()
}

pub(super) struct Ring {
    uring: IoUring,
    volume: Arc<Volume>,
    bell: Arc<Bell>,
    bell_armed: bool,
    small: Bounce,
    large: Bounce,
    /// Whether large bounce memory was used since it was given back.
    large_used: bool,
    active: Slab<Active>,
    pieces: Slab<Piece>,
    /// Requests with more pieces to give out, in turn.
    turns: VecDeque<usize>,
    /// Entries that found no place in the ring.
    backlog: VecDeque<squeue::Entry>,
    /// Requests that want a flush, and those the flush under way is for.
    flush_wanted: Vec<usize>,
    flush_running: Vec<usize>,
    watched: [Option<Watch>; MAX_WATCHED],
    completions: Vec<(u64, i32, bool)>,
    spare: Vec<Vec<libc::iovec>>,
}

struct Watch {
    key: u32,
    /// Told apart from an older watch in the same place.
    generation: u32,
    armed: bool,
}

/// A request and how far it is.
struct Active {
    request: Request,
    place: Place,
    /// Bytes that were given out as pieces.
    given: u64,
    under_way: usize,
    error: Option<VolumeError>,
}

/// Equal buffers in one stretch of memory.
struct Bounce {
    memory: Aligned,
    size: usize,
    free: Vec<u16>,
    count: usize,
}

impl Bounce {
    fn new(size: usize, count: usize) -> io::Result<Self> {
        Ok(Self { memory: Aligned::new(size * count)?, size, free: (0..count as u16).rev().collect(), count })
    }

    fn at(&self, slot: u16) -> *mut u8 {
        // SAFETY: slots are below `count`.
        unsafe { self.memory.base().add(usize::from(slot) * self.size) }
    }

    fn all_free(&self) -> bool {
        self.free.len() == self.count
    }
}

#[derive(Clone, Copy)]
enum Slot {
    Small(u16),
    Large(u16),
}

enum Kind {
    Read,
    Write,
    Flush,
    Punch,
}

/// One entry of the ring.
struct Piece {
    kind: Kind,
    /// Its request; of no meaning for a flush.
    active: usize,
    /// Where on the disk.
    offset: u64,
    length: usize,
    done: usize,
    slot: Option<Slot>,
    /// The client's memory; of a read in place what is still to be read first.
    memory: Vec<libc::iovec>,
    /// The same, as the kernel sees it: shortened after a short read.
    rest: Vec<libc::iovec>,
}

impl Ring {
    pub(super) fn new(volume: Arc<Volume>) -> io::Result<Self> {
        let mut uring = build()?;
        let bell = Arc::new(Bell::new()?);
        let store = volume.store().ring_fd().ok_or(io::ErrorKind::Unsupported)?.as_raw_fd();
        let mut files = [-1; FIRST_WATCHED as usize + MAX_WATCHED];
        files[STORE.0 as usize] = store;
        files[BELL.0 as usize] = bell.as_fd().as_raw_fd();
        if let Some(witness) = WORKER_LIVES.get() {
            files[WITNESS.0 as usize] = witness.as_fd().as_raw_fd();
        }
        let small = Bounce::new(SMALL, SMALLS)?;
        let large = Bounce::new(LARGE, LARGES)?;
        let submitter = uring.submitter();
        submitter.register_files(&files)?;
        let pinned = libc::iovec { iov_base: small.memory.base().cast(), iov_len: SMALL * SMALLS };
        // SAFETY: the memory lives as long as the ring: both are fields of one value, and the lane is drained first.
        unsafe { submitter.register_buffers(&[pinned])? };
        restrict(&uring)?;
        uring.submission().sync();
        Ok(Self {
            uring,
            volume,
            bell,
            bell_armed: false,
            small,
            large,
            large_used: false,
            active: Slab::new(),
            pieces: Slab::new(),
            turns: VecDeque::new(),
            backlog: VecDeque::new(),
            flush_wanted: Vec::new(),
            flush_running: Vec::new(),
            watched: Default::default(),
            completions: Vec::new(),
            spare: Vec::new(),
        })
    }

    #[cfg(test)]
    pub(super) fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    /// What the kernel says to an entry as it is.
    #[cfg(test)]
    pub(super) fn tried(&mut self, entry: squeue::Entry) -> i32 {
        // SAFETY: the caller keeps what the entry points to until this returns.
        unsafe { self.uring.submission().push(&entry).unwrap() };
        self.uring.submit_and_wait(1).unwrap();
        self.uring.completion().next().unwrap().result()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.active.len()
    }

    pub(super) fn has_room(&self) -> bool {
        self.active.len() < MAX_REQUESTS
    }

    /// # Safety
    ///
    /// As [`super::Lane::submit`].
    pub(super) unsafe fn submit(&mut self, request: Request, outbox: &mut Outbox) {
        if let Err(error) = request.check(&self.volume) {
            outbox.done.push_back(Done { token: request.token, result: Err(error) });
            return;
        }
        let flush = request.operation == Operation::Flush;
        let empty = request.length == 0 && !flush;
        let (token, place) = (request.token, Place::default());
        if empty {
            outbox.done.push_back(Done { token, result: Ok(()) });
            return;
        }
        let at = self.active.insert(Active { request, place, given: 0, under_way: 0, error: None });
        if flush {
            self.flush_wanted.push(at);
        } else {
            self.turns.push_back(at);
        }
    }

    pub(super) fn watch(&mut self, fd: BorrowedFd<'_>, key: u32) -> io::Result<()> {
        let free = self.watched.iter().position(Option::is_none);
        let place = free.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        self.uring.submitter().register_files_update(FIRST_WATCHED + place as u32, &[fd.as_raw_fd()])?;
        // A generation of the process is enough: 2^31 watches later the old one's last word is long read.
        static GENERATIONS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let generation = GENERATIONS.fetch_add(1, std::sync::atomic::Ordering::Relaxed) & 0x0fff_ffff;
        self.watched[place] = Some(Watch { key, generation, armed: false });
        Ok(())
    }

    pub(super) fn unwatch(&mut self, key: u32) {
        for place in 0..MAX_WATCHED {
            let Some(watch) = self.watched[place].take_if(|watch| watch.key == key) else { continue };
            if watch.armed {
                let remove = opcode::PollRemove::new(watch_data(place, watch.generation));
                self.push(remove.build().user_data(REMOVAL));
            }
            let none = self.uring.submitter().register_files_update(FIRST_WATCHED + place as u32, &[-1]);
            debug_assert!(none.is_ok(), "a place of the table cannot be cleared: {none:?}");
        }
    }

    pub(super) fn turn(&mut self, wait: bool, outbox: &mut Outbox) -> io::Result<()> {
        self.arm_watches();
        self.hand_out(outbox);
        let wait = wait && outbox.is_empty();
        self.enter(wait)?;
        self.reap(outbox);
        Ok(())
    }

    pub(super) fn drain(&mut self, outbox: &mut Outbox) {
        while !self.active.is_empty() {
            self.hand_out(outbox);
            if self.active.is_empty() {
                return;
            }
            if let Err(error) = self.enter(true) {
                // The kernel may still write into the client's memory, and nothing here can stop it.
                crate::log::line(format_args!("cannot wait for requests under way: {error}"));
                crate::end_process(crate::EXIT_FAILED);
            }
            self.reap(outbox);
        }
    }

    /// Gives entries to the ring for what has its turn, and begins a flush that may.
    fn hand_out(&mut self, outbox: &mut Outbox) {
        while self.pieces.len() < ENTRIES as usize
            && let Some(&at) = self.turns.front()
        {
            match self.next_piece(at) {
                Given::More => self.turns.rotate_left(1),
                Given::All => {
                    self.turns.pop_front();
                    self.settle(at, outbox);
                }
                Given::NoRoom => break,
            }
        }
        if self.flush_wanted.is_empty() || !self.flush_running.is_empty() {
            return;
        }
        match self.volume.flushes.begin(&self.bell) {
            Begun::Now => {
                self.flush_running.append(&mut self.flush_wanted);
                let piece = self.pieces.insert(Piece::new(Kind::Flush, usize::MAX, 0, 0));
                let flags = io_uring::types::FsyncFlags::DATASYNC;
                self.push(opcode::Fsync::new(STORE).flags(flags).build().user_data(piece as u64));
            }
            Begun::Later => self.arm_bell(),
            Begun::Failed => {
                for at in std::mem::take(&mut self.flush_wanted) {
                    self.finish(at, Err(VolumeError::FlushFailed), outbox);
                }
            }
        }
    }

    /// Makes the next piece of a request.
    fn next_piece(&mut self, at: usize) -> Given {
        let volume = self.volume.clone();
        let Some(active) = self.active.get_mut(at) else { return Given::All };
        let (operation, total) = (active.request.operation, active.request.length);
        if active.error.is_some() || active.given == total {
            active.given = total;
            return Given::All;
        }
        let (offset, left) = (active.request.offset + active.given, total - active.given);
        let length = match operation {
            Operation::Flush => return Given::All,
            Operation::Discard => {
                active.given = total;
                let stored = volume.stored_bytes().saturating_sub(offset).min(left);
                if stored > 0 && volume.layout().discard {
                    active.under_way += 1;
                    self.punch(at, offset, stored);
                }
                return Given::All;
            }
            Operation::Read => {
                let stored = volume.stored_bytes().saturating_sub(offset);
                if stored == 0 {
                    let mut beyond = self.spare.pop().unwrap_or_default();
                    pieces::take(&active.request.segments, &mut active.place, left as usize, &mut beyond);
                    // SAFETY: segments of the request, which the front keeps.
                    unsafe { pieces::zero(&beyond) };
                    self.spare.push(beyond);
                    active.given = total;
                    return Given::All;
                }
                left.min(LARGE as u64).min(stored) as usize
            }
            Operation::Write { .. } | Operation::WriteZeroes { .. } => left.min(LARGE as u64) as usize,
        };
        let mut memory = self.spare.pop().unwrap_or_default();
        memory.clear();
        let mut place = active.place;
        if !matches!(operation, Operation::WriteZeroes { .. }) {
            pieces::take(&active.request.segments, &mut place, length, &mut memory);
        }
        let in_place = operation == Operation::Read && {
            let alignment = volume.alignment();
            let unit = volume.layout().unit.max(alignment.offset) as usize;
            memory.len() <= libc::UIO_MAXIOV as usize && pieces::suit(&memory, unit, alignment.memory)
        };
        let slot = if in_place { None } else { self.slot_for(length) };
        if !in_place && slot.is_none() {
            self.spare.push(memory);
            return Given::NoRoom;
        }
        let Some(active) = self.active.get_mut(at) else { return Given::All };
        active.place = place;
        active.given += length as u64;
        active.under_way += 1;
        let given = if active.given == total { Given::All } else { Given::More };
        let kind = if operation == Operation::Read { Kind::Read } else { Kind::Write };
        let mut piece = Piece { slot, memory, ..Piece::new(kind, at, offset, length) };
        if operation == Operation::Read {
            if in_place {
                piece.rest = self.spare.pop().unwrap_or_default();
                piece.rest.clear();
                piece.rest.extend_from_slice(&piece.memory);
            }
        } else {
            // Asked once: another lane may move the end meanwhile, and what was not encrypted must not be written.
            let grows = offset + length as u64 > volume.stored_bytes();
            let written = if grows { self.write_growing(&piece) } else { self.encrypt(&piece) };
            match written {
                Err(error) => {
                    self.fail(piece, error);
                    return given;
                }
                Ok(()) if grows => {
                    self.give_back(piece);
                    return given;
                }
                Ok(()) => {}
            }
        }
        self.start(piece);
        given
    }

    /// Ends a piece that was never given to the kernel.
    fn fail(&mut self, piece: Piece, error: VolumeError) {
        if let Some(active) = self.active.get_mut(piece.active) {
            active.error.get_or_insert(error);
        }
        self.give_back(piece);
    }

    /// A piece is over: its buffers are free again.
    fn give_back(&mut self, piece: Piece) {
        match piece.slot {
            Some(Slot::Small(slot)) => self.small.free.push(slot),
            Some(Slot::Large(slot)) => self.large.free.push(slot),
            None => {}
        }
        for memory in [piece.memory, piece.rest] {
            if memory.capacity() > 0 && self.spare.len() < ENTRIES as usize {
                self.spare.push(memory);
            }
        }
        if let Some(active) = self.active.get_mut(piece.active) {
            active.under_way -= 1;
        }
    }

    fn slot_for(&mut self, length: usize) -> Option<Slot> {
        if length <= SMALL
            && let Some(slot) = self.small.free.pop()
        {
            return Some(Slot::Small(slot));
        }
        let slot = self.large.free.pop()?;
        self.large_used = true;
        Some(Slot::Large(slot))
    }

    fn slot_memory(&self, slot: Slot) -> *mut u8 {
        match slot {
            Slot::Small(slot) => self.small.at(slot),
            Slot::Large(slot) => self.large.at(slot),
        }
    }

    /// Fills a write's bounce memory with ciphertext.
    fn encrypt(&self, piece: &Piece) -> Result<(), VolumeError> {
        let Some(slot) = piece.slot else { return Ok(()) };
        let (bounce, unit) = (self.slot_memory(slot), self.volume.layout().unit as usize);
        // SAFETY: a slot is at least as long as its piece and belongs to it alone; the memory is the request's.
        unsafe {
            if piece.memory.is_empty() || !pieces::suit(&piece.memory, unit, 1) {
                self.fill_plain(piece, bounce);
                return self.volume.encrypt_raw(piece.offset, bounce, bounce, piece.length);
            }
            let mut done = 0;
            for from in &piece.memory {
                let at = piece.offset + done as u64;
                self.volume.encrypt_raw(at, from.iov_base.cast(), bounce.add(done), from.iov_len)?;
                done += from.iov_len;
            }
        }
        Ok(())
    }

    /// Past the stored end the file grows, under a lock of the volume and one write after another.
    fn write_growing(&self, piece: &Piece) -> Result<(), VolumeError> {
        let Some(slot) = piece.slot else { return Ok(()) };
        let bounce = self.slot_memory(slot);
        // SAFETY: as in `encrypt`; no other entry knows of this slot.
        let plain = unsafe {
            self.fill_plain(piece, bounce);
            std::slice::from_raw_parts_mut(bounce, piece.length)
        };
        self.volume.encrypt_into(piece.offset, plain)
    }

    /// # Safety
    ///
    /// `bounce` is as long as the piece, whose memory is valid.
    unsafe fn fill_plain(&self, piece: &Piece, bounce: *mut u8) {
        // SAFETY: passed on. A write without memory is one of zeros.
        unsafe {
            if piece.memory.is_empty() {
                std::ptr::write_bytes(bounce, 0, piece.length);
            } else {
                pieces::gather(&piece.memory, bounce);
            }
        }
    }

    fn punch(&mut self, active: usize, offset: u64, length: u64) {
        let mut piece = Piece::new(Kind::Punch, active, offset, 0);
        // A length of its own: it may be longer than a buffer can be.
        piece.done = length as usize;
        let at = self.volume.layout().payload_offset + offset;
        let entry = opcode::Fallocate::new(STORE, length)
            .offset(at)
            .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
            .build();
        let index = self.pieces.insert(piece);
        self.push(entry.user_data(index as u64));
    }

    /// Gives a piece, or what is left of it, to the kernel.
    fn start(&mut self, piece: Piece) {
        let at = self.volume.layout().payload_offset + piece.offset + piece.done as u64;
        let left = (piece.length - piece.done) as u32;
        let bounce = piece.slot.map(|slot| self.slot_memory(slot).wrapping_add(piece.done));
        let index = self.pieces.insert(piece);
        let piece = &self.pieces[index];
        let entry = match (&piece.kind, bounce, piece.slot) {
            (Kind::Read, Some(to), _) => opcode::Read::new(STORE, to, left).offset(at).build(),
            (Kind::Read, None, _) => match piece.rest[..] {
                [one] => opcode::Read::new(STORE, one.iov_base.cast(), left).offset(at).build(),
                ref many => opcode::Readv::new(STORE, many.as_ptr(), many.len() as u32).offset(at).build(),
            },
            (_, Some(from), Some(Slot::Small(_))) => {
                opcode::WriteFixed::new(STORE, from, left, 0).offset(at).build()
            }
            (_, from, _) => {
                opcode::Write::new(STORE, from.unwrap_or(std::ptr::null_mut()), left).offset(at).build()
            }
        };
        self.push(entry.user_data(index as u64));
    }

    fn push(&mut self, entry: squeue::Entry) {
        let entry = entry.flags(squeue::Flags::FIXED_FILE);
        // SAFETY: what an entry points to is kept until its completion: bounce memory and `rest` of its piece by this
        // value, the client's memory by the front. The descriptors are in the ring's table.
        let full = unsafe { !self.backlog.is_empty() || self.uring.submission().push(&entry).is_err() };
        if full {
            self.backlog.push_back(entry);
        }
    }

    fn arm_watches(&mut self) {
        for place in 0..MAX_WATCHED {
            let Some(watch) = self.watched[place].as_mut().filter(|watch| !watch.armed) else { continue };
            watch.armed = true;
            let data = watch_data(place, watch.generation);
            let entry = opcode::PollAdd::new(Fixed(FIRST_WATCHED + place as u32), POLL_EVENTS).multi(true);
            self.push(entry.build().user_data(data));
        }
    }

    fn arm_bell(&mut self) {
        if !self.bell_armed {
            self.bell_armed = true;
            self.push(opcode::PollAdd::new(BELL, POLL_EVENTS).multi(true).build().user_data(BELL_DATA));
        }
    }

    fn enter(&mut self, wait: bool) -> io::Result<()> {
        loop {
            while let Some(entry) = self.backlog.front() {
                // SAFETY: as in `push`.
                if unsafe { self.uring.submission().push(entry).is_err() } {
                    break;
                }
                self.backlog.pop_front();
            }
            let waits = wait && self.backlog.is_empty();
            let holds = waits && self.active.is_empty() && self.large_used && self.large.all_free();
            let entered = if holds && self.uring.params().is_feature_ext_arg() {
                let limit = Timespec::new().sec(IDLE_SECONDS);
                self.uring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&limit))
            } else {
                self.uring.submit_and_wait(usize::from(waits))
            };
            match entered {
                Ok(_) if self.backlog.is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::ETIME) => {
                        self.large.memory.release();
                        self.large_used = false;
                    }
                    // The kernel is short of something for the moment, or wants completions taken first.
                    Some(libc::EAGAIN | libc::EBUSY) => return Ok(()),
                    _ => return Err(error),
                },
            }
        }
    }

    /// Takes completions.
    fn reap(&mut self, outbox: &mut Outbox) {
        let mut completions = std::mem::take(&mut self.completions);
        completions
            .extend(self.uring.completion().map(|c| (c.user_data(), c.result(), cqueue::more(c.flags()))));
        for (data, result, more) in completions.drain(..) {
            if data & REMOVAL != 0 {
                continue;
            }
            if data == BELL_DATA {
                self.bell_armed = more;
            } else if data & POLL != 0 {
                self.heard(data, result, more, outbox);
            } else if let Some(piece) = self.pieces.try_remove(data as usize) {
                self.completed(piece, result, outbox);
            }
        }
        self.completions = completions;
        // What became free may be what others wait for; and a flush may begin.
        self.hand_out(outbox);
    }

    fn heard(&mut self, data: u64, result: i32, more: bool, outbox: &mut Outbox) {
        let place = (data & 0xff) as usize;
        let watch = self.watched.get_mut(place).and_then(Option::as_mut);
        let Some(watch) = watch.filter(|watch| watch_data(place, watch.generation) == data) else { return };
        watch.armed = more;
        if result >= 0 || result != -libc::ECANCELED {
            let key = watch.key;
            if !outbox.ready.contains(&key) {
                outbox.ready.push_back(key);
            }
        }
    }

    fn completed(&mut self, mut piece: Piece, result: i32, outbox: &mut Outbox) {
        match piece.kind {
            Kind::Flush => {
                let result = if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) };
                let durable = self.volume.flushes.end(result);
                for at in std::mem::take(&mut self.flush_running) {
                    let result = if durable { Ok(()) } else { Err(VolumeError::FlushFailed) };
                    self.finish(at, result, outbox);
                }
                return;
            }
            Kind::Punch => {
                let at = piece.active;
                match -result {
                    libc::EINTR | libc::EAGAIN => return self.punch(at, piece.offset, piece.done as u64),
                    // The medium cannot; a discard is a wish.
                    0 | libc::EOPNOTSUPP | libc::EINVAL | libc::ENODEV | libc::ENOSYS => {}
                    errno => {
                        if let Some(active) = self.active.get_mut(at) {
                            active.error.get_or_insert(io::Error::from_raw_os_error(errno).into());
                        }
                    }
                }
                self.give_back(piece);
                return self.settle(at, outbox);
            }
            Kind::Read | Kind::Write => {}
        }
        let at = piece.active;
        match usize::try_from(result) {
            Ok(0) => {
                let error = match piece.kind {
                    Kind::Read => VolumeError::Truncated,
                    _ => VolumeError::Io(io::ErrorKind::WriteZero.into()),
                };
                self.fail(piece, error);
            }
            Ok(done) if piece.done + done < piece.length => {
                piece.done += done;
                pieces::advance(&mut piece.rest, done);
                return self.start(piece);
            }
            Ok(_) => {
                let decrypted = self.decrypt(&piece);
                match decrypted {
                    Ok(()) => self.give_back(piece),
                    Err(error) => self.fail(piece, error),
                }
            }
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => return self.start(piece),
            Err(_) => self.fail(piece, io::Error::from_raw_os_error(-result).into()),
        }
        self.settle(at, outbox);
    }

    /// Turns what was read into plaintext in the client's memory.
    fn decrypt(&self, piece: &Piece) -> Result<(), VolumeError> {
        if !matches!(piece.kind, Kind::Read) {
            return Ok(());
        }
        // SAFETY: the slot belongs to the piece, the memory to its request, which the front keeps.
        unsafe {
            if let Some(slot) = piece.slot {
                let bounce = self.slot_memory(slot);
                self.volume.decrypt_raw(piece.offset, bounce, piece.length)?;
                pieces::scatter(bounce, &piece.memory);
                return Ok(());
            }
            let mut done = 0;
            for to in &piece.memory {
                self.volume.decrypt_raw(piece.offset + done as u64, to.iov_base.cast(), to.iov_len)?;
                done += to.iov_len;
            }
        }
        Ok(())
    }

    /// Ends a request whose pieces are all over.
    fn settle(&mut self, at: usize, outbox: &mut Outbox) {
        let Some(active) = self.active.get_mut(at) else { return };
        if active.under_way > 0 || (active.given < active.request.length && active.error.is_none()) {
            return;
        }
        if active.error.is_some() && active.given < active.request.length {
            // Still in the queue of turns, which ends it.
            return;
        }
        let fua = matches!(
            active.request.operation,
            Operation::Write { fua: true } | Operation::WriteZeroes { fua: true }
        );
        match active.error.take() {
            Some(error) => self.finish(at, Err(error), outbox),
            None if fua => self.flush_wanted.push(at),
            None => self.finish(at, Ok(()), outbox),
        }
    }

    fn finish(&mut self, at: usize, result: Result<(), VolumeError>, outbox: &mut Outbox) {
        if let Some(active) = self.active.try_remove(at) {
            outbox.done.push_back(Done { token: active.request.token, result });
        }
    }
}

impl Drop for Ring {
    /// A ring ends some time after its descriptor is closed. What it was given is let go of now: sockets are to be closed
    /// when their owner closes them.
    fn drop(&mut self) {
        let keys: Vec<u32> = self.watched.iter().flatten().map(|watch| watch.key).collect();
        keys.into_iter().for_each(|key| self.unwatch(key));
        let _ = self.enter(false);
        let none = [-1; FIRST_WATCHED as usize + MAX_WATCHED];
        let _ = self.uring.submitter().register_files_update(0, &none);
    }
}

impl Piece {
    fn new(kind: Kind, active: usize, offset: u64, length: usize) -> Self {
        Self { kind, active, offset, length, done: 0, slot: None, memory: Vec::new(), rest: Vec::new() }
    }
}

enum Given {
    /// A piece, and there are more.
    More,
    /// The last one.
    All,
    /// None, for want of bounce memory.
    NoRoom,
}

const POLL_EVENTS: u32 = (libc::POLLIN | libc::POLLRDHUP) as u32;

fn watch_data(place: usize, generation: u32) -> u64 {
    POLL | u64::from(generation) << 8 | place as u64
}

/// A ring that is not enabled yet. Old kernels do not know the flags that save work; they get one without.
fn build() -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_r_disabled().setup_cqsize(4 * ENTRIES).dontfork();
    builder.setup_single_issuer().setup_defer_taskrun().setup_coop_taskrun().setup_taskrun_flag();
    match builder.build(ENTRIES) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let mut builder = IoUring::builder();
            builder.setup_r_disabled().setup_cqsize(4 * ENTRIES).dontfork();
            builder.build(ENTRIES)
        }
        other => other,
    }
}

/// Nothing but [`OPCODES`], on descriptors of the table; then the ring is enabled.
fn restrict(uring: &IoUring) -> io::Result<()> {
    let fixed = squeue::Flags::FIXED_FILE.bits();
    let mut rules: Vec<Restriction> = OPCODES.iter().map(|code| Restriction::sqe_op(*code)).collect();
    rules.extend([
        Restriction::sqe_flags_allowed(fixed),
        Restriction::sqe_flags_required(fixed),
        Restriction::register_op(IORING_REGISTER_FILES_UPDATE),
    ]);
    uring.submitter().register_restrictions(&mut rules)?;
    uring.submitter().register_enable_rings()
}

/// From linux/io_uring.h; the crate does not name it.
const IORING_REGISTER_FILES_UPDATE: u8 = 6;
