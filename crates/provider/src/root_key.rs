//! The server's root key: what its native KDKs are sealed under at rest.
//!
//! 32 random bytes in a file that nobody but the server's user may read. Whoever has the file and the store has every
//! key of the native provider; losing it loses what has no backup.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{fs::OFlags, process::geteuid};
use vmseal_keys::{SecretBytes, SecretError, derive, random_bytes};

/// The only mode that is accepted.
const MODE: u32 = 0o600;

/// The root key, in secret memory.
#[derive(Debug)]
pub struct RootKey(SecretBytes<32>);

impl RootKey {
    /// Bytes of the key and of its file.
    pub const LEN: usize = 32;

    /// A root key from elsewhere: a systemd credential, a TPM.
    pub fn from_secret(secret: SecretBytes<{ Self::LEN }>) -> Self {
        Self(secret)
    }

    /// The key in `path`; the file is made if there is none.
    ///
    /// Made means: written under another name, synced, and linked to `path` only then, so that there is never a part
    /// of it and never another key in its place.
    ///
    /// # Errors
    ///
    /// [`RootKeyError`] if the file is not a regular one with mode 0600 and 32 bytes, owned by this process's user.
    pub fn load_or_create(path: &Path) -> Result<Self, RootKeyError> {
        match Self::load(path) {
            Err(RootKeyError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                create(path)?;
                Self::load(path)
            }
            loaded => loaded,
        }
    }

    /// The key in `path`, which must be there.
    ///
    /// # Errors
    ///
    /// As [`Self::load_or_create`].
    pub fn load(path: &Path) -> Result<Self, RootKeyError> {
        let io = failed(path, "open");
        // Not through a link, and without waiting for the other end if it is a pipe.
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
        let mut file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(io)?;
        let found = file.metadata().map_err(failed(path, "look at"))?;
        let (mode, owner, user) = (found.mode() & 0o7777, found.uid(), geteuid().as_raw());
        let path = || path.to_owned();
        if !found.is_file() {
            return Err(RootKeyError::NotAFile { path: path() });
        }
        if mode != MODE {
            return Err(RootKeyError::Mode { path: path(), mode });
        }
        if owner != user {
            return Err(RootKeyError::Owner { path: path(), owner, user });
        }
        if found.len() != Self::LEN as u64 {
            return Err(RootKeyError::Length { path: path(), bytes: found.len() });
        }
        let mut secret = SecretBytes::try_zeroed()?;
        file.read_exact(secret.expose_mut()).map_err(failed(&path(), "read"))?;
        Ok(Self(secret))
    }

    /// A key of its own for another purpose of the server: sealing its audit, its CA's private key.
    ///
    /// # Errors
    ///
    /// [`SecretError`] if there is no secret memory.
    pub fn derive(&self, purpose: &str) -> Result<SecretBytes<32>, SecretError> {
        derive::derive_key(self.0.expose(), &[], &derive::info(purpose, &[]))
    }

    pub(crate) fn expose(&self) -> &[u8; Self::LEN] {
        self.0.expose()
    }
}

fn create(path: &Path) -> Result<(), RootKeyError> {
    let secret: SecretBytes<{ RootKey::LEN }> = SecretBytes::random()?;
    let suffix = u64::from_le_bytes(random_bytes()?);
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{suffix:016x}.new"));
    let temporary = PathBuf::from(name);
    let written = write_new(&temporary, secret.expose()).and_then(|()| std::fs::hard_link(&temporary, path));
    let removed = std::fs::remove_file(&temporary);
    match written {
        // Another process was first; its key counts.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other.map_err(failed(path, "create"))?,
    }
    removed.map_err(failed(&temporary, "remove"))?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory).and_then(|dir| dir.sync_all()).map_err(failed(directory, "sync"))
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(MODE).open(path)?;
    // The umask may have taken bits away.
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(MODE))?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn failed(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> RootKeyError {
    let path = path.to_owned();
    move |source| RootKeyError::Io { what, path, source }
}

/// Why there is no root key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RootKeyError {
    /// A link, a directory, a device.
    #[error("root key {path:?} is not a regular file")]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// Others may read or change it.
    #[error(
        "root key {path:?} has mode {mode:04o}; only 0600 is accepted: if nobody else can have read it, chmod 0600 it"
    )]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Somebody else's.
    #[error(
        "root key {path:?} belongs to user {owner}, this process runs as user {user}: chown it, or run as its owner"
    )]
    Owner {
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// The effective user of this process.
        user: u32,
    },
    /// Cut off, or no root key at all.
    #[error("root key {path:?} has {bytes} bytes, 32 are expected: restore it from where it was copied to")]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// The file system refused.
    #[error("cannot {what} root key {path:?}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Secret memory or randomness could not be had.
    #[error("the root key has no place to be held")]
    Memory(#[from] SecretError),
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, symlink},
    };

    use super::*;

    /// A directory of its own, removed with it.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new() -> Self {
            let tag = u64::from_le_bytes(random_bytes().unwrap());
            let path = std::env::temp_dir().join(format!("vmseal-root-key-{tag:016x}"));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn key(&self) -> PathBuf {
            self.0.join("root.key")
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn root_key_is_made_once_and_read_back() {
        let scratch = Scratch::new();
        let made = RootKey::load_or_create(&scratch.key()).unwrap();
        assert!(made.0.ct_eq(&RootKey::load_or_create(&scratch.key()).unwrap().0));
        assert_eq!(fs::metadata(scratch.key()).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 1, "nothing is left beside it");
        assert_eq!(made.expose().as_slice(), fs::read(scratch.key()).unwrap());
    }

    #[test]
    fn root_key_that_others_may_read_is_refused() {
        let scratch = Scratch::new();
        RootKey::load_or_create(&scratch.key()).unwrap();
        for mode in [0o640, 0o604, 0o400, 0o4600] {
            fs::set_permissions(scratch.key(), fs::Permissions::from_mode(mode)).unwrap();
            let refused = RootKey::load_or_create(&scratch.key()).unwrap_err();
            assert!(matches!(refused, RootKeyError::Mode { mode: found, .. } if found == mode), "{refused}");
        }
    }

    #[test]
    fn root_key_of_another_length_or_kind_is_refused_and_left_alone() {
        let scratch = Scratch::new();
        for bytes in [0usize, 31, 33] {
            let _ = fs::remove_file(scratch.key());
            write_new(&scratch.key(), &vec![7; bytes]).unwrap();
            let refused = RootKey::load_or_create(&scratch.key()).unwrap_err();
            assert!(matches!(refused, RootKeyError::Length { .. }), "{refused}");
            assert_eq!(fs::read(scratch.key()).unwrap(), vec![7; bytes]);
        }
        fs::remove_file(scratch.key()).unwrap();
        fs::create_dir(scratch.key()).unwrap();
        assert!(matches!(RootKey::load_or_create(&scratch.key()), Err(RootKeyError::NotAFile { .. })));
        fs::remove_dir(scratch.key()).unwrap();
        symlink(scratch.0.join("elsewhere"), scratch.key()).unwrap();
        assert!(matches!(RootKey::load_or_create(&scratch.key()), Err(RootKeyError::Io { .. })));
        assert!(!scratch.0.join("elsewhere").exists());
    }

    #[test]
    fn root_key_of_another_user_is_refused() {
        // Every file of the system that is not ours and has this mode would do; only root can make one.
        if !geteuid().is_root() {
            return;
        }
        let scratch = Scratch::new();
        RootKey::load_or_create(&scratch.key()).unwrap();
        std::os::unix::fs::chown(scratch.key(), Some(12345), None).unwrap();
        let refused = RootKey::load_or_create(&scratch.key()).unwrap_err();
        assert!(matches!(refused, RootKeyError::Owner { owner: 12345, .. }), "{refused}");
    }

    #[test]
    fn second_creator_takes_the_first_ones_key() {
        let scratch = Scratch::new();
        create(&scratch.key()).unwrap();
        let first = fs::read(scratch.key()).unwrap();
        create(&scratch.key()).unwrap();
        assert_eq!(fs::read(scratch.key()).unwrap(), first);
        assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 1);
    }

    #[test]
    fn debug_shows_no_key() {
        let mut bytes = *b"VMSEAL-TEST-SECRET-root-01234567";
        let root = RootKey::from_secret(SecretBytes::take_from(&mut bytes));
        assert!(!format!("{root:?}").contains("VMSEAL"));
    }
}
