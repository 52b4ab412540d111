//! Keeps many requests under way on one io_uring.
//!
//! A request is cut into pieces, each one entry of the ring. Reads go straight into the client's memory where the store
//! takes its addresses, and are decrypted there; everything else goes through bounce memory of this lane. What finds no
//! bounce memory waits, in turn with the others, so that one huge request holds up nobody.

use std::{io, os::fd::BorrowedFd, sync::Arc};

use io_uring::{opcode, types::FsyncFlags};
use slab::Slab;

use super::{
    Operation, Outbox, Request,
    bounce::{Bounce, LARGE, Slot},
    pieces,
    requests::{Flush, Given, Requests},
    uring::{ENTRIES, STORE, Uring},
};
use crate::{
    flush_gate::Bell,
    volume::{Volume, VolumeError},
};

/// Most requests in the lane.
const MAX_REQUESTS: usize = 256;
/// Most pieces under way.
const MAX_PIECES: usize = ENTRIES as usize;
/// So many encrypted bytes are handed to the kernel at once, and do not wait for more.
const EAGER: usize = 64 << 10;
/// How long a lane without work keeps large bounce memory: giving it back and taking it again costs as much as a request.
const IDLE_SECONDS: u64 = 1;

/// The ring comes first: dropped before the memory that the kernel has pinned.
pub(super) struct Ring {
    uring: Uring,
    bounce: Bounce,
    volume: Arc<Volume>,
    requests: Requests,
    pieces: Slab<Piece>,
    completed: Vec<(u64, i32)>,
    /// Bytes encrypted since they were handed to the kernel early.
    encrypted: usize,
    spare: Vec<Vec<libc::iovec>>,
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
    /// The client's memory.
    memory: Vec<libc::iovec>,
    /// Of a read in place the memory that is still to be filled.
    rest: Vec<libc::iovec>,
}

impl Piece {
    fn new(kind: Kind, active: usize, offset: u64, length: usize) -> Self {
        Self { kind, active, offset, length, done: 0, slot: None, memory: Vec::new(), rest: Vec::new() }
    }
}

impl Ring {
    pub(super) fn new(volume: Arc<Volume>) -> io::Result<Self> {
        let bell = Arc::new(Bell::new()?);
        let bounce = Bounce::new()?;
        let store = volume.store().ring_fd().ok_or(io::ErrorKind::Unsupported)?;
        // SAFETY: memory and store are fields of the same value as the ring, which is dropped before them.
        let uring = unsafe { Uring::new(store, &bell, bounce.small())? };
        let requests = Requests::new(volume.clone(), bell, false);
        Ok(Self {
            uring,
            bounce,
            volume,
            requests,
            pieces: Slab::new(),
            completed: Vec::new(),
            encrypted: 0,
            spare: Vec::new(),
        })
    }

    #[cfg(test)]
    pub(super) fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    #[cfg(test)]
    pub(super) fn uring(&mut self) -> &mut Uring {
        &mut self.uring
    }

    pub(super) fn in_flight(&self) -> usize {
        self.requests.len()
    }

    pub(super) fn has_room(&self) -> bool {
        self.requests.len() < MAX_REQUESTS
    }

    /// # Safety
    ///
    /// As [`super::Lane::submit`].
    pub(super) unsafe fn submit(&mut self, request: Request, outbox: &mut Outbox) {
        self.requests.submit(request, outbox);
    }

    pub(super) fn watch(&mut self, fd: BorrowedFd<'_>, key: u32) -> io::Result<()> {
        self.uring.watch(fd, key)
    }

    pub(super) fn unwatch(&mut self, key: u32) {
        self.uring.unwatch(key);
    }

    pub(super) fn turn(&mut self, wait: bool, outbox: &mut Outbox) -> io::Result<()> {
        self.uring.arm_watches();
        self.hand_out(outbox);
        self.encrypted = 0;
        let wait = wait && outbox.is_empty();
        let idle = self.requests.is_empty() && self.bounce.holds_unused();
        if !self.uring.enter(wait, idle.then_some(IDLE_SECONDS))? {
            self.bounce.release();
            self.uring.enter(wait, None)?;
        }
        self.reap(outbox);
        Ok(())
    }

    pub(super) fn drain(&mut self, outbox: &mut Outbox) {
        while !self.requests.is_empty() {
            self.hand_out(outbox);
            if self.requests.is_empty() {
                return;
            }
            if let Err(error) = self.uring.enter(true, None) {
                // The kernel may still write into the client's memory, and nothing here can stop it.
                crate::log::line(format_args!("cannot wait for requests under way: {error}"));
                crate::end_process(crate::EXIT_FAILED);
            }
            self.reap(outbox);
        }
    }

    /// Gives entries to the ring for what has its turn, and begins a flush that may.
    fn hand_out(&mut self, outbox: &mut Outbox) {
        while self.pieces.len() < MAX_PIECES
            && let Some(at) = self.requests.front()
        {
            let given = self.next_piece(at, outbox);
            if self.encrypted >= EAGER {
                // The medium writes this while the next is encrypted. An error comes again when completions are waited for.
                self.encrypted = 0;
                let _ = self.uring.enter(false, None);
            }
            if !self.requests.turn_over(at, &given, outbox) {
                break;
            }
        }
        match self.requests.begin_flush(outbox) {
            Flush::No => {}
            Flush::Now => self.start(Piece::new(Kind::Flush, usize::MAX, 0, 0)),
            Flush::Later => self.uring.arm_bell(),
        }
    }

    /// Makes the next piece of a request.
    fn next_piece(&mut self, at: usize, outbox: &mut Outbox) -> Given {
        let Some(active) = self.requests.unfinished(at) else { return Given::All };
        let operation = active.request.operation;
        let (offset, left) = (active.request.offset + active.given, active.request.length - active.given);
        let stored = self.volume.stored_bytes().saturating_sub(offset);
        let length = match operation {
            Operation::Flush => return Given::All,
            Operation::Discard | Operation::Read if stored == 0 => {
                // Nothing is there to be given back; and beyond what is stored there are zeros.
                if operation == Operation::Read {
                    let mut beyond = self.spare.pop().unwrap_or_default();
                    pieces::take(&active.request.segments, &mut active.place, left as usize, &mut beyond);
                    // SAFETY: segments of the request, which the front keeps.
                    unsafe { pieces::zero(&beyond) };
                    self.spare.push(beyond);
                }
                active.given = active.request.length;
                return Given::All;
            }
            Operation::Discard => left.min(stored),
            Operation::Read => left.min(LARGE as u64).min(stored),
            Operation::Write { .. } | Operation::WriteZeroes { .. } => left.min(LARGE as u64),
        };
        if operation == Operation::Discard {
            let given = self.requests.give(at, length);
            self.start(Piece::new(Kind::Punch, at, offset, length as usize));
            return given;
        }
        let length = length as usize;
        let mut memory = self.spare.pop().unwrap_or_default();
        memory.clear();
        let mut place = active.place;
        if !matches!(operation, Operation::WriteZeroes { .. }) {
            pieces::take(&active.request.segments, &mut place, length, &mut memory);
        }
        let in_place = operation == Operation::Read && {
            let alignment = self.volume.alignment();
            let unit = self.volume.layout().unit.max(alignment.offset) as usize;
            memory.len() <= libc::UIO_MAXIOV as usize && pieces::suit(&memory, unit, alignment.memory)
        };
        let slot = if in_place { None } else { self.bounce.lend(length) };
        if !in_place && slot.is_none() {
            self.spare.push(memory);
            return Given::NoRoom;
        }
        active.place = place;
        let given = self.requests.give(at, length as u64);
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
            let grows = offset + length as u64 > self.volume.stored_bytes();
            let written = if grows { self.write_growing(&piece) } else { self.encrypt(&piece) };
            if grows || written.is_err() {
                self.over(piece, written, outbox);
                return given;
            }
            self.encrypted += length;
        }
        self.start(piece);
        given
    }

    /// A piece is over: its buffers are free again.
    fn over(&mut self, piece: Piece, result: Result<(), VolumeError>, outbox: &mut Outbox) {
        if let Some(slot) = piece.slot {
            self.bounce.give_back(slot);
        }
        for memory in [piece.memory, piece.rest] {
            if memory.capacity() > 0 && self.spare.len() < MAX_PIECES {
                self.spare.push(memory);
            }
        }
        self.requests.piece_over(piece.active, result, outbox);
    }

    /// Fills a write's bounce memory with ciphertext.
    fn encrypt(&self, piece: &Piece) -> Result<(), VolumeError> {
        let Some(slot) = piece.slot else { return Ok(()) };
        let (bounce, unit) = (self.bounce.memory(slot), self.volume.layout().unit as usize);
        // SAFETY: a slot is at least as long as its piece and belongs to it alone; the memory is the request's.
        unsafe {
            if piece.memory.is_empty() || !pieces::suit(&piece.memory, unit, 1) {
                fill_plain(piece, bounce);
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
        let bounce = self.bounce.memory(slot);
        // SAFETY: as in `encrypt`; no other entry knows of this slot.
        let plain = unsafe {
            fill_plain(piece, bounce);
            std::slice::from_raw_parts_mut(bounce, piece.length)
        };
        self.volume.encrypt_into(piece.offset, plain)
    }

    /// Gives a piece, or what is left of it, to the kernel.
    fn start(&mut self, piece: Piece) {
        let at = self.volume.layout().payload_offset + piece.offset + piece.done as u64;
        let left = piece.length - piece.done;
        let bytes = left as u32;
        let bounce = piece.slot.map(|slot| self.bounce.memory(slot).wrapping_add(piece.done));
        let pinned = matches!(piece.slot, Some(Slot::Small(_))) && self.uring.is_pinned();
        let index = self.pieces.insert(piece);
        let piece = &self.pieces[index];
        let entry = match (&piece.kind, bounce) {
            (Kind::Flush, _) => opcode::Fsync::new(STORE).flags(FsyncFlags::DATASYNC).build(),
            (Kind::Punch, _) => opcode::Fallocate::new(STORE, left as u64)
                .offset(at)
                .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
                .build(),
            (Kind::Read, Some(to)) => opcode::Read::new(STORE, to, bytes).offset(at).build(),
            (Kind::Read, None) => match piece.rest[..] {
                [one] => opcode::Read::new(STORE, one.iov_base.cast(), bytes).offset(at).build(),
                ref many => opcode::Readv::new(STORE, many.as_ptr(), many.len() as u32).offset(at).build(),
            },
            (Kind::Write, from) => {
                // A write without bounce memory is none: `next_piece` lends it some before.
                let from = from.unwrap_or(std::ptr::null_mut());
                if pinned {
                    opcode::WriteFixed::new(STORE, from, bytes, 0).offset(at).build()
                } else {
                    opcode::Write::new(STORE, from, bytes).offset(at).build()
                }
            }
        };
        // SAFETY: bounce memory and `rest` of a piece are kept by this value until its completion, the client's memory by
        // the front.
        unsafe { self.uring.push(entry, index as u64) };
    }

    /// Takes completions.
    fn reap(&mut self, outbox: &mut Outbox) {
        let mut completed = std::mem::take(&mut self.completed);
        self.uring.take(outbox, |piece, result| completed.push((piece, result)));
        for (piece, result) in completed.drain(..) {
            if let Some(piece) = self.pieces.try_remove(piece as usize) {
                self.completed(piece, result, outbox);
            }
        }
        self.completed = completed;
        // What became free may be what others wait for; and a flush may begin.
        self.hand_out(outbox);
    }

    fn completed(&mut self, mut piece: Piece, result: i32, outbox: &mut Outbox) {
        let failed = || io::Error::from_raw_os_error(-result);
        let result = match (&piece.kind, usize::try_from(result)) {
            (Kind::Flush, Ok(_)) => return self.requests.flushed(Ok(()), outbox),
            // The kernel tells a failed write-back once: it is not asked again.
            (Kind::Flush, Err(_)) => return self.requests.flushed(Err(failed()), outbox),
            (_, Err(_)) if matches!(-result, libc::EINTR | libc::EAGAIN) => return self.start(piece),
            (Kind::Punch, Ok(_)) => Ok(()),
            // The medium cannot; a discard is a wish.
            (Kind::Punch, Err(_))
                if matches!(-result, libc::EOPNOTSUPP | libc::EINVAL | libc::ENODEV | libc::ENOSYS) =>
            {
                Ok(())
            }
            (_, Err(_)) => Err(failed().into()),
            (Kind::Read, Ok(0)) => Err(VolumeError::Truncated),
            (Kind::Write, Ok(0)) => Err(VolumeError::Io(io::ErrorKind::WriteZero.into())),
            (_, Ok(done)) if piece.done + done < piece.length => {
                piece.done += done;
                pieces::advance(&mut piece.rest, done);
                return self.start(piece);
            }
            (Kind::Read, Ok(_)) => self.decrypt(&piece),
            (Kind::Write, Ok(_)) => Ok(()),
        };
        self.over(piece, result, outbox);
    }

    /// Turns what was read into plaintext in the client's memory.
    fn decrypt(&self, piece: &Piece) -> Result<(), VolumeError> {
        // SAFETY: the slot belongs to the piece, the memory to its request, which the front keeps.
        unsafe {
            if let Some(slot) = piece.slot {
                let bounce = self.bounce.memory(slot);
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
}

/// Puts a write's plaintext into its bounce memory. A write without memory is one of zeros.
///
/// # Safety
///
/// `bounce` is as long as the piece, whose memory is valid.
unsafe fn fill_plain(piece: &Piece, bounce: *mut u8) {
    // SAFETY: passed on.
    unsafe {
        if piece.memory.is_empty() {
            std::ptr::write_bytes(bounce, 0, piece.length);
        } else {
            pieces::gather(&piece.memory, bounce);
        }
    }
}
