//! Why a benchmark could not be run. None of these is about a floor: those are rows of the report.

use std::{fmt::Display, io};

/// What went wrong, and with which of the programs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum BenchError {
    /// A call failed.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A front end of vhost-user could not be set up.
    #[error("{peer}: vhost-user {message} failed")]
    VhostUser {
        /// Who answered.
        peer: String,
        /// The message that was sent.
        message: &'static str,
        /// What the library says.
        #[source]
        source: vhost::Error,
    },
    /// A server said something it must not.
    #[error("{peer}: {what}")]
    Peer {
        /// Who.
        peer: String,
        /// What it did.
        what: String,
    },
    /// An export does not do what it is measured for.
    #[error("{export} does not do what is measured: {what}")]
    Cheats {
        /// Which.
        export: String,
        /// What was found.
        what: String,
    },
    /// A program ended or is not there.
    #[error("{program} is not running: {why}")]
    Program {
        /// Its name.
        program: String,
        /// What it left in its log, or why it could not be started.
        why: String,
    },
    /// The command line.
    #[error("{0}")]
    Usage(String),
}

impl BenchError {
    /// A server that said something it must not.
    pub(crate) fn peer(peer: impl Into<String>, what: impl Display) -> Self {
        Self::Peer { peer: peer.into(), what: what.to_string() }
    }
}

/// Says what was tried when a call failed.
pub(crate) trait Trying<T> {
    /// `what` is a phrase: "reading the volume".
    fn trying(self, what: impl FnOnce() -> String) -> Result<T, BenchError>;
}

impl<T> Trying<T> for io::Result<T> {
    fn trying(self, what: impl FnOnce() -> String) -> Result<T, BenchError> {
        self.map_err(|source| BenchError::Io { what: what(), source })
    }
}
