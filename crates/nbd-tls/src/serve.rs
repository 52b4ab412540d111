//! Connections: how many there may be, what each goes through, and what is said of it.
//!
//! A connection that has not shown a certificate takes a slot of its own kind and loses it at the deadline: strangers
//! cannot keep clients out for longer, and nothing they do reaches the export.

use std::{
    io::{self, ErrorKind},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rustls::{CertificateError, Error as TlsError, ServerConfig, ServerConnection};

use crate::{
    clients::Names,
    deadline::Deadline,
    greeting::{self, GreetingError},
    log::{Throttle, line},
    relay::Relay,
};

/// How long the export may take to greet: its worker may just be starting.
const EXPORT_GREETS: Duration = Duration::from_secs(10);
/// Stack of a connection's thread.
const STACK: usize = 256 << 10;
/// A client that says nothing is asked whether it is there: after so many seconds, each so many, so often.
const KEEPALIVE: [libc::c_int; 3] = [60, 15, 4];

/// What serves.
#[derive(Debug)]
pub struct Server {
    config: Arc<ServerConfig>,
    export: PathBuf,
    handshake: Duration,
    handshakes: Arc<Slots>,
    clients: Arc<Slots>,
    strangers: Throttle,
}

impl Server {
    /// For one export.
    pub fn new(
        config: Arc<ServerConfig>,
        export: PathBuf,
        handshake: Duration,
        handshakes: usize,
        clients: usize,
    ) -> Self {
        Self {
            config,
            export,
            handshake,
            handshakes: Slots::new(handshakes),
            clients: Slots::new(clients),
            strangers: Throttle::default(),
        }
    }

    /// Accepts for ever; the kernel keeps who comes while all slots are taken.
    pub fn run(self: &Arc<Self>, listener: &TcpListener) -> ! {
        loop {
            let slot = self.handshakes.take();
            let (client, from) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) => {
                    self.strangers.line(format_args!("cannot accept a connection: {error}"));
                    // For want of descriptors or memory, which only time brings back.
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            let server = Arc::clone(self);
            let serve = move || server.serve(client, from, slot);
            if let Err(error) = thread::Builder::new().name("client".into()).stack_size(STACK).spawn(serve) {
                self.strangers.line(format_args!("no thread for {from}: {error}"));
            }
        }
    }

    fn serve(&self, mut client: TcpStream, from: SocketAddr, handshake: Slot) {
        let end = Instant::now() + self.handshake;
        let (tls, flags) = match self.shake_hands(&mut client, end) {
            Ok(done) => done,
            Err(ConnectError::Greeting(GreetingError::Left)) => return,
            Err(error) => return self.strangers.line(format_args!("{from} is turned away: {error}")),
        };
        drop(handshake);
        let who = match tls.peer_certificates().and_then(<[_]>::first) {
            Some(certificate) => Names::of(certificate),
            // The verifier demands one.
            None => {
                return self.strangers.line(format_args!("{from} is turned away: it shows no certificate"));
            }
        };
        let Some(_slot) = self.clients.try_take() else {
            return line(format_args!(
                "{from} ({who}) is turned away: there are {} clients already; see --connections",
                self.clients.all
            ));
        };
        let export = match self.connect(flags) {
            Ok(export) => export,
            Err(error) => {
                let export = self.export.display();
                return line(format_args!("{from} ({who}) is turned away: the export at {export}: {error}"));
            }
        };
        line(format_args!("{from} ({who}) is connected"));
        let (carried, result) = Relay::new(client, tls, export).run();
        let (up, down) = (carried.up, carried.down);
        match result {
            Ok(()) => line(format_args!("{from} ended after {up} bytes to the export and {down} from it")),
            Err(error) => {
                line(format_args!("{from} ended after {up} bytes to the export and {down} from it: {error}"));
            }
        }
    }

    /// NBD in clear until STARTTLS, then TLS until the client is known.
    fn shake_hands(
        &self,
        client: &mut TcpStream,
        end: Instant,
    ) -> Result<(ServerConnection, greeting::ClientFlags), ConnectError> {
        prepare(client)?;
        let mut in_time = Deadline::new(client, end);
        let flags = greeting::until_starttls(&mut in_time)?;
        let mut tls = ServerConnection::new(Arc::clone(&self.config)).map_err(ConnectError::Tls)?;
        while tls.is_handshaking() {
            tls.complete_io(&mut in_time).map_err(ConnectError::of_handshake)?;
        }
        Ok((tls, flags))
    }

    fn connect(&self, flags: greeting::ClientFlags) -> Result<UnixStream, ConnectError> {
        let mut export = connect(&self.export)?;
        let mut in_time = Deadline::new(&mut export, Instant::now() + EXPORT_GREETS);
        greeting::of_export(&mut in_time, flags)?;
        Ok(export)
    }
}

/// Small messages go at once, and a client that is gone without a word is noticed.
fn prepare(client: &TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    let [idle, interval, count] = KEEPALIVE;
    // Of what is sent and not acknowledged, in milliseconds.
    let unacknowledged = (idle + interval * count) * 1000;
    for (level, name, value) in [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, idle),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, interval),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, count),
        (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, unacknowledged),
    ] {
        // SAFETY: an int and its size, read during the call.
        let set = unsafe {
            libc::setsockopt(
                client.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Connects without waiting: a listener whose queue is full says so.
fn connect(path: &Path) -> io::Result<UnixStream> {
    // SAFETY: plain data; all zero is valid.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(ErrorKind::InvalidFilename.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    // SAFETY: integers; on success the descriptor is new and ours alone. The address is whole and its path ends in a zero.
    let (socket, connected) = unsafe {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let fd = libc::socket(libc::AF_UNIX, kind, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
        (OwnedFd::from_raw_fd(fd), libc::connect(fd, (&raw const address).cast(), length))
    };
    if connected != 0 {
        return Err(io::Error::last_os_error());
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Why a client is not connected.
#[derive(Debug, thiserror::Error)]
enum ConnectError {
    #[error(transparent)]
    Greeting(#[from] GreetingError),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{}", explained(.0))]
    Tls(#[source] TlsError),
    #[error(
        "it hung up during the TLS handshake; if it does not accept our certificate: it must know our authority, and \
         connect by a name that is in the certificate"
    )]
    HungUp,
}

impl ConnectError {
    fn of_handshake(error: io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>()) {
            Some(tls) => Self::Tls(tls.clone()),
            None if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
                Self::HungUp
            }
            None => Self::Io(error),
        }
    }
}

/// What an administrator can do about it.
fn explained(error: &TlsError) -> String {
    match error {
        TlsError::NoCertificatesPresented => {
            "it shows no certificate; it needs one of the authority in --client-ca".into()
        }
        TlsError::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "its certificate is not of the authority in --client-ca".into()
        }
        TlsError::InvalidCertificate(CertificateError::Other(ours)) => ours.0.to_string(),
        TlsError::InvalidCertificate(why) => format!("its certificate is refused: {why}"),
        TlsError::AlertReceived(alert) => format!(
            "it does not accept our certificate ({alert:?}): it must know our authority, and connect by a name that is in \
             the certificate"
        ),
        TlsError::PeerIncompatible(why) => format!("there is no TLS 1.3 that both can ({why:?})"),
        other => format!("TLS failed: {other}"),
    }
}

/// A number of places; who has one holds a [`Slot`].
#[derive(Debug)]
struct Slots {
    all: usize,
    taken: Mutex<usize>,
    freed: Condvar,
}

impl Slots {
    fn new(all: usize) -> Arc<Self> {
        Arc::new(Self { all, taken: Mutex::new(0), freed: Condvar::new() })
    }

    /// Waits for one.
    fn take(self: &Arc<Self>) -> Slot {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken =
            self.freed.wait_while(taken, |taken| *taken >= self.all).unwrap_or_else(PoisonError::into_inner);
        *taken += 1;
        Slot(Arc::clone(self))
    }

    fn try_take(self: &Arc<Self>) -> Option<Slot> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if *taken >= self.all {
            return None;
        }
        *taken += 1;
        Some(Slot(Arc::clone(self)))
    }
}

/// One place, given back when dropped.
#[derive(Debug)]
struct Slot(Arc<Slots>);

impl Drop for Slot {
    fn drop(&mut self) {
        *self.0.taken.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_as_many_as_there_are_and_come_back() {
        let slots = Slots::new(2);
        let (first, _second) = (slots.take(), slots.try_take().unwrap());
        assert!(slots.try_take().is_none());
        drop(first);
        assert!(slots.try_take().is_some());
        assert_eq!(*slots.taken.lock().unwrap(), 1);
    }

    #[test]
    fn path_that_is_too_long_for_a_socket_is_refused() {
        let error = connect(Path::new(&"x".repeat(200))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidFilename);
    }
}
