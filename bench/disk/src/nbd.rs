//! A plain NBD client on a unix socket: one connection, simple replies, many requests in flight, few system calls.
//!
//! What is made ready goes out in one gathering write; small replies come in many to a read; a large payload is read
//! to where it belongs. It blocks, and cannot lock up: loads either read or write, so that one direction is short.

use std::{
    io::{IoSlice, IoSliceMut, Read, Write},
    os::unix::net::UnixStream,
};

use crate::{
    error::{BenchError, Trying},
    sample::Client,
};

const MAGIC: &[u8; 8] = b"NBDMAGIC";
const IHAVEOPT: &[u8; 8] = b"IHAVEOPT";
const OPT_GO: u32 = 7;
const REP_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;

const REQUEST_BYTES: usize = 28;
const REPLY_BYTES: usize = 16;
/// Requests and what they are about.
const MEMORY: usize = 4 << 20;
/// Replies with at most this much payload are read many at a time.
const SMALL: usize = 16 << 10;
/// What is read at a time then.
const STAGING: usize = 256 << 10;
/// Most requests in flight.
const SLOTS: usize = 64;

/// One connection.
pub(crate) struct NbdClient {
    socket: UnixStream,
    peer: String,
    bytes: u64,
    memory: Vec<u8>,
    /// Requests not yet sent: header, and where in the memory the payload of a write lies.
    ready: Vec<([u8; REQUEST_BYTES], std::ops::Range<usize>)>,
    /// Of each slot in flight: where the payload of its reply goes.
    awaited: Vec<std::ops::Range<usize>>,
    in_flight: usize,
    staging: Vec<u8>,
    /// What of the staging buffer is filled and not looked at yet.
    staged: std::ops::Range<usize>,
}

impl NbdClient {
    /// Takes up the export of this name.
    pub(crate) fn new(socket: UnixStream, peer: &str, name: &str) -> Result<Self, BenchError> {
        let bytes = negotiate(&socket, peer, name)?;
        Ok(Self {
            socket,
            peer: peer.to_owned(),
            bytes,
            memory: vec![0x5a; MEMORY],
            ready: Vec::with_capacity(SLOTS),
            awaited: vec![0..0; SLOTS],
            in_flight: 0,
            staging: vec![0; STAGING],
            staged: 0..0,
        })
    }

    fn push(&mut self, command: u16, slot: usize, offset: u64, len: usize) {
        let mut header = [0; REQUEST_BYTES];
        header[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[6..8].copy_from_slice(&command.to_be_bytes());
        header[8..16].copy_from_slice(&(slot as u64).to_be_bytes());
        header[16..24].copy_from_slice(&offset.to_be_bytes());
        header[24..28].copy_from_slice(&(len as u32).to_be_bytes());
        let place = slot * len..(slot + 1) * len;
        let (payload, answer) = match command {
            CMD_READ => (0..0, place),
            CMD_WRITE => (place, 0..0),
            _ => (0..0, 0..0),
        };
        self.ready.push((header, payload));
        self.awaited[slot] = answer;
        self.in_flight += 1;
    }

    /// The slot a reply is for.
    fn slot_of(&self, reply: &[u8; REPLY_BYTES]) -> Result<usize, BenchError> {
        let word = |at: usize| u32::from_be_bytes([reply[at], reply[at + 1], reply[at + 2], reply[at + 3]]);
        if word(0) != REPLY_MAGIC {
            return Err(BenchError::peer(&self.peer, "reply without its magic"));
        }
        if word(4) != 0 {
            return Err(BenchError::peer(&self.peer, format!("request failed with NBD error {}", word(4))));
        }
        match word(12) as usize {
            slot if slot < SLOTS && word(8) == 0 => Ok(slot),
            _ => Err(BenchError::peer(&self.peer, "reply to a request that was not made")),
        }
    }

    /// One reply, its payload read to where it belongs. With one request in flight both come in one read.
    fn take_large(&mut self) -> Result<usize, BenchError> {
        let trying = |peer: &str| format!("reading a reply of {peer}");
        let mut reply = [0; REPLY_BYTES];
        let mut got = 0;
        let only = self.awaited.iter().position(|place| !place.is_empty()).filter(|_| self.in_flight == 1);
        if let Some(slot) = only {
            let place = self.awaited[slot].clone();
            let mut parts = [IoSliceMut::new(&mut reply), IoSliceMut::new(&mut self.memory[place])];
            got = self.socket.read_vectored(&mut parts).trying(|| trying(&self.peer))?;
            if got == 0 {
                return Err(BenchError::peer(&self.peer, "hung up"));
            }
        }
        if got < REPLY_BYTES {
            self.socket.read_exact(&mut reply[got..]).trying(|| trying(&self.peer))?;
        }
        let slot = self.slot_of(&reply)?;
        let place = std::mem::replace(&mut self.awaited[slot], 0..0);
        let rest = place.start + got.saturating_sub(REPLY_BYTES)..place.end;
        self.socket.read_exact(&mut self.memory[rest]).trying(|| trying(&self.peer))?;
        self.in_flight -= 1;
        Ok(slot)
    }

    /// One reply out of the staging buffer, if there is a whole one.
    fn take_staged(&mut self) -> Result<Option<usize>, BenchError> {
        let Some(reply) = self.staging[self.staged.clone()].first_chunk() else { return Ok(None) };
        let slot = self.slot_of(reply)?;
        let place = self.awaited[slot].clone();
        let payload = self.staged.start + REPLY_BYTES..self.staged.start + REPLY_BYTES + place.len();
        if payload.end > self.staged.end {
            return Ok(None);
        }
        self.staged.start = payload.end;
        self.awaited[slot] = 0..0;
        self.memory[place].copy_from_slice(&self.staging[payload]);
        self.in_flight -= 1;
        Ok(Some(slot))
    }
}

impl Client for NbdClient {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn submit(&mut self, slot: usize, write: bool, offset: u64, len: usize) {
        self.push(if write { CMD_WRITE } else { CMD_READ }, slot, offset, len);
    }

    fn submit_flush(&mut self, slot: usize) {
        self.push(CMD_FLUSH, slot, 0, 0);
    }

    fn send(&mut self) -> Result<(), BenchError> {
        let mut parts = Vec::with_capacity(2 * self.ready.len());
        for (header, payload) in &self.ready {
            parts.push(IoSlice::new(header));
            if !payload.is_empty() {
                parts.push(IoSlice::new(&self.memory[payload.clone()]));
            }
        }
        let mut left = &mut parts[..];
        while !left.is_empty() {
            let sent = self.socket.write_vectored(left).trying(|| format!("sending to {}", self.peer))?;
            IoSlice::advance_slices(&mut left, sent);
        }
        self.ready.clear();
        Ok(())
    }

    fn wait(&mut self, done: &mut Vec<usize>) -> Result<(), BenchError> {
        if self.staged.is_empty() && self.awaited.iter().any(|place| place.len() > SMALL) {
            done.push(self.take_large()?);
            return Ok(());
        }
        loop {
            while let Some(slot) = self.take_staged()? {
                done.push(slot);
            }
            if !done.is_empty() {
                return Ok(());
            }
            self.staging.copy_within(self.staged.clone(), 0);
            let filled = self.staged.len();
            let got = self.socket.read(&mut self.staging[filled..]);
            let got = got.trying(|| format!("reading replies of {}", self.peer))?;
            if got == 0 {
                return Err(BenchError::peer(&self.peer, "hung up"));
            }
            self.staged = 0..filled + got;
        }
    }

    fn fill(&mut self, at: usize, bytes: &[u8]) {
        self.memory[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn take(&self, at: usize, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.memory[at..at + bytes.len()]);
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        self.push(CMD_DISC, 0, 0, 0);
        // A server that is gone already does not mind.
        let _ = self.send();
    }
}

/// The handshake; gives the size of the export.
fn negotiate(mut socket: &UnixStream, peer: &str, name: &str) -> Result<u64, BenchError> {
    let trying = || format!("handshake with {peer}");
    let mut greeting = [0; 18];
    socket.read_exact(&mut greeting).trying(trying)?;
    if &greeting[..8] != MAGIC || &greeting[8..16] != IHAVEOPT {
        return Err(BenchError::peer(peer, "is no NBD server of the new style"));
    }
    let flags = u32::from(u16::from_be_bytes([greeting[16], greeting[17]])) & 3;
    let mut option = flags.to_be_bytes().to_vec();
    option.extend(IHAVEOPT);
    option.extend(OPT_GO.to_be_bytes());
    option.extend((name.len() as u32 + 6).to_be_bytes());
    option.extend((name.len() as u32).to_be_bytes());
    option.extend(name.as_bytes());
    option.extend([0; 2]);
    socket.write_all(&option).trying(trying)?;
    let mut bytes = None;
    loop {
        let mut head = [0; 20];
        socket.read_exact(&mut head).trying(trying)?;
        let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let mut content = vec![0; (word(16) as usize).min(64 << 10)];
        socket.read_exact(&mut content).trying(trying)?;
        if head[..8] != REP_MAGIC.to_be_bytes() {
            return Err(BenchError::peer(peer, "answers an option without its magic"));
        }
        match (word(12), &content[..]) {
            (REP_ACK, _) => break,
            (REP_INFO, [a, b, size @ ..]) if u16::from_be_bytes([*a, *b]) == INFO_EXPORT => {
                bytes = size.first_chunk().map(|size| u64::from_be_bytes(*size));
            }
            (REP_INFO, _) => {}
            (other, text) => {
                let text = String::from_utf8_lossy(text);
                return Err(BenchError::peer(peer, format!("refuses the export: {other:#x} {text}")));
            }
        }
    }
    bytes.ok_or_else(|| BenchError::peer(peer, "does not tell the size of its export"))
}
