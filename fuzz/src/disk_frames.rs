//! Frames on the setup and control sockets: any bytes of a peer, and what is made of a setup that could be read.

use std::{
    io::Write,
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use vmseal_disk::{frame, setup};
use vmseal_model::control::{ControlReply, ControlRequest, JobEvent, JobSetup, Setup};

use crate::{disk::memory_file, input::Input};

/// Most bytes that are sent: what a socket holds without anybody reading.
const MOST: usize = 100 << 10;

/// Receives.
///
/// # Panics
///
/// If a message that was read is not read from what it is written as.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (choice, descriptors) = (input.u8(), usize::from(input.u8() % 8));
    let rest = &input.all()[..data.len().saturating_sub(2).min(MOST)];
    let (mut ours, theirs) = UnixStream::pair().expect("sockets");
    if choice & 1 == 0 {
        // A frame that is whole.
        let file = memory_file(8192).expect("memory");
        let fds = vec![file.as_fd(); descriptors];
        frame::send_raw(&ours, rest, &fds).expect("fits into the socket");
    } else {
        ours.write_all(rest).expect("fits into the socket");
    }
    ours.shutdown(Shutdown::Write).expect("a socket");
    while let Ok(Some(frame)) = frame::receive_raw(&theirs) {
        message::<ControlRequest>(&frame.body);
        message::<ControlReply>(&frame.body);
        message::<JobSetup>(&frame.body);
        message::<JobEvent>(&frame.body);
        if let Some(parsed) = message::<Setup>(&frame.body) {
            prepare(&parsed, frame.fds);
        }
    }
}

fn message<T>(body: &[u8]) -> Option<T>
where
    T: for<'a> serde::Deserialize<'a> + serde::Serialize + PartialEq + std::fmt::Debug,
{
    let message: T = serde_json::from_slice(body).ok()?;
    let again = serde_json::to_vec(&message).expect("a message is written");
    assert_eq!(serde_json::from_slice::<T>(&again).expect("what was written is read"), message);
    Some(message)
}

/// With descriptors that are of no use nothing can be served; it must say so.
fn prepare(parsed: &Setup, fds: Vec<OwnedFd>) {
    if let Err(error) = setup::prepare(parsed, fds, 0) {
        assert!(!error.to_string().is_empty());
    }
}
