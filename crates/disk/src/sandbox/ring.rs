//! What an io_uring may do. Seccomp sees only that a ring is entered, not what is in it: a ring without restrictions
//! opens files and makes sockets although openat(2) and socket(2) are forbidden.
//!
//! A process that was taken over could make itself another ring. What that one opens and connects is still landlock's
//! and the network namespace's to forbid, so it reaches nothing either.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Entries must name a place in the ring's table of descriptors, not a descriptor.
pub const FIXED_FILE: u8 = 1 << 0;
/// The next entry begins when this one is done.
pub const IO_LINK: u8 = 1 << 2;

// From linux/io_uring.h.
const REGISTER_FILES_UPDATE: u8 = 6;
const REGISTER_RESTRICTIONS: libc::c_uint = 11;
const REGISTER_ENABLE_RINGS: libc::c_uint = 12;
const RESTRICTION_REGISTER_OP: u16 = 0;
const RESTRICTION_SQE_OP: u16 = 1;
const RESTRICTION_SQE_FLAGS_ALLOWED: u16 = 2;
const RESTRICTION_SQE_FLAGS_REQUIRED: u16 = 3;

#[repr(C)]
struct Restriction {
    kind: u16,
    value: u8,
    reserved: u8,
    reserved2: [u32; 3],
}

/// Leaves a ring that was made disabled (IORING_SETUP_R_DISABLED) these operations on its table of descriptors, with
/// `flags` beside [`FIXED_FILE`], and changes of the table; then enables it. What it needs registered is registered
/// before.
///
/// # Errors
///
/// The kernel's: the ring is of no use then.
pub fn restrict(ring: BorrowedFd<'_>, opcodes: &[u8], flags: u8) -> io::Result<()> {
    let rule = |kind, value| Restriction { kind, value, reserved: 0, reserved2: [0; 3] };
    let mut rules: Vec<Restriction> =
        opcodes.iter().map(|opcode| rule(RESTRICTION_SQE_OP, *opcode)).collect();
    rules.push(rule(RESTRICTION_SQE_FLAGS_ALLOWED, FIXED_FILE | flags));
    rules.push(rule(RESTRICTION_SQE_FLAGS_REQUIRED, FIXED_FILE));
    rules.push(rule(RESTRICTION_REGISTER_OP, REGISTER_FILES_UPDATE));
    register(ring, REGISTER_RESTRICTIONS, rules.as_ptr().cast(), rules.len() as libc::c_uint)?;
    register(ring, REGISTER_ENABLE_RINGS, std::ptr::null(), 0)
}

fn register(
    ring: BorrowedFd<'_>,
    operation: libc::c_uint,
    argument: *const libc::c_void,
    count: libc::c_uint,
) -> io::Result<()> {
    // SAFETY: both callers pass what their operation reads, and it outlives the call; nothing is written.
    match unsafe { libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), operation, argument, count) }
    {
        ..0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
