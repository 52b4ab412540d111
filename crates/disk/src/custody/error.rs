//! Why volumes do not change hands, in words an administrator can act on.

use std::io;

use vmseal_luks::{ClaimError, OwnerError};
use vmseal_model::{control::Phase, id::HostId};

use crate::{lock::LockError, volume::VolumeError};

/// Why an order was not carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CustodyError {
    /// The setup had no host.
    #[error(
        "this disk process was set up without the id of its host, so its volumes cannot change hands: stop and start the VM \
         once the host has joined"
    )]
    NoHost,
    /// Another order is under way.
    #[error("another order is being carried out: ask again")]
    Occupied,
    /// Not in this phase.
    #[error("cannot {order}: {}", describe(*phase))]
    Phase {
        /// What was ordered.
        order: &'static str,
        /// What the volumes are.
        phase: Phase,
    },
    /// Given to somebody else.
    #[error(
        "the volumes were handed over to host {to} already: take them back first, or activate them there"
    )]
    GivenTo {
        /// Whom.
        to: HostId,
    },
    /// Requests do not end.
    #[error(
        "{target}: requests are still under way after {} seconds, storage is slow or hangs; nothing was handed over and the \
         VM goes on",
        super::REST.as_secs()
    )]
    Busy {
        /// The disk.
        target: String,
    },
    /// What was written is not durable.
    #[error("{target}: {cause}; nothing was handed over and the VM goes on")]
    Flush {
        /// The disk.
        target: String,
        /// Why.
        cause: VolumeError,
    },
    /// The lock cannot be had.
    #[error("{target}: the volume cannot be taken, and nothing was written")]
    Lock {
        /// The disk.
        target: String,
        /// Why.
        #[source]
        cause: LockError,
    },
    /// No helper of a network store.
    #[error(
        "{target}: its store helper is not connected, so nobody here has the lock: start it once the other host's has ended"
    )]
    NoHelper {
        /// The disk.
        target: String,
    },
    /// A lock that other hosts do not see.
    #[error(
        "{target} is a block device, whose lock other hosts do not see: host {to} may be taking it at this moment. End its \
         disk process first, and say so (ended)"
    )]
    Unarbitrated {
        /// The disk.
        target: String,
        /// Who was given it.
        to: HostId,
    },
    /// Somebody else has it.
    #[error("{target}: {cause}")]
    Claim {
        /// The disk.
        target: String,
        /// Who, and what to do.
        cause: ClaimError,
    },
    /// The block says nothing.
    #[error(
        "{target}: {cause}; whose the volume is cannot be known. Make sure that no other host uses it, then have its block \
         written anew: vmseal vm repair"
    )]
    Block {
        /// The disk.
        target: String,
        /// Why.
        cause: OwnerError,
    },
    /// The block is not on the disk.
    #[error("{target}: the owner block cannot be written; ask again, or take the volumes back")]
    Write {
        /// The disk.
        target: String,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The volume is not what it was.
    #[error("{target}: {cause}")]
    Volume {
        /// The disk.
        target: String,
        /// Why.
        cause: VolumeError,
    },
}

fn describe(phase: Phase) -> &'static str {
    match phase {
        Phase::Serving => "the volumes are this process's, and in use",
        Phase::Waiting => "the volumes are another process's, and this one waits for them",
        Phase::Activating => "this process is taking the volumes; activate again",
        Phase::Drained => "the volumes are this process's, and drained",
        Phase::HandingOver => "the volumes are being handed over; hand over again, or resume",
        Phase::HandedOver => "the volumes were handed over",
    }
}
