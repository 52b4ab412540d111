//! Serves the plaintext view of one VM's volumes: the small program that holds disk keys.
//!
//! In: one setup frame with descriptors (key memory, volumes, listening sockets). Out: an NBD export per disk and a
//! control socket. It opens nothing by path except libvirt's pid file within a directory it was given, speaks to no
//! network, and knows no image format. Frames and life cycle: `docs/formats/disk-control.md`.

#![deny(unsafe_op_in_unsafe_fn)]

mod aligned;
pub mod control;
pub mod custody;
pub mod descriptors;
pub mod engine;
pub mod export;
mod flush_gate;
pub mod frame;
pub mod gate;
pub mod job;
pub mod keeper;
pub mod lane;
pub mod latch;
mod lock;
pub mod log;
pub mod medium;
pub mod nbd;
pub mod notice;
pub mod peer;
pub mod program;
pub mod remote;
pub mod resize;
pub mod sandbox;
pub mod setup;
pub mod store;
pub mod ublk;
pub mod vhost_user;
pub mod volume;
pub mod worker;

/// Exit code: ended as asked.
pub const EXIT_DONE: i32 = 0;
/// Exit code: failed; a keeper starts the worker again.
pub const EXIT_FAILED: i32 = 1;
/// Exit code: wrong usage or a setup that cannot be served; a keeper ends too, for trying again does not help.
pub const EXIT_SETUP: i32 = 2;
/// Exit code: made a system call that the sandbox stops; a keeper starts the worker again.
pub const EXIT_STOPPED: i32 = 3;
/// Exit code: made room for a worker from another program.
pub const EXIT_UPGRADE: i32 = 4;

/// Ends the process at once. Threads that still serve are not waited for, and no destructor runs beside them: an order
/// to end must not become a crash, after which a keeper would start another worker.
pub fn end_process(code: i32) -> ! {
    // SAFETY: ends the process; nothing of ours is buffered.
    unsafe { libc::_exit(code) }
}
