//! The directory of one VM's sockets: `<run dir>/libvirt-<uuid>/`, with a listener for the control socket and for each
//! disk.
//!
//! The directory belongs to the disk process's user in the end, and that process is not trusted with more than its
//! disks. So it is taken back to root and closed to all before anything in it is touched, and handed over when done;
//! no name in it is ever followed.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::{
        fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};

use vmseal_model::id::DomainUuid;

use crate::{accounts, config::AgentConfig};

/// Who gets the directory; of no meaning to an agent that is not root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The disk process's user.
    pub uid: u32,
    /// QEMU's group.
    pub gid: u32,
}

/// What could not be done with which path.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct SocketDirError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// A VM's listeners.
#[derive(Debug)]
pub struct Listeners {
    /// For the agent.
    pub control: UnixListener,
    /// One a disk, in the order asked.
    pub disks: Vec<UnixListener>,
}

/// A disk's socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSocket {
    /// Where.
    pub path: PathBuf,
    /// Only root may connect, and not QEMU.
    pub for_root: bool,
}

/// Makes the directory anew with its sockets; what lay in it is gone.
///
/// # Errors
///
/// [`SocketDirError`]; call [`remove`] then.
pub fn create(
    config: &AgentConfig,
    domain: DomainUuid,
    disks: &[DiskSocket],
    owner: Option<Owner>,
) -> Result<Listeners, SocketDirError> {
    let dir = config.vm_dir(domain);
    let handle = take(&config.run_dir, &dir)?;
    empty(&dir)?;
    let bind = |path: &Path, for_root: bool| -> Result<UnixListener, SocketDirError> {
        let error = |action| failed(action, path);
        let listener = UnixListener::bind(path).map_err(error("listen on"))?;
        let mode = if for_root { 0o600 } else { 0o660 };
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(error("set permissions of"))?;
        if let Some(owner) = owner.filter(|_| !for_root) {
            std::os::unix::fs::lchown(path, Some(owner.uid), Some(owner.gid)).map_err(error("hand over"))?;
        }
        Ok(listener)
    };
    let listeners = Listeners {
        control: bind(&config.control_socket(domain), false)?,
        disks: disks.iter().map(|disk| bind(&disk.path, disk.for_root)).collect::<Result<_, _>>()?,
    };
    if let Some(owner) = owner {
        std::os::unix::fs::fchown(&handle, Some(owner.uid), Some(owner.gid))
            .map_err(failed("hand over", &dir))?;
    }
    handle.set_permissions(fs::Permissions::from_mode(0o750)).map_err(failed("hand over", &dir))?;
    Ok(listeners)
}

/// Removes the directory and what is in it. One that is not there is removed already.
///
/// # Errors
///
/// [`SocketDirError`] names what stayed.
pub fn remove(config: &AgentConfig, domain: DomainUuid) -> Result<(), SocketDirError> {
    let dir = config.vm_dir(domain);
    match fs::symlink_metadata(&dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(SocketDirError { action: "look at", path: dir, source }),
        Ok(_) => {}
    }
    take(&config.run_dir, &dir)?;
    empty(&dir)?;
    fs::remove_dir(&dir).map_err(failed("remove", &dir))
}

/// Domains that have a directory here.
pub fn list(run_dir: &Path) -> Vec<DomainUuid> {
    let Ok(entries) = fs::read_dir(run_dir) else { return Vec::new() };
    entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            name.to_str()?.strip_prefix(crate::config::VM_DIR_PREFIX)?.parse().ok()
        })
        .collect()
}

/// Has the directory for ourselves alone, making it if need be.
fn take(run_dir: &Path, dir: &Path) -> Result<File, SocketDirError> {
    DirBuilder::new().recursive(true).mode(0o755).create(run_dir).map_err(failed("make", run_dir))?;
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed("make", dir)(e)),
        _ => {}
    }
    let handle = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(dir)
        .map_err(failed("open", dir))?;
    if accounts::is_root() {
        std::os::unix::fs::fchown(&handle, Some(0), Some(0)).map_err(failed("take back", dir))?;
    }
    handle.set_permissions(fs::Permissions::from_mode(0o700)).map_err(failed("take back", dir))?;
    // The run directory is root's, so what was opened is what the name still means; looked at all the same.
    let (opened, named) = (handle.metadata(), fs::symlink_metadata(dir));
    match (opened, named) {
        (Ok(opened), Ok(named)) if (opened.dev(), opened.ino()) == (named.dev(), named.ino()) => Ok(handle),
        (Err(e), _) | (_, Err(e)) => Err(failed("look at", dir)(e)),
        _ => Err(failed("take back", dir)(io::Error::other("it was replaced meanwhile"))),
    }
}

fn empty(dir: &Path) -> Result<(), SocketDirError> {
    for entry in fs::read_dir(dir).map_err(failed("list", dir))? {
        let path = entry.map_err(failed("list", dir))?.path();
        let is_dir = fs::symlink_metadata(&path).is_ok_and(|m| m.is_dir());
        // std's remove_dir_all follows no link either.
        let gone = if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        gone.map_err(failed("remove", &path))?;
    }
    Ok(())
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> SocketDirError + use<'a> {
    move |source| SocketDirError { action, path: path.to_owned(), source }
}

/// A directory's descriptor to hand to a process.
pub fn open_dir(path: &Path) -> Result<File, SocketDirError> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(path).map_err(failed("open", path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::scratch::Scratch;

    const DOMAIN: DomainUuid = DomainUuid::from_bytes([3; 16]);

    /// A socket for each target, or for its warden if that ends with `!`.
    fn sockets(config: &AgentConfig, targets: &[&str]) -> Vec<DiskSocket> {
        let socket = |target: &&str| match target.strip_suffix('!') {
            Some(target) => DiskSocket { path: config.ublk_socket(DOMAIN, target), for_root: true },
            None => DiskSocket { path: config.disk_socket(DOMAIN, target), for_root: false },
        };
        targets.iter().map(socket).collect()
    }

    fn config(scratch: &Scratch) -> AgentConfig {
        AgentConfig { run_dir: scratch.path().join("run"), ..AgentConfig::default() }
    }

    #[test]
    fn sockets_are_there_and_only_user_and_group_reach_them() {
        let scratch = Scratch::new();
        let config = config(&scratch);
        let targets = ["vda", "vdb", "vdc!"];
        let listeners = create(&config, DOMAIN, &sockets(&config, &targets), None).unwrap();
        assert_eq!(listeners.disks.len(), 3);
        UnixStream::connect(config.disk_socket(DOMAIN, "vdb")).unwrap();
        UnixStream::connect(config.control_socket(DOMAIN)).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(&config.vm_dir(DOMAIN)), 0o750);
        assert_eq!(mode(&config.disk_socket(DOMAIN, "vda")), 0o660);
        assert_eq!(mode(&config.ublk_socket(DOMAIN, "vdc")), 0o600, "root's warden alone");
        assert_eq!(list(&config.run_dir), [DOMAIN]);
    }

    #[test]
    fn second_make_replaces_what_the_first_left() {
        let scratch = Scratch::new();
        let config = config(&scratch);
        drop(create(&config, DOMAIN, &sockets(&config, &["vda", "vdb"]), None).unwrap());
        let _listeners = create(&config, DOMAIN, &sockets(&config, &["vda"]), None).unwrap();
        assert!(!config.disk_socket(DOMAIN, "vdb").exists());
        UnixStream::connect(config.disk_socket(DOMAIN, "vda")).unwrap();
    }

    #[test]
    fn link_in_the_directory_is_removed_and_not_followed() {
        let scratch = Scratch::new();
        let config = config(&scratch);
        let outside = scratch.path().join("outside");
        fs::write(&outside, "kept").unwrap();
        drop(create(&config, DOMAIN, &sockets(&config, &[]), None).unwrap());
        std::os::unix::fs::symlink(&outside, config.disk_socket(DOMAIN, "vda")).unwrap();
        let _listeners = create(&config, DOMAIN, &sockets(&config, &["vda"]), None).unwrap();
        assert_eq!(fs::read_to_string(&outside).unwrap(), "kept");
    }

    #[test]
    fn directory_that_is_a_link_is_refused() {
        let scratch = Scratch::new();
        let config = config(&scratch);
        fs::create_dir_all(&config.run_dir).unwrap();
        std::os::unix::fs::symlink(scratch.path(), config.vm_dir(DOMAIN)).unwrap();
        assert!(create(&config, DOMAIN, &sockets(&config, &["vda"]), None).is_err());
    }

    #[test]
    fn removed_directory_is_gone_and_removing_again_is_fine() {
        let scratch = Scratch::new();
        let config = config(&scratch);
        drop(create(&config, DOMAIN, &sockets(&config, &["vda"]), None).unwrap());
        remove(&config, DOMAIN).unwrap();
        remove(&config, DOMAIN).unwrap();
        assert!(!config.vm_dir(DOMAIN).exists());
    }
}
