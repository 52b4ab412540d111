//! What is said when a system call was stopped, and the end of the process after that.
//!
//! Except for the first few files that were to be opened: these fail with EACCES, and the process goes on. C libraries
//! look into `/proc` and `/sys` for hints when it pleases them, and do without; a guest's disk must not end for that.

use std::{
    io, mem,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::{EXIT_STOPPED, latch::SharedPage};

/// So many files may fail to open.
const MOST_OPENED: u32 = 8;
static OPENED: AtomicU32 = AtomicU32::new(0);

/// Where the handler notes it; set once, before there is a handler.
static PAGE: OnceLock<Option<Arc<SharedPage>>> = OnceLock::new();

/// Installs the handler for SIGSYS.
pub(super) fn install(page: Option<Arc<SharedPage>>) -> io::Result<()> {
    let _ = PAGE.set(page);
    // SAFETY: plain data that is filled in here; the handler has the three-argument form that SA_SIGINFO demands, and
    // does async-signal-safe things only.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = on_stopped as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigemptyset(&mut action.sa_mask);
        if libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The beginning of the kernel's siginfo for SIGSYS; the libc crate does not name its fields.
#[repr(C)]
struct StoppedCall {
    signal: i32,
    errno: i32,
    code: i32,
    // A union of pointers follows, aligned as one.
    call_address: *const libc::c_void,
    system_call: i32,
    architecture: u32,
}

extern "C" fn on_stopped(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo of this signal. Of one that a process sent the number means nothing.
    let system_call = unsafe { (*info.cast::<StoppedCall>()).system_call };
    if let Some(Some(page)) = PAGE.get() {
        page.note_stopped(system_call.unsigned_abs());
    }
    let mut line = Line::default();
    line.text(b"vmseal-disk[");
    // SAFETY: getpid has no arguments.
    line.number(unsafe { libc::getpid() }.unsigned_abs());
    line.text(b"] stopped: system call ");
    line.number(system_call.unsigned_abs());
    line.text(b" is not allowed in the sandbox; this is a bug or an attack\n");
    // SAFETY: bytes of `line`; async-signal-safe, and allowed.
    unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len) };
    let opens = libc::c_long::from(system_call) == libc::SYS_openat;
    if opens && OPENED.fetch_add(1, Ordering::Relaxed) < MOST_OPENED {
        // SAFETY: the kernel passes the context of the thread that made the call, to be gone back to.
        unsafe { answer(context.cast(), -libc::c_long::from(libc::EACCES)) };
        return;
    }
    // SAFETY: ends the process, and is allowed.
    unsafe { libc::_exit(EXIT_STOPPED) }
}

/// Lets the stopped call give this result.
///
/// # Safety
///
/// The context is the one a handler of SIGSYS got.
unsafe fn answer(context: *mut libc::ucontext_t, result: libc::c_long) {
    // SAFETY: the caller's promise. These registers hold a system call's result.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        {
            (*context).uc_mcontext.gregs[libc::REG_RAX as usize] = result;
        }
        #[cfg(target_arch = "aarch64")]
        {
            (*context).uc_mcontext.regs[0] = result as u64;
        }
    }
}

/// A line that is put together without memory from anywhere.
struct Line {
    bytes: [u8; 160],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 160], len: 0 }
    }
}

impl Line {
    fn text(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = *byte;
                self.len += 1;
            }
        }
    }

    fn number(&mut self, number: u32) {
        let mut power = 1_000_000_000;
        while power > 1 && number / power == 0 {
            power /= 10;
        }
        while power > 0 {
            self.text(&[b'0' + (number / power % 10) as u8]);
            power /= 10;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_in_decimal_and_nothing_runs_over() {
        let mut line = Line::default();
        for number in [0, 7, 10, 257, u32::MAX] {
            line.number(number);
            line.text(b" ");
        }
        assert_eq!(&line.bytes[..line.len], b"0 7 10 257 4294967295 ");
        for _ in 0..100 {
            line.text(b"too much");
        }
        assert_eq!(line.len, 160);
    }
}
