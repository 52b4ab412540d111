//! An NBD server for one export: the fixed newstyle handshake, then requests, many at a time.
//!
//! In: a connected stream of a peer that was let in, and its export. Out: when it is over, and why. Everything a peer
//! says is bounded before it is stored: options 16 KiB and 128 of them, payloads 32 MiB. What is not understood is
//! answered with an error where the protocol has one, and ends the connection where the stream would be out of step.
//!
//! Source: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>. No TLS (a unix socket whose peer is
//! known); extended headers are refused cleanly, and clients go on without.

mod buffers;
mod handshake;
mod input;
mod option;
mod output;
mod request;
mod transmission;
mod wire;

#[cfg(test)]
mod conversation_tests;

use std::{io, os::unix::net::UnixStream, time::Duration};

pub use self::wire::MAX_PAYLOAD;
use crate::export::Export;

/// How long a peer may take for each step of the handshake.
const HANDSHAKE_STEP: Duration = Duration::from_secs(30);

/// Why a connection ended other than by the peer's wish.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NbdError {
    /// The peer broke the protocol in a way that leaves the stream out of step.
    #[error("client broke the NBD protocol: {0}")]
    Protocol(&'static str),
    /// The socket failed, or the peer closed it in the middle of something.
    #[error("connection failed: {0}")]
    Socket(#[from] io::Error),
}

/// Serves one connection to its end.
///
/// # Errors
///
/// [`NbdError`]; nothing has to be done about it but to close.
pub fn serve(stream: &UnixStream, export: &Export) -> Result<(), NbdError> {
    stream.set_read_timeout(Some(HANDSHAKE_STEP))?;
    stream.set_write_timeout(Some(HANDSHAKE_STEP))?;
    let mut socket = stream;
    let Some(session) = handshake::negotiate(&mut socket, export)? else { return Ok(()) };
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    transmission::run(stream, export, session)
}
