//! Serves a block device of the host, `/dev/ublkb<n>`: the kernel's ublk driver asks, one thread a queue answers.
//!
//! In: a connection of the device's warden, which is root and knows what devices there are; with its offer comes the char
//! device. Out: when it is over, and why. Nothing here makes, starts or ends a device (`docs/design/ublk.md`).
//!
//! A warden that dies changes nothing: the device is served on, and the next warden says that it keeps it. A worker that
//! dies loses no request: the driver notices, the warden has the device recovered and offers it to the next worker, and
//! what was not answered is asked again.

mod abi;
mod descriptions;
mod device;
mod queue;
mod seat;

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::FileTypeExt, net::UnixStream},
    },
    sync::Arc,
    time::Duration,
};

use vmseal_model::ublk::{
    DiskShown, MAX_DEPTH, MAX_IO_BYTES, MAX_QUEUES, Offer, UBLK_VERSION, WardenSays, WorkerSays,
};

pub use self::seat::Seat;
use self::seat::Service;
use crate::{
    descriptors::ready,
    export::Export,
    frame::{self, FrameError},
    worker::with_causes,
};

/// How long a message may take to go or to come, once it has begun.
const STEP: Duration = Duration::from_secs(30);

/// Why a device is not served, or no longer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UblkError {
    /// The warden says what it should not.
    #[error("the offer of a ublk device is wrong: {0}")]
    Offer(&'static str),
    /// One device a disk.
    #[error("the disk is served as /dev/ublkb{0} already")]
    Taken(u32),
    /// There is none.
    #[error("the disk is not served as a block device")]
    NotServed,
    /// The connection to the warden failed.
    #[error("the connection to the warden of a ublk device failed")]
    Connection(#[from] FrameError),
    /// No memory, descriptor, thread or ring.
    #[error("queue {queue} cannot be set up")]
    SetUp {
        /// Which.
        queue: u16,
        /// Why.
        source: io::Error,
    },
    /// The driver takes a command for wrong.
    #[error("the ublk driver refuses request {tag} of queue {queue}")]
    Driver {
        /// Which queue.
        queue: u16,
        /// Which request.
        tag: u16,
        /// What it says.
        source: io::Error,
    },
    /// A ring failed.
    #[error("queue {queue} failed")]
    Ring {
        /// Which.
        queue: u16,
        /// Why.
        source: io::Error,
    },
}

/// Talks with one warden until it is gone, or the device is.
///
/// # Errors
///
/// [`UblkError`]; the warden was told if it could be.
pub fn serve(stream: &UnixStream, export: &Arc<Export>) -> Result<(), UblkError> {
    let outcome = converse(stream, export);
    if let Err(error) = &outcome {
        let _ = frame::send(stream, &WorkerSays::Refused { message: with_causes(error) }, &[]);
    }
    outcome
}

fn converse(stream: &UnixStream, export: &Arc<Export>) -> Result<(), UblkError> {
    let socket = |error: io::Error| UblkError::Connection(error.into());
    stream.set_read_timeout(Some(STEP)).map_err(socket)?;
    stream.set_write_timeout(Some(STEP)).map_err(socket)?;
    frame::send(stream, &WorkerSays::Disk(shown(export)), &[])?;
    let mut attended: Option<Arc<Service>> = None;
    loop {
        let [said, over] = ready([Some(stream.as_fd()), attended.as_ref().map(|it| it.over())], None);
        if over {
            return attended.map_or(Ok(()), |service| service.outcome());
        }
        if !said {
            continue;
        }
        match frame::receive::<WardenSays>(stream)? {
            // The warden is gone: the device is served on. Or this worker makes room for another, and takes requests until
            // it ends: what it leaves unanswered is asked again, as after any other end.
            None => return Ok(()),
            Some((WardenSays::Offer(offer), fds)) if attended.is_none() => {
                let device = check(&offer, fds)?;
                attended = Some(device::start(export, &offer, device)?);
            }
            Some((WardenSays::Keep, _)) if attended.is_none() => {
                attended = Some(export.seat().service().ok_or(UblkError::NotServed)?);
            }
            Some((WardenSays::Started, _)) if attended.is_some() => {
                frame::send(stream, &WorkerSays::Serving, &[])?;
            }
            Some(_) => return Err(UblkError::Offer("it comes out of turn")),
        }
    }
}

fn shown(export: &Export) -> DiskShown {
    let layout = export.volume().layout();
    DiskShown {
        version: UBLK_VERSION,
        disk: export.disk(),
        bytes: layout.presented,
        // 512 or 4096.
        unit_bytes: layout.unit as u32,
        read_only: layout.read_only,
        discard: layout.discard,
        pid: std::process::id().cast_signed(),
        serves: export.seat().device(),
    }
}

fn check(offer: &Offer, fds: Vec<OwnedFd>) -> Result<File, UblkError> {
    if offer.version != UBLK_VERSION {
        return Err(UblkError::Offer("it is of another version; install one release of vmseal on this host"));
    }
    if !(1..=MAX_QUEUES).contains(&offer.queues) || !(1..=MAX_DEPTH).contains(&offer.depth) {
        return Err(UblkError::Offer("its number of queues or requests is impossible"));
    }
    if !(4096..=MAX_IO_BYTES).contains(&offer.max_io_bytes) || !offer.max_io_bytes.is_multiple_of(4096) {
        return Err(UblkError::Offer("its longest request is impossible"));
    }
    let [device] = <[OwnedFd; 1]>::try_from(fds)
        .map_err(|_| UblkError::Offer("it comes with another number of descriptors than one"))?;
    let device = File::from(device);
    if !device.metadata().is_ok_and(|about| about.file_type().is_char_device()) {
        return Err(UblkError::Offer("its descriptor is no char device"));
    }
    Ok(device)
}

#[cfg(test)]
mod tests {
    use vmseal_model::{control::ExportKind, id::DiskId};

    use super::*;

    fn offer() -> Offer {
        Offer { version: UBLK_VERSION, device: 0, queues: 2, depth: 8, max_io_bytes: 65536, encoded: true }
    }

    fn open(path: &str) -> OwnedFd {
        File::open(path).unwrap().into()
    }

    fn export() -> Arc<Export> {
        let volume = crate::volume::tests::fixture(8192, |_| {}).volume;
        Arc::new(Export::new(DiskId::from_bytes([4; 16]), "vda".into(), ExportKind::Ublk, volume))
    }

    fn hear(stream: &UnixStream) -> WorkerSays {
        frame::receive(stream).unwrap().unwrap().0
    }

    #[test]
    fn impossible_offers_are_refused() {
        assert!(check(&offer(), vec![open("/dev/null")]).is_ok());
        assert!(check(&offer(), vec![]).is_err());
        assert!(check(&offer(), vec![open("/dev/null"), open("/dev/null")]).is_err());
        assert!(check(&offer(), vec![open("/")]).is_err());
        let changes: [fn(&mut Offer); 7] = [
            |offer| offer.version += 1,
            |offer| offer.queues = 0,
            |offer| offer.queues = MAX_QUEUES + 1,
            |offer| offer.depth = 0,
            |offer| offer.depth = MAX_DEPTH + 1,
            |offer| offer.max_io_bytes = 2 * MAX_IO_BYTES,
            |offer| offer.max_io_bytes = 4097,
        ];
        for change in changes {
            let mut offer = offer();
            change(&mut offer);
            assert!(check(&offer, vec![open("/dev/null")]).is_err(), "{offer:?}");
        }
    }

    #[test]
    fn worker_says_what_the_disk_is_and_refuses_a_device_that_is_none() {
        let export = export();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        frame::send(&ours, &WardenSays::Offer(offer()), &[null.as_fd()]).unwrap();
        assert!(matches!(serve(&theirs, &export), Err(UblkError::SetUp { .. })));
        let WorkerSays::Disk(disk) = hear(&ours) else { panic!("no description") };
        assert_eq!(
            (disk.disk, disk.bytes, disk.serves),
            (export.disk(), export.volume().layout().presented, None)
        );
        assert!(matches!(hear(&ours), WorkerSays::Refused { .. }));
        assert_eq!(export.seat().device(), None, "the failed device keeps its seat");
    }

    #[test]
    fn warden_cannot_keep_or_start_what_is_not_served() {
        for says in [WardenSays::Keep, WardenSays::Started] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            frame::send(&ours, &says, &[]).unwrap();
            assert!(serve(&theirs, &export()).is_err(), "{says:?}");
            hear(&ours);
            assert!(matches!(hear(&ours), WorkerSays::Refused { .. }));
        }
    }
}
