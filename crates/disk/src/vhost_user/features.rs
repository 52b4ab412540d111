//! What a device and a driver, and a back end and a front end, may agree on.

use vhost::vhost_user::{VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures as Transport};

use crate::volume::Layout;

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// VIRTIO_RING_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_RING_F_INDIRECT_DESC.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// VHOST_F_LOG_ALL.
pub const LOG_ALL: u64 = Transport::LOG_ALL.bits();
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const PROTOCOL_FEATURES: u64 = Transport::PROTOCOL_FEATURES.bits();
/// VIRTIO_BLK_F_SEG_MAX.
pub const SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO.
pub const RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE.
pub const BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_FLUSH.
pub const FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_TOPOLOGY.
pub const TOPOLOGY: u64 = 1 << 10;
/// VIRTIO_BLK_F_CONFIG_WCE.
pub const CONFIG_WCE: u64 = 1 << 11;
/// VIRTIO_BLK_F_MQ.
pub const MQ: u64 = 1 << 12;
/// VIRTIO_BLK_F_DISCARD.
pub const DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES.
pub const WRITE_ZEROES: u64 = 1 << 14;

/// Features of a disk, for the driver and the front end.
pub fn offered(layout: &Layout) -> u64 {
    let always = VERSION_1
        | EVENT_IDX
        | INDIRECT_DESC
        | LOG_ALL
        | PROTOCOL_FEATURES
        | SEG_MAX
        | BLK_SIZE
        | FLUSH
        | TOPOLOGY
        | CONFIG_WCE
        | MQ;
    match (layout.read_only, layout.discard) {
        (true, _) => always | RO,
        (false, true) => always | WRITE_ZEROES | DISCARD,
        (false, false) => always | WRITE_ZEROES,
    }
}

/// What the front end may use of the protocol.
pub fn protocol() -> Protocol {
    Protocol::MQ
        | Protocol::LOG_SHMFD
        | Protocol::REPLY_ACK
        | Protocol::BACKEND_REQ
        | Protocol::CONFIG
        | Protocol::INFLIGHT_SHMFD
        | Protocol::RESET_DEVICE
        | Protocol::CONFIGURE_MEM_SLOTS
}

/// Whether writes must be durable when they are done: the driver asked for it, or cannot ask for a flush.
///
/// Source: VIRTIO 1.2 §5.2.5.2 and §5.2.6.2.
pub fn is_write_through(accepted: u64, writeback: bool) -> bool {
    if accepted & CONFIG_WCE != 0 { !writeback } else { accepted & FLUSH == 0 }
}
