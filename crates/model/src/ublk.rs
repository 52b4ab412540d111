//! What is said about a block device of the host, `/dev/ublkb<n>`, between its *warden* (root, makes and ends the
//! device) and the worker that serves it. Format: `docs/formats/ublk-handshake.md`.
//!
//! The warden connects to the disk's socket, as another client would. The worker says what the disk is; the warden offers
//! a device, or says that it is the one who looks after the device that the worker serves already. Frames are those of
//! [`crate::control`].

use serde::{Deserialize, Serialize};

use crate::id::DiskId;

/// Version of these messages, in [`WorkerSays::Disk`] and in [`Offer`].
pub const UBLK_VERSION: u32 = 1;
/// Most queues of a device.
pub const MAX_QUEUES: u16 = 16;
/// Most requests under way in one queue.
pub const MAX_DEPTH: u16 = 256;
/// Most bytes of one request's data that may be offered.
pub const MAX_IO_BYTES: u32 = 1 << 20;

/// What a worker says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub enum WorkerSays {
    /// First, without being asked.
    Disk(DiskShown),
    /// To [`WardenSays::Started`]: it serves, and did so after the device was started.
    Serving,
    /// It does not serve it, or no longer. The end of the connection follows.
    Refused {
        /// One line for the administrator.
        message: String,
    },
}

/// What the block device is to look like, and who serves it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskShown {
    /// [`UBLK_VERSION`].
    pub version: u32,
    /// The disk.
    pub disk: DiskId,
    /// Its size.
    pub bytes: u64,
    /// Its logical block: 512 or 4096.
    pub unit_bytes: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether a discard does anything.
    pub discard: bool,
    /// The worker's process.
    pub pid: i32,
    /// Number of the device that the worker serves already, for a warden that is gone.
    pub serves: Option<u32>,
}

/// What a warden says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub enum WardenSays {
    /// Serve this device; its char device, `/dev/ublkc<n>`, comes with the frame. It can be open once only.
    Offer(Offer),
    /// Go on with [`DiskShown::serves`].
    Keep,
    /// The device is started, or started again. Answered by [`WorkerSays::Serving`].
    Started,
}

/// A device to serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// [`UBLK_VERSION`].
    pub version: u32,
    /// Its number.
    pub device: u32,
    /// Its queues.
    pub queues: u16,
    /// Requests under way in each.
    pub depth: u16,
    /// Most bytes of one request's data.
    pub max_io_bytes: u32,
    /// Whether the driver wants its commands encoded as ioctls are (Linux 6.4), or their bare numbers.
    pub encoded: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_what_the_format_says() {
        let offer =
            Offer { version: 1, device: 3, queues: 2, depth: 64, max_io_bytes: 262_144, encoded: true };
        assert_eq!(
            serde_json::to_string(&WardenSays::Offer(offer)).unwrap(),
            r#"{"say":"offer","version":1,"device":3,"queues":2,"depth":64,"max_io_bytes":262144,"encoded":true}"#
        );
        assert_eq!(serde_json::to_string(&WardenSays::Keep).unwrap(), r#"{"say":"keep"}"#);
        assert_eq!(serde_json::to_string(&WorkerSays::Serving).unwrap(), r#"{"say":"serving"}"#);
        let disk = WorkerSays::Disk(DiskShown {
            version: 1,
            disk: DiskId::from_bytes([0x11; 16]),
            bytes: 4096,
            unit_bytes: 512,
            read_only: false,
            discard: true,
            pid: 7,
            serves: None,
        });
        let text = serde_json::to_string(&disk).unwrap();
        assert!(
            text.starts_with(r#"{"say":"disk","version":1,"disk":"#) && text.contains(r#""serves":null"#)
        );
        assert_eq!(serde_json::from_str::<WorkerSays>(&text).unwrap(), disk);
    }
}
