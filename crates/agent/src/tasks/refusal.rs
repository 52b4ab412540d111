//! Why a task is not begun or does not go on, in the words an administrator gets: code, message, hint.

use vmseal_keys::WrapError;
use vmseal_model::refusal::Code;

use crate::{
    causes::causes,
    domain_xml::XmlError,
    job::JobError,
    journal::JournalError,
    new_volume::NewVolumeError,
    ports::{HypervisorError, KeyMissing},
    spawn::SpawnError,
    store::StoreError,
    tasks::image::{UsesError, shell},
    volume::VolumeError,
};

/// A refusal or failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Its stable code.
    pub code: Code,
    /// What, on which object, why.
    pub message: String,
    /// The way out; empty if there is none to name.
    pub hint: String,
}

impl Refusal {
    /// Without a hint.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: String::new() }
    }

    /// With the way out.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// About a disk: its name before the message.
    #[must_use]
    pub fn about(mut self, target: &str) -> Self {
        self.message = format!("disk {target}: {}", self.message);
        self
    }
}

/// Why a task stopped.
#[derive(Debug)]
pub(crate) enum Halt {
    /// The agent ends, or a crash is being tried: nothing is undone, the journal goes on later.
    Stopped,
    /// Nobody can tell how things stand, or nothing can be written down: nothing is undone, it is tried again.
    Suspended(Refusal),
    /// The administrator no longer wants it.
    Cancelled,
    /// It cannot be done: what was begun is undone.
    Failed(Refusal),
}

impl From<Refusal> for Halt {
    fn from(refusal: Refusal) -> Self {
        Self::Failed(refusal)
    }
}

impl From<JournalError> for Halt {
    fn from(error: JournalError) -> Self {
        let hint = "make room on the file system of the agent's state directory";
        Self::Suspended(Refusal::new(Code::Failed, causes(&error)).hint(hint))
    }
}

impl From<JobError> for Halt {
    fn from(error: JobError) -> Self {
        match error {
            JobError::Spawn(error) => Self::Failed(error.into()),
            error => Self::Failed(Refusal::new(Code::Failed, causes(&error))),
        }
    }
}

macro_rules! failed {
    ($($error:ty => $make:expr;)*) => {$(
        impl From<$error> for Refusal {
            fn from(error: $error) -> Self {
                let make: fn($error) -> Refusal = $make;
                make(error)
            }
        }

        impl From<$error> for Halt {
            fn from(error: $error) -> Self {
                Self::Failed(error.into())
            }
        }
    )*};
}

failed! {
    StoreError => |e| Refusal::new(
        match &e {
            StoreError::EpochTooOld { .. } => Code::EpochTooOld,
            StoreError::OtherDomain { .. } | StoreError::OtherVm { .. } => Code::UnknownVm,
            StoreError::Damaged { .. } => Code::Integrity,
            _ => Code::Failed,
        },
        causes(&e),
    );
    XmlError => |e| Refusal::new(
        match &e {
            XmlError::Metadata { .. } => Code::Integrity,
            XmlError::NoDisk { .. } => Code::NotFound,
            XmlError::DiskExists { .. } => Code::Exists,
            _ => Code::BadRequest,
        },
        causes(&e),
    );
    HypervisorError => |e| match &e {
        HypervisorError::NoDomain { .. } => Refusal::new(Code::NotFound, causes(&e)),
        HypervisorError::Unreachable { .. } => {
            Refusal::new(Code::HostNotReady, causes(&e)).hint("systemctl status libvirtd virtqemud")
        }
        _ => Refusal::new(Code::Failed, causes(&e)),
    };
    UsesError => |e| match e {
        UsesError::Hypervisor(e) => e.into(),
        UsesError::Definition { ref domain, .. } => {
            let hint = format!("look at: virsh dumpxml {}", shell(domain));
            Refusal::new(Code::Failed, causes(&e)).hint(hint)
        }
    };
    VolumeError => |e| Refusal::new(e.code(), causes(&e)).hint(e.hint());
    NewVolumeError => |e| {
        Refusal::new(if e.is_full() { Code::NoSpace } else { Code::Failed }, causes(&e))
    };
    SpawnError => |e| Refusal::new(Code::HostNotReady, causes(&e));
    KeyMissing => |e| Refusal::new(e.code, causes(&e));
    WrapError => |e| Refusal::new(
        match &e {
            WrapError::Memory(_) => Code::HostNotReady,
            WrapError::UnwrapOnly { .. } | WrapError::TooManyRecipients { .. } => Code::Failed,
            _ => Code::Integrity,
        },
        causes(&e),
    );
    vmseal_keys::SecretError => |e| Refusal::new(Code::HostNotReady, causes(&e));
}

/// A failing file operation.
pub(crate) fn io_refusal(action: &str, path: &std::path::Path, error: &std::io::Error) -> Refusal {
    let code = match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => Code::NoSpace,
        Some(libc::EEXIST) => Code::Exists,
        Some(libc::ENOENT) => Code::NotFound,
        _ => Code::Failed,
    };
    Refusal::new(code, format!("cannot {action} {}: {error}", path.display()))
}
