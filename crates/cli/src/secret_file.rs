//! Files that hold a secret: made new, 0600, never over an old one, durable before anybody relies on them.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, IsTerminal, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::Advice;
use zeroize::Zeroizing;

use crate::error::CliError;

/// Writes a file that did not exist before. On failure nothing is left behind.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    let mut file = create_new(path)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| sync_parent(path));
    written.map_err(|e| {
        // Only the file made a moment ago; half a secret is of no use to anybody.
        let _ = fs::remove_file(path);
        CliError::file("write", path, &e)
    })
}

/// Replaces a file as a whole: after a crash there is the old one or the new one.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    let mut new = path.as_os_str().to_owned();
    new.push(format!(".new-{}", std::process::id()));
    let new = PathBuf::from(new);
    write_new(&new, bytes)?;
    fs::rename(&new, path).and_then(|()| sync_parent(path)).map_err(|e| {
        let _ = fs::remove_file(&new);
        CliError::file("write", path, &e)
    })
}

/// Reads back what was written, from the device and not from the page cache as far as the kernel lets it go.
pub(crate) fn read_back(path: &Path, limit: u64) -> Result<Zeroizing<Vec<u8>>, CliError> {
    let file = File::open(path).map_err(|e| CliError::file("read back", path, &e))?;
    // Advice only: tmpfs, for one, has nothing else to read from.
    let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
    read_bounded(&file, limit).map_err(|e| CliError::file("read back", path, &e))
}

/// Reads a file of at most `limit` bytes.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Zeroizing<Vec<u8>>, CliError> {
    let file = File::open(path).map_err(|e| CliError::file("read", path, &e))?;
    read_bounded(&file, limit).map_err(|e| CliError::file("read", path, &e))
}

/// Whether others than its owner may read it.
pub(crate) fn readable_by_others(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_file() && meta.mode() & 0o077 != 0)
}

/// Opens descriptor `fd`, which this process was started with, for writing. A terminal is refused: it would show the
/// secret and keep it in its scroll-back.
pub(crate) fn open_output_descriptor(fd: u32) -> Result<File, CliError> {
    let path = PathBuf::from(format!("/dev/fd/{fd}"));
    // Appended: with `3>>` the shell means what lies there to stay.
    let file = OpenOptions::new().append(true).open(&path).map_err(|e| {
        CliError::usage(format!("cannot write to descriptor {fd}: {e}"))
            .hint("give a pipe or file that is open for writing, such as: --out-fd 3 3>volume.key")
    })?;
    if file.is_terminal() {
        return Err(CliError::usage(format!("descriptor {fd} is a terminal; a key is never written to one"))
            .hint("write it to a new file with --out FILE, or to a pipe"));
    }
    Ok(file)
}

fn create_new(path: &Path) -> Result<File, CliError> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|e| match e.kind() {
        ErrorKind::AlreadyExists => {
            CliError::failed(format!("{} exists already; nothing was written", path.display()))
                .hint("name a file that does not exist")
        }
        _ => CliError::file("create", path, &e),
    })
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

fn read_bounded(file: &File, limit: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    // Room for all of it at once: a vector that grows leaves copies behind.
    let size = file.metadata()?.len().min(limit).max(4096);
    let mut bytes = Zeroizing::new(Vec::with_capacity(size as usize + 1));
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(ErrorKind::FileTooLarge, format!("it has more than {limit} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("vmseal-cli-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn secret_file_is_new_and_for_its_owner_only() {
        let dir = scratch("secret-file");
        let path = dir.join("key");
        write_new(&path, b"one").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(!readable_by_others(&path));
        let again = write_new(&path, b"two").unwrap_err();
        assert!(again.to_string().contains("exists already"), "{again}");
        assert_eq!(*read_back(&path, 10).unwrap(), b"one");
        replace(&path, b"three").unwrap();
        assert_eq!(*read(&path, 10).unwrap(), b"three");
        assert!(read(&path, 4).unwrap_err().to_string().contains("more than 4 bytes"));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn symlink_is_not_followed_when_a_secret_is_written() {
        let dir = scratch("secret-link");
        std::os::unix::fs::symlink(dir.join("elsewhere"), dir.join("key")).unwrap();
        assert!(write_new(&dir.join("key"), b"x").is_err());
        assert!(!dir.join("elsewhere").exists());
        fs::remove_dir_all(dir).unwrap();
    }
}
