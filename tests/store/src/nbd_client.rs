//! An NBD client that has many requests under way: sends, and takes answers in whatever order they come.

use std::{
    collections::HashMap,
    io::{self, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;
const FUA: u16 = 1;
const PATIENCE: Duration = Duration::from_secs(20);

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Read so much.
    Read {
        /// From where.
        offset: u64,
        /// How much.
        len: u32,
    },
    /// Write.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Vec<u8>,
        /// Whether it is durable when it is answered.
        fua: bool,
    },
    /// Write zeros.
    WriteZeroes {
        /// Where.
        offset: u64,
        /// How many.
        len: u32,
    },
    /// Discard.
    Trim {
        /// Where.
        offset: u64,
        /// How much.
        len: u32,
    },
    /// Flush.
    Flush,
}

/// An answer: what was read, or an error number.
pub type Answer = Result<Vec<u8>, u32>;

/// A connection.
pub struct Client {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    next: u64,
    /// Bytes that each request under way is to give.
    under_way: HashMap<u64, usize>,
}

impl Client {
    /// Connects; simple replies.
    ///
    /// # Errors
    ///
    /// The socket's, or a greeting that is none.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let mut writer = UnixStream::connect(socket)?;
        writer.set_read_timeout(Some(PATIENCE))?;
        let mut reader = BufReader::new(writer.try_clone()?);
        let mut greeting = [0; 18];
        reader.read_exact(&mut greeting)?;
        let mut says = 3u32.to_be_bytes().to_vec();
        says.extend(b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0");
        writer.write_all(&says)?;
        loop {
            let mut head = [0; 20];
            reader.read_exact(&mut head)?;
            let mut content = vec![0; be32(&head[16..20]) as usize];
            reader.read_exact(&mut content)?;
            match be32(&head[12..16]) {
                1 => break,
                3 => {}
                other => return Err(io::Error::other(format!("the server answers GO with {other:#x}"))),
            }
        }
        Ok(Self { reader, writer, next: 0, under_way: HashMap::new() })
    }

    /// Sends a request; gives its number.
    ///
    /// # Errors
    ///
    /// The socket's: nobody will answer.
    pub fn send(&mut self, request: &Request) -> io::Result<u64> {
        let (flags, kind, offset, len): (u16, u16, u64, u32) = match request {
            Request::Read { offset, len } => (0, READ, *offset, *len),
            Request::Write { offset, data, fua } => {
                (if *fua { FUA } else { 0 }, WRITE, *offset, data.len() as u32)
            }
            Request::WriteZeroes { offset, len } => (0, WRITE_ZEROES, *offset, *len),
            Request::Trim { offset, len } => (0, TRIM, *offset, *len),
            Request::Flush => (0, FLUSH, 0, 0),
        };
        self.next += 1;
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(self.next.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        if let Request::Write { data, .. } = request {
            bytes.extend(data);
        }
        self.under_way.insert(self.next, if kind == READ { len as usize } else { 0 });
        self.writer.write_all(&bytes)?;
        Ok(self.next)
    }

    /// The next answer, and to which request.
    ///
    /// # Errors
    ///
    /// The socket's.
    pub fn answer(&mut self) -> io::Result<(u64, Answer)> {
        let mut head = [0; 16];
        self.reader.read_exact(&mut head)?;
        let number = u64::from_be_bytes(head[8..16].try_into().map_err(io::Error::other)?);
        let len = self.under_way.remove(&number).filter(|_| be32(&head[..4]) == 0x6744_6698);
        let Some(len) = len else { return Err(io::Error::other(format!("no answer to anything: {head:?}"))) };
        if be32(&head[4..8]) != 0 {
            return Ok((number, Err(be32(&head[4..8]))));
        }
        let mut data = vec![0; len];
        self.reader.read_exact(&mut data)?;
        Ok((number, Ok(data)))
    }

    /// Sends a request and waits for its answer, which is the only one under way.
    ///
    /// # Errors
    ///
    /// As [`Client::answer`].
    pub fn call(&mut self, request: &Request) -> io::Result<Answer> {
        let sent = self.send(request)?;
        let (number, answer) = self.answer()?;
        if number == sent { Ok(answer) } else { Err(io::Error::other("another request was answered")) }
    }
}

fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
}
