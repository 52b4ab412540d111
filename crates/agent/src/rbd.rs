//! Volumes and clear images on Ceph RBD, through helper processes: this one loads no librbd and speaks to no cluster.
//!
//! A location as text in; facts, images and a socket behind which an image is served out. The helper holds the image's
//! exclusive lock as long as it lives, so a held image is a locked one. Which Ceph user and which keyring is `agent.toml`'s
//! word and the definition's; the key itself passes no hand of ours. Protocol: `docs/formats/store-helper.md`.

pub mod channel;
pub mod helper;
pub mod location;
mod remembered;
pub mod tool;

use std::{io, path::PathBuf};

use vmseal_model::refusal::Code;

pub use self::{helper::Served, location::Location, tool::Tool};
use crate::{causes::causes, tasks::Refusal};

/// Why an image cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RbdError {
    /// The helper is not installed.
    #[error("the helper for Ceph RBD, {}, is not there", program.display())]
    NoProgram {
        /// Where it was looked for.
        program: PathBuf,
    },
    /// The user helpers run as is not there.
    #[error("there is no user {name}, as which helpers for Ceph RBD run")]
    NoUser {
        /// Its name.
        name: String,
    },
    /// librbd is missing or too old.
    #[error("Ceph's library cannot be used: {said}")]
    Library {
        /// In the helper's words.
        said: String,
    },
    /// The image is not there.
    #[error("there is no RBD image {image}")]
    Absent {
        /// Pool and image.
        image: String,
    },
    /// Its name is taken.
    #[error("there is an RBD image {image} already")]
    Exists {
        /// Pool and image.
        image: String,
    },
    /// Another client has it.
    #[error("RBD image {image} is in use by another client: {said}")]
    Held {
        /// Pool and image.
        image: String,
        /// Who, in the helper's words.
        said: String,
    },
    /// The cluster or the helper says no.
    #[error("RBD image {image} cannot be used: {said}")]
    Failed {
        /// Pool and image.
        image: String,
        /// In the helper's words.
        said: String,
    },
    /// It says nothing.
    #[error("the helper for RBD image {image} says nothing for {seconds} s")]
    Silent {
        /// Pool and image.
        image: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The text names no image.
    #[error("'{}' names no RBD image: {reason}", text.escape_debug())]
    Location {
        /// What was given.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The system.
    #[error("cannot {action} for RBD image {image}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Pool and image.
        image: String,
        /// Why.
        source: io::Error,
    },
}

impl RbdError {
    /// The code of the refusal.
    pub fn code(&self) -> Code {
        match self {
            Self::NoProgram { .. } | Self::NoUser { .. } | Self::Library { .. } | Self::Silent { .. } => {
                Code::HostNotReady
            }
            Self::Absent { .. } => Code::NotFound,
            Self::Exists { .. } => Code::Exists,
            Self::Held { .. } => Code::VolumeInUse,
            Self::Location { .. } => Code::BadRequest,
            Self::Failed { .. } | Self::Io { .. } => Code::Failed,
        }
    }

    /// What to do next.
    pub fn hint(&self) -> String {
        match self {
            Self::NoProgram { .. } => "install vmseal-rbd there, or set rbd_binary in agent.toml".into(),
            Self::NoUser { name } => {
                format!(
                    "useradd --system --user-group --shell /usr/sbin/nologin {name}, or set rbd_user in agent.toml"
                )
            }
            Self::Library { .. } => "apt install librbd1; vmseal doctor says when that is enough".into(),
            Self::Absent { image } => {
                format!("look at: rbd ls {}", image.split('/').next().unwrap_or_default())
            }
            Self::Exists { image } => format!("find out what it is: rbd info {image}"),
            Self::Held { image, .. } => format!(
                "see who has it: rbd status {image}; rbd lock ls {image}. Only if that host is off or fenced: vmseal-agent \
                 fence-rbd {image}"
            ),
            Self::Failed { image, .. } => {
                format!(
                    "try it as that user on this host: rbd info {image}; rights are in docs/operate/ceph.md"
                )
            }
            Self::Silent { .. } => "see whether the cluster answers here: ceph -s".into(),
            Self::Location { .. } => "write rbd:POOL/IMAGE".into(),
            Self::Io { .. } => String::new(),
        }
    }
}

impl From<RbdError> for Refusal {
    fn from(error: RbdError) -> Self {
        Self::new(error.code(), causes(&error)).hint(error.hint())
    }
}
