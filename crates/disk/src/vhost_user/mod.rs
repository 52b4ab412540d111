//! Serves a disk to QEMU as a vhost-user-blk back end: the guest's own queues, its memory without a copy.
//!
//! In: a connection that was admitted, an export. Out: requests carried out, until the front end hangs up. What is
//! offered, how requests survive the end of this process, and the limits: `docs/design/vhost-user.md`.
//!
//! The front end is trusted no more than its guest. What either of them does wrong ends its queue or its connection, and
//! touches no other disk.
//!
//! - [`connection`], [`message`]: the socket and what is said on it.
//! - [`device`]: what was agreed on; starts and stops queues.
//! - [`queue`]: one thread per queue, from a [`ring`] to a lane and back.
//! - [`mapping`], [`memory`], [`dirty_log`], [`inflight`], [`sigbus`]: memory that is shared.
//! - [`request`], [`config`], [`features`]: the block device.

pub mod config;
mod connection;
mod device;
pub mod dirty_log;
pub mod features;
pub mod inflight;
mod link;
pub mod mapping;
pub mod memory;
pub mod message;
mod notifier;
mod queue;
pub mod request;
pub mod ring;
mod sigbus;

use std::{io, os::unix::net::UnixStream, sync::Arc};

pub use self::{
    device::DeviceError,
    link::Link,
    message::{MAX_FDS, MessageError},
};
use self::{
    device::{Answer, Device},
    message::Message,
};
use crate::{export::Export, worker::with_causes};

/// The parts that need no socket, for fuzz targets and benchmarks of this workspace. Not an interface.
#[doc(hidden)]
pub mod fuzzing {
    pub use super::{
        config, dirty_log::DirtyLog, features, inflight, mapping, memory, message, request, ring,
    };
}

/// Why a connection ended before the front end hung up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VhostUserError {
    /// The socket failed.
    #[error("vhost-user connection failed")]
    Io(#[from] io::Error),
    /// The front end does not speak the protocol.
    #[error("vhost-user front end breaks the protocol: {0}")]
    Message(#[from] MessageError),
    /// More than a message may have.
    #[error("vhost-user front end sent more than {MAX_FDS} descriptors at once")]
    TooManyDescriptors,
    /// What it wants cannot be done, and it did not ask whether it was.
    #[error("vhost-user message {code} cannot be done")]
    Refused {
        /// Which message.
        code: u32,
        /// Why.
        #[source]
        cause: DeviceError,
    },
    /// The disk has a connection already.
    #[error("the disk has a vhost-user connection already")]
    Taken,
}

/// Serves until the front end hangs up. What it had begun is done when this returns.
///
/// # Errors
///
/// [`VhostUserError`].
pub fn serve(stream: &UnixStream, export: &Arc<Export>) -> Result<(), VhostUserError> {
    let _claim = export.link().claim().ok_or(VhostUserError::Taken)?;
    let mut device = Device::new(export.clone());
    while let Some(incoming) = connection::receive(stream)? {
        let header = incoming.header;
        let message = Message::parse(header.code, &incoming.body, incoming.fds)?;
        let wants_ack = header.need_reply && device.acknowledges();
        match device.handle(message) {
            Ok(Answer::Done) if wants_ack => connection::send(stream, &header.reply(&[0; 8]), None)?,
            Ok(Answer::Done) => {}
            Ok(Answer::Value(value)) => connection::send(stream, &header.reply(&value.to_ne_bytes()), None)?,
            Ok(Answer::Body(body)) => connection::send(stream, &header.reply(&body), None)?,
            Ok(Answer::File(body, file)) => {
                use std::os::fd::AsFd;
                connection::send(stream, &header.reply(&body), Some(file.as_fd()))?;
            }
            Err((cause, true)) if wants_ack => {
                device.say(format_args!("vhost-user message {}: {}", header.code, with_causes(&cause)));
                connection::send(stream, &header.reply(&1u64.to_ne_bytes()), None)?;
            }
            Err((cause, _)) => return Err(VhostUserError::Refused { code: header.code, cause }),
        }
    }
    Ok(())
}
