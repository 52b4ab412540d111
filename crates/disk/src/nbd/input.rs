//! What the client sent and nobody has taken yet: many small requests come in by one system call.

use std::{
    io::{self, Read},
    os::{fd::AsRawFd, unix::net::UnixStream},
};

/// Bytes of the buffer: sixteen requests with 4 KiB each.
const CAPACITY: usize = 72 << 10;

/// The receiving side of a connection.
pub(super) struct Input {
    bytes: Box<[u8]>,
    from: usize,
    to: usize,
}

/// What a look at the socket gave.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// More bytes.
    More,
    /// Nothing for now.
    Nothing,
    /// The client closed its side.
    End,
}

impl Input {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; CAPACITY].into_boxed_slice(), from: 0, to: 0 }
    }

    /// The next `N` bytes, if they are all there; they are taken.
    pub(super) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = *self.waiting().first_chunk()?;
        self.from += N;
        Some(bytes)
    }

    /// Whether a part of something is there.
    pub(super) fn is_empty(&self) -> bool {
        self.from == self.to
    }

    fn waiting(&self) -> &[u8] {
        self.bytes.get(self.from..self.to).unwrap_or_default()
    }

    /// Receives once, into what is free.
    pub(super) fn receive(&mut self, stream: &UnixStream, wait: bool) -> io::Result<Heard> {
        if self.from > 0 {
            self.bytes.copy_within(self.from..self.to, 0);
            (self.from, self.to) = (0, self.to - self.from);
        }
        let free = self.bytes.get_mut(self.to..).unwrap_or_default();
        let flags = if wait { 0 } else { libc::MSG_DONTWAIT };
        loop {
            // SAFETY: the pointer is valid for as many bytes as said.
            let got = unsafe { libc::recv(stream.as_raw_fd(), free.as_mut_ptr().cast(), free.len(), flags) };
            match usize::try_from(got) {
                Ok(0) => return Ok(Heard::End),
                Ok(got) => {
                    self.to += got;
                    return Ok(Heard::More);
                }
                Err(_) => {}
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => return Ok(Heard::Nothing),
                // A client that was killed with replies unread looks like this.
                io::ErrorKind::ConnectionReset if self.is_empty() => return Ok(Heard::End),
                _ => return Err(error),
            }
        }
    }

    /// Fills `to`, first with what was received already.
    pub(super) fn fill(&mut self, mut stream: &UnixStream, to: &mut [u8]) -> io::Result<()> {
        let have = self.waiting().len().min(to.len());
        let (first, rest) = to.split_at_mut(have);
        first.copy_from_slice(self.waiting().get(..have).unwrap_or_default());
        self.from += have;
        if rest.is_empty() { Ok(()) } else { stream.read_exact(rest) }
    }

    /// Takes a payload nobody wants off the stream.
    pub(super) fn skip(&mut self, stream: &UnixStream, length: u64) -> io::Result<()> {
        let have = (self.waiting().len() as u64).min(length);
        self.from += have as usize;
        if io::copy(&mut stream.take(length - have), &mut io::sink())? < length - have {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn bytes_come_in_order_whoever_takes_them() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let mut input = Input::new();
        assert_eq!(input.receive(&server, false).unwrap(), Heard::Nothing);
        client.write_all(b"abcdefgh").unwrap();
        assert_eq!(input.receive(&server, true).unwrap(), Heard::More);
        assert_eq!(input.take(), Some(*b"abc"));
        assert_eq!(input.take::<6>(), None);
        client.write_all(b"ijkl").unwrap();
        let mut seven = [0; 7];
        input.fill(&server, &mut seven).unwrap();
        assert_eq!(&seven, b"defghij");
        assert!(input.is_empty());
        client.write_all(b"mn").unwrap();
        assert_eq!(input.receive(&server, true).unwrap(), Heard::More);
        input.skip(&server, 3).unwrap();
        assert_eq!(input.take(), Some(*b"n"));
        drop(client);
        assert!(input.skip(&server, 1).is_err());
        assert!(input.fill(&server, &mut [0; 1]).is_err());
        assert_eq!(input.receive(&server, true).unwrap(), Heard::End);
    }
}
