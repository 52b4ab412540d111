//! One disk as it is shown: its volume, and the one process that uses it.
//!
//! Several connections of one process are one client (multi-conn). A second process waits until the first is gone if
//! the first has hung up already, and is refused otherwise: two QEMUs on one disk destroy it.

use std::{
    fmt, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use vmseal_model::{
    control::{ExportKind, ExportStatus},
    id::DiskId,
};

use crate::{
    descriptors::{hung_up, peer_handle, ready},
    flush_gate::Bell,
    log::Throttle,
    ublk::Seat,
    vhost_user::Link,
    volume::Volume,
};

/// Most connections of the one client.
pub const MAX_CONNECTIONS: usize = 16;
/// How long a new process waits for one that has hung up to be dealt with.
const HANG_UP_WAIT: Duration = Duration::from_secs(5);

/// Why a client is refused although it is who it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdmitError {
    /// Another process has the disk.
    #[error("process {pid} wants the disk, which process {holder} is using")]
    InUse {
        /// Who knocks.
        pid: i32,
        /// Who has it.
        holder: i32,
    },
    /// It has come back before what it had begun was done.
    #[error(
        "process {pid} comes back while requests of its last connection are under way: storage is slow or hangs"
    )]
    Unfinished {
        /// Who knocks.
        pid: i32,
    },
    /// Too many connections.
    #[error("process {pid} has {MAX_CONNECTIONS} connections already")]
    TooMany {
        /// Whose.
        pid: i32,
    },
    /// This process is about to end.
    #[error("process {pid} connects while this process ends")]
    Ending {
        /// Who knocks.
        pid: i32,
    },
    /// No descriptor left.
    #[error("connection cannot be kept")]
    Io(#[from] io::Error),
}

/// One disk.
pub struct Export {
    disk: DiskId,
    name: String,
    target: String,
    kind: ExportKind,
    serial: String,
    volume: Arc<Volume>,
    link: Link,
    seat: Seat,
    clients: Mutex<Clients>,
    changed: Condvar,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    refused: AtomicU64,
    refusals: Throttle,
    events: Throttle,
    /// Rings when no more clients are to be taken from the listener.
    stop: Option<Bell>,
}

#[derive(Default)]
struct Clients {
    /// No new ones: this process ends.
    closed: bool,
    /// Connections that were finished stay open until the process ends, and they with it: a client that sees its end
    /// connects again, and must find the next worker.
    finishing: bool,
    /// The process that has the disk; zero if none.
    pid: i32,
    /// A handle of it, where the kernel gives one (Linux 6.5): its number may be another process's by now.
    handle: Option<OwnedFd>,
    next_id: u64,
    connections: Vec<(u64, UnixStream)>,
    finished: Vec<UnixStream>,
}

impl Clients {
    /// Whether a process with this number that connects now is the one that has the disk.
    fn is(&self, pid: i32) -> bool {
        let ended = self.handle.as_ref().is_some_and(|handle| {
            let [ended] = ready([Some(handle.as_fd())], Some(Duration::ZERO));
            ended
        });
        self.pid == pid && !ended
    }

    /// Whether a connection was closed by its other end and is still being worked off.
    fn any_hung_up(&self) -> bool {
        self.connections.iter().any(|(_, stream)| hung_up(stream))
    }

    /// Whether every connection was closed by its other end.
    fn all_hung_up(&self) -> bool {
        self.connections.iter().all(|(_, stream)| hung_up(stream))
    }
}

impl Export {
    /// A disk without clients.
    pub fn new(disk: DiskId, target: String, kind: ExportKind, volume: Volume) -> Self {
        Self {
            disk,
            name: disk.to_string(),
            target,
            kind,
            serial: disk.to_string(),
            volume: Arc::new(volume),
            link: Link::default(),
            seat: Seat::default(),
            clients: Mutex::default(),
            changed: Condvar::new(),
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            refusals: Throttle::default(),
            events: Throttle::default(),
            // Without, a client that connects at the moment of an upgrade is turned away and tries again.
            stop: Bell::new().ok(),
        }
    }

    /// The disk.
    pub fn disk(&self) -> DiskId {
        self.disk
    }

    /// The export's name: the disk's id.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The disk's target in the guest, for messages.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// How it is shown.
    pub fn kind(&self) -> ExportKind {
        self.kind
    }

    /// Gives it a serial number for its guest to see; without, that is its id.
    #[must_use]
    pub fn with_serial(self, serial: &str) -> Self {
        if serial.is_empty() { self } else { Self { serial: serial.into(), ..self } }
    }

    /// Its serial number as its guest sees it, where we are the one to tell it.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// Its vhost-user connection.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Its block device of the host, if it is shown as one.
    pub fn seat(&self) -> &Seat {
        &self.seat
    }

    /// Its volume.
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    /// Counts bytes read by the client.
    pub fn count_read(&self, bytes: u64) {
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes written by the client.
    pub fn count_written(&self, bytes: u64) {
        self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts a connection that was turned away, and says so in the log.
    pub fn refuse(&self, why: fmt::Arguments<'_>) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        self.refusals.line(format_args!("{}: refused: {why}", self.target));
    }

    /// Says in the log what a client does. Somebody who connects all day does not fill the disk.
    pub fn tell(&self, what: fmt::Arguments<'_>) {
        self.events.line(format_args!("{}: {what}", self.target));
    }

    /// Takes a connection in, until the admission is dropped.
    ///
    /// # Errors
    ///
    /// [`AdmitError`]: why not.
    pub fn admit(self: &Arc<Self>, pid: i32, stream: &UnixStream) -> Result<Admission, AdmitError> {
        let stream = stream.try_clone()?;
        let deadline = Instant::now() + HANG_UP_WAIT;
        let mut clients = self.clients();
        loop {
            if clients.closed {
                return Err(AdmitError::Ending { pid });
            }
            // What a connection that hung up still does must not come after what the next one is told is done.
            let same = clients.is(pid) && !clients.any_hung_up();
            if clients.connections.is_empty() || same {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || (!clients.is(pid) && !clients.all_hung_up()) {
                let holder = clients.pid;
                return Err(if clients.is(pid) {
                    AdmitError::Unfinished { pid }
                } else {
                    AdmitError::InUse { pid, holder }
                });
            }
            clients = self.changed.wait_timeout(clients, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if clients.connections.len() >= MAX_CONNECTIONS {
            return Err(AdmitError::TooMany { pid });
        }
        let id = clients.next_id;
        clients.next_id += 1;
        if clients.connections.is_empty() {
            clients.pid = pid;
            clients.handle = peer_handle(&stream).ok();
        }
        clients.connections.push((id, stream));
        Ok(Admission { export: self.clone(), id })
    }

    /// Lets nobody in any more. Without `force` only if nobody is in; gives whether it is closed now.
    pub fn close(&self, force: bool) -> bool {
        let mut clients = self.clients();
        if !force && (!clients.connections.is_empty() || self.seat.device().is_some()) {
            return false;
        }
        clients.closed = true;
        true
    }

    /// Takes [`Export::close`] back.
    pub fn reopen(&self) {
        self.clients().closed = false;
    }

    /// Cuts every connection and waits for nothing.
    pub fn hang_up(&self) {
        for (_, stream) in &self.clients().connections {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Cuts every connection; requests in flight end, their replies go nowhere. Waits at most `limit` for that.
    pub fn cut_connections(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        self.hang_up();
        let mut clients = self.clients();
        while !clients.connections.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            clients = self.changed.wait_timeout(clients, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The next client at the disk's listener; nobody once [`Export::stop_listening`] was called.
    ///
    /// # Errors
    ///
    /// As `accept(2)`.
    pub fn next_client(&self, listener: &UnixListener) -> io::Result<UnixStream> {
        loop {
            let [stop, client] = ready([self.stop.as_ref().map(AsFd::as_fd), Some(listener.as_fd())], None);
            if stop {
                thread::park();
            } else if client {
                return listener.accept().map(|(stream, _)| stream);
            }
        }
    }

    /// Leaves who connects from now on for the next worker.
    pub fn stop_listening(&self) {
        if let Some(stop) = &self.stop {
            stop.ring();
        }
    }

    /// Takes no more requests, has those that were taken answered, and waits for that until `deadline`. Clients see the
    /// end of their connections only when this process ends.
    pub fn finish_connections(&self, deadline: Instant) {
        let mut clients = self.clients();
        clients.closed = true;
        clients.finishing = true;
        for (_, stream) in &clients.connections {
            let _ = stream.shutdown(std::net::Shutdown::Read);
        }
        while !clients.connections.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            clients = self.changed.wait_timeout(clients, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What the control socket says about it.
    pub fn status(&self) -> ExportStatus {
        ExportStatus {
            disk: self.disk,
            target: self.target.clone(),
            client_pid: self.clients().pid,
            stored_bytes: self.volume.stored_bytes(),
            presented_bytes: self.volume.presented_bytes(),
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
            refused_clients: self.refused.load(Ordering::Relaxed),
        }
    }

    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that was taken in.
pub struct Admission {
    export: Arc<Export>,
    id: u64,
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut clients = self.export.clients();
        if let Some(at) = clients.connections.iter().position(|(id, _)| *id == self.id) {
            let (_, stream) = clients.connections.swap_remove(at);
            if clients.finishing {
                clients.finished.push(stream);
            }
        }
        if clients.connections.is_empty() {
            clients.pid = 0;
            clients.handle = None;
        }
        drop(clients);
        self.export.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;
    use crate::volume::tests::fixture;

    /// A connection made by a process that has ended, kept open by this one; gives that process's number too.
    fn connection_of_the_dead(
        listener: &UnixListener,
        path: &std::path::Path,
    ) -> (UnixStream, UnixStream, i32) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        // SAFETY: the child makes system calls only, and ends by _exit; it is waited for once.
        let child = unsafe {
            let child = libc::fork();
            if child == 0 {
                let sent = UnixStream::connect(path).is_ok_and(|stream| {
                    crate::frame::send_with_fds(&theirs, b"x", &[stream.as_fd()]).is_ok()
                });
                libc::_exit(i32::from(!sent));
            }
            child
        };
        let served = listener.accept().unwrap().0;
        let (_, fds) = crate::frame::receive_with_fds(&ours, &mut [0]).unwrap();
        let [kept] = <[OwnedFd; 1]>::try_from(fds).unwrap();
        (UnixStream::from(kept), served, child)
    }

    #[test]
    fn number_of_a_process_that_ended_is_no_ticket() {
        let path = std::env::temp_dir().join(format!("vmseal-export-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let disk = DiskId::from_bytes([5; 16]);
        let export = Arc::new(Export::new(disk, "vda".into(), ExportKind::Nbd, fixture(8192, |_| {}).volume));
        let (kept, served, pid) = connection_of_the_dead(&listener, &path);
        let has_handles = peer_handle(&served).is_ok();
        let _first = export.admit(pid, &served).unwrap();
        // Still a child of ours: its number is no other process's, but a second connection comes too late to be its own.
        let mut status = 0;
        // SAFETY: the child is waited for once.
        assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
        assert_eq!(status, 0);
        let (_other, second) = UnixStream::pair().unwrap();
        let admitted = export.admit(pid, &second);
        assert_eq!(matches!(admitted, Err(AdmitError::InUse { .. })), has_handles);
        drop(kept);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn client_that_comes_back_waits_until_what_it_left_is_done() {
        let disk = DiskId::from_bytes([4; 16]);
        let export = Arc::new(Export::new(disk, "vda".into(), ExportKind::Nbd, fixture(8192, |_| {}).volume));
        let (client, server) = UnixStream::pair().unwrap();
        let working = export.admit(7, &server).unwrap();
        // Several connections of one client are no matter.
        let (_other, at_once) = UnixStream::pair().unwrap();
        drop(export.admit(7, &at_once).unwrap());

        drop(client);
        let (tell, told) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                let (_back, stream) = UnixStream::pair().unwrap();
                tell.send(export.admit(7, &stream).map(drop)).unwrap();
            });
            told.recv_timeout(Duration::from_millis(100)).expect_err("let in beside what it left");
            drop(working);
            told.recv_timeout(HANG_UP_WAIT).unwrap().unwrap();
        });
    }
}
