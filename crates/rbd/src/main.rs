//! `vmseal-rbd`: keeps one volume's ciphertext on a Ceph RBD image. Started beside a VM's disk process, not by hand.

mod arguments;

use std::{io::Write, mem, process::ExitCode, sync::Arc, thread};

use vmseal_rbd::{
    cluster::{Cluster, ClusterError},
    image::{Image, ImageError},
    library::Library,
    line, manage,
    serve::{Stop, serve},
};

use self::arguments::{Arguments, Serve, USAGE, What, parse};

/// Exit code: somebody else has the image.
const EXIT_HELD: u8 = 3;
/// Exit code: there is no such image.
const EXIT_ABSENT: u8 = 4;
/// Exit code: there is one of that name already.
const EXIT_EXISTS: u8 = 5;
/// Exit code: librbd is missing or too old.
const EXIT_LIBRARY: u8 = 6;

fn main() -> ExitCode {
    let Some(Arguments { name, what }) = parse(std::env::args_os().skip(1).collect()) else {
        let _ = std::io::stderr().write_all(USAGE.as_bytes());
        return ExitCode::from(2);
    };
    match what {
        What::Version => say(format!("vmseal-rbd {}\n", env!("CARGO_PKG_VERSION")).as_bytes()),
        What::Check => match Library::load() {
            Ok(_) => ExitCode::SUCCESS,
            Err(error) => failed(&error.into()),
        },
        What::Serve(order) => serve_image(&name, &order),
        What::Info => with(&name, |cluster| Ok(manage::info(cluster, &name.image)?.into_bytes())),
        What::Fence => match Image::fence(&name) {
            Ok(Some(owner)) => say(format!("{owner} held it and is blocklisted\n").as_bytes()),
            Ok(None) => say(b"nobody held it\n"),
            Err(error) => refused(&error),
        },
        What::Read { offset, length } => {
            with(&name, |cluster| manage::read(cluster, &name.image, offset, length))
        }
        What::Create { bytes } => {
            with(&name, |cluster| manage::create(cluster, &name.image, bytes).map(|()| Vec::new()))
        }
        What::Rename { to } => {
            with(&name, |cluster| manage::rename(cluster, &name.image, &to).map(|()| Vec::new()))
        }
        What::Remove => with(&name, |cluster| manage::remove(cluster, &name.image).map(|()| Vec::new())),
    }
}

fn with(
    name: &vmseal_rbd::cluster::ImageName,
    work: impl FnOnce(&Cluster) -> Result<Vec<u8>, ClusterError>,
) -> ExitCode {
    match Cluster::connect(name).and_then(|cluster| work(&cluster)) {
        Ok(output) => say(&output),
        Err(error) => failed(&error),
    }
}

fn say(output: &[u8]) -> ExitCode {
    if std::io::stdout().write_all(output).is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn failed(error: &ClusterError) -> ExitCode {
    line(format_args!("{error}"));
    match error {
        ClusterError::Absent { .. } => ExitCode::from(EXIT_ABSENT),
        ClusterError::Library(_) => ExitCode::from(EXIT_LIBRARY),
        ClusterError::Failed { cause, .. } if cause.raw_os_error() == Some(libc::EEXIST) => {
            ExitCode::from(EXIT_EXISTS)
        }
        _ => ExitCode::FAILURE,
    }
}

fn refused(error: &ImageError) -> ExitCode {
    if let ImageError::Cluster(error) = error {
        return failed(error);
    }
    line(format_args!("{error}"));
    if matches!(error, ImageError::Held { .. }) { ExitCode::from(EXIT_HELD) } else { ExitCode::FAILURE }
}

fn serve_image(name: &vmseal_rbd::cluster::ImageName, order: &Serve) -> ExitCode {
    // Before librados starts its threads, so that they inherit it.
    let Some(stop) = stop_on_signal() else {
        line(format_args!("cannot block signals or start a thread"));
        return ExitCode::FAILURE;
    };
    let image = match Image::open(name, &order.take_over) {
        Ok(image) => image,
        Err(error) => return refused(&error),
    };
    if let Some((offset, expected)) = &order.same {
        match image.has(*offset, expected) {
            Ok(true) => {}
            Ok(false) => {
                line(format_args!(
                    "image {} was held by another host meanwhile: its owner block is not as it was left. The guest here \
                     must not go on with it",
                    image.shown()
                ));
                return ExitCode::from(EXIT_HELD);
            }
            Err(error) => {
                line(format_args!("{error}"));
                return ExitCode::FAILURE;
            }
        }
    }
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
    match serve(image, &order.socket, &stop) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            line(format_args!("{shown}: {error}"));
            ExitCode::FAILURE
        }
    }
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
