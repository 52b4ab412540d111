//! Requests and replies. Many requests are under way at a time, and replies go out in the order things are done.
//!
//! Payloads lie in buffers of the connection. On a store in memory a write is encrypted where it was received and
//! written piece by piece, while it is in the processor's cache.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::UnixStream,
    },
};

use slab::Slab;

use super::{
    NbdError,
    buffers::{Buffer, Buffers},
    input::{Heard, Input},
    output::Output,
    request::{Command, REQUEST_BYTES, Request, Session},
    wire::*,
};
use crate::{
    export::Export,
    gate::Way,
    lane::{Done, EngineKind, Lane, Operation, Request as LaneRequest, Segment},
    volume::{Volume, VolumeError},
};

/// Most extents in one answer; a client asks again from where they end.
const MAX_EXTENTS: usize = 4096;
/// Of a write to a store in memory, so much is received and written at a time.
const PIECE: usize = 128 << 10;
/// How long a connection keeps large buffers without using them.
const IDLE_MS: libc::c_int = 1000;
/// The key of the socket among what the lane watches.
const SOCKET: u32 = 0;

/// Answers requests until the peer disconnects.
pub(super) fn run(stream: &UnixStream, export: &Export, session: Session) -> Result<(), NbdError> {
    let mut lane = Lane::new(export.volume().clone())?;
    let at_once = lane.engine() == EngineKind::Blocking;
    if !at_once {
        lane.watch(stream.as_fd(), SOCKET)?;
    }
    let connection = Connection {
        lane,
        at_once,
        stream,
        export,
        session,
        input: Input::new(),
        output: Output::default(),
        calls: Slab::new(),
        buffers: Buffers::default(),
        held: None,
    };
    connection.serve()
}

/// A request under way.
struct Call {
    request: Request,
    command: Command,
    buffer: Option<Buffer>,
}

/// One connection in its transmission phase. The lane comes first: dropped first, it waits for what is under way in
/// buffers of the calls.
struct Connection<'a> {
    lane: Lane,
    /// Whether what was submitted is always done at once.
    at_once: bool,
    stream: &'a UnixStream,
    export: &'a Export,
    session: Session,
    input: Input,
    output: Output,
    calls: Slab<Call>,
    buffers: Buffers,
    /// A request of which the head was taken, and that waits for the volume's gate.
    held: Option<Request>,
}

impl Connection<'_> {
    fn serve(mut self) -> Result<(), NbdError> {
        loop {
            let goes_on = self.take_requests()?;
            self.answer_done()?;
            self.output.send(self.stream, &mut self.buffers)?;
            if !goes_on {
                return self.end();
            }
            match self.hear()? {
                Heard::End if self.input.is_empty() => return self.end(),
                Heard::End => return Err(NbdError::Socket(io::ErrorKind::UnexpectedEof.into())),
                Heard::More | Heard::Nothing => {}
            }
        }
    }

    /// Everything that was taken is done and answered.
    fn end(mut self) -> Result<(), NbdError> {
        while !self.calls.is_empty() {
            self.lane.wait()?;
            while self.lane.next_ready().is_some() {}
            self.answer_done()?;
            // A peer that is gone needs no answers; that what it asked for is done counts.
            let _ = self.output.send(self.stream, &mut self.buffers);
        }
        Ok(())
    }

    /// Takes up what was received; false if the client wants to end.
    fn take_requests(&mut self) -> Result<bool, NbdError> {
        while self.buffers.has_room() && !self.lane.is_full() {
            let request = match self.held.take() {
                Some(request) => request,
                None => {
                    let Some(bytes) = self.input.take::<REQUEST_BYTES>() else { break };
                    let parsed = Request::parse(&bytes);
                    parsed.ok_or(NbdError::Protocol("wrong magic before a request"))?
                }
            };
            match request.check(&self.export.volume().layout(), self.session) {
                Ok(Command::Disconnect) => return Ok(false),
                Ok(command) if self.lane.has_room() => self.take_up(request, command)?,
                Ok(command) if reads(command) && self.lane.has_room_for(Way::Reading) => {
                    self.take_beside(request, command)?;
                }
                // Everything before it is durable; looked at after it came.
                Ok(Command::Flush) if self.export.volume().is_at_rest() => {
                    self.simple_reply(request.cookie, 0);
                }
                Ok(_) => {
                    self.held = Some(request);
                    break;
                }
                Err(errno) => {
                    self.skip_payload(&request)?;
                    self.error_reply(&request, errno);
                }
            }
            if self.at_once {
                self.answer_done()?;
            }
            if self.output.is_full() {
                self.output.send(self.stream, &mut self.buffers)?;
            }
        }
        Ok(true)
    }

    /// Takes up a look at the volume while its gate is open for readers only.
    fn take_beside(&mut self, request: Request, command: Command) -> Result<(), NbdError> {
        // Another process writes there, maybe on another host.
        self.export.volume().store().forget_cached();
        match self.export.volume().remeasure() {
            Ok(()) => self.take_up(request, command),
            Err(error) => {
                self.error_reply(&request, errno(&error));
                Ok(())
            }
        }
    }

    fn skip_payload(&mut self, request: &Request) -> Result<(), NbdError> {
        if request.kind != CMD_WRITE {
            return Ok(());
        }
        if request.length > MAX_PAYLOAD {
            return Err(NbdError::Protocol("payload is too long"));
        }
        Ok(self.input.skip(self.stream, u64::from(request.length))?)
    }

    fn take_up(&mut self, request: Request, command: Command) -> Result<(), NbdError> {
        let operation = match command {
            Command::Read => Operation::Read,
            Command::Write { fua } => {
                if request.length > MAX_PAYLOAD {
                    return Err(NbdError::Protocol("payload is too long"));
                }
                if self.at_once {
                    return self.write_through(&request, fua);
                }
                Operation::Write { fua }
            }
            Command::WriteZeroes { fua } => Operation::WriteZeroes { fua },
            Command::Trim { .. } => Operation::Discard,
            Command::Flush => Operation::Flush,
            Command::BlockStatus { one } => {
                self.block_status(&request, one);
                return Ok(());
            }
            Command::Disconnect => return Ok(()),
        };
        let mut buffer = None;
        if matches!(command, Command::Read | Command::Write { .. }) {
            let Ok(taken) = self.buffers.take(request.length as usize) else {
                self.skip_payload(&request)?;
                self.error_reply(&request, ENOMEM);
                return Ok(());
            };
            buffer = Some(taken);
        }
        if let (Command::Write { .. }, Some(buffer)) = (command, &mut buffer) {
            self.input.fill(self.stream, buffer.bytes())?;
        }
        let segments =
            buffer.iter().map(|buffer| Segment { base: buffer.base(), len: buffer.len() }).collect();
        let token = self.calls.insert(Call { request, command, buffer }) as u64;
        let (offset, length) = (request.offset, u64::from(request.length));
        // SAFETY: the buffer stays with the call until the outcome was taken, and the lane is dropped before the calls.
        unsafe { self.lane.submit(LaneRequest { token, operation, offset, length, segments }) };
        Ok(())
    }

    /// Receives, encrypts and writes a payload piece by piece.
    fn write_through(&mut self, request: &Request, fua: bool) -> Result<(), NbdError> {
        let volume = self.export.volume();
        let length = request.length as usize;
        let Ok(mut buffer) = self.buffers.take(length.min(PIECE)) else {
            self.skip_payload(request)?;
            self.error_reply(request, ENOMEM);
            return Ok(());
        };
        let (mut done, mut outcome) = (0, Ok(()));
        while done < length {
            let piece = buffer.bytes().get_mut(..(length - done).min(PIECE)).unwrap_or_default();
            self.input.fill(self.stream, piece)?;
            if outcome.is_ok() {
                outcome = volume.write(request.offset + done as u64, piece);
            }
            done += piece.len();
        }
        self.buffers.give_back(buffer);
        if fua && outcome.is_ok() {
            outcome = volume.flush();
        }
        match outcome {
            Ok(()) => {
                self.export.count_written(length as u64);
                self.simple_reply(request.cookie, 0);
            }
            Err(error) => self.simple_reply(request.cookie, errno(&error)),
        }
        Ok(())
    }

    fn answer_done(&mut self) -> Result<(), NbdError> {
        while let Some(done) = self.lane.next_done() {
            self.answer(done);
            if self.output.is_full() {
                self.output.send(self.stream, &mut self.buffers)?;
            }
        }
        Ok(())
    }

    fn answer(&mut self, done: Done) {
        let token = done.token as usize;
        if let (Ok(()), Some(call)) = (&done.result, self.calls.get_mut(token))
            && call.command == (Command::Trim { fua: true })
        {
            // Durable means after the discard.
            call.command = Command::Flush;
            let request = LaneRequest {
                token: done.token,
                operation: Operation::Flush,
                offset: 0,
                length: 0,
                segments: Vec::new(),
            };
            // SAFETY: a flush has no memory.
            unsafe { self.lane.submit(request) };
            return;
        }
        let Some(call) = self.calls.try_remove(token) else { return };
        let Call { request, command, buffer } = call;
        if let Err(error) = done.result {
            if let Some(buffer) = buffer {
                self.buffers.give_back(buffer);
            }
            return self.error_reply(&request, errno(&error));
        }
        match command {
            Command::Read => {
                self.export.count_read(u64::from(request.length));
                let mut header = self.output.header();
                if self.session.structured {
                    chunk_header(&mut header, REPLY_TYPE_OFFSET_DATA, request.cookie, 8 + request.length);
                    header.extend(request.offset.to_be_bytes());
                } else {
                    simple_header(&mut header, request.cookie, 0);
                }
                self.output.push(header, buffer);
                return;
            }
            Command::Write { .. } | Command::WriteZeroes { .. } => {
                self.export.count_written(u64::from(request.length));
            }
            Command::Flush | Command::Trim { .. } | Command::BlockStatus { .. } | Command::Disconnect => {}
        }
        if let Some(buffer) = buffer {
            self.buffers.give_back(buffer);
        }
        self.simple_reply(request.cookie, 0);
    }

    fn block_status(&mut self, request: &Request, one: bool) {
        let most = if one { 1 } else { MAX_EXTENTS };
        let extents = match self.export.volume().extents(request.offset, u64::from(request.length), most) {
            Ok(extents) => extents,
            Err(error) => return self.error_reply(request, errno(&error)),
        };
        let mut answer = self.output.header();
        chunk_header(&mut answer, REPLY_TYPE_BLOCK_STATUS, request.cookie, 4 + 8 * extents.len() as u32);
        answer.extend(ALLOCATION_ID.to_be_bytes());
        for extent in extents {
            // Never longer than the request, whose length is a u32. Never "zero": a hole reads as anything.
            answer.extend(u32::try_from(extent.len).unwrap_or(request.length).to_be_bytes());
            answer.extend(if extent.hole { STATE_HOLE } else { 0 }.to_be_bytes());
        }
        self.output.push(answer, None);
    }

    /// Reads and block status must be answered by chunks once these were agreed on; everything else may be simple.
    fn error_reply(&mut self, request: &Request, error: u32) {
        if !self.session.structured || !matches!(request.kind, CMD_READ | CMD_BLOCK_STATUS) {
            return self.simple_reply(request.cookie, error);
        }
        let mut chunk = self.output.header();
        chunk_header(&mut chunk, REPLY_TYPE_ERROR, request.cookie, 6);
        chunk.extend(error.to_be_bytes());
        chunk.extend(0u16.to_be_bytes());
        self.output.push(chunk, None);
    }

    fn simple_reply(&mut self, cookie: u64, error: u32) {
        let mut header = self.output.header();
        simple_header(&mut header, cookie, error);
        self.output.push(header, None);
    }

    /// Waits for the next thing to do: bytes of the client, or something that is done.
    fn hear(&mut self) -> Result<Heard, NbdError> {
        if self.calls.is_empty() {
            self.lane.rest();
            if let Some(request) = &self.held {
                self.buffers.release();
                let command = request.check(&self.export.volume().layout(), self.session);
                let goes_on = |volume: &Volume| {
                    command.is_err() || command.is_ok_and(|command| passes(volume, command))
                };
                let opened = self.lane.wait_for_gate(self.stream, goes_on);
                return Ok(if opened { Heard::Nothing } else { Heard::End });
            }
            if self.buffers.keep_much() && !readable(self.stream, IDLE_MS) {
                self.buffers.release();
            }
            return Ok(self.input.receive(self.stream, true)?);
        }
        // Not while the lane is full: what was received already waits, too.
        if self.lane.has_room() && self.buffers.has_room() {
            match self.input.receive(self.stream, false)? {
                Heard::Nothing => {}
                heard => {
                    self.lane.poll()?;
                    return Ok(heard);
                }
            }
        }
        self.lane.wait()?;
        while self.lane.next_ready().is_some() {}
        Ok(Heard::Nothing)
    }
}

/// Whether a request may be carried out now, as far as the volume's gate goes. A client that ends while its disk is another's
/// flushes once more, and must not wait for it: nothing of it is left to be flushed.
fn passes(volume: &Volume, command: Command) -> bool {
    let way = volume.gate().way();
    match command {
        command if reads(command) => way >= Way::Reading,
        Command::Flush => way == Way::Open || volume.is_at_rest(),
        Command::Disconnect => true,
        _ => way == Way::Open,
    }
}

fn reads(command: Command) -> bool {
    matches!(command, Command::Read | Command::BlockStatus { .. })
}

/// Whether there is something to receive within so many milliseconds.
fn readable(stream: &UnixStream, milliseconds: libc::c_int) -> bool {
    let mut poll = libc::pollfd { fd: stream.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, valid for the call.
    unsafe { libc::poll(&mut poll, 1, milliseconds) != 0 }
}

fn simple_header(header: &mut Vec<u8>, cookie: u64, error: u32) {
    header.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
    header.extend(error.to_be_bytes());
    header.extend(cookie.to_be_bytes());
}

fn chunk_header(header: &mut Vec<u8>, kind: u16, cookie: u64, length: u32) {
    header.extend(STRUCTURED_REPLY_MAGIC.to_be_bytes());
    header.extend(REPLY_FLAG_DONE.to_be_bytes());
    header.extend(kind.to_be_bytes());
    header.extend(cookie.to_be_bytes());
    header.extend(length.to_be_bytes());
}

fn errno(error: &VolumeError) -> u32 {
    match error {
        VolumeError::Unaligned | VolumeError::OutOfRange => EINVAL,
        VolumeError::ReadOnly => EPERM,
        VolumeError::NoSpace(_) => ENOSPC,
        VolumeError::Io(error) if error.raw_os_error() == Some(libc::ENOMEM) => ENOMEM,
        VolumeError::FlushFailed | VolumeError::Truncated | VolumeError::Fenced | VolumeError::Io(_) => EIO,
    }
}
