//! What a new volume is made from, where that is an empty image; and the end of it, where it is a clear one.
//!
//! The end comes after the switch, so nothing of it fails the task: what cannot be done is told.

use std::{fs::File, process::Command};

use vmseal_model::{refusal::Code, task::SourceFate};

use crate::{
    rbd::Location,
    tasks::{
        context::Context,
        hold::lock_again,
        image::{self, UsesError},
        place::{self, Clear},
        plan::{Identity, NewDisk, Origin},
        refusal::{Halt, Refusal, io_refusal},
        refuse,
        wipe::{self, delete},
    },
};

/// An empty qcow2 image, of exactly the planned length: the same each time, so a copy of it can go on after a crash.
pub(crate) fn make_empty_image(ctx: &Context, disk: &NewDisk, virtual_bytes: u64) -> Result<(), Halt> {
    let path = disk.empty_image(&ctx.world.config.state_dir, ctx.command.task);
    delete(&path.to_string_lossy())?;
    let failed =
        |why: String| Refusal::new(Code::HostNotReady, format!("qemu-img cannot make an empty image: {why}"));
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "preallocation=off"])
        .arg(&path)
        .arg(virtual_bytes.to_string())
        .output()
        .map_err(|e| failed(e.to_string()))?;
    if !made.status.success() {
        return Err(failed(String::from_utf8_lossy(&made.stderr).trim().to_owned()).into());
    }
    let grow = || -> std::io::Result<bool> {
        let file = File::options().write(true).open(&path)?;
        if file.metadata()?.len() > disk.image_bytes {
            return Ok(false);
        }
        file.set_len(disk.image_bytes)?;
        Ok(true)
    };
    match grow() {
        Ok(true) => Ok(()),
        Ok(false) => Err(failed(format!("it is larger than {} bytes", disk.image_bytes)).into()),
        Err(error) => Err(io_refusal("write", &path, &error).into()),
    }
}

/// The clear image meets its fate; `held` is its lock, if this run of the agent has it. What cannot be done here is told,
/// not failed: the VM is encrypted.
pub(crate) fn source_gone(
    ctx: &mut Context,
    disk: &NewDisk,
    held: Option<Clear>,
) -> Result<Option<String>, Halt> {
    let (path, identity, fate) = match &disk.origin {
        Origin::Zeros => return Ok(None),
        Origin::EmptyQcow2 { .. } => {
            let gone =
                delete(&disk.empty_image(&ctx.world.config.state_dir, ctx.command.task).to_string_lossy());
            return Ok(gone.err().map(|r| r.message));
        }
        Origin::Image { path, identity, fate } => (path, identity, *fate),
    };
    let at = place::location(path)?;
    let left = |why: Refusal| {
        let way = match &at {
            Some(at) => format!("when nothing needs it: rbd rm {}", image::shell(&at.name())),
            None => format!("when nothing needs it: shred -u {}", image::shell(path)),
        };
        Some(format!("the clear image {path} is still there ({}); {way}", why.message))
    };
    // Somebody may have come to use it since.
    match refuse::uses(&ctx.world) {
        Ok(uses) => {
            if let Some(other) = uses.other(path, Some(identity), None) {
                return Ok(left(Refusal::new(Code::ImageShared, format!("{other} uses it"))));
            }
            if let (SourceFate::Wipe, Some(disk)) = (fate, uses.unknown()) {
                let text = format!("{disk} may use it, or lie on it: what file that is cannot be told here");
                return Ok(left(Refusal::new(Code::ImageShared, text)));
            }
        }
        // Trying again does not help.
        Err(error @ UsesError::Definition { .. }) => return Ok(left(error.into())),
        // Asked again later: a clear image must not stay because libvirtd starts after the agent.
        Err(error @ UsesError::Hypervisor(_)) => return Err(Halt::Suspended(error.into())),
    }
    if let Some(at) = &at {
        // The lock goes before the image does.
        drop(held);
        return image_gone(ctx, at, identity, fate, left);
    }
    let held = held.and_then(|held| match held {
        Clear::File(file) => Some(file),
        Clear::Image(_) => None,
    });
    let done = match fate {
        SourceFate::Keep => wipe::keep(path, identity).map_err(Halt::from),
        // Nobody reads or writes it while it is overwritten.
        SourceFate::Wipe => match held.map_or_else(|| lock_again(path, identity), |file| Ok(Some(file))) {
            Ok(_locked) => wipe::wipe(ctx, path, identity),
            Err(why) => Err(why.into()),
        },
    };
    match (done, fate) {
        (Ok(()), SourceFate::Keep) => Ok(Some(format!("the clear image is kept: {path}"))),
        (Ok(()), SourceFate::Wipe) => Ok(Some(format!(
            "the clear image {path} was overwritten and deleted; copies that a copy-on-write file system, a snapshot or \
             an SSD keeps are out of reach"
        ))),
        (Err(Halt::Failed(why)), _) => Ok(left(why)),
        (Err(halt), _) => Err(halt),
    }
}

/// The same of an image on RBD. Its objects are deleted; nothing overwrites them.
fn image_gone(
    ctx: &Context,
    at: &Location,
    identity: &Identity,
    fate: SourceFate,
    left: impl Fn(Refusal) -> Option<String>,
) -> Result<Option<String>, Halt> {
    if fate == SourceFate::Keep {
        return Ok(Some(format!("the clear image is kept: {at}")));
    }
    match place::remove_image(ctx, at, identity, None) {
        Ok(()) => Ok(Some(format!(
            "the clear image {at} was removed; Ceph does not overwrite what it frees, so its bytes stay on the OSDs' media \
             until they are used again"
        ))),
        Err(Halt::Failed(why)) => Ok(left(why)),
        Err(halt) => Err(halt),
    }
}
