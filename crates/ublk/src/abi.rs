//! Numbers and layouts of the ublk driver's control commands. Source: linux/ublk_cmd.h.

use std::mem;

use vmseal_model::ublk::DiskShown;

/// What goes with a control command.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct CtrlCmd {
    /// The device; `u32::MAX` for a new one of the driver's choice.
    pub dev_id: u32,
    /// A queue; `u16::MAX` where none is meant.
    pub queue_id: u16,
    /// Length of what is at `addr`.
    pub len: u16,
    /// Memory the command reads or writes.
    pub addr: u64,
    /// The command's number.
    pub data: u64,
    /// Only of devices made without privileges.
    pub dev_path_len: u16,
    /// Zero.
    pub pad: u16,
    /// Zero.
    pub reserved: u32,
}
const _: () = assert!(mem::size_of::<CtrlCmd>() == 32);

impl CtrlCmd {
    /// As it stands in the 80 bytes of a long entry.
    pub fn bytes(&self) -> [u8; 80] {
        let mut bytes = [0; 80];
        bytes[0..4].copy_from_slice(&self.dev_id.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.queue_id.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.len.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.addr.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.data.to_ne_bytes());
        bytes[24..26].copy_from_slice(&self.dev_path_len.to_ne_bytes());
        bytes
    }
}

/// What is known of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DevInfo {
    /// Its queues.
    pub nr_hw_queues: u16,
    /// Requests in each.
    pub queue_depth: u16,
    /// One of the `STATE_` numbers.
    pub state: u16,
    /// Zero.
    pub pad0: u16,
    /// Most bytes of a request's data.
    pub max_io_buf_bytes: u32,
    /// Its number.
    pub dev_id: u32,
    /// Who serves it.
    pub ublksrv_pid: i32,
    /// Zero.
    pub pad1: u32,
    /// The `F_` flags.
    pub flags: u64,
    /// Ours: the driver keeps it and does not look at it.
    pub ublksrv_flags: u64,
    /// Who made it.
    pub owner_uid: u32,
    /// Who made it.
    pub owner_gid: u32,
    /// Zero.
    pub reserved: [u64; 2],
}
const _: () = assert!(mem::size_of::<DevInfo>() == 64);

/// What the block device looks like: the header, the basics, and what discards are.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Params {
    len: u32,
    types: u32,
    attrs: u32,
    logical_bs_shift: u8,
    physical_bs_shift: u8,
    io_opt_shift: u8,
    io_min_shift: u8,
    max_sectors: u32,
    chunk_sectors: u32,
    dev_sectors: u64,
    virt_boundary_mask: u64,
    discard_alignment: u32,
    discard_granularity: u32,
    max_discard_sectors: u32,
    max_write_zeroes_sectors: u32,
    max_discard_segments: u16,
    reserved: u16,
    /// Brings it to a multiple of 8 bytes; `len` does not count it.
    tail: u32,
}
const _: () = assert!(mem::size_of::<Params>() == Params::LEN as usize + 4);
const _: () =
    assert!(mem::offset_of!(Params, attrs) == 8 && mem::offset_of!(Params, discard_alignment) == 40);

const PARAM_BASIC: u32 = 1 << 0;
const PARAM_DISCARD: u32 = 1 << 1;
const ATTR_READ_ONLY: u32 = 1 << 0;
const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
const ATTR_FUA: u32 = 1 << 3;
/// Most sectors of one request that writes zeros, which is as much work as any write: 32 MiB.
const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 16;
/// Most sectors of one discard: 2 GiB.
const MAX_DISCARD_SECTORS: u32 = 1 << 22;

impl Params {
    /// Bytes the driver reads.
    pub const LEN: u32 = 60;

    /// Those of this disk.
    pub fn of(disk: &DiskShown) -> Self {
        let unit = disk.unit_bytes.max(512);
        let mut attrs = ATTR_VOLATILE_CACHE | ATTR_FUA;
        if disk.read_only {
            attrs |= ATTR_READ_ONLY;
        }
        let discards = disk.discard && !disk.read_only;
        Self {
            len: Self::LEN,
            types: PARAM_BASIC | PARAM_DISCARD,
            attrs,
            logical_bs_shift: unit.trailing_zeros() as u8,
            // Whatever the logical block, aligned 4 KiB are one access of the medium.
            physical_bs_shift: 12,
            io_opt_shift: 12,
            io_min_shift: 12,
            max_sectors: MAX_IO_BYTES / 512,
            chunk_sectors: 0,
            dev_sectors: disk.bytes / 512,
            virt_boundary_mask: 0,
            discard_alignment: 0,
            discard_granularity: unit.max(4096),
            max_discard_sectors: if discards { MAX_DISCARD_SECTORS } else { 0 },
            max_write_zeroes_sectors: if disk.read_only { 0 } else { MAX_WRITE_ZEROES_SECTORS },
            max_discard_segments: u16::from(discards),
            reserved: 0,
            tail: 0,
        }
    }
}

/// Most bytes of one request's data that we ask for. A queue's worker has memory for its depth times this.
pub const MAX_IO_BYTES: u32 = 256 << 10;

/// Not started, or stopped.
pub const STATE_DEAD: u16 = 0;
/// Served.
pub const STATE_LIVE: u16 = 1;
/// Its worker died; requests wait.
pub const STATE_QUIESCED: u16 = 2;

/// Survives the end of its worker.
pub const F_USER_RECOVERY: u64 = 1 << 3;
/// And what was under way then is asked again.
pub const F_USER_RECOVERY_REISSUE: u64 = 1 << 4;
/// Its size can be changed (Linux 6.16).
pub const F_UPDATE_SIZE: u64 = 1 << 10;

/// A control command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// What is known of a device.
    GetDevInfo = 0x02,
    /// A new device.
    AddDev = 0x04,
    /// No device.
    DelDev = 0x05,
    /// The block device appears, once all queues wait for requests.
    StartDev = 0x06,
    /// The block device goes away.
    StopDev = 0x07,
    /// What the block device looks like.
    SetParams = 0x08,
    /// The queues are for another worker.
    StartUserRecovery = 0x10,
    /// The block device goes on, once all queues wait for requests.
    EndUserRecovery = 0x11,
    /// What this driver can do (Linux 6.5).
    GetFeatures = 0x13,
    /// Another size (Linux 6.16).
    UpdateSize = 0x15,
}

impl Op {
    /// Its number: encoded as that of an ioctl, or bare (before Linux 6.4).
    pub fn number(self, encoded: bool) -> u32 {
        const READ: u32 = 2;
        const WRITE: u32 = 1;
        let bare = u32::from(self as u8);
        if !encoded {
            return bare;
        }
        let direction = match self {
            Self::GetDevInfo | Self::GetFeatures => READ,
            _ => READ | WRITE,
        };
        direction << 30 | (mem::size_of::<CtrlCmd>() as u32) << 16 | u32::from(b'u') << 8 | bare
    }
}

/// UBLK_IO_FETCH_REQ, encoded or bare, of a queue.
pub fn fetch(encoded: bool) -> u32 {
    const FETCH_REQ: u32 = 0x20;
    FETCH_REQ | if encoded { 3 << 30 | 16 << 16 | u32::from(b'u') << 8 } else { 0 }
}

#[cfg(test)]
mod tests {
    use vmseal_model::id::DiskId;

    use super::*;

    #[test]
    fn numbers_are_those_of_the_header_file() {
        // _IOWR('u', 4, struct ublksrv_ctrl_cmd) and _IOR('u', 2, struct ublksrv_ctrl_cmd).
        assert_eq!(Op::AddDev.number(true), 0xc020_7504);
        assert_eq!(Op::GetDevInfo.number(true), 0x8020_7502);
        assert_eq!(Op::GetFeatures.number(true), 0x8020_7513);
        assert_eq!(Op::EndUserRecovery.number(true), 0xc020_7511);
        assert_eq!(Op::AddDev.number(false), 4);
        assert_eq!((fetch(true), fetch(false)), (0xc010_7520, 0x20));
    }

    #[test]
    fn command_stands_in_its_bytes_as_in_memory() {
        let cmd = CtrlCmd {
            dev_id: 1,
            queue_id: u16::MAX,
            len: 64,
            addr: 0x1234_5678,
            data: 9,
            dev_path_len: 0,
            pad: 0,
            reserved: 0,
        };
        // SAFETY: plain integers without padding, as the size says.
        let raw: [u8; 32] = unsafe { mem::transmute(cmd) };
        assert_eq!(cmd.bytes()[..32], raw);
        assert!(cmd.bytes()[32..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn read_only_disk_takes_neither_discard_nor_zeros() {
        let disk = DiskShown {
            version: 1,
            disk: DiskId::from_bytes([1; 16]),
            bytes: 1 << 30,
            unit_bytes: 4096,
            read_only: false,
            discard: true,
            pid: 1,
            serves: None,
        };
        let params = Params::of(&disk);
        assert_eq!((params.dev_sectors, params.logical_bs_shift), (1 << 21, 12));
        assert_eq!((params.max_discard_sectors, params.max_discard_segments), (MAX_DISCARD_SECTORS, 1));
        let params = Params::of(&DiskShown { read_only: true, unit_bytes: 512, ..disk });
        assert_eq!(params.attrs & ATTR_READ_ONLY, ATTR_READ_ONLY);
        assert_eq!(params.logical_bs_shift, 9);
        assert_eq!((params.max_discard_sectors, params.max_write_zeroes_sectors), (0, 0));
    }
}
