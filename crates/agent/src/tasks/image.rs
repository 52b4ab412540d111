//! Looks at image files before a task touches them: what they are, who else uses them, whether there is room.
//!
//! Paths and the hypervisor's definitions in; facts or a refusal out. Changes nothing.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ffi::CString,
    fs::{self, File},
    io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use vmseal_model::{id::DomainUuid, refusal::Code};

use crate::{
    domain_xml::{DiskSource, DiskView, DomainXml, XmlError},
    new_volume::Ownership,
    ports::{Definition, DomainInfo, Hypervisor, HypervisorError},
    rbd::Location,
    store::Store,
    tasks::{
        backing::{Backing, backing_of},
        plan::Identity,
        refusal::{Refusal, io_refusal},
    },
    volume::{VolumeError, open_regular},
};

/// Longest backing chain that is followed.
const MAX_CHAIN: usize = 64;
/// Room that is left for the agent's own files.
const MARGIN: u64 = 1 << 20;

/// A regular file that was opened for reading and looked at.
pub(crate) struct Image {
    pub(crate) file: File,
    pub(crate) identity: Identity,
    pub(crate) ownership: Ownership,
}

/// Opens an image.
///
/// # Errors
///
/// Refused: a path that is not absolute or holds control characters, a symbolic link, whatever is no regular file, a
/// file with a second name.
pub(crate) fn examine(path: &str) -> Result<Image, Refusal> {
    check_path(path)?;
    let file = match open_regular(Path::new(path), false) {
        Ok(file) => file,
        Err(VolumeError::NotRegular { .. }) => {
            let unsupported = |what: String| Refusal::new(Code::UnsupportedDisk, format!("{path} is {what}"));
            return Err(match fs::read_link(path) {
                Ok(_) => {
                    let real = fs::canonicalize(path)
                        .map_or_else(|_| "its target".into(), |p| p.display().to_string());
                    unsupported("a symbolic link".into())
                        .hint(format!("name the file itself in the domain: {real}"))
                }
                Err(_) => unsupported("no regular file; this version encrypts image files only".into()),
            });
        }
        Err(error) => return Err(error.into()),
    };
    let metadata = file.metadata().map_err(|e| io_refusal("look at", Path::new(path), &e))?;
    if metadata.nlink() > 1 {
        let text = format!(
            "{path} has {} names (hard links); another user of it would not notice",
            metadata.nlink()
        );
        return Err(Refusal::new(Code::UnsupportedDisk, text)
            .hint(format!("find the others with: find / -xdev -inum {}", metadata.ino())));
    }
    let ownership = Ownership { uid: metadata.uid(), gid: metadata.gid(), mode: metadata.mode() & 0o777 };
    Ok(Image { identity: Identity::of(&metadata), ownership, file })
}

/// A path that can stand in a definition and in a message.
pub(crate) fn check_path(path: &str) -> Result<(), Refusal> {
    let bad = |why: &str| Err(Refusal::new(Code::BadRequest, format!("'{}' {why}", path.escape_debug())));
    if !path.starts_with('/') {
        return bad("is not an absolute path");
    }
    if path.chars().any(|c| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}')) {
        return bad("holds control characters");
    }
    if Path::new(path).file_name().is_none() || path.ends_with('/') {
        return bad("names no file");
    }
    Ok(())
}

/// Nothing may lie at `path`.
pub(crate) fn check_free(path: &str) -> Result<(), Refusal> {
    check_path(path)?;
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(io_refusal("look at", Path::new(path), &e)),
        Ok(_) => Err(Refusal::new(Code::Exists, format!("{path} exists already"))
            .hint(format!("find out what it is, then: mv {0} {0}.old", shell(path)))),
    }
}

/// Who uses a file.
#[derive(Debug, Clone)]
struct Use {
    whose: String,
    /// The disk of a domain; none for a volume this agent knows.
    disk: Option<(DomainUuid, String)>,
    path: PathBuf,
}

/// Files that domains and volumes use.
pub(crate) struct Uses {
    by_inode: BTreeMap<(u64, u64), Vec<Use>>,
    by_path: BTreeMap<PathBuf, Vec<Use>>,
    /// Disks of which nobody can tell here what file they use.
    unknown: BTreeSet<String>,
}

/// Why nothing is known of the uses of files.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UsesError {
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// Of a domain that may use any file.
    #[error("the definition of {domain} cannot be read")]
    Definition { domain: String, source: XmlError },
}

impl Uses {
    /// Files of all domains' definitions, running and persistent, with their backing chains, and of all volumes this
    /// agent knows.
    ///
    /// # Errors
    ///
    /// [`UsesError`] if the definitions cannot all be read: then nothing is known.
    pub(crate) fn collect(hypervisor: &dyn Hypervisor, store: &Store) -> Result<Self, UsesError> {
        let mut uses = Self { by_inode: BTreeMap::new(), by_path: BTreeMap::new(), unknown: BTreeSet::new() };
        for domain in hypervisor.domains()? {
            for which in [Definition::Persistent, Definition::Live] {
                let xml = match hypervisor.xml(domain.uuid, which) {
                    Ok(xml) => xml,
                    // It went away meanwhile, or has only the other one.
                    Err(HypervisorError::NoDomain { .. }) => continue,
                    Err(error) => return Err(error.into()),
                };
                let xml = DomainXml::parse(&xml)
                    .map_err(|source| UsesError::Definition { domain: domain.name.clone(), source })?;
                xml.disks().into_iter().for_each(|disk| uses.add_disk(&domain, disk));
            }
        }
        for vm in store.vms() {
            for disk in vm.disks.iter().filter(|d| !d.retired) {
                for path in std::iter::once(&disk.source).chain(&disk.header) {
                    uses.add(format!("encrypted disk {}", disk.disk), None, path.into());
                }
            }
        }
        Ok(uses)
    }

    /// Somebody else who uses this file; `own` is the disk it is known to be.
    pub(crate) fn other(
        &self,
        path: &str,
        identity: Option<&Identity>,
        own: Option<(DomainUuid, &str)>,
    ) -> Option<String> {
        let here = canonical(Path::new(path));
        let by_inode = identity.and_then(|i| self.by_inode.get(&(i.device, i.inode)));
        let mut found = by_inode.into_iter().chain(self.by_path.get(&here)).flatten();
        let is_own = |u: &Use| match (&u.disk, own) {
            (Some((domain, target)), Some(own)) => (*domain, target.as_str()) == own,
            _ => false,
        };
        found.find(|u| !is_own(u)).map(|u| format!("{} ({})", u.whose, u.path.display()))
    }

    /// A disk that may use any file, for all that can be told here.
    pub(crate) fn unknown(&self) -> Option<&str> {
        self.unknown.first().map(String::as_str)
    }

    fn add_disk(&mut self, domain: &DomainInfo, disk: DiskView) {
        let whose = format!("disk {} of {}", disk.target, domain.name);
        // Without a type libvirt takes an image as raw: nothing below it is ever looked for.
        let raw = matches!(disk.format.as_deref(), None | Some("raw"));
        match disk.source {
            // What it holds is in a volume of ours, which the store knows.
            source if source.is_served() => {}
            DiskSource::Block(path) if !raw => {
                self.unknown.insert(format!("{whose} (an image in the device {path})"));
                self.add(whose, Some((domain.uuid, disk.target)), path.into());
            }
            DiskSource::File(path) | DiskSource::Block(path) if raw => {
                self.add(whose, Some((domain.uuid, disk.target)), path.into());
            }
            DiskSource::File(path) | DiskSource::Block(path) => {
                self.add_chain(&whose, (domain.uuid, disk.target), path.into());
            }
            // Only libvirt knows which file of which pool that is.
            DiskSource::Other(kind) if kind == "volume" => {
                self.unknown.insert(format!("{whose} (a volume of a storage pool)"));
            }
            DiskSource::Rbd(at) => self.add(whose, Some((domain.uuid, disk.target)), at.to_string().into()),
            DiskSource::NbdUnix { .. }
            | DiskSource::VhostUser { .. }
            | DiskSource::None
            | DiskSource::Other(_) => {}
        }
    }

    fn add_chain(&mut self, whose: &str, disk: (DomainUuid, String), path: PathBuf) {
        let mut seen = HashSet::new();
        let mut next = path;
        while seen.insert(next.clone()) {
            let below = if seen.len() > MAX_CHAIN {
                Backing::Unknown("its chain is too long".to_owned())
            } else {
                backing_of(&next)
            };
            self.add(whose.to_owned(), Some(disk.clone()), next);
            next = match below {
                Backing::File(path) => path,
                Backing::Nothing => return,
                Backing::Unknown(why) => {
                    self.unknown.insert(format!("{whose} ({why})"));
                    return;
                }
            };
        }
    }

    fn add(&mut self, whose: String, disk: Option<(DomainUuid, String)>, path: PathBuf) {
        let item = Use { whose, disk, path: path.clone() };
        if let Ok(metadata) = fs::metadata(&path) {
            self.by_inode.entry((metadata.dev(), metadata.ino())).or_default().push(item.clone());
        }
        self.by_path.entry(canonical(&path)).or_default().push(item);
    }
}

/// The path without links; where the file is not there, its directory's without links.
pub(crate) fn canonical(path: &Path) -> PathBuf {
    // An image is the same one whoever reaches it by whatever monitors.
    if let Some(Ok(at)) = Location::of_path(path) {
        return format!("rbd:{}", at.name()).into();
    }
    fs::canonicalize(path).unwrap_or_else(|_| match (path.parent(), path.file_name()) {
        (Some(dir), Some(name)) => {
            fs::canonicalize(dir).map_or_else(|_| path.to_owned(), |dir| dir.join(name))
        }
        _ => path.to_owned(),
    })
}

/// Whether there is room for files of these sizes in these directories.
///
/// # Errors
///
/// [`Code::NoSpace`] with what is needed and what is free; a directory that is not there.
pub(crate) fn check_space(needs: &[(&Path, u64)]) -> Result<(), Refusal> {
    let mut by_device: BTreeMap<u64, (&Path, u64)> = BTreeMap::new();
    for (dir, bytes) in needs {
        let device = fs::metadata(dir).map_err(|e| io_refusal("look at", dir, &e))?.dev();
        let entry = by_device.entry(device).or_insert((dir, MARGIN));
        entry.1 = entry.1.saturating_add(*bytes);
    }
    for (dir, needed) in by_device.into_values() {
        let free = free_bytes(dir).map_err(|e| io_refusal("look at the file system of", dir, &e))?;
        if free < needed {
            let text = format!("{} has {} free, {} are needed", dir.display(), size(free), size(needed));
            return Err(Refusal::new(Code::NoSpace, text).hint(
                "a volume takes all its space at once; a clear image is given back only after the switch",
            ));
        }
    }
    Ok(())
}

fn free_bytes(dir: &Path) -> io::Result<u64> {
    let path = CString::new(dir.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: all-zero is a valid statvfs; `path` is terminated and both outlive the call.
    let stat = unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        if libc::statvfs(path.as_ptr(), &raw mut stat) != 0 {
            return Err(io::Error::last_os_error());
        }
        stat
    };
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Bytes for people; below a mebibyte exactly.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("bytes", 0)];
    let (unit, shift) = UNITS.into_iter().find(|(_, shift)| bytes >> shift > 0).unwrap_or(("bytes", 0));
    if shift == 0 {
        format!("{bytes} bytes")
    } else {
        format!("{:.1} {unit}", bytes as f64 / (1u64 << shift) as f64)
    }
}

/// A word for a shell, quoted where it must be.
pub(crate) fn shell(word: &str) -> String {
    let plain =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-' | ':' | '+' | '@' | ',');
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn words_for_the_shell_are_quoted_where_they_must_be() {
        assert_eq!(shell("/x/web01.img"), "/x/web01.img");
        assert_eq!(shell("web 01"), "'web 01'");
        assert_eq!(shell("it's; rm -rf"), r"'it'\''s; rm -rf'");
        assert_eq!(shell(""), "''");
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!(size(17), "17 bytes");
        assert_eq!(size(3 << 29), "1.5 GiB");
        assert_eq!(size(5 << 20), "5.0 MiB");
    }

    #[test]
    fn impossible_need_says_how_much_and_how_much_there_is() {
        let scratch = Scratch::new();
        let refused = check_space(&[(scratch.path(), u64::MAX / 2), (scratch.path(), 1)]).unwrap_err();
        assert_eq!(refused.code, Code::NoSpace);
        assert!(
            refused.message.contains("free") && refused.message.contains("TiB are needed"),
            "{refused:?}"
        );
        check_space(&[(scratch.path(), 1)]).unwrap();
    }

    #[test]
    fn paths_that_cannot_stand_in_a_definition_are_refused() {
        for bad in ["x.img", "", "/", "/x/", "/x\n.img", "/x/..", "/x/a\u{1}"] {
            assert!(check_path(bad).is_err(), "{bad:?}");
        }
        check_path("/x/ä b.img").unwrap();
    }
}
