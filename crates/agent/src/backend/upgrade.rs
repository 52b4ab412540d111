//! A disk process whose program was replaced goes on from the new one, under the running VM.
//!
//! The installed program and a worker's process in; the worker told to make room. Asked once for each process an agent
//! takes on, which is after a package brought a new one: one that does not serve is not tried again and again.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use vmseal_model::control::{ControlReply, ControlRequest, DiskStatus};

use crate::control_frame::{self, FrameError};

/// How long a worker may take to answer what it has: its own limit is 5 s.
const MAKES_ROOM: Duration = Duration::from_secs(8);

/// Why a worker goes on from the program it has.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpgradeError {
    /// The installed program cannot be read.
    #[error("cannot open {}", path.display())]
    Program {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No answer.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// It says no.
    #[error("the disk process refused: {0}")]
    Refused(String),
    /// It said something else.
    #[error("the disk process answered something else")]
    Answer,
}

/// Whether the worker runs from another file than the installed one. One that cannot be looked at is left alone.
pub(super) fn is_outdated(status: &DiskStatus, program: &Path) -> bool {
    let place = |path: &Path| fs::metadata(path).ok().map(|about| (about.dev(), about.ino()));
    let runs = place(Path::new(&format!("/proc/{}/exe", status.worker_pid)));
    matches!((runs, place(program)), (Some(runs), Some(installed)) if runs != installed)
}

/// Has the worker behind this socket make room for one from `program`. Clients connect again and see no error.
///
/// # Errors
///
/// [`UpgradeError`]: the worker serves on as it is.
pub(super) fn upgrade(socket: &Path, program: &Path) -> Result<(), UpgradeError> {
    let opened = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(program);
    let file = opened.map_err(|source| UpgradeError::Program { path: program.to_owned(), source })?;
    let deadline = Instant::now() + MAKES_ROOM;
    match control_frame::ask_with(socket, &ControlRequest::Upgrade, &[file.as_fd()], deadline)? {
        ControlReply::Upgrading => Ok(()),
        ControlReply::Refused { message } => Err(UpgradeError::Refused(message)),
        _ => Err(UpgradeError::Answer),
    }
}
