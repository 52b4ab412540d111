//! Ciphertext on a network store, kept there by a helper process: this one has keys and therefore no network.
//!
//! The volume's descriptor is a listening socket then. A helper connects to it, brings shared memory and serves
//! requests; only ciphertext ever lies in that memory. A helper that dies stalls the disk until another connects, and
//! what was under way is asked again. A helper that lost the store's lock ends the disk: see [`Link::is_lost`].
//! Messages: `docs/formats/store-helper.md`.
//!
//! Here are the connection and synchronous access to it; lanes have channels of their own (`lane/remote.rs`).

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use vmseal_model::store_helper::{
    CHANNEL_BYTES, MAX_BATCH, MAX_DISCARD, MESSAGE_BYTES, StoreMessage, StoreOp,
};

use crate::{
    descriptors::{self, is_packet_listener, peer_of},
    flush_gate::Bell,
    log,
    store::{Run, Store},
};

/// Bytes of one synchronous transfer.
const TRANSFER: usize = 1 << 20;
/// How long a new helper may take to say its first word.
const GREETING: libc::timeval = libc::timeval { tv_sec: 10, tv_usec: 0 };
/// Pause after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Memory of a channel, shared with the helper.
pub(crate) struct Memory(*mut u8);

// SAFETY: the mapping belongs to the process, and this handle is its only owner.
unsafe impl Send for Memory {}

impl Memory {
    fn map(fd: &OwnedFd) -> io::Result<Self> {
        // SAFETY: fcntl without a pointer; fstat fills plain data; a new mapping at an address of the kernel's choice.
        unsafe {
            let seals = libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS);
            let mut stat: libc::stat = mem::zeroed();
            let sized = libc::fstat(fd.as_raw_fd(), &mut stat) == 0 && stat.st_size >= CHANNEL_BYTES as i64;
            // Memory that could shrink would end this process with a SIGBUS.
            if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 || !sized {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let base =
                libc::mmap(ptr::null_mut(), CHANNEL_BYTES, protection, libc::MAP_SHARED, fd.as_raw_fd(), 0);
            if base == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self(base.cast())) }
        }
    }

    /// Copies bytes that lie at `at` to memory of ours.
    ///
    /// # Safety
    ///
    /// `to` is valid for writing `len` bytes.
    pub(crate) unsafe fn copy_out(&self, at: usize, to: *mut u8, len: usize) {
        debug_assert!(at + len <= CHANNEL_BYTES);
        // SAFETY: within the mapping; whatever the helper does to it meanwhile, these are only bytes.
        unsafe { ptr::copy_nonoverlapping(self.0.add(at), to, len) };
    }

    /// Copies ciphertext to `at`.
    ///
    /// # Safety
    ///
    /// `from` is valid for reading `len` bytes.
    pub(crate) unsafe fn copy_in(&self, at: usize, from: *const u8, len: usize) {
        debug_assert!(at + len <= CHANNEL_BYTES);
        // SAFETY: as for `copy_out`.
        unsafe { ptr::copy_nonoverlapping(from, self.0.add(at), len) };
    }

    /// Copies what lies at `at` in another channel's memory to the same place here.
    pub(crate) fn take_over(&self, other: &Self, at: usize, len: usize) {
        // SAFETY: the other mapping is as long.
        unsafe { self.copy_in(at, other.0.add(at), len) };
    }

    /// Gives the pages back, here and in the helper. Nothing may be under way.
    pub(crate) fn release(&self) {
        // SAFETY: the range is exactly this mapping.
        unsafe { libc::madvise(self.0.cast(), CHANNEL_BYTES, libc::MADV_REMOVE) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: exactly this mapping, and nothing borrows it any more.
        unsafe { libc::munmap(self.0.cast(), CHANNEL_BYTES) };
    }
}

/// A socket to the helper and the memory that goes with it.
pub(crate) struct Channel {
    pub(crate) socket: OwnedFd,
    pub(crate) memory: Memory,
}

impl Channel {
    /// Asks one thing and waits for the answer. An error means that the helper is gone or not to be used any more.
    fn ask(&self, request: StoreMessage, fds: &mut Vec<OwnedFd>) -> io::Result<StoreMessage> {
        send(self.socket.as_fd(), &request.encode(), 0)?;
        let mut packet = [0; MESSAGE_BYTES * MAX_BATCH];
        let got = receive(self.socket.as_fd(), &mut packet, fds)?;
        match packet.get(..got).and_then(StoreMessage::decode_packet).as_deref() {
            Some(&[reply]) if reply.token == request.token && reply.op == request.op => Ok(reply),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// What became of a wish for a channel.
pub(crate) enum Opened {
    /// Here it is.
    Channel(Channel),
    /// There is no helper now; the bell rings when there is.
    Later,
    /// The store's lock is lost.
    Lost,
}

/// The way to the helper, whoever that is at the moment.
pub struct Link {
    listener: OwnedFd,
    owner: u32,
    /// Whose the listener is: who made it gives it to the user that helpers run as.
    helper: u32,
    lost: AtomicBool,
    ending: Bell,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Once known it does not change.
    bytes: Option<u64>,
    first: Option<Channel>,
    waiting: Vec<Arc<Bell>>,
}

impl State {
    /// Has to do with this helper no more. It and the thread that keeps the link see that.
    fn part(&mut self) {
        if let Some(first) = self.first.take() {
            // SAFETY: an open socket.
            unsafe { libc::shutdown(first.socket.as_raw_fd(), libc::SHUT_RDWR) };
        }
    }
}

impl Link {
    /// Whether a helper is there, which has the lock then.
    pub(crate) fn is_connected(&self) -> bool {
        self.state().first.is_some() && !self.is_lost()
    }

    /// Whether the store's lock was taken from us. Then nothing works any more, for somebody else has the disk.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Says that the lock is lost, once.
    pub(crate) fn lose(&self) {
        if !self.lost.swap(true, Ordering::AcqRel) {
            log::line(format_args!(
                "the lock of a volume's store is lost, another host took it: every request fails from now on"
            ));
        }
        let mut state = self.state();
        state.waiting.drain(..).for_each(|bell| bell.ring());
        self.changed.notify_all();
    }

    /// Another channel, for a lane.
    pub(crate) fn open(&self, bell: &Arc<Bell>) -> io::Result<Opened> {
        let mut state = self.state();
        if self.is_lost() {
            return Ok(Opened::Lost);
        }
        if let Some(first) = &state.first {
            let mut fds = Vec::new();
            let request =
                StoreMessage { op: StoreOp::Open, flags: 0, token: 0, length: 0, ..StoreMessage::hello(0) };
            match first.ask(request, &mut fds) {
                Ok(reply) if reply.errno != 0 => return Err(errno(reply.errno)),
                Ok(_) => match <[OwnedFd; 2]>::try_from(fds) {
                    Ok([socket, memory]) => {
                        return Ok(Opened::Channel(Channel { socket, memory: Memory::map(&memory)? }));
                    }
                    Err(_) => return Err(io::ErrorKind::InvalidData.into()),
                },
                Err(_) => state.part(),
            }
        }
        if !state.waiting.iter().any(|waiting| Arc::ptr_eq(waiting, bell)) {
            state.waiting.push(bell.clone());
        }
        Ok(Opened::Later)
    }

    /// Asks one thing of whoever is the helper, again and again until one answers.
    ///
    /// `before` puts data into the channel's memory, `after` takes it out.
    fn ask(
        &self,
        request: StoreMessage,
        before: impl Fn(&Memory),
        after: impl FnOnce(&Memory),
    ) -> io::Result<()> {
        let mut state = self.state();
        loop {
            if self.is_lost() {
                return Err(errno(libc::ESHUTDOWN.unsigned_abs()));
            }
            let Some(first) = &state.first else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            before(&first.memory);
            match first.ask(request, &mut Vec::new()) {
                Ok(StoreMessage { errno: 0, .. }) => {
                    after(&first.memory);
                    return Ok(());
                }
                Ok(reply) => {
                    drop(state);
                    if reply.errno == libc::ESHUTDOWN.unsigned_abs() {
                        self.lose();
                    }
                    return Err(errno(reply.errno));
                }
                Err(_) => state.part(),
            }
        }
    }

    /// Takes one helper after another, until the store is dropped.
    fn keep(&self) {
        while let Some(socket) = self.next_connection() {
            let hangs_up = match self.greet(socket) {
                Ok(socket) => socket,
                Err(error) => {
                    log::line(format_args!("a store helper was turned away: {error}"));
                    continue;
                }
            };
            if self.wait_for(hangs_up.as_fd(), libc::POLLRDHUP) {
                log::line(format_args!("the store helper is gone; requests wait for the next one"));
                self.state().part();
            }
        }
    }

    fn next_connection(&self) -> Option<OwnedFd> {
        while self.wait_for(self.listener.as_fd(), libc::POLLIN) {
            // SAFETY: no address is asked for; the descriptor is new and ours alone.
            let fd = unsafe {
                let flags = libc::SOCK_CLOEXEC;
                libc::accept4(self.listener.as_raw_fd(), ptr::null_mut(), ptr::null_mut(), flags)
            };
            if fd >= 0 {
                // SAFETY: as above.
                return Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
            thread::sleep(ACCEPT_PAUSE);
        }
        None
    }

    /// Waits for an event on a socket; false when the store is dropped.
    fn wait_for(&self, fd: BorrowedFd<'_>, events: libc::c_short) -> bool {
        let entry = |fd: BorrowedFd<'_>, events| libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
        let mut polled = [entry(fd, events), entry(self.ending.as_fd(), libc::POLLIN)];
        loop {
            // SAFETY: two entries, valid for the call.
            let ready = unsafe { libc::poll(polled.as_mut_ptr(), 2, -1) };
            if polled[1].revents != 0 {
                return false;
            }
            if ready > 0 {
                return true;
            }
        }
    }

    /// Makes a connection the link's, if it is a helper's; gives its socket, to be watched.
    fn greet(&self, socket: OwnedFd) -> io::Result<OwnedFd> {
        let peer = peer_of(&socket)?;
        // SAFETY: geteuid has no arguments.
        let own = unsafe { libc::geteuid() };
        if ![0, self.owner, self.helper, own].contains(&peer.uid) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        set_timeout(&socket, GREETING)?;
        let (mut packet, mut fds) = ([0; MESSAGE_BYTES], Vec::new());
        let got = receive(socket.as_fd(), &mut packet, &mut fds)?;
        let hello = packet.get(..got).and_then(StoreMessage::decode_packet);
        let hello = hello.and_then(|messages| messages.first().copied()).ok_or(io::ErrorKind::InvalidData)?;
        let mut state = self.state();
        let known = state.bytes.unwrap_or(hello.offset);
        let fits = hello == StoreMessage::hello(hello.offset) && hello.offset >= known;
        let reply = StoreMessage { errno: if fits { 0 } else { libc::EPROTO.unsigned_abs() }, ..hello };
        send(socket.as_fd(), &reply.encode(), 0)?;
        let [memory] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| io::ErrorKind::InvalidData)?;
        if !fits {
            return Err(io::Error::other("it is of another release, or its store has become shorter"));
        }
        set_timeout(&socket, libc::timeval { tv_sec: 0, tv_usec: 0 })?;
        let watched = socket.try_clone()?;
        state.bytes = Some(known);
        state.first = Some(Channel { socket, memory: Memory::map(&memory)? });
        state.waiting.drain(..).for_each(|bell| bell.ring());
        self.changed.notify_all();
        drop(state);
        log::line(format_args!("store helper {} serves a volume of {known} bytes", peer.pid));
        Ok(watched)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A store behind a helper.
pub struct RemoteStore {
    link: Arc<Link>,
    bytes: u64,
}

impl RemoteStore {
    /// Whether a volume's descriptor is a socket for a helper.
    pub fn is_meant_by(fd: &OwnedFd) -> bool {
        is_packet_listener(fd)
    }

    /// A store whose helper connects to `listener`: root, `owner`, whoever the listener belongs to (`fchown`), or this
    /// process's own user. Waits for the first one, unless it is known how many bytes the store has at least.
    ///
    /// # Errors
    ///
    /// No thread or descriptor left.
    pub fn new(listener: OwnedFd, owner: u32, bytes: Option<u64>) -> io::Result<Self> {
        // SAFETY: fstat fills plain data, of an open descriptor.
        let helper = unsafe {
            let mut stat: libc::stat = mem::zeroed();
            if libc::fstat(listener.as_raw_fd(), &mut stat) != 0 {
                return Err(io::Error::last_os_error());
            }
            stat.st_uid
        };
        let link = Arc::new(Link {
            listener,
            owner,
            helper,
            lost: AtomicBool::new(false),
            ending: Bell::new()?,
            state: Mutex::new(State { bytes, ..State::default() }),
            changed: Condvar::new(),
        });
        let kept = link.clone();
        thread::Builder::new().name("store".into()).spawn(move || kept.keep())?;
        let mut state = link.state();
        let bytes = loop {
            match state.bytes {
                Some(bytes) => break bytes,
                None => state = link.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(state);
        Ok(Self { link, bytes })
    }

    fn request(op: StoreOp, offset: u64, length: u64) -> StoreMessage {
        StoreMessage { token: 0, op, flags: 0, errno: 0, offset, length: length as u32, buffer: 0 }
    }
}

impl Store for RemoteStore {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        let within = self.bytes.saturating_sub(at).min(buf.len() as u64) as usize;
        let mut done = 0;
        for piece in buf.get_mut(..within).unwrap_or_default().chunks_mut(TRANSFER) {
            let request = Self::request(StoreOp::Read, at + done as u64, piece.len() as u64);
            done += piece.len();
            // SAFETY: an exclusive slice.
            let take = |memory: &Memory| unsafe { memory.copy_out(0, piece.as_mut_ptr(), piece.len()) };
            self.link.ask(request, |_| {}, take)?;
        }
        Ok(done)
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> io::Result<()> {
        // An image has its full size from the start; it is thin by itself.
        if at.checked_add(buf.len() as u64).is_none_or(|end| end > self.bytes) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        for (index, piece) in buf.chunks(TRANSFER).enumerate() {
            let request = Self::request(StoreOp::Write, at + (index * TRANSFER) as u64, piece.len() as u64);
            // SAFETY: a slice.
            let fill = |memory: &Memory| unsafe { memory.copy_in(0, piece.as_ptr(), piece.len()) };
            self.link.ask(request, fill, |_| {})?;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.link.ask(Self::request(StoreOp::Flush, 0, 0), |_| {}, |_| {})
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(MAX_DISCARD);
            self.link.ask(Self::request(StoreOp::Discard, at + done, piece), |_| {}, |_| {})?;
            done += piece;
        }
        Ok(())
    }

    fn run_at(&self, _at: u64, end: u64) -> Run {
        Run { end, hole: false }
    }

    fn link(&self) -> Option<&Arc<Link>> {
        Some(&self.link)
    }
}

impl Drop for RemoteStore {
    fn drop(&mut self) {
        self.link.ending.ring();
    }
}

/// What a helper answered.
pub(crate) fn errno(errno: u32) -> io::Error {
    io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(libc::EIO))
}

fn set_timeout(socket: &OwnedFd, time: libc::timeval) -> io::Result<()> {
    let length = mem::size_of_val(&time) as libc::socklen_t;
    let (fd, value) = (socket.as_raw_fd(), (&raw const time).cast());
    // SAFETY: an open socket and a value of the length that is said.
    if unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, value, length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sends one packet.
pub(crate) fn send(socket: BorrowedFd<'_>, packet: &[u8], flags: libc::c_int) -> io::Result<()> {
    loop {
        let flags = flags | libc::MSG_NOSIGNAL;
        // SAFETY: as many bytes as the slice has.
        if unsafe { libc::send(socket.as_raw_fd(), packet.as_ptr().cast(), packet.len(), flags) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Receives one packet without waiting for it; the end of the connection is an error.
pub(crate) fn receive_now(socket: BorrowedFd<'_>, packet: &mut [u8]) -> io::Result<usize> {
    loop {
        let (fd, to) = (socket.as_raw_fd(), packet.as_mut_ptr().cast());
        // SAFETY: as many bytes as the slice has.
        match usize::try_from(unsafe { libc::recv(fd, to, packet.len(), libc::MSG_DONTWAIT) }) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => return Ok(got),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Receives one packet and up to two descriptors; the end of the connection is an error.
fn receive(socket: BorrowedFd<'_>, packet: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let received = descriptors::receive_with_fds(socket, packet, &mut [0; 4])?;
    fds.extend(received.fds);
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(received.bytes)
}
