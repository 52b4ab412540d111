//! Requests and replies, one after another on each connection.
//!
//! One buffer serves a connection: a payload is read into it, encrypted there and written from there; a read goes the
//! other way. In front of it is room for a reply's header, so that header and data are one write.

use std::io::{self, Read, Write};

use super::{
    NbdError,
    request::{Command, REQUEST_BYTES, Request, Session},
    wire::*,
};
use crate::{
    export::Export,
    volume::{Volume, VolumeError},
};

/// Room for the longest header before data: a structured chunk (20 bytes) and an offset (8).
const HEADROOM: usize = 64;
/// A buffer larger than this is given back after the request that needed it.
const KEPT_BUFFER: usize = 8 << 20;
/// Most extents in one answer; a client asks again from where they end.
const MAX_EXTENTS: usize = 4096;

/// Answers requests until the peer disconnects.
pub(super) fn run(
    socket: &mut (impl Read + Write),
    export: &Export,
    session: Session,
) -> Result<(), NbdError> {
    let mut buffer = Buffer::default();
    while let Some(bytes) = next_request(socket)? {
        let Some(request) = Request::parse(&bytes) else {
            return Err(NbdError::Protocol("wrong magic before a request"));
        };
        let checked = request.check(export.volume().layout(), session);
        if request.kind == CMD_WRITE {
            // The payload follows whatever the verdict, and has to be taken off the stream.
            if request.length > MAX_PAYLOAD {
                return Err(NbdError::Protocol("payload is too long"));
            }
            let checked = match checked {
                Ok(command) => buffer.resize(request.length as usize).map(|()| command),
                refused => refused,
            };
            match checked {
                Ok(_) => socket.read_exact(buffer.data())?,
                Err(_) => skip(socket, u64::from(request.length))?,
            }
            let done = checked.and_then(|command| {
                carry_out(export, command, &request, buffer.data()).map_err(|error| errno(&error))
            });
            simple_reply(socket, request.cookie, done.err().unwrap_or(0))?;
        } else {
            match checked {
                Ok(Command::Disconnect) => return Ok(()),
                Ok(Command::Read) => read(socket, export, session, &request, &mut buffer)?,
                Ok(Command::BlockStatus { one }) => block_status(socket, export.volume(), one, &request)?,
                Ok(command) => {
                    let done = carry_out(export, command, &request, &mut []);
                    simple_reply(socket, request.cookie, done.err().map_or(0, |error| errno(&error)))?;
                }
                Err(error) => error_reply(socket, session, &request, error)?,
            }
        }
        buffer.shrink();
    }
    Ok(())
}

/// Everything that answers with success or an error only.
fn carry_out(
    export: &Export,
    command: Command,
    request: &Request,
    payload: &mut [u8],
) -> Result<(), VolumeError> {
    let (volume, length) = (export.volume(), u64::from(request.length));
    let fua = match command {
        Command::Write { fua } => {
            volume.write(request.offset, payload)?;
            export.count_written(length);
            fua
        }
        Command::WriteZeroes { fua } => {
            volume.write_zeroes(request.offset, length)?;
            export.count_written(length);
            fua
        }
        Command::Trim { fua } => {
            volume.discard(request.offset, length)?;
            fua
        }
        Command::Flush => true,
        Command::Read | Command::BlockStatus { .. } | Command::Disconnect => false,
    };
    if fua { volume.flush() } else { Ok(()) }
}

fn read(
    socket: &mut impl Write,
    export: &Export,
    session: Session,
    request: &Request,
    buffer: &mut Buffer,
) -> Result<(), NbdError> {
    let done = buffer
        .resize(request.length as usize)
        .and_then(|()| export.volume().read(request.offset, buffer.data()).map_err(|error| errno(&error)));
    if let Err(error) = done {
        return error_reply(socket, session, request, error);
    }
    export.count_read(u64::from(request.length));
    let header = if session.structured {
        let mut header = chunk_header(REPLY_TYPE_OFFSET_DATA, request.cookie, 8 + request.length);
        header.extend(request.offset.to_be_bytes());
        header
    } else {
        simple_header(request.cookie, 0)
    };
    Ok(socket.write_all(buffer.behind(&header))?)
}

fn block_status(
    socket: &mut impl Write,
    volume: &Volume,
    one: bool,
    request: &Request,
) -> Result<(), NbdError> {
    let most = if one { 1 } else { MAX_EXTENTS };
    let extents = match volume.extents(request.offset, u64::from(request.length), most) {
        Ok(extents) => extents,
        Err(error) => {
            let session = Session { structured: true, allocation: true };
            return error_reply(socket, session, request, errno(&error));
        }
    };
    let mut answer = chunk_header(REPLY_TYPE_BLOCK_STATUS, request.cookie, 4 + 8 * extents.len() as u32);
    answer.extend(ALLOCATION_ID.to_be_bytes());
    for extent in extents {
        // Never longer than the request, whose length is a u32. Never "zero": a hole reads as anything.
        answer.extend(u32::try_from(extent.len).unwrap_or(request.length).to_be_bytes());
        answer.extend(if extent.hole { STATE_HOLE } else { 0 }.to_be_bytes());
    }
    Ok(socket.write_all(&answer)?)
}

/// Reads and block status must be answered by chunks once these were agreed on; everything else may be simple.
fn error_reply(
    socket: &mut impl Write,
    session: Session,
    request: &Request,
    error: u32,
) -> Result<(), NbdError> {
    if !session.structured || !matches!(request.kind, CMD_READ | CMD_BLOCK_STATUS) {
        return simple_reply(socket, request.cookie, error);
    }
    let mut chunk = chunk_header(REPLY_TYPE_ERROR, request.cookie, 6);
    chunk.extend(error.to_be_bytes());
    chunk.extend(0u16.to_be_bytes());
    Ok(socket.write_all(&chunk)?)
}

fn simple_reply(socket: &mut impl Write, cookie: u64, error: u32) -> Result<(), NbdError> {
    Ok(socket.write_all(&simple_header(cookie, error))?)
}

fn simple_header(cookie: u64, error: u32) -> Vec<u8> {
    let mut header = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
    header.extend(error.to_be_bytes());
    header.extend(cookie.to_be_bytes());
    header
}

fn chunk_header(kind: u16, cookie: u64, length: u32) -> Vec<u8> {
    let mut header = STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
    header.extend(REPLY_FLAG_DONE.to_be_bytes());
    header.extend(kind.to_be_bytes());
    header.extend(cookie.to_be_bytes());
    header.extend(length.to_be_bytes());
    header
}

fn errno(error: &VolumeError) -> u32 {
    match error {
        VolumeError::Unaligned | VolumeError::OutOfRange => EINVAL,
        VolumeError::ReadOnly => EPERM,
        VolumeError::NoSpace(_) => ENOSPC,
        VolumeError::Io(error) if error.raw_os_error() == Some(libc::ENOMEM) => ENOMEM,
        VolumeError::FlushFailed | VolumeError::Truncated | VolumeError::Io(_) => EIO,
    }
}

/// The next request's bytes; `None` if the peer closed between requests.
fn next_request(socket: &mut impl Read) -> Result<Option<[u8; REQUEST_BYTES]>, NbdError> {
    let mut bytes = [0; REQUEST_BYTES];
    let mut got = 0;
    while let Some(rest) = bytes.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match socket.read(rest) {
            Ok(0) if got == 0 => return Ok(None),
            Ok(0) => return Err(NbdError::Socket(io::ErrorKind::UnexpectedEof.into())),
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A client that was killed with replies unread looks like this.
            Err(error) if got == 0 && error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Some(bytes))
}

/// Takes a payload nobody wants off the stream.
fn skip(socket: &mut impl Read, length: u64) -> Result<(), NbdError> {
    if io::copy(&mut socket.take(length), &mut io::sink())? < length {
        return Err(NbdError::Socket(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(())
}

/// Room for a header, then data.
#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    length: usize,
}

impl Buffer {
    /// Makes room for `length` bytes of data, whose content is whatever was there.
    fn resize(&mut self, length: usize) -> Result<(), u32> {
        let whole = HEADROOM + length;
        if self.bytes.len() < whole {
            self.bytes.try_reserve_exact(whole - self.bytes.len()).map_err(|_| ENOMEM)?;
            self.bytes.resize(whole, 0);
        }
        self.length = length;
        Ok(())
    }

    fn data(&mut self) -> &mut [u8] {
        self.bytes.get_mut(HEADROOM..HEADROOM + self.length).unwrap_or_default()
    }

    /// `header` and the data, without a gap.
    fn behind(&mut self, header: &[u8]) -> &[u8] {
        let start = HEADROOM - header.len();
        if let Some(room) = self.bytes.get_mut(start..HEADROOM) {
            room.copy_from_slice(header);
        }
        self.bytes.get(start..HEADROOM + self.length).unwrap_or_default()
    }

    fn shrink(&mut self) {
        if self.bytes.len() > HEADROOM + KEPT_BUFFER {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_and_data_lie_together_and_a_large_buffer_is_given_back() {
        let mut buffer = Buffer::default();
        buffer.resize(3).unwrap();
        buffer.data().copy_from_slice(b"abc");
        assert_eq!(buffer.behind(b"head"), b"headabc");
        assert_eq!(buffer.behind(&chunk_header(1, 2, 3)).len(), 23);
        buffer.resize(MAX_PAYLOAD as usize).unwrap();
        buffer.shrink();
        assert_eq!(buffer.bytes.capacity(), 0);
        assert_eq!(buffer.data(), b"");
    }

    #[test]
    fn payload_cut_short_is_an_end_of_file() {
        assert!(skip(&mut [0u8; 4].as_slice(), 4).is_ok());
        assert!(skip(&mut [0u8; 3].as_slice(), 4).is_err());
        assert!(next_request(&mut [0u8; 0].as_slice()).unwrap().is_none());
        assert!(next_request(&mut [0u8; 27].as_slice()).is_err());
    }
}
