//! Keeps many requests under way at a store's helper, over a channel of this lane's own.
//!
//! Only finished ciphertext is copied into the channel's memory, and what comes out of it is copied before it is
//! decrypted: the helper can look into and change that memory at any time. When the helper is gone, requests wait here
//! for the next one and are sent again; none was answered, so none may have been overtaken.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::Arc,
};

use slab::Slab;
use vmseal_model::store_helper::{
    CHANNEL_BYTES, MAX_BATCH, MAX_DISCARD, MAX_UNDER_WAY, MESSAGE_BYTES, StoreMessage, StoreOp,
};

use super::{
    Operation, Outbox, Request, pieces,
    requests::{Flush, Given, Requests},
};
use crate::{
    aligned::Aligned,
    flush_gate::Bell,
    remote::{self, Link, Memory, Opened},
    volume::{Volume, VolumeError},
};

/// Bytes of a piece, and of a slot of the channel's memory.
const SLOT: usize = 128 << 10;
const SLOTS: usize = CHANNEL_BYTES / SLOT;
/// Most requests at a time.
const MAX_REQUESTS: usize = 128;
/// Most events looked at in one turn.
const EVENTS: usize = 16;
/// What epoll says for the channel and the bell; keys of watched descriptors are below.
const CHANNEL: u64 = 1 << 32;
const BELL: u64 = 2 << 32;

pub(super) struct Remote {
    volume: Arc<Volume>,
    link: Arc<Link>,
    bell: Arc<Bell>,
    epoll: OwnedFd,
    /// None while there is no helper.
    socket: Option<OwnedFd>,
    /// The channel's; of the last one while there is none.
    memory: Option<Memory>,
    memory_used: bool,
    free: Vec<u16>,
    /// Where data is encrypted and decrypted.
    bounce: Aligned,
    requests: Requests,
    pieces: Slab<Piece>,
    outgoing: VecDeque<StoreMessage>,
    watched: Vec<(u32, i32)>,
}

/// A part of a request, as the helper is asked for it.
struct Piece {
    message: StoreMessage,
    /// Its request; of no meaning for a flush.
    active: usize,
    slot: Option<u16>,
    /// Where a read goes.
    memory: Vec<libc::iovec>,
}

impl Remote {
    pub(super) fn new(volume: Arc<Volume>, link: Arc<Link>) -> io::Result<Self> {
        // SAFETY: no pointers; the descriptor is new and ours alone.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if epoll < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
        let bell = Arc::new(Bell::new()?);
        add(&epoll, bell.as_fd(), BELL, libc::EPOLLIN)?;
        // A write is durable when the helper answers.
        let requests = Requests::new(volume.clone(), bell.clone(), true);
        let mut remote = Self {
            volume,
            link,
            bell,
            epoll,
            socket: None,
            memory: None,
            memory_used: false,
            free: (0..SLOTS as u16).rev().collect(),
            bounce: Aligned::new(SLOT)?,
            requests,
            pieces: Slab::new(),
            outgoing: VecDeque::new(),
            watched: Vec::new(),
        };
        remote.connect()?;
        Ok(remote)
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
        add(&self.epoll, fd, u64::from(key), libc::EPOLLIN | libc::EPOLLRDHUP)?;
        self.watched.push((key, fd.as_raw_fd()));
        Ok(())
    }

    pub(super) fn unwatch(&mut self, key: u32) {
        let epoll = self.epoll.as_raw_fd();
        self.watched.retain(|&(watched, fd)| {
            if watched == key {
                // SAFETY: a descriptor that was closed already gives an error, which is as good.
                unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
            }
            watched != key
        });
    }

    pub(super) fn turn(&mut self, wait: bool, outbox: &mut Outbox) -> io::Result<()> {
        self.advance(outbox)?;
        let wait = wait && outbox.is_empty();
        if wait && self.requests.is_empty() && self.memory_used {
            self.memory.iter().for_each(Memory::release);
            self.memory_used = false;
        }
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        let count = loop {
            let timeout = if wait { -1 } else { 0 };
            // SAFETY: as many events as said.
            let count = unsafe {
                libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), EVENTS as libc::c_int, timeout)
            };
            match usize::try_from(count) {
                Ok(count) => break count,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        };
        for event in events.iter().take(count) {
            match event.u64 {
                CHANNEL => self.receive(outbox),
                // What it rings for is looked at in any case.
                BELL => {}
                key => outbox.ready.push_back(key as u32),
            }
        }
        self.advance(outbox)
    }

    pub(super) fn drain(&mut self, outbox: &mut Outbox) {
        // What is ready meanwhile is still said afterwards.
        let mut apart = Outbox::default();
        while !self.requests.is_empty() {
            if let Err(error) = self.turn(true, &mut apart) {
                crate::log::line(format_args!("cannot wait for requests under way: {error}"));
                crate::end_process(crate::EXIT_FAILED);
            }
            outbox.done.append(&mut apart.done);
            outbox.ready.append(&mut apart.ready);
        }
    }

    /// Everything that can be done without waiting.
    fn advance(&mut self, outbox: &mut Outbox) -> io::Result<()> {
        if self.socket.is_none() {
            self.connect()?;
        }
        if self.link.is_lost() {
            self.fail_all(outbox);
            return Ok(());
        }
        if self.socket.is_some() {
            self.hand_out(outbox);
            self.send();
            // The helper may have gone just now: the next one is asked for, or its bell is.
            if self.socket.is_none() {
                self.connect()?;
            }
        }
        Ok(())
    }

    /// Gets a channel, if there is a helper, and asks again for what the last one has not answered.
    fn connect(&mut self) -> io::Result<()> {
        let Opened::Channel(channel) = self.link.open(&self.bell)? else { return Ok(()) };
        add(&self.epoll, channel.socket.as_fd(), CHANNEL, libc::EPOLLIN | libc::EPOLLOUT)?;
        self.outgoing.clear();
        for (_, piece) in &self.pieces {
            let message = piece.message;
            if let (StoreOp::Write, Some(old)) = (message.op, &self.memory) {
                channel.memory.take_over(old, message.buffer as usize, message.length as usize);
            }
            self.outgoing.push_back(message);
        }
        self.memory = Some(channel.memory);
        self.socket = Some(channel.socket);
        self.send();
        Ok(())
    }

    /// Cuts requests into pieces, in turn, and begins a flush that may.
    fn hand_out(&mut self, outbox: &mut Outbox) {
        // One place is left for a flush.
        while self.pieces.len() < MAX_UNDER_WAY - 1
            && let Some(at) = self.requests.front()
        {
            let given = self.next_piece(at, outbox);
            if !self.requests.turn_over(at, &given, outbox) {
                break;
            }
        }
        match self.requests.begin_flush(outbox) {
            // The bell is always listened to.
            Flush::No | Flush::Later => {}
            Flush::Now => self.ask(usize::MAX, StoreOp::Flush, 0, 0, None, Vec::new()),
        }
    }

    /// Makes the next piece of a request.
    fn next_piece(&mut self, at: usize, outbox: &mut Outbox) -> Given {
        let Some(active) = self.requests.unfinished(at) else { return Given::All };
        let operation = active.request.operation;
        let (offset, left) = (active.request.offset + active.given, active.request.length - active.given);
        let (op, length) = match operation {
            Operation::Flush => return Given::All,
            Operation::Discard => (StoreOp::Discard, left.min(MAX_DISCARD)),
            Operation::Read => (StoreOp::Read, left.min(SLOT as u64)),
            Operation::Write { .. } | Operation::WriteZeroes { .. } => {
                (StoreOp::Write, left.min(SLOT as u64))
            }
        };
        let slot = if op == StoreOp::Discard { None } else { self.free.pop() };
        if op != StoreOp::Discard && slot.is_none() {
            return Given::NoRoom;
        }
        let mut memory = Vec::new();
        if matches!(operation, Operation::Read | Operation::Write { .. }) {
            pieces::take(&active.request.segments, &mut active.place, length as usize, &mut memory);
        }
        let given = self.requests.give(at, length);
        if let (StoreOp::Write, Some(slot)) = (op, slot)
            && let Err(error) = self.encrypt(slot, offset, length as usize, &memory)
        {
            self.free.push(slot);
            self.requests.piece_over(at, Err(error), outbox);
            return given;
        }
        self.ask(at, op, offset, length, slot, memory);
        given
    }

    /// Puts a write's ciphertext into a slot. Without memory it is one of zeros.
    fn encrypt(
        &mut self,
        slot: u16,
        offset: u64,
        length: usize,
        memory: &[libc::iovec],
    ) -> Result<(), VolumeError> {
        let bounce = self.bounce.base();
        let Some(shared) = &self.memory else { return Ok(()) };
        self.memory_used = true;
        // SAFETY: the bounce buffer is ours and as long as a piece may be; the memory is the request's, which the front
        // keeps. Plaintext never is in shared memory, not even for a moment.
        unsafe {
            if memory.is_empty() {
                std::ptr::write_bytes(bounce, 0, length);
            } else {
                pieces::gather(memory, bounce);
            }
            self.volume.encrypt_raw(offset, bounce, bounce, length)?;
            shared.copy_in(usize::from(slot) * SLOT, bounce, length);
        }
        Ok(())
    }

    fn ask(
        &mut self,
        active: usize,
        op: StoreOp,
        offset: u64,
        length: u64,
        slot: Option<u16>,
        memory: Vec<libc::iovec>,
    ) {
        let place = self.pieces.vacant_entry();
        let offset = if op == StoreOp::Flush { 0 } else { self.volume.layout().payload_offset + offset };
        let buffer = slot.map_or(0, |slot| u32::from(slot) * SLOT as u32);
        let token = place.key() as u64;
        let message = StoreMessage { token, op, flags: 0, errno: 0, offset, length: length as u32, buffer };
        place.insert(Piece { message, active, slot, memory });
        self.outgoing.push_back(message);
        self.memory_used |= slot.is_some();
    }

    /// Sends what is to be sent; what does not fit into the socket follows when it can be written to.
    fn send(&mut self) {
        while let Some(socket) = &self.socket
            && !self.outgoing.is_empty()
        {
            let count = self.outgoing.len().min(MAX_BATCH);
            let batch: Vec<u8> = self.outgoing.iter().take(count).flat_map(StoreMessage::encode).collect();
            match remote::send(socket.as_fd(), &batch, libc::MSG_DONTWAIT) {
                Ok(()) => drop(self.outgoing.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.socket = None,
            }
        }
    }

    /// Takes replies until there are no more.
    fn receive(&mut self, outbox: &mut Outbox) {
        let mut packet = [0; MESSAGE_BYTES * MAX_BATCH];
        while let Some(socket) = &self.socket {
            let replies = match remote::receive_now(socket.as_fd(), &mut packet) {
                Ok(got) => packet.get(..got).and_then(StoreMessage::decode_packet),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => None,
            };
            // Closed, or no helper of ours at the other end: both mean another channel.
            let Some(replies) = replies else {
                self.socket = None;
                return;
            };
            for reply in replies {
                if let Some(piece) = self.pieces.try_remove(reply.token as usize) {
                    let result = if reply.errno == 0 { Ok(()) } else { Err(remote::errno(reply.errno)) };
                    self.completed(piece, result, outbox);
                }
            }
        }
    }

    fn completed(&mut self, piece: Piece, result: io::Result<()>, outbox: &mut Outbox) {
        if matches!(&result, Err(error) if error.raw_os_error() == Some(libc::ESHUTDOWN)) {
            self.link.lose();
        }
        if piece.message.op == StoreOp::Flush {
            self.requests.flushed(result, outbox);
            return;
        }
        let result = match result {
            Ok(()) if piece.message.op == StoreOp::Read => self.decrypt(&piece),
            // The medium cannot; a discard is a wish.
            Err(error)
                if piece.message.op == StoreOp::Discard
                    && matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) =>
            {
                Ok(())
            }
            other => other.map_err(VolumeError::from),
        };
        self.free.extend(piece.slot);
        self.requests.piece_over(piece.active, result, outbox);
    }

    /// Turns what was read into plaintext in the client's memory.
    fn decrypt(&mut self, piece: &Piece) -> Result<(), VolumeError> {
        let (bounce, length) = (self.bounce.base(), piece.message.length as usize);
        let Some(shared) = &self.memory else { return Ok(()) };
        let offset = piece.message.offset - self.volume.layout().payload_offset;
        // SAFETY: the bounce buffer is ours and as long as a piece may be; the memory is the request's, which the front
        // keeps.
        unsafe {
            shared.copy_out(piece.message.buffer as usize, bounce, length);
            self.volume.decrypt_raw(offset, bounce, length)?;
            pieces::scatter(bounce, &piece.memory);
        }
        Ok(())
    }

    /// Fails everything, for the store is somebody else's now.
    fn fail_all(&mut self, outbox: &mut Outbox) {
        let gone = || io::Error::from_raw_os_error(libc::ESHUTDOWN);
        // A helper that still answers finds nobody who waits, and writes into memory of the channel only.
        self.socket = None;
        self.outgoing.clear();
        self.pieces.clear();
        self.free = (0..SLOTS as u16).rev().collect();
        self.requests.fail_all(gone, outbox);
    }
}

/// Watches a descriptor: an event each time it becomes ready. Edges, so nothing has to be switched off again.
fn add(epoll: &OwnedFd, fd: BorrowedFd<'_>, data: u64, events: libc::c_int) -> io::Result<()> {
    let mut event = libc::epoll_event { events: (events | libc::EPOLLET).cast_unsigned(), u64: data };
    // SAFETY: both descriptors are open; the event is copied.
    let added =
        unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd.as_raw_fd(), &mut event) };
    if added != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
