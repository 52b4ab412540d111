//! A socket whose peer must be done by a given time, however it spreads its bytes.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

/// What a deadline can be put on.
pub trait Timed: Read + Write {
    /// How long the next read and write may wait.
    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;
}

impl Timed for TcpStream {
    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(timeout)?;
        self.set_write_timeout(timeout)
    }
}

impl Timed for UnixStream {
    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(timeout)?;
        self.set_write_timeout(timeout)
    }
}

/// A socket until its deadline.
#[derive(Debug)]
pub struct Deadline<'a, S> {
    socket: &'a mut S,
    end: Instant,
}

impl<'a, S: Timed> Deadline<'a, S> {
    /// All reads and writes together end by then.
    pub fn new(socket: &'a mut S, end: Instant) -> Self {
        Self { socket, end }
    }

    fn arm(&self) -> io::Result<()> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        // Less than a microsecond would mean for ever.
        self.socket.set_timeout(Some(left.max(Duration::from_millis(1))))
    }
}

fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "not done in time")
}

/// The kernel says that a time-out is no error but "again".
fn in_time(result: io::Result<usize>) -> io::Result<usize> {
    result.map_err(|error| if error.kind() == io::ErrorKind::WouldBlock { late() } else { error })
}

impl<S: Timed> Read for Deadline<'_, S> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.arm()?;
        in_time(self.socket.read(into))
    }
}

impl<S: Timed> Write for Deadline<'_, S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.arm()?;
        in_time(self.socket.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_one_by_one_do_not_move_the_deadline() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        // A peer that sends a byte whenever it is asked to, which is after each that was read.
        let end = Instant::now() + Duration::from_millis(200);
        let mut socket = Deadline::new(&mut ours, end);
        let error = loop {
            theirs.write_all(&[1]).unwrap();
            match socket.read(&mut [0]) {
                Ok(count) => assert_eq!(count, 1),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(Instant::now() >= end);
    }

    #[test]
    fn silent_peer_is_given_up() {
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let mut socket = Deadline::new(&mut ours, Instant::now() + Duration::from_millis(20));
        assert_eq!(socket.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
