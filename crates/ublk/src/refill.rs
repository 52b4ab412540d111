//! What makes a recovery safe that comes after one that was cut off.
//!
//! START_USER_RECOVERY lets every queue go that a worker had, and drivers up to Linux 6.14 follow a null pointer if there is
//! a queue that nobody had: that is so when a worker, or the warden, died between START_USER_RECOVERY and the last queue's
//! first requests. It also is refused where nobody had any. Nothing tells whether it is so. Hence, whenever it may be, this
//! process asks for requests on every queue itself, as a worker does, and lets go of them again. A queue that somebody had
//! refuses that, which does no harm; and while a device waits for recovery no request comes.

use std::{fs::File, io, os::fd::AsRawFd, thread, time::Duration};

use io_uring::{IoUring, opcode, types::Fd};

use crate::abi;

/// How long the driver may take to note that the queues were let go of. It says nowhere that it has.
const SETTLE: Duration = Duration::from_millis(100);

/// Takes every queue that nobody had, and lets go of it. Closes the device; how many requests were asked for.
///
/// # Errors
///
/// No memory, ring or thread.
pub fn refill(device: File, queues: u16, depth: u16, encoded: bool) -> io::Result<usize> {
    // A queue is a thread's, and must be a dead one's before its recovery.
    let taken = thread::Builder::new()
        .name("refill".into())
        .spawn(move || take(&device, queues, depth, encoded))?
        .join()
        .map_err(|_| io::Error::other("the thread that takes queues panicked"))??;
    if taken > 0 {
        thread::sleep(SETTLE);
    }
    Ok(taken)
}

fn take(device: &File, queues: u16, depth: u16, encoded: bool) -> io::Result<usize> {
    let all = usize::from(queues) * usize::from(depth);
    let mut ring = IoUring::new(all as u32)?;
    // The driver wants an address for each; nothing is copied there.
    let nowhere = [0u8; 16];
    for queue in 0..queues {
        for tag in 0..depth {
            let mut cmd = [0; 16];
            cmd[0..2].copy_from_slice(&queue.to_ne_bytes());
            cmd[2..4].copy_from_slice(&tag.to_ne_bytes());
            cmd[8..16].copy_from_slice(&(nowhere.as_ptr() as u64).to_ne_bytes());
            let entry = opcode::UringCmd16::new(Fd(device.as_raw_fd()), abi::fetch(encoded)).cmd(cmd).build();
            // SAFETY: the device waits for recovery, so no request comes that would be copied; the ring ends here.
            unsafe { ring.submission().push(&entry).map_err(|_| io::Error::other("the ring is full"))? };
        }
    }
    let mut left = all;
    while left > 0 {
        left -= ring.submit()?.min(left);
    }
    let refused = ring.completion().count();
    Ok(all - refused)
}
