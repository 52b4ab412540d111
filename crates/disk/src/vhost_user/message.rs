//! Messages of the front end: what they are made of, and what they may be.
//!
//! In: a header, a body, descriptors. Out: a [`Message`] whose parts have their right sizes. Whether it makes sense at
//! this moment is not asked here. No I/O.
//!
//! Codes and feature bits are the `vhost` crate's. Its connection is not used: it cannot tell of a changed configuration,
//! takes descriptors without close-on-exec, and loses its place in the stream when it gets more of them than it expected.

use std::os::fd::OwnedFd;

use vhost::vhost_user::message::FrontendReq;

use super::{
    memory::{MAX_REGIONS, RegionSpec},
    ring::RingAddresses,
};

/// Bytes of a message's header.
pub const HEADER: usize = 12;
/// Longest body that is taken: the largest memory table there may be.
pub const MAX_BODY: usize = 8 + 32 * MAX_FDS;
/// Most descriptors with one message.
pub const MAX_FDS: usize = 64;
const _: () = assert!(MAX_FDS <= MAX_REGIONS);

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
/// A message about a queue's descriptor has none.
const NO_FD: u64 = 1 << 8;

/// Why bytes are no message. The connection ends.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MessageError {
    /// Another version, a reply, or flags that do not exist.
    #[error("message with flags {0:#x}")]
    Flags(u32),
    /// Longer than [`MAX_BODY`].
    #[error("message of {0} bytes")]
    TooLong(u32),
    /// Unknown, or for devices of other kinds.
    #[error("message {0} is not known here")]
    Unknown(u32),
    /// A body of the wrong size.
    #[error("message {0} has a body of {1} bytes")]
    Size(u32, usize),
    /// Too many or too few descriptors.
    #[error("message {0} came with {1} descriptors")]
    Descriptors(u32, usize),
    /// A value no message may have.
    #[error("message {0} has an impossible value")]
    Value(u32),
}

/// A header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub code: u32,
    /// Whether an answer is wished for where none is due.
    pub need_reply: bool,
    /// Bytes that follow.
    pub len: usize,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    ///
    /// [`MessageError`].
    pub fn parse(bytes: &[u8; HEADER]) -> Result<Self, MessageError> {
        let [c0, c1, c2, c3, f0, f1, f2, f3, l0, l1, l2, l3] = *bytes;
        let (code, flags, len) = (
            u32::from_ne_bytes([c0, c1, c2, c3]),
            u32::from_ne_bytes([f0, f1, f2, f3]),
            u32::from_ne_bytes([l0, l1, l2, l3]),
        );
        if flags & VERSION_MASK != VERSION || flags & !(VERSION_MASK | NEED_REPLY) != 0 {
            return Err(MessageError::Flags(flags));
        }
        if len as usize > MAX_BODY {
            return Err(MessageError::TooLong(len));
        }
        Ok(Self { code, need_reply: flags & NEED_REPLY != 0, len: len as usize })
    }

    /// An answer to it.
    pub fn reply(&self, body: &[u8]) -> Vec<u8> {
        frame(self.code, VERSION | REPLY, body)
    }
}

/// A message that expects no answer, or an answer.
pub fn frame(code: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    for word in [code, flags | VERSION, body.len() as u32] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(body);
    bytes
}

/// An area for requests in flight, as GET_INFLIGHT_FD and SET_INFLIGHT_FD describe it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InflightSpec {
    /// Its bytes.
    pub len: u64,
    /// Where it begins in its file.
    pub offset: u64,
    /// For how many queues.
    pub queues: u16,
    /// Of how many descriptors.
    pub size: u16,
}

impl InflightSpec {
    /// As the body of a message; QEMU wants the padding of its own structure.
    pub fn to_body(self) -> [u8; 24] {
        let mut body = [0; 24];
        let fields = [&self.len.to_ne_bytes()[..], &self.offset.to_ne_bytes()[..]];
        let shape = [&self.queues.to_ne_bytes()[..], &self.size.to_ne_bytes()[..]];
        for (to, from) in body.iter_mut().zip(fields.concat().into_iter().chain(shape.concat())) {
            *to = from;
        }
        body
    }
}

/// What the front end says or asks.
#[derive(Debug)]
#[non_exhaustive]
pub enum Message {
    /// Which features are offered?
    GetFeatures,
    /// These are agreed on.
    SetFeatures(u64),
    /// A session begins.
    SetOwner,
    /// It ends. Out of use.
    ResetOwner,
    /// All of the guest's memory.
    SetMemoryTable(Vec<(RegionSpec, OwnedFd)>),
    /// Where to log what is written to.
    SetLogBase {
        /// Its bytes.
        len: u64,
        /// Where it begins in its file.
        offset: u64,
        /// The file.
        file: OwnedFd,
    },
    /// A queue's number of descriptors.
    SetQueueSize {
        /// Which queue.
        queue: u32,
        /// How many.
        size: u32,
    },
    /// Where a queue is.
    SetQueueAddresses {
        /// Which queue.
        queue: u32,
        /// Its parts.
        at: RingAddresses,
        /// Where the guest sees its used ring, if writes to it are to be logged.
        log_used: Option<u64>,
    },
    /// Where a queue goes on.
    SetQueueBase {
        /// Which queue.
        queue: u32,
        /// Index of the next chain.
        base: u32,
    },
    /// Stop a queue, and where was it?
    GetQueueBase {
        /// Which queue.
        queue: u32,
    },
    /// What tells us of new chains.
    SetKick {
        /// Which queue.
        queue: u32,
        /// An eventfd.
        fd: Option<OwnedFd>,
    },
    /// What tells the driver of used chains.
    SetCall {
        /// Which queue.
        queue: u32,
        /// An eventfd.
        fd: Option<OwnedFd>,
    },
    /// What tells the front end of a queue that stopped.
    SetError {
        /// Which queue.
        queue: u32,
        /// An eventfd.
        fd: Option<OwnedFd>,
    },
    /// Which features of the protocol are offered?
    GetProtocolFeatures,
    /// These are agreed on.
    SetProtocolFeatures(u64),
    /// How many queues may there be?
    GetQueueCount,
    /// Whether chains are taken.
    EnableQueue {
        /// Which queue.
        queue: u32,
        /// Whether.
        enable: bool,
    },
    /// The way for messages of ours.
    SetBackendChannel(OwnedFd),
    /// A part of the configuration space?
    GetConfig {
        /// Where.
        offset: u32,
        /// How much.
        len: u32,
        /// Goes back as it came.
        flags: u32,
    },
    /// A part of the configuration space is to change.
    SetConfig {
        /// Where.
        offset: u32,
        /// To what.
        bytes: Vec<u8>,
    },
    /// Make an area for requests in flight.
    GetInflight(InflightSpec),
    /// Use this one.
    SetInflight(InflightSpec, OwnedFd),
    /// As if just connected.
    ResetDevice,
    /// How many regions may there be?
    GetMaxRegions,
    /// One region more.
    AddRegion(RegionSpec, OwnedFd),
    /// One less.
    RemoveRegion(RegionSpec),
}

impl Message {
    /// Reads a message.
    ///
    /// # Errors
    ///
    /// [`MessageError`]; the descriptors are closed then.
    pub fn parse(code: u32, body: &[u8], mut fds: Vec<OwnedFd>) -> Result<Self, MessageError> {
        let known = FrontendReq::try_from(code).map_err(|_| MessageError::Unknown(code))?;
        let mut fields = Fields { code, whole: body.len(), rest: body };
        let count = fds.len();
        let bad_count = MessageError::Descriptors(code, count);
        let mut one = || if count == 1 { fds.pop() } else { None };
        let message = match known {
            FrontendReq::GET_FEATURES => Self::GetFeatures,
            FrontendReq::SET_FEATURES => Self::SetFeatures(fields.u64()?),
            FrontendReq::SET_OWNER => Self::SetOwner,
            FrontendReq::RESET_OWNER => Self::ResetOwner,
            FrontendReq::SET_MEM_TABLE => {
                let (regions, _padding) = (fields.u32()?, fields.u32()?);
                if regions as usize != count {
                    return Err(bad_count);
                }
                let specs: Result<Vec<_>, _> = (0..regions).map(|_| fields.region()).collect();
                Self::SetMemoryTable(specs?.into_iter().zip(std::mem::take(&mut fds)).collect())
            }
            FrontendReq::SET_LOG_BASE => {
                let (len, offset) = (fields.u64()?, fields.u64()?);
                Self::SetLogBase { len, offset, file: one().ok_or(bad_count)? }
            }
            FrontendReq::SET_VRING_NUM => Self::SetQueueSize { queue: fields.u32()?, size: fields.u32()? },
            FrontendReq::SET_VRING_ADDR => {
                let (queue, flags) = (fields.u32()?, fields.u32()?);
                let (descriptors, used, available) = (fields.u64()?, fields.u64()?, fields.u64()?);
                let log = fields.u64()?;
                if flags & !1 != 0 {
                    return Err(MessageError::Value(code));
                }
                let at = RingAddresses { descriptors, available, used };
                Self::SetQueueAddresses { queue, at, log_used: (flags & 1 != 0).then_some(log) }
            }
            FrontendReq::SET_VRING_BASE => Self::SetQueueBase { queue: fields.u32()?, base: fields.u32()? },
            FrontendReq::GET_VRING_BASE => {
                let (queue, _) = (fields.u32()?, fields.u32()?);
                Self::GetQueueBase { queue }
            }
            FrontendReq::SET_VRING_KICK | FrontendReq::SET_VRING_CALL | FrontendReq::SET_VRING_ERR => {
                let value = fields.u64()?;
                let (queue, fd) = ((value & 0xff) as u32, one());
                if fd.is_some() != (value & NO_FD == 0) || value > (NO_FD | 0xff) {
                    return Err(bad_count);
                }
                match known {
                    FrontendReq::SET_VRING_KICK => Self::SetKick { queue, fd },
                    FrontendReq::SET_VRING_CALL => Self::SetCall { queue, fd },
                    _ => Self::SetError { queue, fd },
                }
            }
            FrontendReq::GET_PROTOCOL_FEATURES => Self::GetProtocolFeatures,
            FrontendReq::SET_PROTOCOL_FEATURES => Self::SetProtocolFeatures(fields.u64()?),
            FrontendReq::GET_QUEUE_NUM => Self::GetQueueCount,
            FrontendReq::SET_VRING_ENABLE => match (fields.u32()?, fields.u32()?) {
                (queue, enable @ (0 | 1)) => Self::EnableQueue { queue, enable: enable == 1 },
                _ => return Err(MessageError::Value(code)),
            },
            FrontendReq::SET_BACKEND_REQ_FD => Self::SetBackendChannel(one().ok_or(bad_count)?),
            FrontendReq::GET_CONFIG | FrontendReq::SET_CONFIG => {
                let (offset, len, flags) = (fields.u32()?, fields.u32()?, fields.u32()?);
                let bytes = std::mem::take(&mut fields.rest);
                if bytes.len() != len as usize {
                    return Err(MessageError::Size(code, body.len()));
                }
                if known == FrontendReq::GET_CONFIG {
                    Self::GetConfig { offset, len, flags }
                } else {
                    Self::SetConfig { offset, bytes: bytes.to_vec() }
                }
            }
            FrontendReq::GET_INFLIGHT_FD => Self::GetInflight(fields.inflight()?),
            FrontendReq::SET_INFLIGHT_FD => Self::SetInflight(fields.inflight()?, one().ok_or(bad_count)?),
            FrontendReq::RESET_DEVICE => Self::ResetDevice,
            FrontendReq::GET_MAX_MEM_SLOTS => Self::GetMaxRegions,
            FrontendReq::ADD_MEM_REG => {
                fields.u64()?;
                Self::AddRegion(fields.region()?, one().ok_or(bad_count)?)
            }
            FrontendReq::REM_MEM_REG => {
                fields.u64()?;
                // Some front ends send the region's descriptor along; it is closed (vhost-user specification).
                drop(one());
                Self::RemoveRegion(fields.region()?)
            }
            _ => return Err(MessageError::Unknown(code)),
        };
        if !fields.rest.is_empty() {
            return Err(MessageError::Size(code, body.len()));
        }
        if !fds.is_empty() {
            return Err(MessageError::Descriptors(code, count));
        }
        Ok(message)
    }
}

/// A body, field by field.
struct Fields<'a> {
    code: u32,
    whole: usize,
    rest: &'a [u8],
}

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        let (bytes, rest) =
            self.rest.split_first_chunk::<N>().ok_or(MessageError::Size(self.code, self.whole))?;
        self.rest = rest;
        Ok(*bytes)
    }

    fn u16(&mut self) -> Result<u16, MessageError> {
        self.take().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Result<u32, MessageError> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64, MessageError> {
        self.take().map(u64::from_ne_bytes)
    }

    fn region(&mut self) -> Result<RegionSpec, MessageError> {
        let (guest, len, user, offset) = (self.u64()?, self.u64()?, self.u64()?, self.u64()?);
        Ok(RegionSpec { guest, len, user, offset })
    }

    fn inflight(&mut self) -> Result<InflightSpec, MessageError> {
        let (len, offset) = (self.u64()?, self.u64()?);
        let (queues, size) = (self.u16()?, self.u16()?);
        // QEMU's structure has four bytes of padding, the specification's has none.
        if self.rest.len() == 4 {
            self.rest = &[];
        }
        Ok(InflightSpec { len, offset, queues, size })
    }
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
