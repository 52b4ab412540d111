//! What is said about a ublk device between the process that has it made (root) and the worker that serves it.
//!
//! The maker connects to the disk's socket, as another client would, and sends an [`Offer`] with the device's char
//! device, `/dev/ublkc<n>`, opened for this worker: it can be open once only. The worker sets its queues up and sends an
//! [`Answer`]. Nothing more is said: when the connection ends, so does the service, from either side. Frames are those
//! of [`crate::control`].

use serde::{Deserialize, Serialize};

/// Version of [`Offer`] and [`Answer`].
pub const OFFER_VERSION: u32 = 1;
/// Most queues of a device.
pub const MAX_QUEUES: u16 = 16;
/// Most requests under way in one queue.
pub const MAX_DEPTH: u16 = 256;
/// Most bytes of one request's data.
pub const MAX_IO_BYTES: u32 = 1 << 20;

/// A device to serve; its char device comes with the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// [`OFFER_VERSION`].
    pub version: u32,
    /// Its queues.
    pub queues: u16,
    /// Requests under way in each.
    pub depth: u16,
    /// Most bytes of one request's data.
    pub max_io_bytes: u32,
    /// Whether the driver wants its commands encoded as ioctls are (Linux 6.4), or their bare numbers.
    pub encoded: bool,
}

/// What the worker says to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// Every queue waits for requests.
    Ready {
        /// The worker.
        pid: i32,
    },
    /// It does not serve it.
    Refused {
        /// One line for the administrator.
        message: String,
    },
}
