//! The helper's life: the image is opened and locked once; then one worker after another is served, each found by
//! connecting to the socket its keeper holds. The next is not greeted before everything the last one asked has ended:
//! a late write of a dead worker must not come after a new one of its successor.

use std::{
    ffi::CString,
    io, mem,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use vmseal_model::store_helper::{MAX_CHANNELS, StoreMessage, StoreOp};

use crate::{
    channel::{self, Channel},
    image::Image,
};

/// Why a helper ended that was not told to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Its socket's path cannot be one.
    #[error("{0} is no path of a unix socket")]
    Path(String),
    /// Resources.
    #[error("helper cannot go on")]
    Io(#[from] io::Error),
    /// The other side turned it away.
    #[error(
        "the disk process refuses this helper: both must be of one release and the image as long as before"
    )]
    Refused,
}

/// What ends a helper from outside.
#[derive(Default)]
pub struct Stop {
    asked: AtomicBool,
    socket: Mutex<Option<OwnedFd>>,
}

impl Stop {
    /// Ends the helper once everything under way has ended.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::Release);
        if let Some(socket) = &*self.socket.lock().unwrap_or_else(PoisonError::into_inner) {
            // SAFETY: an open socket.
            unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
        }
    }

    fn set(&self, socket: Option<OwnedFd>) -> bool {
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = socket;
        !self.asked.load(Ordering::Acquire)
    }
}

/// Serves the workers behind the socket at `path` until nobody listens there any more, or `stop`.
///
/// # Errors
///
/// [`ServeError`].
pub fn serve(image: Image, path: &Path, stop: &Stop) -> Result<(), ServeError> {
    let mut image = Arc::new(image);
    let lost = Arc::new(AtomicBool::new(false));
    while let Some(socket) = connect(path)? {
        if !stop.set(Some(socket.try_clone()?)) {
            break;
        }
        let done = one_worker(socket, &image, &lost);
        done?;
        if !stop.set(None) {
            break;
        }
    }
    // Everything asked has ended, but the thread of librbd that said so may still be on its way out. The image is
    // closed here and not there: that gives the lock back before this process ends.
    while let Err(shared) = Arc::try_unwrap(image).map(drop) {
        image = shared;
        thread::yield_now();
    }
    Ok(())
}

/// Serves one worker to its end.
fn one_worker(socket: OwnedFd, image: &Arc<Image>, lost: &Arc<AtomicBool>) -> Result<(), ServeError> {
    let (first, memory) = Channel::new(socket, image.clone(), lost.clone())?;
    let hello = StoreMessage::hello(image.bytes());
    if channel::send(first.socket(), &hello.encode(), &[memory.as_fd()]).is_err() {
        return Ok(());
    }
    drop(memory);
    let mut others: Vec<(OwnedFd, JoinHandle<()>)> = Vec::new();
    let mut refused = false;
    let mut greeted = false;
    first.run(|message| {
        match message.op {
            StoreOp::Hello => {
                greeted = true;
                refused = *message != hello;
                return !refused;
            }
            _ if !greeted => return false,
            _ => {}
        }
        others.retain(|(_, thread)| !thread.is_finished());
        let opened = if others.len() < MAX_CHANNELS {
            open(image, lost)
        } else {
            Err(io::Error::from_raw_os_error(libc::EMFILE))
        };
        match opened {
            Ok((end, theirs, memory, thread)) => {
                others.push((end, thread));
                let reply = StoreMessage { errno: 0, ..*message };
                channel::send(first.socket(), &reply.encode(), &[theirs.as_fd(), memory.as_fd()]).is_ok()
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO).unsigned_abs();
                channel::send(first.socket(), &StoreMessage { errno, ..*message }.encode(), &[]).is_ok()
            }
        }
    });
    for (end, thread) in others {
        // SAFETY: an open socket. Its channel sees the end, and ends when all it was asked has.
        unsafe { libc::shutdown(end.as_raw_fd(), libc::SHUT_RDWR) };
        let _ = thread.join();
    }
    if refused { Err(ServeError::Refused) } else { Ok(()) }
}

/// Opens another channel: our hold on its socket, the worker's end, its memory and the thread that serves it.
fn open(
    image: &Arc<Image>,
    lost: &Arc<AtomicBool>,
) -> io::Result<(OwnedFd, OwnedFd, OwnedFd, JoinHandle<()>)> {
    let (ours, theirs) = channel::socket_pair()?;
    let end = ours.try_clone()?;
    let (channel, memory) = Channel::new(ours, image.clone(), lost.clone())?;
    let thread = thread::Builder::new().name("channel".into()).spawn(move || channel.run(|_| false))?;
    Ok((end, theirs, memory, thread))
}

/// A connection to whoever holds the socket; `None` when nobody does any more.
fn connect(path: &Path) -> Result<Option<OwnedFd>, ServeError> {
    let wrong = || ServeError::Path(path.display().to_string());
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| wrong())?;
    // SAFETY: sockaddr_un is plain data; all zero is its empty value.
    let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = name.as_bytes_with_nul();
    if bytes.len() > address.sun_path.len() {
        return Err(wrong());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    // SAFETY: the descriptor is new and ours alone; the address has the length that is said.
    unsafe {
        let fd = libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error().into());
        }
        let socket = OwnedFd::from_raw_fd(fd);
        let length = mem::size_of_val(&address) as libc::socklen_t;
        if libc::connect(fd, (&raw const address).cast(), length) == 0 {
            return Ok(Some(socket));
        }
        match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::ECONNREFUSED | libc::ENOENT)) => Ok(None),
            error => Err(error.into()),
        }
    }
}
