//! Where images and volumes lie, for the steps of a task: a file by its path, or an RBD image by its location.
//!
//! The text says which. Here is what both can do and each does its own way; what only files can (spare space, modes,
//! overwriting) is said in words where an image cannot.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use vmseal_luks::{HEADER_BYTES, HeaderFile};
use vmseal_model::refusal::Code;

use crate::{
    domain_xml::DiskSource,
    rbd::{Location, RbdError, Served, Tool, tool::Info},
    tasks::{
        context::{Context, World},
        image::{self, shell},
        plan::Identity,
        refusal::{Halt, Refusal, io_refusal},
        wipe,
    },
};

/// Ends the name of a volume that was made from an image.
const ENCRYPTED: &str = ".vmseal";
/// What stands for a device in an image's identity: no file system has that number.
const NO_DEVICE: u64 = u64::MAX;
/// Bytes written at a time.
const CHUNK: u64 = 1 << 20;

/// The location, where a text is one.
pub(crate) fn location(path: &str) -> Result<Option<Location>, Refusal> {
    Ok(Location::is_meant_by(path).then(|| Location::parse(path)).transpose()?)
}

/// Another thing of the same kind whose name differs by what `change` does to it.
fn renamed(path: &str, change: impl FnOnce(&str) -> String) -> String {
    match Location::is_meant_by(path).then(|| Location::parse(path)) {
        Some(Ok(at)) => at.beside(&change(&at.image)).to_string(),
        // What is no location is refused where it is looked at.
        _ => change(path),
    }
}

/// Where the volume of a clear image comes to lie.
pub(crate) fn encrypted_name(path: &str) -> String {
    renamed(path, |name| format!("{name}{ENCRYPTED}"))
}

/// Where the clear image of a volume may come to lie: its old name, if it shows one; one more than that.
pub(crate) fn clear_names(volume: &str) -> (Option<String>, String) {
    let shows_one = match Location::is_meant_by(volume).then(|| Location::parse(volume)) {
        Some(Ok(at)) => at.image.ends_with(ENCRYPTED),
        _ => volume.ends_with(ENCRYPTED),
    };
    let old = renamed(volume, |name| name.strip_suffix(ENCRYPTED).unwrap_or(name).to_owned());
    let more = renamed(&old, |name| format!("{name}.clear"));
    (shows_one.then_some(old), more)
}

/// A name beside it that only a task uses.
pub(crate) fn beside(path: &str, suffix: &str) -> PathBuf {
    renamed(path, |name| format!("{name}.{suffix}")).into()
}

/// Whether a definition's source is this very place.
pub(crate) fn is_at(source: &DiskSource, path: &str) -> bool {
    match source {
        DiskSource::File(there) => there == path,
        // As whom it is asked for is no part of where it is, and a definition without `<auth>` cannot say it.
        DiskSource::Rbd(there) => Location::parse(path).is_ok_and(|at| there.anonymous() == at.anonymous()),
        _ => false,
    }
}

/// What lies there; none if nothing does.
pub(crate) fn look(world: &World, path: &str) -> Result<Option<Identity>, Refusal> {
    if let Some(at) = location(path)? {
        return Ok(Tool::new(&world.config)?.info(&at)?.map(|info| identity(&at, &info)));
    }
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(Identity::of(&metadata))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io_refusal("look at", Path::new(path), &e)),
    }
}

/// Whether what lies there is still the one of that identity. What cannot be looked at is not.
pub(crate) fn is_still(world: &World, path: &str, made: &Identity) -> bool {
    matches!(look(world, path), Ok(Some(there)) if there.same_file(made))
}

/// Nothing may lie there.
pub(crate) fn check_free(world: &World, path: &str) -> Result<(), Refusal> {
    match location(path)? {
        None => image::check_free(path),
        Some(at) => match Tool::new(&world.config)?.info(&at)? {
            None => Ok(()),
            Some(_) => Err(RbdError::Exists { image: at.name() }.into()),
        },
    }
}

/// Removes what lies there; nothing is fine.
pub(crate) fn delete(world: &World, path: &str) -> Result<(), Refusal> {
    match location(path)? {
        None => wipe::delete(path),
        Some(at) => Ok(Tool::new(&world.config)?.remove(&at)?),
    }
}

/// How an image is told from another one of its name, and whether it was written to: as far as Ceph notes that, which is
/// about once a minute.
pub(crate) fn identity(at: &Location, info: &Info) -> Identity {
    let digest = aws_lc_rs::digest::digest(
        &aws_lc_rs::digest::SHA256,
        format!("{}\0{}", at.beside("").name(), info.id).as_bytes(),
    );
    let modified = i64::try_from(info.modified_ns).unwrap_or(i64::MAX);
    Identity {
        device: NO_DEVICE,
        inode: u64::from_le_bytes(digest.as_ref()[..8].try_into().expect("eight bytes of thirty-two")),
        bytes: info.bytes,
        modified_s: modified / 1_000_000_000,
        modified_ns: modified % 1_000_000_000,
        born_ns: Some(info.created_ns),
    }
}

/// An image that nobody has open, and that can be locked.
///
/// # Errors
///
/// Refused with who has it, or what it lacks.
pub(crate) fn idle_image(world: &World, at: &Location) -> Result<Info, Refusal> {
    let info = Tool::new(&world.config)?.info(at)?.ok_or_else(|| RbdError::Absent { image: at.name() })?;
    let name = at.name();
    if let Some(watcher) = info.watchers.first() {
        let said = format!("a client at {watcher} has it open");
        return Err(RbdError::Held { image: name, said }.into());
    }
    if !info.can_lock {
        let text = format!("RBD image {name} has no exclusive lock: nothing keeps two hosts from writing it");
        return Err(Refusal::new(Code::UnsupportedDisk, text)
            .hint(format!("rbd feature enable {} exclusive-lock", shell(&name))));
    }
    Ok(info)
}

/// A clear image that a task holds: nobody else opens it for writing until it is dropped.
pub(crate) enum Clear {
    File(File),
    Image(Served),
}

impl Clear {
    /// Holds an image that nobody has open. `name` stands for it in the agent's state.
    pub(crate) fn hold(world: &World, at: &Location, name: &str) -> Result<(Self, Identity), Refusal> {
        let info = idle_image(world, at)?;
        let served = Served::open(&Tool::new(&world.config)?, at, name)?;
        Ok((Self::Image(served), identity(at, &info)))
    }

    /// For a job.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::File(file) => file.as_fd(),
            Self::Image(served) => served.listener().expect("it was opened here, with its socket"),
        }
    }

    /// As it is now.
    pub(crate) fn identity(&self, world: &World, path: &str) -> Result<Identity, Refusal> {
        match self {
            Self::File(file) => {
                let metadata = file.metadata().map_err(|e| io_refusal("look at", Path::new(path), &e))?;
                Ok(Identity::of(&metadata))
            }
            Self::Image(served) => {
                look(world, path)?.ok_or_else(|| RbdError::Absent { image: served.location().name() }.into())
            }
        }
    }
}

/// Under which name a task's image is known in the agent's state.
pub(crate) fn held_name(ctx: &Context, target: &str, what: &str) -> String {
    format!("{}.{target}.{what}", ctx.command.task)
}

/// Makes an image under a name only this task uses, writes its beginning, and gives it its own name. `created` is told as
/// soon as it is there.
pub(crate) fn make_image(
    ctx: &mut Context,
    target: &str,
    (unfinished, path): (&Path, &str),
    bytes: u64,
    beginning: Option<&[u8]>,
) -> Result<(), Halt> {
    let unfinished = unfinished.to_string_lossy();
    let (Some(new), Some(at)) = (location(&unfinished)?, location(path)?) else {
        return Err(Refusal::new(Code::Failed, format!("{path} is no RBD image")).into());
    };
    let tool = Tool::new(&ctx.world.config).map_err(Refusal::from)?;
    tool.create(&new, bytes).map_err(Refusal::from)?;
    let info = tool.info(&new).map_err(Refusal::from)?;
    let info = info.ok_or_else(|| Refusal::from(RbdError::Absent { image: new.name() }))?;
    ctx.note(target, "created", &identity(&new, &info))?;
    if let Some(beginning) = beginning {
        let served = Served::open(&tool, &new, &held_name(ctx, target, "new")).map_err(Refusal::from)?;
        let written = served.channel().and_then(|channel| {
            channel.put(0, beginning)?;
            channel.settle()
        });
        written.map_err(|e| io_refusal("write the header of", Path::new(&*unfinished), &e))?;
    }
    Ok(tool.rename(&new, &at).map_err(Refusal::from)?)
}

/// Removes an image that nobody has open, if it still is that one; its header is overwritten before, if it is a volume's:
/// that ends every use of its data with an old key record.
pub(crate) fn remove_image(
    ctx: &Context,
    at: &Location,
    identity: &Identity,
    header_in: Option<&str>,
) -> Result<(), Halt> {
    let path = at.to_string();
    match look(&ctx.world, &path)? {
        None => return Ok(()),
        Some(there) if !there.same_file(identity) => {
            let text = format!("{path} is another image than the one this task worked on; it is left alone");
            return Err(Refusal::new(Code::Conflict, text).into());
        }
        Some(_) => {}
    }
    idle_image(&ctx.world, at)?;
    let tool = Tool::new(&ctx.world.config).map_err(Refusal::from)?;
    if let Some(name) = header_in {
        let served = Served::open(&tool, at, name).map_err(Refusal::from)?;
        let zeros = vec![0; CHUNK as usize];
        let overwrite = || -> io::Result<()> {
            let channel = served.channel()?;
            let end = HEADER_BYTES.min(channel.bytes());
            for offset in (0..end).step_by(CHUNK as usize) {
                channel.put(offset, &zeros[..(end - offset).min(CHUNK) as usize])?;
            }
            channel.settle()
        };
        overwrite().map_err(|e| io_refusal("overwrite the header of", Path::new(&path), &e))?;
    }
    ctx.reach("source-gone", "overwritten")?;
    Ok(tool.remove(at).map_err(Refusal::from)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_beside_are_of_the_same_kind() {
        assert_eq!(encrypted_name("/x/a.img"), "/x/a.img.vmseal");
        let at = r"rbd:p/a:id=u:mon_host=h\:1";
        assert_eq!(encrypted_name(at), r"rbd:p/a.vmseal:id=u:mon_host=h\:1");
        assert_eq!(
            clear_names(&encrypted_name(at)),
            (Some(at.into()), r"rbd:p/a.clear:id=u:mon_host=h\:1".into())
        );
        assert_eq!(clear_names("/x/a"), (None, "/x/a.clear".into()));
        assert_eq!(beside(at, "7.new"), PathBuf::from(r"rbd:p/a.7.new:id=u:mon_host=h\:1"));
    }

    #[test]
    fn image_is_told_from_another_of_its_name_and_knows_when_it_was_written() {
        let at = Location::named("p/a").unwrap();
        let info = Info { id: "1f".into(), bytes: 512, created_ns: 5, modified_ns: 7, ..Info::default() };
        let one = identity(&at, &info);
        assert!(one.is_unchanged(&identity(&at.beside("b"), &info)), "a new name changes nothing");
        assert!(one.same_file(&identity(&at, &Info { modified_ns: 8, ..info.clone() })));
        assert!(!one.is_unchanged(&identity(&at, &Info { modified_ns: 8, ..info.clone() })));
        assert!(!one.same_file(&identity(&at, &Info { id: "20".into(), ..info.clone() })));
        assert!(!one.same_file(&identity(&Location::named("q/a").unwrap(), &info)));
    }
}
