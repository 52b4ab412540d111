//! One ublk device of ours: found, made, opened, ended.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::PathBuf,
};

use vmseal_model::ublk::{DiskShown, Offer, UBLK_VERSION};

use crate::{
    abi::{self, DevInfo, Op, Params},
    control::{self, Control},
    names,
};

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// All numbers are taken.
    #[error("this host has no free number for a ublk device: see /dev/ublkc*, and end what is not needed")]
    NoNumber,
    /// Not for us.
    #[error("the ublk driver makes no device for this process: it needs root with CAP_SYS_ADMIN")]
    NotPermitted(#[source] io::Error),
    /// It would not survive.
    #[error(
        "this kernel's ublk devices do not survive the end of who serves them: Linux 6.1 or later is needed"
    )]
    NoRecovery,
    /// The driver says no.
    #[error("the ublk driver refuses to {what}")]
    Driver {
        /// What was asked of it.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The char device.
    #[error("{path} cannot be opened")]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// How a driver's answer reads.
pub fn refused(what: &'static str) -> impl FnOnce(io::Error) -> DeviceError {
    move |source| DeviceError::Driver { what, source }
}

/// The device with this mark.
///
/// # Errors
///
/// The driver's.
pub fn find(control: &mut Control, mark: u64) -> Result<Option<DevInfo>, DeviceError> {
    for number in names::devices() {
        // Another's may go away meanwhile.
        let info = control.info(number).map_err(refused("say what a device is"))?;
        if let Some(info) = info.filter(|info| info.ublksrv_flags == mark) {
            return Ok(Some(info));
        }
    }
    Ok(None)
}

/// Makes a device for this disk, whose queues have one request more than `depth`. It is not a block device yet.
///
/// # Errors
///
/// [`DeviceError`].
pub fn add(
    control: &mut Control,
    disk: &DiskShown,
    mark: u64,
    queues: u16,
    depth: u16,
) -> Result<DevInfo, DeviceError> {
    let wanted = DevInfo {
        nr_hw_queues: queues,
        queue_depth: depth + 1,
        max_io_buf_bytes: abi::MAX_IO_BYTES,
        // The driver chooses.
        dev_id: u32::MAX,
        ublksrv_pid: -1,
        flags: abi::F_USER_RECOVERY | abi::F_USER_RECOVERY_REISSUE,
        ublksrv_flags: mark,
        ..DevInfo::default()
    };
    let info = control.add(wanted).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOSPC) => DeviceError::NoNumber,
        Some(libc::EPERM | libc::EACCES) => DeviceError::NotPermitted(error),
        _ => refused("make a device")(error),
    })?;
    let set = if control::recovers(&info) {
        control.set_params(info.dev_id, &Params::of(disk)).map_err(refused("take the disk's size and limits"))
    } else {
        Err(DeviceError::NoRecovery)
    };
    if let Err(error) = set {
        let _ = control.simple(Op::DelDev, info.dev_id, 0);
        return Err(error);
    }
    Ok(info)
}

/// Keeps the block layer from giving a queue all the requests that it has room for; whether that is so already.
///
/// The driver (up to Linux 6.14) hears of a worker's death by the commands with which it waits for requests. A queue whose
/// requests were all under way has none, and the driver notices only when the block layer loses patience, after 30 s. So
/// there is one that is never used. A scheduler has more requests of its own, but not of the driver's: they stay limited if one is
/// chosen later.
///
/// Waits until everything under way has ended; to be called in a thread of its own, for a worker can die meanwhile.
///
/// # Errors
///
/// The kernel's.
pub fn spare_one(number: u32, depth: u16) -> io::Result<()> {
    let queue = PathBuf::from(format!("/sys/block/ublkb{number}/queue"));
    fs::write(queue.join("scheduler"), "none")?;
    fs::write(queue.join("nr_requests"), (depth - 1).to_string())
}

/// Whether [`spare_one`] was done.
pub fn spares_one(number: u32, depth: u16) -> bool {
    let text = fs::read_to_string(format!("/sys/block/ublkb{number}/queue/nr_requests"));
    text.is_ok_and(|text| text.trim().parse::<u16>().is_ok_and(|requests| requests < depth))
}

/// What a worker is told about a device.
pub fn offer(control: &Control, info: &DevInfo) -> Offer {
    Offer {
        version: UBLK_VERSION,
        device: info.dev_id,
        queues: info.nr_hw_queues,
        depth: info.queue_depth,
        max_io_bytes: info.max_io_buf_bytes,
        encoded: control.encoded(),
    }
}

/// Opens the char device of who serves it; `None` while somebody else has it open.
///
/// # Errors
///
/// [`DeviceError::Open`].
pub fn open(number: u32) -> Result<Option<File>, DeviceError> {
    let path = PathBuf::from(format!("/dev/ublkc{number}"));
    match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(None),
        Err(source) => Err(DeviceError::Open { path, source }),
    }
}

/// Ends a device: the block device goes away, then its number. Waits until it has.
///
/// # Errors
///
/// The driver's.
pub fn end(control: &mut Control, number: u32) -> Result<(), DeviceError> {
    for (op, what) in [(Op::StopDev, "stop a device"), (Op::DelDev, "end a device")] {
        match control.simple(op, number, 0) {
            Err(error) if error.raw_os_error() != Some(libc::ENODEV) => return Err(refused(what)(error)),
            _ => {}
        }
    }
    Ok(())
}

/// Bytes of the block device as the host sees them.
pub fn size(number: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/sys/block/ublkb{number}/size")).ok()?;
    text.trim().parse::<u64>().ok()?.checked_mul(512)
}

/// Gives the block device another size, where the driver can (Linux 6.16).
///
/// # Errors
///
/// The driver's.
pub fn resize(control: &mut Control, number: u32, bytes: u64) -> Result<(), DeviceError> {
    if !control.has(abi::F_UPDATE_SIZE) {
        return Err(refused("change a device's size")(io::ErrorKind::Unsupported.into()));
    }
    control.simple(Op::UpdateSize, number, bytes / 512).map_err(refused("change a device's size"))
}
