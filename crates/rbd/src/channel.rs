//! One socket and its memory: requests go to the image as they come, replies go back as they are ready.
//!
//! A reply is sent by the librbd thread that got the outcome; while one sends, others add theirs to the next packet.

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use vmseal_model::store_helper::{CHANNEL_BYTES, MAX_BATCH, MESSAGE_BYTES, StoreMessage, StoreOp};

use crate::{image::Image, library::Handle};

/// Memory of a channel, as this process has it mapped.
struct Memory(*mut u8);

// SAFETY: a shared mapping of the process, never moved; only the kernel and librbd look into it.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: exactly this mapping; whoever uses it holds the channel, which is gone.
        unsafe { libc::munmap(self.0.cast(), CHANNEL_BYTES) };
    }
}

/// A channel.
pub struct Channel {
    socket: OwnedFd,
    memory: Memory,
    image: Arc<Image>,
    lost: Arc<AtomicBool>,
    state: Mutex<State>,
    idle: Condvar,
}

#[derive(Default)]
struct State {
    under_way: usize,
    replies: Vec<StoreMessage>,
    sending: bool,
}

/// What one request needs until its outcome.
struct Pending {
    channel: Arc<Channel>,
    request: StoreMessage,
}

impl Channel {
    /// A channel on this socket with new memory; gives the descriptor of that for the other side.
    ///
    /// # Errors
    ///
    /// No memory or descriptor left.
    pub fn new(
        socket: OwnedFd,
        image: Arc<Image>,
        lost: Arc<AtomicBool>,
    ) -> io::Result<(Arc<Self>, OwnedFd)> {
        let memory = sealed_memory()?;
        // SAFETY: a new shared mapping of a descriptor of this length, at an address of the kernel's choice.
        let base = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(ptr::null_mut(), CHANNEL_BYTES, protection, libc::MAP_SHARED, memory.as_raw_fd(), 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory_here = Memory(base.cast());
        let (state, idle) = (Mutex::default(), Condvar::new());
        Ok((Arc::new(Self { socket, memory: memory_here, image, lost, state, idle }), memory))
    }

    /// The socket.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Carries requests out until the other side hangs up or sends what is no request, and all outcomes are known. What
    /// is no request to the image goes to `other`; false from it ends the channel.
    pub fn run(self: &Arc<Self>, mut other: impl FnMut(&StoreMessage) -> bool) {
        let mut packet = [0; MESSAGE_BYTES * MAX_BATCH];
        'packets: while let Ok(got) = receive(self.socket.as_fd(), &mut packet) {
            let Some(requests) = packet.get(..got).and_then(StoreMessage::decode_packet) else { break };
            for request in requests {
                match request.op {
                    StoreOp::Hello | StoreOp::Open => {
                        if !other(&request) {
                            break 'packets;
                        }
                    }
                    _ if !request.is_within(self.image.bytes()) => self.answer(request, libc::EINVAL),
                    // Nothing may be tried again by a holder whose lock is gone.
                    _ if self.lost.load(Ordering::Acquire) => self.answer(request, libc::ESHUTDOWN),
                    _ => self.start(request),
                }
            }
        }
        let mut state = self.state();
        while state.under_way > 0 || state.sending {
            state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn start(self: &Arc<Self>, request: StoreMessage) {
        self.state().under_way += 1;
        let pending = Box::into_raw(Box::new(Pending { channel: self.clone(), request }));
        let result = self.image.completion(pending.cast(), completed).and_then(|completion| {
            let (lib, image) = (self.image.library(), self.image.handle());
            let (offset, length) = (request.offset, request.length as usize);
            let buffer = self.memory.0.wrapping_add(request.buffer as usize);
            // SAFETY: the image is open as long as the channel, which `pending` holds; `is_within` has checked that
            // the buffer lies in the channel's memory, which stays mapped as long.
            let result = unsafe {
                match request.op {
                    StoreOp::Read => (lib.rbd_aio_read)(image, offset, length, buffer.cast(), completion),
                    StoreOp::Write => (lib.rbd_aio_write)(image, offset, length, buffer.cast(), completion),
                    StoreOp::Discard => (lib.rbd_aio_discard)(image, offset, length as u64, completion),
                    StoreOp::Flush | StoreOp::Open | StoreOp::Hello => (lib.rbd_aio_flush)(image, completion),
                }
            };
            if result < 0 {
                // SAFETY: librbd did not take it.
                unsafe { (lib.rbd_aio_release)(completion) };
                return Err(-result);
            }
            Ok(())
        });
        if let Err(errno) = result {
            // SAFETY: made above, and the callback will not be called.
            let pending = unsafe { Box::from_raw(pending) };
            self.finish(pending.request, errno);
        }
    }

    /// The outcome of a request that was started.
    fn finish(&self, request: StoreMessage, errno: i32) {
        // EROFS: the lock went without a blocklisting. Either way somebody else may be writing.
        let errno = if errno == libc::EROFS { libc::ESHUTDOWN } else { errno };
        if errno == libc::ESHUTDOWN && !self.lost.swap(true, Ordering::AcqRel) {
            crate::line(format_args!(
                "{}: the exclusive lock is lost, another host took it",
                self.image.shown()
            ));
        }
        self.answer(request, errno);
        let mut state = self.state();
        state.under_way -= 1;
        self.idle.notify_all();
    }

    fn answer(&self, request: StoreMessage, errno: i32) {
        let mut state = self.state();
        state.replies.push(StoreMessage { errno: errno.unsigned_abs(), ..request });
        if state.sending {
            return;
        }
        state.sending = true;
        while !state.replies.is_empty() {
            let batch: Vec<u8> = {
                let count = state.replies.len().min(MAX_BATCH);
                state.replies.drain(..count).flat_map(|reply| reply.encode()).collect()
            };
            drop(state);
            // A worker that is gone needs no answer.
            let _ = send(self.socket.as_fd(), &batch, &[]);
            state = self.state();
        }
        state.sending = false;
        self.idle.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Called by librbd, once for each completion it took.
extern "C" fn completed(completion: Handle, argument: *mut libc::c_void) {
    // SAFETY: the argument is the `Pending` this completion was made with, and nobody else takes it.
    let pending = unsafe { Box::from_raw(argument.cast::<Pending>()) };
    let (channel, request) = (&pending.channel, pending.request);
    let lib = channel.image.library();
    // SAFETY: the completion is done and used by nobody afterwards.
    let result = unsafe {
        let result = (lib.rbd_aio_get_return_value)(completion);
        (lib.rbd_aio_release)(completion);
        result
    };
    let errno = match (request.op, usize::try_from(result)) {
        (StoreOp::Read, Ok(got)) if got < request.length as usize => libc::EIO,
        (_, Ok(_)) => 0,
        (_, Err(_)) => i32::try_from(-result).unwrap_or(libc::EIO),
    };
    channel.finish(request, errno);
}

/// Memory that can neither shrink nor grow: nobody's access to it ends in a SIGBUS.
fn sealed_memory() -> io::Result<OwnedFd> {
    // SAFETY: a NUL-terminated name; the descriptor is new and ours alone; the other calls take integers.
    unsafe {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        let fd = libc::memfd_create(c"vmseal-ciphertext".as_ptr(), flags);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = OwnedFd::from_raw_fd(fd);
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        if libc::ftruncate(fd.as_raw_fd(), CHANNEL_BYTES as libc::off_t) != 0
            || libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) != 0
        {
            return Err(io::Error::last_os_error());
        }
        Ok(fd)
    }
}

/// A pair of connected sockets that keep packets apart.
pub(crate) fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut pair = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: room for two descriptors, which are new and ours alone.
    unsafe {
        if libc::socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1])))
    }
}

/// Receives a packet; the end of the connection is an error.
pub(crate) fn receive(socket: BorrowedFd<'_>, packet: &mut [u8]) -> io::Result<usize> {
    loop {
        // SAFETY: as many bytes as the buffer has.
        let got = unsafe { libc::recv(socket.as_raw_fd(), packet.as_mut_ptr().cast(), packet.len(), 0) };
        match usize::try_from(got) {
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

/// Sends a packet with up to two descriptors.
pub(crate) fn send(socket: BorrowedFd<'_>, packet: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    const WORDS: usize = 8;
    let mut ancillary = [0u64; WORDS];
    let mut part = libc::iovec { iov_base: packet.as_ptr().cast_mut().cast(), iov_len: packet.len() };
    // SAFETY: msghdr is plain data; all zero is its empty value.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    let payload = fds.len() * mem::size_of::<RawFd>();
    // SAFETY: CMSG_SPACE is arithmetic.
    let space = unsafe { libc::CMSG_SPACE(payload as u32) } as usize;
    if space > WORDS * 8 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    if !fds.is_empty() {
        message.msg_control = ancillary.as_mut_ptr().cast();
        // SAFETY: the header and its data lie within `ancillary`, which is aligned; BorrowedFd is an int in memory.
        unsafe {
            message.msg_controllen = space as _;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(payload as u32) as _;
            ptr::copy_nonoverlapping(fds.as_ptr().cast::<u8>(), libc::CMSG_DATA(header), payload);
        }
    }
    loop {
        // SAFETY: `message` points at values that outlive the call, which only reads them.
        if unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
