//! Walls around a process that holds keys: what it does not need, it cannot do, whoever takes it over.
//!
//! In: what is prepared already, and the one directory that is looked into later. Out: which walls stand, or an error,
//! after which nothing may be served. Entered by a worker and by a job after their setup was checked and before a
//! client's or a volume's first byte, while the process has one thread. There is no way back.
//!
//! | wall | what it leaves |
//! |---|---|
//! | [`privileges`] | no capability, none to be had by an exec |
//! | [`network`] | a network namespace without an interface that is up, where whoever started us could make one |
//! | [`landlock`] | no file by name but those directly asked for in the pid files' directory, no TCP, no signal or abstract socket outwards |
//! | [`seccomp`] | the system calls an engine makes; the first other one is reported and ends the process |
//! | [`ring`] | io_urings that do block I/O on descriptors they were given; seccomp does not see what goes through a ring |

pub mod landlock;
pub mod network;
pub mod privileges;
mod report;
pub mod ring;
pub mod seccomp;
mod system_calls;

use std::{io, os::fd::BorrowedFd, sync::Arc};

use vmseal_model::control::SandboxStatus;

use crate::latch::SharedPage;

/// Why the sandbox could not be entered. Nothing may be served then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// Capabilities stay.
    #[error("privileges cannot be dropped")]
    Privileges(#[source] io::Error),
    /// Landlock is there and says no.
    #[error("landlock cannot be set up")]
    Landlock(#[source] io::Error),
    /// The report's handler cannot be installed.
    #[error("the handler for stopped system calls cannot be installed")]
    Report(#[source] io::Error),
    /// Seccomp is there and says no.
    #[error("seccomp cannot be set up")]
    Seccomp(#[source] io::Error),
}

/// Puts up every wall that this kernel has.
///
/// `pid_files` is the directory in which files may still be read; `page` is where a stopped system call is noted for
/// the next worker.
///
/// # Errors
///
/// [`SandboxError`]. That a kernel lacks a wall is no error, but is in the status.
pub fn enter(
    pid_files: Option<BorrowedFd<'_>>,
    page: Option<Arc<SharedPage>>,
) -> Result<SandboxStatus, SandboxError> {
    let before = page.as_ref().map(|page| page.stopped()).unwrap_or_default();
    // Asked while a socket can still be had.
    let network = !network::has_interface_up();
    privileges::drop_all().map_err(SandboxError::Privileges)?;
    let landlock = landlock::enter(pid_files).map_err(SandboxError::Landlock)?;
    report::install(page).map_err(SandboxError::Report)?;
    let seccomp = seccomp::enter(pid_files).map_err(SandboxError::Seccomp)?;
    Ok(SandboxStatus { seccomp, landlock, network, stopped: before.0, last_stopped: before.1 })
}

/// One line for the log; names what is missing.
pub fn describe(status: &SandboxStatus) -> String {
    let mut text = match status.landlock {
        0 => "sandbox WITHOUT landlock (not in this kernel)".to_owned(),
        abi => format!("sandbox with landlock {abi}"),
    };
    text += if status.seccomp { ", seccomp" } else { ", WITHOUT seccomp (not in this kernel)" };
    text += if status.network { ", no network" } else { ", the host's network namespace" };
    if let Some(last) = status.last_stopped {
        text +=
            &format!("; {} system calls of workers before were stopped, the last was {last}", status.stopped);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_for_the_log_names_what_is_missing() {
        let whole = SandboxStatus { seccomp: true, landlock: 7, network: true, ..SandboxStatus::default() };
        assert_eq!(describe(&whole), "sandbox with landlock 7, seccomp, no network");
        let text =
            describe(&SandboxStatus { stopped: 2, last_stopped: Some(41), ..SandboxStatus::default() });
        for part in ["WITHOUT landlock", "WITHOUT seccomp", "host's network", "2 system calls", "last was 41"]
        {
            assert!(text.contains(part), "{text}");
        }
    }
}
