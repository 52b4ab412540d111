//! `vmseal-rbd`: keeps one volume's ciphertext on a Ceph RBD image. Started beside a VM's disk process, not by hand.

use std::{
    ffi::{CString, OsStr, OsString},
    io::Write,
    mem,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    thread,
};

use vmseal_rbd::{
    image::{Image, ImageError, ImageName, TakeOver},
    line,
    serve::{Stop, serve},
};

const USAGE: &str = "\
usage: vmseal-rbd --pool POOL --image IMAGE --socket PATH [--namespace NAME] [--user USER] [--conf FILE]
                  [--take-over OWNER | --take-over-from-anybody]

Takes the image's exclusive lock and serves the disk process that listens at PATH, until that is gone. Says
`owner NAME` on standard output once the lock is held. --take-over breaks the lock of OWNER and blocklists it.
Exit codes: 0 ended in order, 1 failed, 2 wrong usage, 3 another client holds the lock.
";

/// Exit code: somebody else has the image.
const EXIT_HELD: u8 = 3;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let [only] = &arguments[..]
        && (only == "--version" || only == "-V")
    {
        let _ = writeln!(std::io::stdout(), "vmseal-rbd {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let Some((name, take_over, socket)) = parse(arguments) else {
        let _ = std::io::stderr().write_all(USAGE.as_bytes());
        return ExitCode::from(2);
    };
    // Before librados starts its threads, so that they inherit it.
    let Some(stop) = stop_on_signal() else {
        line(format_args!("cannot block signals or start a thread"));
        return ExitCode::FAILURE;
    };
    let image = match Image::open(&name, &take_over) {
        Ok(image) => image,
        Err(error) => {
            line(format_args!("{error}"));
            let held = matches!(error, ImageError::Held { .. });
            return if held { ExitCode::from(EXIT_HELD) } else { ExitCode::FAILURE };
        }
    };
    match image.owner() {
        Ok(owner) => {
            let _ = writeln!(std::io::stdout(), "owner {}", owner.unwrap_or_default());
        }
        Err(error) => {
            line(format_args!("{error}"));
            return ExitCode::FAILURE;
        }
    }
    let shown = image.shown().to_owned();
    match serve(image, &socket, &stop) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            line(format_args!("{shown}: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: Vec<OsString>) -> Option<(ImageName, TakeOver, PathBuf)> {
    let (mut pool, mut image, mut socket, mut namespace, mut user, mut conf) =
        (None, None, None, None, None, None);
    let mut take_over = TakeOver::No;
    let mut arguments = arguments.into_iter();
    while let Some(option) = arguments.next() {
        if option == "--take-over-from-anybody" {
            take_over = TakeOver::Anybody;
            continue;
        }
        let value = arguments.next()?;
        let slot = match option.as_bytes() {
            b"--pool" => &mut pool,
            b"--image" => &mut image,
            b"--socket" => &mut socket,
            b"--namespace" => &mut namespace,
            b"--user" => &mut user,
            b"--conf" => &mut conf,
            b"--take-over" => {
                take_over = TakeOver::From(value.into_string().ok()?);
                continue;
            }
            _ => return None,
        };
        *slot = Some(CString::new(value.into_vec()).ok()?);
    }
    let user = user.unwrap_or_else(|| c"admin".into());
    let socket = PathBuf::from(OsStr::from_bytes(socket?.as_bytes()));
    Some((ImageName { pool: pool?, namespace, image: image?, user, conf }, take_over, socket))
}

/// SIGTERM and SIGINT let everything under way end first.
fn stop_on_signal() -> Option<Arc<Stop>> {
    let stop = Arc::new(Stop::default());
    let for_thread = stop.clone();
    // SAFETY: sigset_t is plain data that sigemptyset initialises; the calls touch only `set`.
    let set = unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        if libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
            return None;
        }
        set
    };
    let waits = move || {
        // SAFETY: a valid set; the siginfo argument may be null.
        while unsafe { libc::sigwaitinfo(&set, std::ptr::null_mut()) } < 0 {}
        for_thread.ask();
    };
    thread::Builder::new().name("signals".into()).spawn(waits).ok()?;
    Some(stop)
}
