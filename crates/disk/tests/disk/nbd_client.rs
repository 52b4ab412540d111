//! A small NBD client that says exactly what a test wants said, and keeps going after errors.

use std::{
    collections::BTreeSet,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const CACHE: u16 = 5;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const BLOCK_STATUS: u16 = 7;

pub(crate) const FUA: u16 = 1;
pub(crate) const NO_HOLE: u16 = 2;
pub(crate) const DF: u16 = 4;
pub(crate) const REQ_ONE: u16 = 8;
pub(crate) const FAST_ZERO: u16 = 16;

pub(crate) const EPERM: u32 = 1;
pub(crate) const EINVAL: u32 = 22;
pub(crate) const ENOSPC: u32 = 28;
pub(crate) const EOVERFLOW: u32 = 75;
pub(crate) const ENOTSUP: u32 = 95;

/// How a request failed.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The server said so.
    Errno(u32),
    /// The connection is gone.
    Gone(#[expect(dead_code, reason = "shown when a test unwraps it")] io::Error),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Gone(error)
    }
}

impl Fault {
    pub(crate) fn errno(&self) -> Option<u32> {
        match self {
            Self::Errno(errno) => Some(*errno),
            Self::Gone(_) => None,
        }
    }
}

/// A stream after the greeting, before any option.
pub(crate) fn greet(socket: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
    stream.write_all(&3u32.to_be_bytes())?;
    Ok(stream)
}

/// Sends an option.
pub(crate) fn send_option(mut stream: &UnixStream, option: u32, content: &[u8]) -> io::Result<()> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((content.len() as u32).to_be_bytes());
    bytes.extend(content);
    stream.write_all(&bytes)
}

/// Receives one reply to an option: its type and content.
pub(crate) fn option_reply(mut stream: &UnixStream, option: u32) -> io::Result<(u32, Vec<u8>)> {
    let mut head = [0; 20];
    stream.read_exact(&mut head)?;
    assert_eq!(head[..8], 0x0003_e889_0455_65a9u64.to_be_bytes());
    assert_eq!(head[8..12], option.to_be_bytes());
    let mut content = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
    stream.read_exact(&mut content)?;
    Ok((u32::from_be_bytes(head[12..16].try_into().unwrap()), content))
}

/// A connection in transmission.
pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    pub(crate) size: u64,
    pub(crate) flags: u16,
    structured: bool,
    cookie: u64,
}

impl Client {
    /// Structured replies and `base:allocation`.
    pub(crate) fn connect(socket: &Path) -> io::Result<Self> {
        let stream = greet(socket)?;
        send_option(&stream, 8, &[])?;
        assert_eq!(option_reply(&stream, 8)?.0, 1);
        send_option(&stream, 10, b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation")?;
        assert_eq!(option_reply(&stream, 10)?, (4, b"\0\0\0\x01base:allocation".to_vec()));
        assert_eq!(option_reply(&stream, 10)?.0, 1);
        Self::go(stream, true)
    }

    /// Simple replies only.
    pub(crate) fn connect_simple(socket: &Path) -> io::Result<Self> {
        Self::go(greet(socket)?, false)
    }

    fn go(stream: UnixStream, structured: bool) -> io::Result<Self> {
        send_option(&stream, 7, &[0; 6])?;
        let (mut size, mut flags) = (0, 0);
        loop {
            match option_reply(&stream, 7)? {
                (1, _) => break,
                (3, info) if info[..2] == [0, 0] => {
                    size = u64::from_be_bytes(info[2..10].try_into().unwrap());
                    flags = u16::from_be_bytes(info[10..12].try_into().unwrap());
                }
                (3, _) => {}
                other => panic!("answer to GO is {other:?}"),
            }
        }
        Ok(Self { stream, size, flags, structured, cookie: 0 })
    }

    /// Sends a request's 28 bytes.
    pub(crate) fn send(&mut self, kind: u16, flags: u16, offset: u64, length: u32) -> io::Result<()> {
        self.cookie += 1;
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        self.stream.write_all(&bytes)
    }

    /// Receives the answer to the last request: what stands in its chunk, or `simple` bytes after a simple reply.
    pub(crate) fn answer(&mut self, simple: usize) -> Result<Vec<u8>, Fault> {
        let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        match word(&head[..4]) {
            0x6744_6698 => {
                assert_eq!(head[8..], self.cookie.to_be_bytes());
                if word(&head[4..8]) != 0 {
                    return Err(Fault::Errno(word(&head[4..8])));
                }
                let mut data = vec![0; simple];
                self.stream.read_exact(&mut data)?;
                Ok(data)
            }
            0x668e_33ef => {
                assert!(self.structured, "a chunk that was not agreed on");
                assert_eq!(head[4..6], [0, 1], "exactly one chunk");
                assert_eq!(head[8..], self.cookie.to_be_bytes());
                let mut length = [0; 4];
                self.stream.read_exact(&mut length)?;
                let mut chunk = vec![0; word(&length) as usize];
                self.stream.read_exact(&mut chunk)?;
                if head[6] & 0x80 != 0 { Err(Fault::Errno(word(&chunk[..4]))) } else { Ok(chunk) }
            }
            other => panic!("reply with magic {other:#x}"),
        }
    }

    /// Any request without a payload.
    pub(crate) fn request(&mut self, kind: u16, flags: u16, offset: u64, length: u32) -> Result<(), Fault> {
        self.send(kind, flags, offset, length)?;
        self.answer(0).map(drop)
    }

    pub(crate) fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Fault> {
        self.send(READ, 0, offset, length)?;
        let mut data = self.answer(length as usize)?;
        if self.structured {
            assert_eq!(data[..8], offset.to_be_bytes());
            data.drain(..8);
        }
        assert_eq!(data.len(), length as usize);
        Ok(data)
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8], flags: u16) -> Result<(), Fault> {
        self.send(WRITE, flags, offset, data.len() as u32)?;
        self.stream.write_all(data)?;
        self.answer(0).map(drop)
    }

    /// Sends all, then waits for all answers, which may come in any order.
    pub(crate) fn write_batch(&mut self, writes: &[(u64, Vec<u8>)]) -> Result<(), Fault> {
        let first = self.cookie;
        for (offset, data) in writes {
            self.send(WRITE, 0, *offset, data.len() as u32)?;
            self.stream.write_all(data)?;
        }
        let last = self.cookie;
        let mut open: BTreeSet<u64> = (first + 1..=last).collect();
        while !open.is_empty() {
            let mut reply = [0; 16];
            self.stream.read_exact(&mut reply)?;
            let [magic, errno, high, low] = std::array::from_fn(|word| {
                u32::from_be_bytes(std::array::from_fn(|byte| reply[4 * word + byte]))
            });
            assert_eq!(magic, 0x6744_6698, "a write is answered by a simple reply");
            assert!(open.remove(&(u64::from(high) << 32 | u64::from(low))), "answered twice, or never asked");
            if errno != 0 {
                return Err(Fault::Errno(errno));
            }
        }
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Result<(), Fault> {
        self.request(FLUSH, 0, 0, 0)
    }

    /// Extents as (length, flags).
    pub(crate) fn block_status(
        &mut self,
        offset: u64,
        length: u32,
        flags: u16,
    ) -> Result<Vec<(u32, u32)>, Fault> {
        self.send(BLOCK_STATUS, flags, offset, length)?;
        let chunk = self.answer(0)?;
        assert_eq!(chunk[..4], 1u32.to_be_bytes(), "the context's id");
        let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        Ok(chunk[4..].chunks(8).map(|extent| (word(&extent[..4]), word(&extent[4..]))).collect())
    }

    /// Whether the server closed the connection.
    pub(crate) fn is_closed(&mut self) -> bool {
        closed(&self.stream)
    }
}

/// Whether the other end closes without saying more.
pub(crate) fn closed(mut stream: &UnixStream) -> bool {
    match stream.read(&mut [0; 1]) {
        Ok(got) => got == 0,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}
