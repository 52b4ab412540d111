//! Commands to the ublk driver: `/dev/ublk-control`, on an io_uring with long entries.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use io_uring::{IoUring, cqueue, opcode, squeue::Entry128, types::Fd};

use crate::abi::{self, CtrlCmd, DevInfo, Op, Params};

/// The driver's device.
pub const CONTROL: &str = "/dev/ublk-control";
/// A cancellation's own completion.
const CANCEL: u64 = u64::MAX;
/// Entries of the ring: a start that waits, one command beside it, a cancellation.
const ENTRIES: u32 = 8;
/// The first Linux whose devices survive the end of their worker.
const FIRST_LINUX: (u32, u32) = (6, 1);

/// Why the driver cannot be used at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// Too old.
    #[error(
        "Linux {release} has no block devices that survive the end of who serves them: Linux 6.1 or later is needed"
    )]
    OldKernel {
        /// What runs.
        release: String,
    },
    /// Not loaded.
    #[error(
        "the kernel's ublk driver is not loaded ({CONTROL} is missing): run `modprobe ublk_drv`, and name it in \
         /etc/modules-load.d to have it loaded at boot"
    )]
    NoDriver,
    /// Not for us.
    #[error("{CONTROL} may not be used: this needs root with CAP_SYS_ADMIN")]
    NotPermitted(#[source] io::Error),
    /// Cannot be opened.
    #[error("{CONTROL} cannot be opened")]
    Open(#[source] io::Error),
    /// No ring.
    #[error("there is no io_uring to be had; see `sysctl kernel.io_uring_disabled`, which must be 0 or 1")]
    NoRing(#[source] io::Error),
}

/// The way to the driver.
pub struct Control {
    ring: IoUring<Entry128, cqueue::Entry>,
    file: File,
    encoded: bool,
    features: u64,
    next: u64,
    /// What has come and was not asked for yet.
    completed: Vec<(u64, i32)>,
}

/// A command that is under way.
#[derive(Debug)]
pub struct Ticket(u64);

impl Control {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// [`ControlError`].
    pub fn open() -> Result<Self, ControlError> {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let release = release.trim();
        if version(release).is_some_and(|version| version < FIRST_LINUX) {
            return Err(ControlError::OldKernel { release: release.to_owned() });
        }
        let file = OpenOptions::new().read(true).write(true).open(CONTROL).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => ControlError::NoDriver,
                Some(libc::EACCES | libc::EPERM) => ControlError::NotPermitted(error),
                _ => ControlError::Open(error),
            }
        })?;
        let ring = IoUring::builder().dontfork().build(ENTRIES).map_err(ControlError::NoRing)?;
        let mut control = Self { ring, file, encoded: true, features: 0, next: 0, completed: Vec::new() };
        // Linux before 6.5 does not know the question.
        let mut features = 0u64;
        let asked = CtrlCmd { len: 8, addr: (&raw mut features) as u64, ..command(0) };
        // SAFETY: the driver writes 8 bytes at `features`, which outlives the call.
        match unsafe { control.run(Op::GetFeatures, &asked) } {
            Ok(_) => control.features = features,
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                return Err(ControlError::NotPermitted(error));
            }
            Err(_) => control.encoded = false,
        }
        Ok(control)
    }

    /// Whether commands are encoded as ioctls are.
    pub fn encoded(&self) -> bool {
        self.encoded
    }

    /// Whether the driver has this feature.
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Makes a device like this; what it became.
    ///
    /// # Errors
    ///
    /// The driver's.
    pub fn add(&mut self, mut info: DevInfo) -> io::Result<DevInfo> {
        let len = size_of::<DevInfo>() as u16;
        let cmd = CtrlCmd { len, addr: (&raw mut info) as u64, ..command(info.dev_id) };
        // SAFETY: the driver reads and writes one `DevInfo`, which outlives the call.
        unsafe { self.run(Op::AddDev, &cmd)? };
        Ok(info)
    }

    /// What is known of a device; `None` if there is none.
    ///
    /// # Errors
    ///
    /// The driver's.
    pub fn info(&mut self, device: u32) -> io::Result<Option<DevInfo>> {
        let mut info = DevInfo::default();
        let len = size_of::<DevInfo>() as u16;
        let cmd = CtrlCmd { len, addr: (&raw mut info) as u64, ..command(device) };
        // SAFETY: the driver writes one `DevInfo`, which outlives the call.
        match unsafe { self.run(Op::GetDevInfo, &cmd) } {
            Ok(_) => Ok(Some(info)),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Says what the block device is to look like.
    ///
    /// # Errors
    ///
    /// The driver's.
    pub fn set_params(&mut self, device: u32, params: &Params) -> io::Result<()> {
        let len = Params::LEN as u16;
        let cmd = CtrlCmd { len, addr: std::ptr::from_ref(params) as u64, ..command(device) };
        // SAFETY: the driver reads as many bytes of `params`, which outlives the call.
        unsafe { self.run(Op::SetParams, &cmd).map(|_| ()) }
    }

    /// A command that has a number and no memory, to its end.
    ///
    /// # Errors
    ///
    /// The driver's.
    pub fn simple(&mut self, op: Op, device: u32, data: u64) -> io::Result<()> {
        let ticket = self.begin(op, device, data)?;
        self.wait(&ticket).map(|_| ())
    }

    /// The same, without waiting.
    ///
    /// # Errors
    ///
    /// The ring's.
    pub fn begin(&mut self, op: Op, device: u32, data: u64) -> io::Result<Ticket> {
        // SAFETY: a command without memory.
        unsafe { self.push(op, &CtrlCmd { data, ..command(device) }) }
    }

    /// Its result, if there is one.
    ///
    /// # Errors
    ///
    /// The driver's.
    pub fn finished(&mut self, ticket: &Ticket) -> Option<io::Result<i32>> {
        self.take();
        let at = self.completed.iter().position(|(number, _)| *number == ticket.0)?;
        let (_, result) = self.completed.swap_remove(at);
        Some(if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) })
    }

    /// Ends it if it still waits; its result.
    ///
    /// # Errors
    ///
    /// `EINTR` or `ECANCELED` if it was ended; else as it went.
    pub fn cancel(&mut self, ticket: &Ticket) -> io::Result<i32> {
        let entry: Entry128 = opcode::AsyncCancel::new(ticket.0).build().user_data(CANCEL).into();
        // SAFETY: it points to nothing.
        unsafe { self.ring.submission().push(&entry).map_err(|_| full())? };
        self.ring.submit()?;
        self.wait(ticket)
    }

    /// SAFETY: as [`Control::push`].
    unsafe fn run(&mut self, op: Op, cmd: &CtrlCmd) -> io::Result<i32> {
        // SAFETY: passed on; the memory is used until the result is there, which is waited for.
        let ticket = unsafe { self.push(op, cmd)? };
        self.wait(&ticket)
    }

    fn wait(&mut self, ticket: &Ticket) -> io::Result<i32> {
        loop {
            if let Some(result) = self.finished(ticket) {
                return result;
            }
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
    }

    /// # Safety
    ///
    /// What the command points to is as long as it says, and outlives it.
    unsafe fn push(&mut self, op: Op, cmd: &CtrlCmd) -> io::Result<Ticket> {
        self.next += 1;
        let number = self.next;
        let entry = opcode::UringCmd80::new(Fd(self.file.as_raw_fd()), op.number(self.encoded))
            .cmd(cmd.bytes())
            .build()
            .user_data(number);
        // SAFETY: as the caller promises; the file is open as long as the ring.
        unsafe { self.ring.submission().push(&entry).map_err(|_| full())? };
        self.ring.submit()?;
        Ok(Ticket(number))
    }

    fn take(&mut self) {
        self.completed.extend(
            self.ring
                .completion()
                .map(|entry| (entry.user_data(), entry.result()))
                .filter(|it| it.0 != CANCEL),
        );
    }
}

impl AsFd for Control {
    /// Readable when a command has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as the ring, which the borrow holds.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

fn command(dev_id: u32) -> CtrlCmd {
    CtrlCmd { dev_id, queue_id: u16::MAX, len: 0, addr: 0, data: 0, dev_path_len: 0, pad: 0, reserved: 0 }
}

/// There are more entries than commands at a time.
fn full() -> io::Error {
    io::ErrorKind::ResourceBusy.into()
}

/// Major and minor number of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Whether a device outlives its worker, as it was made.
pub fn recovers(info: &DevInfo) -> bool {
    let needed = abi::F_USER_RECOVERY | abi::F_USER_RECOVERY_REISSUE;
    info.flags & needed == needed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_tells_whether_devices_survive() {
        assert_eq!(version("6.12.95+deb12-cloud-amd64"), Some((6, 12)));
        assert!(version("6.0.19").unwrap() < FIRST_LINUX);
        assert!(version("5.10.0-21").unwrap() < FIRST_LINUX);
        assert!(version("6.1-rc1").unwrap() >= FIRST_LINUX);
        assert_eq!(version("unknown"), None);
    }
}
