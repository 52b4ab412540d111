//! What becomes of a file that is no longer needed: overwritten and deleted, made useless, or kept.
//!
//! A path and the identity it must have in; what is left, in words, out. Best effort, and said so: copies that a
//! copy-on-write file system, a snapshot below or an SSD keeps are out of reach.

use std::{
    fs::{self, File, Permissions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, PermissionsExt},
    },
    path::Path,
};

use vmseal_luks::HEADER_BYTES;

use crate::{
    new_volume::sync_directory,
    tasks::{
        context::Context,
        plan::Identity,
        refusal::{Halt, Refusal, io_refusal},
    },
    volume::open_regular,
};

const CHUNK: usize = 1 << 20;

/// The file of that name, if it still is the one of that identity. `None` if it is gone.
///
/// # Errors
///
/// Another file lies there, or it cannot be opened.
pub(crate) fn reopen(path: &str, identity: &Identity) -> Result<Option<File>, Refusal> {
    let file = match open_regular(Path::new(path), true) {
        Ok(file) => file,
        Err(error) if error.code() == vmseal_model::refusal::Code::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let metadata = file.metadata().map_err(|e| io_refusal("look at", Path::new(path), &e))?;
    if !Identity::of(&metadata).same_file(identity) {
        let text = format!("{path} is another file than the one this task worked on; it is left alone");
        return Err(Refusal::new(vmseal_model::refusal::Code::Conflict, text));
    }
    Ok(Some(file))
}

/// Overwrites all that is stored with zeros, flushes, deletes. Again after a crash does no harm.
pub(crate) fn wipe(ctx: &Context, path: &str, identity: &Identity) -> Result<(), Halt> {
    let Some(file) = reopen(path, identity)? else { return Ok(()) };
    let len = file.metadata().map_err(|e| io_refusal("look at", Path::new(path), &e))?.len();
    let done = overwrite(&file, 0, len, || ctx.check_wanted());
    done?.map_err(|e| io_refusal("overwrite", Path::new(path), &e))?;
    ctx.reach("source-gone", "overwritten")?;
    Ok(delete(path)?)
}

/// Overwrites a volume's header, which ends every use of its data with an old key record, and deletes it.
pub(crate) fn wipe_volume(
    ctx: &Context,
    path: &str,
    header: Option<&str>,
    identity: &Identity,
) -> Result<(), Halt> {
    let always = || Ok::<(), Halt>(());
    if let Some(header) = header
        && let Ok(file) = open_regular(Path::new(header), true)
    {
        overwrite(&file, 0, HEADER_BYTES, always)?
            .map_err(|e| io_refusal("overwrite", Path::new(header), &e))?;
        delete(header)?;
    }
    let Some(file) = reopen(path, identity)? else { return Ok(()) };
    if header.is_none() {
        overwrite(&file, 0, HEADER_BYTES, always)?
            .map_err(|e| io_refusal("overwrite", Path::new(path), &e))?;
    }
    ctx.reach("source-gone", "overwritten")?;
    Ok(delete(path)?)
}

/// Lets nobody but root read it.
pub(crate) fn keep(path: &str, identity: &Identity) -> Result<(), Refusal> {
    let Some(file) = reopen(path, identity)? else { return Ok(()) };
    file.set_permissions(Permissions::from_mode(0o600))
        .map_err(|e| io_refusal("change the mode of", Path::new(path), &e))
}

/// Deletes a name, durably; one that is gone is fine.
pub(crate) fn delete(path: &str) -> Result<(), Refusal> {
    let path = Path::new(path);
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_refusal("delete", path, &e)),
        _ => {}
    }
    sync_directory(path).map_err(|e| io_refusal("flush the directory of", path, &e))
}

/// Zeros over every stored byte of a range; holes stay holes, for writing there could fill the file system.
fn overwrite<E>(
    file: &File,
    from: u64,
    to: u64,
    mut wanted: impl FnMut() -> Result<(), E>,
) -> Result<io::Result<()>, E> {
    let zeros = vec![0; CHUNK];
    let mut at = from;
    while let Some((begin, end)) = next_data(file, at, to) {
        at = begin;
        while at < end {
            wanted()?;
            let piece = &zeros[..(end - at).min(CHUNK as u64) as usize];
            if let Err(error) = file.write_all_at(piece, at) {
                return Ok(Err(error));
            }
            at += piece.len() as u64;
        }
    }
    Ok(file.sync_all())
}

/// The next stored range before `to`. Where the file system cannot say, all is stored.
fn next_data(file: &File, at: u64, to: u64) -> Option<(u64, u64)> {
    if at >= to {
        return None;
    }
    let seek = |at: u64, whence: libc::c_int| -> Result<u64, Option<i32>> {
        let at = libc::off_t::try_from(at).map_err(|_| None)?;
        // SAFETY: lseek takes no pointers; nobody uses this description's position.
        let found = unsafe { libc::lseek(file.as_raw_fd(), at, whence) };
        u64::try_from(found).map_err(|_| io::Error::last_os_error().raw_os_error())
    };
    let begin = match seek(at, libc::SEEK_DATA) {
        Ok(begin) => begin,
        Err(Some(libc::ENXIO)) => return None,
        Err(_) => return Some((at, to)),
    };
    if begin >= to {
        return None;
    }
    let end = seek(begin, libc::SEEK_HOLE).unwrap_or(to).min(to);
    Some((begin, end.max(begin + 1)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn every_stored_byte_is_overwritten_and_holes_stay_holes() {
        let scratch = Scratch::new();
        let path = scratch.path().join("x.img");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        for at in [0, 5 << 20, (40 << 20) + 123] {
            file.write_all_at(&[0xaa; 3000], at).unwrap();
        }
        let before = file.metadata().unwrap().blocks();
        let done: Result<io::Result<()>, ()> = overwrite(&file, 0, 64 << 20, || Ok(()));
        done.unwrap().unwrap();
        let after = file.metadata().unwrap();
        assert!(fs::read(&path).unwrap().iter().all(|b| *b == 0));
        assert!(after.blocks() <= before + 64 && after.len() == 64 << 20, "{} {before}", after.blocks());
    }

    #[test]
    fn another_file_of_the_name_is_left_alone() {
        let scratch = Scratch::new();
        let path = scratch.path().join("x.img");
        let name = path.to_str().unwrap();
        fs::write(&path, "old").unwrap();
        let identity = Identity::of(&fs::metadata(&path).unwrap());
        assert!(reopen(name, &identity).unwrap().is_some());
        fs::rename(&path, scratch.path().join("away")).unwrap();
        assert!(reopen(name, &identity).unwrap().is_none());
        fs::write(&path, "new").unwrap();
        assert!(reopen(name, &identity).is_err());
        assert!(keep(name, &identity).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    }
}
