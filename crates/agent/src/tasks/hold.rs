//! Files a task holds: opened, locked, and as they were planned.
//!
//! Plans in, locked files out. A resumed task tries for a while: a job of the last run may be about to end.

use std::{
    fs::File,
    path::Path,
    time::{Duration, Instant},
};

use vmseal_model::refusal::Code;

use crate::{
    lock::{Claim, LockError, claim_soon},
    tasks::{
        context::Context,
        image,
        place::{self, Clear},
        plan::{Identity, NewDisk, Origin},
        refusal::{Halt, Refusal, io_refusal},
        wipe,
    },
};

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(50);

/// Tries what may be in use for a moment only.
pub(crate) fn patiently<T, E>(ctx: &Context, mut attempt: impl FnMut() -> Result<T, E>) -> Result<T, Halt>
where
    Refusal: From<E>,
{
    let until = Instant::now() + Duration::from_secs(if ctx.resumed { 5 } else { 0 });
    loop {
        match attempt().map_err(Refusal::from) {
            Err(refusal) if refusal.code == Code::VolumeInUse && Instant::now() < until => {
                ctx.check_wanted()?;
                ctx.control.pause(PAUSE);
            }
            other => return Ok(other?),
        }
    }
}

/// Opens and locks the clear image: no QEMU opens it until the task ends, and it is as it was planned.
pub(crate) fn claim_source(ctx: &Context, disk: &NewDisk) -> Result<Option<Clear>, Halt> {
    let Origin::Image { path, identity, .. } = &disk.origin else { return Ok(None) };
    if let Some(at) = place::location(path)? {
        let name = place::held_name(ctx, &disk.target, "source");
        let held = patiently(ctx, || Clear::hold(&ctx.world, &at, &name).map_err(|r| r.about(&disk.target)))?;
        if !held.1.is_unchanged(identity) {
            return Err(changed(path).about(&disk.target).into());
        }
        return Ok(Some(held.0));
    }
    let image = image::examine(path).map_err(|r| r.about(&disk.target))?;
    patiently(ctx, || lock_source(&image.file, path).map_err(|r| r.about(&disk.target)))?;
    if !image.identity.is_unchanged(identity) {
        return Err(changed(path).about(&disk.target).into());
    }
    Ok(Some(Clear::File(image.file)))
}

/// Locks an image as long as its file is open.
pub(crate) fn lock_source(file: &File, path: &str) -> Result<(), Refusal> {
    claim_soon(file, Claim::Source).map_err(|lock| match lock {
        LockError::InUse { .. } => Refusal::new(Code::VolumeInUse, format!("{path} is {lock}"))
            .hint(format!("find out who: fuser -v {}", image::shell(path))),
        LockError::Io(error) => io_refusal("lock", Path::new(path), &error),
    })
}

/// Opens and locks a file that is about to be overwritten; `None` if it is gone.
///
/// # Errors
///
/// Somebody has it, or another file lies there: it must not be overwritten.
pub(crate) fn lock_again(path: &str, identity: &Identity) -> Result<Option<File>, Refusal> {
    let Some(file) = wipe::reopen(path, identity)? else { return Ok(None) };
    lock_source(&file, path).map(|()| Some(file))
}

/// The image is not what it was.
pub(crate) fn changed(path: &str) -> Refusal {
    Refusal::new(Code::Conflict, format!("{path} was changed while it was being encrypted"))
        .hint("find out by what, then encrypt the VM again")
}
