//! One client's bytes, from TLS to the export and back, until either side is done.
//!
//! One thread, which waits in poll. Memory is bounded and full buffers push back: nothing is read from the client while
//! the export has not taken what came before, nothing from the export while the client has not.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    os::{fd::AsRawFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

use rustls::ServerConnection;

/// Bytes of each buffer: ciphertext that came, plaintext for the export, plaintext for the client.
const BUFFER: usize = 128 << 10;
/// So often one way goes on before the other one gets its turn.
const TURNS: usize = 16;
/// How long the export may take to end after the client has.
const LINGER: Duration = Duration::from_secs(10);

/// How much was carried, in bytes of plaintext.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Carried {
    /// From the client to the export.
    pub up: u64,
    /// From the export to the client.
    pub down: u64,
}

/// Why it ended, if not in order.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RelayError {
    /// The client's connection.
    #[error("the client's connection broke: {0}")]
    Client(#[source] io::Error),
    /// What it sent is no TLS.
    #[error("the client broke TLS: {0}")]
    Tls(#[source] rustls::Error),
    /// The export's connection.
    #[error("the export's connection broke: {0}")]
    Export(#[source] io::Error),
    /// The kernel.
    #[error("cannot wait: {0}")]
    Wait(#[source] io::Error),
}

/// Bytes on their way, `from..to` of them.
struct Buffer {
    bytes: Box<[u8]>,
    from: usize,
    to: usize,
}

impl Buffer {
    fn new() -> Self {
        Self { bytes: vec![0; BUFFER].into_boxed_slice(), from: 0, to: 0 }
    }

    fn is_empty(&self) -> bool {
        self.from == self.to
    }

    fn pending(&self) -> &[u8] {
        &self.bytes[self.from..self.to]
    }

    /// Takes what a reader gives, when it is empty.
    fn fill(&mut self, read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<usize> {
        let count = read(&mut self.bytes)?;
        (self.from, self.to) = (0, count);
        Ok(count)
    }
}

/// One client and its export.
pub struct Relay {
    client: TcpStream,
    tls: ServerConnection,
    export: UnixStream,
    /// Ciphertext of the client. rustls itself would fetch 4 KiB at a time.
    arrived: Buffer,
    /// Plaintext for the export.
    up: Buffer,
    down: Box<[u8]>,
    /// No more comes from the client.
    client_ended: bool,
    /// The export was told so, and ends by then.
    ends_by: Option<Instant>,
    export_ended: bool,
    carried: Carried,
}

impl std::fmt::Debug for Relay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Relay").field("carried", &self.carried).finish_non_exhaustive()
    }
}

impl Relay {
    /// Between a client whose handshake is done and an export that waits for options.
    pub fn new(client: TcpStream, mut tls: ServerConnection, export: UnixStream) -> Self {
        // What is given to it at a time is bounded already, by `down`.
        tls.set_buffer_limit(None);
        Self {
            client,
            tls,
            export,
            arrived: Buffer::new(),
            up: Buffer::new(),
            down: vec![0; BUFFER].into_boxed_slice(),
            client_ended: false,
            ends_by: None,
            export_ended: false,
            carried: Carried::default(),
        }
    }

    /// Carries until the end; says how much.
    pub fn run(mut self) -> (Carried, Result<(), RelayError>) {
        let result = self.carry();
        (self.carried, result)
    }

    fn carry(&mut self) -> Result<(), RelayError> {
        self.client.set_nonblocking(true).map_err(RelayError::Client)?;
        self.export.set_nonblocking(true).map_err(RelayError::Export)?;
        loop {
            let up_goes_on = self.carry_up()?;
            let down_goes_on = self.carry_down()?;
            if self.export_ended && !self.tls.wants_write() {
                // Whoever reads hears the end, and so does who writes.
                let _ = self.client.shutdown(Shutdown::Write);
                return Ok(());
            }
            if self.client_ended && self.up.is_empty() && self.ends_by.is_none() {
                // An export that is gone already needs no telling.
                let _ = self.export.shutdown(Shutdown::Write);
                self.ends_by = Some(Instant::now() + LINGER);
            }
            if !up_goes_on && !down_goes_on && !self.wait()? {
                return Ok(());
            }
        }
    }

    /// Client to export, as far as it goes; whether it would go on at once.
    fn carry_up(&mut self) -> Result<bool, RelayError> {
        for _ in 0..TURNS {
            if !self.up.is_empty() {
                match self.export.write(self.up.pending()) {
                    Ok(count) => {
                        self.up.from += count;
                        self.carried.up += count as u64;
                    }
                    Err(error) if again(&error) => return Ok(false),
                    // Its last answers may still be there to be carried.
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                        (self.up.from, self.up.to) = (0, 0);
                        self.client_ended = true;
                        return Ok(false);
                    }
                    Err(error) => return Err(RelayError::Export(error)),
                }
                continue;
            }
            if self.client_ended {
                return Ok(false);
            }
            match self.up.fill(|into| self.tls.reader().read(into)) {
                Ok(0) => self.client_ended = true,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => self.client_ended = true,
                Err(error) if again(&error) => {
                    if !self.decrypt()? {
                        return Ok(false);
                    }
                }
                Err(error) => return Err(RelayError::Client(error)),
            }
        }
        Ok(true)
    }

    /// Gives rustls some of what arrived, or fetches more; false if nothing is there.
    fn decrypt(&mut self) -> Result<bool, RelayError> {
        if self.arrived.is_empty() {
            match self.arrived.fill(|into| self.client.read(into)) {
                // An empty read tells it that this was the end.
                Ok(_) => {}
                Err(error) if again(&error) => return Ok(false),
                Err(error) => return Err(RelayError::Client(error)),
            }
        }
        let mut rest = self.arrived.pending();
        let count = self.tls.read_tls(&mut rest).map_err(RelayError::Client)?;
        self.arrived.from += count;
        if let Err(error) = self.tls.process_new_packets() {
            // The alert, if the client takes it at once.
            let _ = self.tls.write_tls(&mut self.client);
            return Err(RelayError::Tls(error));
        }
        Ok(true)
    }

    /// Export to client, as far as it goes; whether it would go on at once.
    fn carry_down(&mut self) -> Result<bool, RelayError> {
        for _ in 0..TURNS {
            if self.tls.wants_write() {
                match self.tls.write_tls(&mut self.client) {
                    Ok(_) => {}
                    Err(error) if again(&error) => return Ok(false),
                    Err(error) => return Err(RelayError::Client(error)),
                }
                continue;
            }
            if self.export_ended {
                return Ok(false);
            }
            match self.export.read(&mut self.down) {
                Ok(0) => {
                    self.export_ended = true;
                    self.tls.send_close_notify();
                }
                Ok(count) => {
                    self.tls.writer().write_all(&self.down[..count]).map_err(RelayError::Client)?;
                    self.carried.down += count as u64;
                }
                Err(error) if again(&error) => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    self.export_ended = true;
                    self.tls.send_close_notify();
                }
                Err(error) => return Err(RelayError::Export(error)),
            }
        }
        Ok(true)
    }

    /// Waits until something can go on; false if the export did not end in time.
    fn wait(&self) -> Result<bool, RelayError> {
        let timeout = match self.ends_by {
            None => -1,
            Some(end) => match end.saturating_duration_since(Instant::now()).as_millis() {
                0 => return Ok(false),
                left => left as i32,
            },
        };
        let writes = self.tls.wants_write();
        let wish = |read: bool, write: bool| {
            (if read { libc::POLLIN } else { 0 }) | (if write { libc::POLLOUT } else { 0 })
        };
        let mut polls = [
            (self.client.as_raw_fd(), wish(!self.client_ended && self.up.is_empty(), writes)),
            (self.export.as_raw_fd(), wish(!self.export_ended && !writes, !self.up.is_empty())),
        ]
        // A descriptor we want nothing of would wake us for its end, again and again.
        .map(|(fd, events)| libc::pollfd {
            fd: if events == 0 { -1 } else { fd },
            events,
            revents: 0,
        });
        // SAFETY: two pollfds, valid for the call.
        if unsafe { libc::poll(polls.as_mut_ptr(), 2, timeout) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(RelayError::Wait(error));
            }
        }
        Ok(true)
    }
}

fn again(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
