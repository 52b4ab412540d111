//! What a worker tells its keeper, on the socket its setup came by: one byte, and with an upgrade the program.
//!
//! The keeper parses nothing longer, and answers an upgrade with one byte.

use std::{
    io::{self, Read},
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use crate::frame::{self, FrameError};

const SERVES: u8 = b'S';
const UPGRADE: u8 = b'U';
const TAKEN: u8 = b'T';
const REFUSED: u8 = b'R';

/// How long a keeper may take to look at a program.
const ANSWER: Duration = Duration::from_secs(5);

/// What a worker tells.
#[derive(Debug)]
pub enum Notice {
    /// It serves: its setup was good, and so is its program.
    Serves,
    /// The next worker should run this.
    Upgrade(OwnedFd),
}

/// Why a keeper did not take a program.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UpgradeError {
    /// It looked at it.
    #[error(
        "the keeper does not run that program: it must be an executable file of root's, or of who started the keeper, \
         that nobody else can write and that has a name"
    )]
    Refused,
    /// It was not heard.
    #[error("the keeper cannot be asked")]
    Socket(#[from] FrameError),
}

/// Tells the keeper that this worker serves.
///
/// # Errors
///
/// The socket's: the keeper is gone.
pub fn say_serves(keeper: &UnixStream) -> Result<(), FrameError> {
    frame::send_with_fds(keeper, &[SERVES], &[]).map(drop)
}

/// Asks the keeper to run `program` from the next worker on.
///
/// # Errors
///
/// [`UpgradeError`]: everything stays as it is.
pub fn ask_upgrade(keeper: &UnixStream, program: BorrowedFd<'_>) -> Result<(), UpgradeError> {
    frame::send_with_fds(keeper, &[UPGRADE], &[program])?;
    let mut answer = [REFUSED];
    let (mut socket, failed) = (keeper, |error: io::Error| UpgradeError::Socket(error.into()));
    keeper.set_read_timeout(Some(ANSWER)).map_err(failed)?;
    socket.read_exact(&mut answer).map_err(failed)?;
    if answer == [TAKEN] { Ok(()) } else { Err(UpgradeError::Refused) }
}

/// The keeper's side: the next notice; `None` if the worker closed its end, or said what no worker says.
pub fn receive(worker: &UnixStream) -> Option<Notice> {
    let mut byte = [0];
    let (got, fds) = frame::receive_with_fds(worker, &mut byte).ok()?;
    match (got, byte[0], <[OwnedFd; 1]>::try_from(fds)) {
        (1, SERVES, _) => Some(Notice::Serves),
        (1, UPGRADE, Ok([program])) => Some(Notice::Upgrade(program)),
        _ => None,
    }
}

/// The keeper's answer to an upgrade.
pub fn answer(worker: &UnixStream, taken: bool) {
    // A worker that is gone needs no answer.
    let _ = frame::send_with_fds(worker, &[if taken { TAKEN } else { REFUSED }], &[]);
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write, os::fd::AsFd, thread};

    use super::*;

    #[test]
    fn notices_arrive_and_an_upgrade_is_answered() {
        let (worker, keeper) = UnixStream::pair().unwrap();
        say_serves(&worker).unwrap();
        assert!(matches!(receive(&keeper), Some(Notice::Serves)));
        for taken in [true, false] {
            thread::scope(|scope| {
                let asked = scope.spawn(|| ask_upgrade(&worker, File::open("/dev/null").unwrap().as_fd()));
                assert!(matches!(receive(&keeper), Some(Notice::Upgrade(_))));
                answer(&keeper, taken);
                assert_eq!(asked.join().unwrap().is_ok(), taken);
            });
        }
        drop(worker);
        assert!(receive(&keeper).is_none());
    }

    #[test]
    fn nonsense_is_the_end() {
        for bytes in [b"x".as_slice(), b"U"] {
            let (mut worker, keeper) = UnixStream::pair().unwrap();
            worker.write_all(bytes).unwrap();
            assert!(receive(&keeper).is_none());
        }
    }
}
