//! `vmseal-disk`: keeper, worker or job, as its first argument says. Started by the agent, not by hand.

use std::{io::Write, os::unix::net::UnixStream};

use vmseal_disk::{EXIT_DONE, EXIT_FAILED, EXIT_SETUP, descriptors, end_process, job, keeper, log, worker};

const USAGE: &str = "\
usage: vmseal-disk keeper | job | --version

Serves the disks of one encrypted VM. The agent starts it with its setup socket as
descriptor 3; it is of no use on the command line. See `vmseal vm` and `vmseal disk`.
";

fn main() {
    end_process(run())
}

fn run() -> i32 {
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let ["--version" | "-V"] = arguments[..] {
        // A whole line goes out at once.
        let _ = writeln!(std::io::stdout(), "vmseal-disk {}", env!("CARGO_PKG_VERSION"));
        return EXIT_DONE;
    }
    let role: fn(UnixStream, i32, u32) -> i32 = match arguments[..] {
        ["keeper"] => |socket, _, _| keeper::run(socket),
        ["job"] => |socket, _, _| job::run(socket),
        ["worker", _, _] => worker::run,
        _ => return usage(),
    };
    // The keeper says which process it is and who set it up.
    let (keeper, owner) = match arguments[..] {
        [_, keeper, owner] => match (keeper.parse(), owner.parse()) {
            (Ok(keeper), Ok(owner)) => (keeper, owner),
            _ => return usage(),
        },
        _ => (0, u32::MAX),
    };
    if let Err(error) = vmseal_keys::harden_process() {
        log::line(format_args!("cannot keep this process from being dumped: {error}"));
        return EXIT_FAILED;
    }
    end_on_panic();
    // Few allocations are made while serving, so one more arena for each thread would only be memory. With one the C
    // library also has no reason to count processors in /sys and look for overcommitment in /proc, which the sandbox
    // would stop.
    // SAFETY: integers; before there is a second thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // SAFETY: the string is NUL-terminated and shorter than 16 bytes. (A worker is started through /proc/self/exe.)
    unsafe { libc::prctl(libc::PR_SET_NAME, c"vmseal-disk".as_ptr()) };
    // SAFETY: first thing that looks at descriptors, and once; nothing here has opened one.
    match unsafe { descriptors::take_setup_socket() } {
        Ok(socket) => role(socket, keeper, owner),
        Err(_) => usage(),
    }
}

fn usage() -> i32 {
    let _ = std::io::stderr().write_all(USAGE.as_bytes());
    EXIT_SETUP
}

/// A panic is a bug, and a process with a bug in it stops: the keeper starts a new worker, whose clients reconnect.
fn end_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        log::line(format_args!("bug: {panic}"));
        std::process::abort();
    }));
}
