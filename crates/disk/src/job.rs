//! One pass over a volume: encrypt a clear file into it, decrypt it into one, compare the two, or fill it with
//! encrypted zeros. Either may be an image behind a store helper: only ciphertext of the volume and, of a clear image,
//! what is clear there anyway pass that.
//!
//! In: a setup frame and descriptors on the setup socket. Out: events on the same socket. It is resumable from what it
//! said was durable, never deletes or shortens anything, and ends when the agent closes its end.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
};

use aws_lc_rs::digest;
use vmseal_model::control::{CONTROL_VERSION, Job, JobEvent, JobSetup, OLDEST_CONTROL_VERSION};
use vmseal_xts::Cipher;

use crate::{
    EXIT_DONE, EXIT_FAILED, EXIT_SETUP,
    descriptors::{hung_up, peer_of},
    frame, log,
    medium::Medium,
    sandbox,
    setup::{DiskDefect, KeyMemory, SetupError, layout_of},
    store::{Store, StoreError},
    volume::{Volume, VolumeError},
    worker::with_causes,
};

/// Bytes at a time.
const CHUNK: u64 = 1 << 20;
/// Bytes between two flushes, and so between two events.
const DURABLE_STEP: u64 = 64 << 20;
/// Zeros of this size stay holes in a clear file.
const HOLE: usize = 64 << 10;
/// A clear file may end this much before the size that was named: sizes are rounded up to whole units.
const ROUNDING: u64 = 4096;

/// Why a job ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// The setup is from another release.
    #[error(
        "job has version {found}, this vmseal-disk speaks {OLDEST_CONTROL_VERSION} to {CONTROL_VERSION}: restart the agent after an upgrade"
    )]
    Version {
        /// What it has.
        found: u32,
    },
    /// The setup is impossible.
    #[error("job is wrong: {0}")]
    Malformed(&'static str),
    /// The disk's values or its key are wrong.
    #[error("{0}")]
    Disk(DiskDefect),
    /// The key memory cannot be used.
    #[error(transparent)]
    Keys(SetupError),
    /// The clear file's descriptor cannot be used.
    #[error("the clear file {0}")]
    ClearFile(StoreError),
    /// The volume failed.
    #[error("at byte {at}: {cause}")]
    Volume {
        /// Where.
        at: u64,
        /// How.
        cause: VolumeError,
    },
    /// The clear file failed.
    #[error("at byte {at} of the clear file")]
    Clear {
        /// Where.
        at: u64,
        /// How.
        #[source]
        cause: io::Error,
    },
    /// The clear file is shorter than it was said to be.
    #[error("the clear file ends at byte {at}, {bytes} were expected; was it changed meanwhile?")]
    ClearShort {
        /// Where it ends.
        at: u64,
        /// Where it should.
        bytes: u64,
    },
    /// The volume does not hold what an earlier run said was durable.
    #[error("job is to go on at byte {from}, but the volume ends at byte {stored}")]
    Resume {
        /// Where to go on.
        from: u64,
        /// Where it ends.
        stored: u64,
    },
    /// Volume and clear file are not the same.
    #[error("volume and clear file differ at byte {at}")]
    Differ {
        /// The first byte that differs.
        at: u64,
    },
    /// Nobody is there any more.
    #[error("the agent went away")]
    AgentGone,
}

/// Runs a job to its end; gives the exit code.
pub fn run(socket: UnixStream) -> i32 {
    // SAFETY: ignoring a signal installs no handler. A file that may not grow further answers EFBIG instead.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let (setup, fds) = match frame::receive::<JobSetup>(&socket) {
        Ok(Some(frame)) => frame,
        Ok(None) => return EXIT_SETUP,
        Err(error) => return end(&socket, &with_causes(&error), EXIT_SETUP),
    };
    // Helpers of the user that set this up are served, too.
    let owner = match peer_of(&socket) {
        Ok(peer) => peer.uid,
        Err(error) => return end(&socket, &with_causes(&error), EXIT_SETUP),
    };
    let work = match Work::prepare(setup, fds, owner) {
        Ok(work) => work,
        Err(error) => return end(&socket, &with_causes(&error), EXIT_SETUP),
    };
    if let Err(error) = sandbox::enter(None, None) {
        return end(&socket, &with_causes(&error), EXIT_FAILED);
    }
    match work.run(&socket) {
        Ok(sha256) => match frame::send(&socket, &JobEvent::Done { sha256 }, &[]) {
            Ok(()) => EXIT_DONE,
            Err(_) => EXIT_FAILED,
        },
        Err(error) => end(&socket, &with_causes(&error), EXIT_FAILED),
    }
}

fn end(socket: &UnixStream, message: &str, code: i32) -> i32 {
    log::line(format_args!("job: {message}"));
    let _ = frame::send(socket, &JobEvent::Failed { message: message.into() }, &[]);
    code
}

struct Work {
    job: Job,
    volume: Volume,
    volume_store: Arc<Medium>,
    clear: Option<Medium>,
    bytes: u64,
    from: u64,
    unit: u64,
}

impl Work {
    fn prepare(setup: JobSetup, fds: Vec<OwnedFd>, owner: u32) -> Result<Self, JobError> {
        if !(OLDEST_CONTROL_VERSION..=CONTROL_VERSION).contains(&setup.version) {
            return Err(JobError::Version { found: setup.version });
        }
        let (job, mut disk) = (setup.job, setup.disk);
        let (keys, data, clear) = match (job, <[OwnedFd; 3]>::try_from(fds)) {
            (Job::Zero, Ok([keys, data, _])) => (keys, data, None),
            (_, Ok([keys, data, clear])) => (keys, data, Some(clear)),
            (Job::Zero, Err(fds)) => match <[OwnedFd; 2]>::try_from(fds) {
                Ok([keys, data]) => (keys, data, None),
                Err(_) => return Err(JobError::Malformed("it needs two descriptors")),
            },
            (_, Err(_)) => return Err(JobError::Malformed("it needs three descriptors")),
        };
        let writes_volume = matches!(job, Job::Encrypt | Job::Zero);
        if writes_volume && disk.read_only {
            return Err(JobError::Malformed("it writes a volume that is read-only"));
        }
        // A volume that is being filled is as short as it happens to be; one that is read must be whole, or grow.
        disk.grows |= writes_volume;
        disk.read_only = !writes_volume;
        let layout = layout_of(&disk).map_err(JobError::Disk)?;
        if setup.bytes > disk.presented_bytes
            || setup.from > setup.bytes
            || !setup.from.is_multiple_of(layout.unit)
        {
            return Err(JobError::Malformed("its range is not within the disk"));
        }
        let keys = KeyMemory::map(keys, std::slice::from_ref(&disk)).map_err(JobError::Keys)?;
        let dek = keys.dek(&disk, setup.vm).map_err(JobError::Disk)?;
        let cipher = Cipher::new(dek.data_key(), layout.unit as usize)
            .map_err(|error| JobError::Disk(DiskDefect::Key(error)))?;
        let volume_store = Medium::new(data, !writes_volume, owner);
        let volume_store = Arc::new(volume_store.map_err(|error| JobError::Disk(DiskDefect::Store(error)))?);
        let volume = Volume::new(Box::new(volume_store.clone()), cipher, layout)
            .map_err(|error| JobError::Disk(DiskDefect::Volume(error)))?;
        if writes_volume && volume.stored_bytes() < setup.from {
            return Err(JobError::Resume { from: setup.from, stored: volume.stored_bytes() });
        }
        let clear = clear
            .map(|fd| Medium::new(fd, job != Job::Decrypt, owner).map_err(JobError::ClearFile))
            .transpose()?;
        let (bytes, from, unit) = (setup.bytes, setup.from, layout.unit);
        Ok(Self { job, volume, volume_store, clear, bytes, from, unit })
    }

    /// Does it; gives the hash, or nothing.
    fn run(&self, socket: &UnixStream) -> Result<String, JobError> {
        let clear = || self.clear.as_ref().ok_or(JobError::Malformed("it has no clear file"));
        match self.job {
            Job::Zero => {
                self.each_chunk(socket, |at, len| {
                    let len = (len as u64).next_multiple_of(self.unit);
                    self.volume.write_zeroes(at, len).map_err(|cause| JobError::Volume { at, cause })
                })?;
            }
            Job::Encrypt => {
                let clear = clear()?;
                let mut buf = vec![0; CHUNK as usize];
                self.each_chunk(socket, |at, len| {
                    let piece = self.clear_piece(clear, at, len, &mut buf)?;
                    self.volume.write(at, piece).map_err(|cause| JobError::Volume { at, cause })
                })?;
            }
            Job::Decrypt => self.decrypt(socket, clear()?)?,
            Job::Verify => return self.verify(socket, clear()?),
        }
        Ok(String::new())
    }

    fn decrypt(&self, socket: &UnixStream, clear: &Medium) -> Result<(), JobError> {
        let mut buf = vec![0; CHUNK as usize];
        self.each_chunk(socket, |at, len| {
            let piece = self.volume_piece(at, len, &mut buf)?;
            let piece = piece.get(..len).unwrap_or_default();
            for (i, block) in piece.chunks(HOLE).enumerate() {
                let at = at + (i * HOLE) as u64;
                // Made a hole and not merely left out: what lies there may be older than this job.
                let hole = is_zero(block) && clear.make_hole(at, block.len() as u64);
                if !hole {
                    clear.write_at(at, block).map_err(|cause| JobError::Clear { at, cause })?;
                }
            }
            Ok(())
        })?;
        let at = self.bytes;
        clear.extend_to(at).and_then(|()| clear.sync_all()).map_err(|cause| JobError::Clear { at, cause })
    }

    fn verify(&self, socket: &UnixStream, clear: &Medium) -> Result<String, JobError> {
        // What is compared should be what the media hold.
        self.volume_store.forget_cached();
        clear.forget_cached();
        let mut hash = digest::Context::new(&digest::SHA256);
        let (mut ours, mut theirs) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
        self.each_chunk(socket, |at, len| {
            let ours = self.volume_piece(at, len, &mut ours)?;
            let theirs = self.clear_piece(clear, at, len, &mut theirs)?;
            if let Some(i) = ours.iter().zip(theirs.iter()).position(|(a, b)| a != b) {
                return Err(JobError::Differ { at: at + i as u64 });
            }
            hash.update(ours.get(..len).unwrap_or_default());
            Ok(())
        })?;
        Ok(hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Calls `work` for each piece of the range, flushes what it wrote and says how far it is.
    fn each_chunk(
        &self,
        socket: &UnixStream,
        mut work: impl FnMut(u64, usize) -> Result<(), JobError>,
    ) -> Result<(), JobError> {
        let (mut at, mut durable) = (self.from, self.from);
        while at < self.bytes {
            if hung_up(socket) {
                return Err(JobError::AgentGone);
            }
            let len = (self.bytes - at).min(CHUNK);
            work(at, len as usize)?;
            at += len;
            if at - durable >= DURABLE_STEP || at == self.bytes {
                self.flush(at)?;
                durable = at;
                let event = JobEvent::Progress { durable };
                frame::send(socket, &event, &[]).map_err(|_| JobError::AgentGone)?;
            }
        }
        if self.from == self.bytes { self.flush(at) } else { Ok(()) }
    }

    /// Makes durable what the job writes.
    fn flush(&self, at: u64) -> Result<(), JobError> {
        match (self.job, &self.clear) {
            (Job::Encrypt | Job::Zero, _) => {
                self.volume.flush().map_err(|cause| JobError::Volume { at, cause })
            }
            (Job::Decrypt, Some(clear)) => clear.flush().map_err(|cause| JobError::Clear { at, cause }),
            _ => Ok(()),
        }
    }

    /// `len` bytes of the volume and what is left of the last unit.
    fn volume_piece<'a>(&self, at: u64, len: usize, buf: &'a mut [u8]) -> Result<&'a mut [u8], JobError> {
        let piece = buf.get_mut(..len.next_multiple_of(self.unit as usize)).unwrap_or_default();
        self.volume.read(at, piece).map_err(|cause| JobError::Volume { at, cause })?;
        Ok(piece)
    }

    /// `len` bytes of the clear file, and zeros up to a whole unit. The file may end a little early, never much.
    fn clear_piece<'a>(
        &self,
        clear: &Medium,
        at: u64,
        len: usize,
        buf: &'a mut [u8],
    ) -> Result<&'a mut [u8], JobError> {
        let piece = buf.get_mut(..len.next_multiple_of(self.unit as usize)).unwrap_or_default();
        let (wanted, padding) = piece.split_at_mut(len);
        let got = clear.read_at(at, wanted).map_err(|cause| JobError::Clear { at, cause })?;
        let end = at + got as u64;
        if got < len && self.bytes - end >= ROUNDING {
            return Err(JobError::ClearShort { at: end, bytes: self.bytes });
        }
        wanted.get_mut(got..).unwrap_or_default().fill(0);
        padding.fill(0);
        Ok(piece)
    }
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}
