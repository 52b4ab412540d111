//! Replies that are ready, sent together: many by one system call.

use std::{
    io,
    os::{fd::AsRawFd, unix::net::UnixStream},
};

use super::buffers::{Buffer, Buffers};

/// Replies sent by one call at most; each has a header and may have data.
const TOGETHER: usize = 64;
/// More bytes than these are not kept waiting for company.
const ENOUGH: usize = 128 << 10;

/// One reply.
struct Reply {
    header: Vec<u8>,
    data: Option<Buffer>,
}

/// The sending side of a connection.
#[derive(Default)]
pub(super) struct Output {
    replies: Vec<Reply>,
    bytes: usize,
    spare: Vec<Vec<u8>>,
    iovecs: Vec<libc::iovec>,
}

impl Output {
    /// An empty header to write into.
    pub(super) fn header(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_default()
    }

    /// Puts a reply with the others.
    pub(super) fn push(&mut self, header: Vec<u8>, data: Option<Buffer>) {
        self.bytes += header.len() + data.as_ref().map_or(0, Buffer::len);
        self.replies.push(Reply { header, data });
    }

    /// Whether it is time to send.
    pub(super) fn is_full(&self) -> bool {
        self.replies.len() >= TOGETHER || self.bytes >= ENOUGH
    }

    /// Sends everything.
    pub(super) fn send(&mut self, stream: &UnixStream, buffers: &mut Buffers) -> io::Result<()> {
        if self.replies.is_empty() {
            return Ok(());
        }
        self.iovecs.clear();
        for reply in &self.replies {
            self.iovecs.push(libc::iovec {
                iov_base: reply.header.as_ptr().cast_mut().cast(),
                iov_len: reply.header.len(),
            });
            if let Some(data) = &reply.data {
                self.iovecs.push(libc::iovec { iov_base: data.base().cast(), iov_len: data.len() });
            }
        }
        let sent = send_all(stream, &mut self.iovecs);
        self.bytes = 0;
        for mut reply in self.replies.drain(..) {
            reply.header.clear();
            self.spare.push(reply.header);
            if let Some(data) = reply.data {
                buffers.give_back(data);
            }
        }
        sent
    }
}

fn send_all(stream: &UnixStream, iovecs: &mut [libc::iovec]) -> io::Result<()> {
    let mut first = 0;
    while let Some(rest) = iovecs.get_mut(first..).filter(|rest| !rest.is_empty()) {
        // SAFETY: msghdr is plain data; zero is a message of nothing.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = rest.as_mut_ptr();
        message.msg_iovlen = rest.len().min(libc::UIO_MAXIOV as usize);
        // SAFETY: the vectors point to replies that are kept until this is over.
        let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
        let Ok(mut sent) = usize::try_from(sent) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        };
        for iovec in rest {
            if sent < iovec.iov_len {
                // SAFETY: within what the vector covers.
                iovec.iov_base = unsafe { iovec.iov_base.cast::<u8>().add(sent) }.cast();
                iovec.iov_len -= sent;
                break;
            }
            sent -= iovec.iov_len;
            first += 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn replies_arrive_whole_and_in_order_however_slow_the_reader() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let (mut output, mut buffers) = (Output::default(), Buffers::default());
        let mut expected = Vec::new();
        for round in 0..40u8 {
            let header = vec![round; 16];
            let mut data = buffers.take(100_000).unwrap();
            data.bytes().fill(!round);
            expected.extend_from_slice(&header);
            expected.extend_from_slice(data.bytes());
            output.push(header, Some(data));
            output.push(vec![7], None);
            expected.push(7);
        }
        assert!(output.is_full());
        let heard = std::thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let mut heard = Vec::new();
                client.read_to_end(&mut heard).unwrap();
                heard
            });
            output.send(&server, &mut buffers).unwrap();
            server.shutdown(std::net::Shutdown::Write).unwrap();
            reader.join().unwrap()
        });
        assert!(heard == expected);
        assert!(!output.is_full());
    }
}
