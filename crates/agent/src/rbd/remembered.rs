//! What the agent keeps of a helper that it started: `<state dir>/rbd/<name>.json`, durable before the image is used.
//!
//! Its lock outlives it if it is killed, the host with it perhaps. Who knows its owner, and that it is dead, may break that
//! lock; nobody else's is ever broken with what lies here.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::backend::process::Process;

/// Most bytes of a file that are read.
const MAX_FILE: u64 = 64 << 10;

/// A helper that has, or had, an image's lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Remembered {
    /// The image.
    pub(crate) location: String,
    /// What Ceph calls the holder of the lock.
    pub(crate) owner: String,
    /// Its process, on the boot it was started in.
    pub(crate) pid: i32,
    /// When that process began, in the kernel's ticks since boot.
    pub(crate) began: u64,
    /// The kernel's id of that boot.
    pub(crate) boot: String,
    /// The first bytes of the volume's owner block, as this host left it; hexadecimal, empty where there is none.
    #[serde(default)]
    pub(crate) owner_block: String,
}

impl Remembered {
    /// Of a process that runs now.
    pub(crate) fn of(location: String, owner: String, pid: i32, owner_block: String) -> io::Result<Self> {
        Ok(Self { location, owner, pid, began: began(pid)?, boot: boot()?, owner_block })
    }

    /// Its process, if it still runs.
    pub(crate) fn process(&self) -> Option<Process> {
        if boot().ok()? != self.boot {
            return None;
        }
        let process = Process::open(self.pid).ok()?;
        // Looked at after the handle was got: a pid that was given away again began later.
        (began(self.pid).ok()? == self.began).then_some(process)
    }

    /// Reads one; none if there is none, or it says nothing that can be understood: then no lock is broken.
    pub(crate) fn load(state_dir: &Path, name: &str) -> Option<Self> {
        let path = path(state_dir, name);
        let about = fs::metadata(&path).ok().filter(|about| about.len() <= MAX_FILE)?;
        let read = about.is_file().then(|| fs::read(&path).ok())??;
        match serde_json::from_slice(&read) {
            Ok(remembered) => Some(remembered),
            Err(error) => {
                tracing::warn!("{} is passed over: {error}", path.display());
                None
            }
        }
    }

    /// Writes it; durable when this returns.
    pub(crate) fn save(&self, state_dir: &Path, name: &str) -> io::Result<()> {
        let path = path(state_dir, name);
        let dir = path.parent().unwrap_or(state_dir);
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let new = path.with_extension("new");
        let mut options = File::options();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec(self).map_err(io::Error::other)?)?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(dir)?.sync_all()
    }

    /// Deletes it, after its helper gave the lock back.
    pub(crate) fn forget(state_dir: &Path, name: &str) {
        let _ = fs::remove_file(path(state_dir, name));
    }
}

fn path(state_dir: &Path, name: &str) -> PathBuf {
    state_dir.join("rbd").join(format!("{name}.json"))
}

fn boot() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// The 22nd field of its `stat`; the second one is in parentheses and may hold anything.
fn began(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after = stat.rsplit_once(')').map(|(_, after)| after);
    let field = after.and_then(|after| after.split_whitespace().nth(19)?.parse().ok());
    field.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn helper_is_known_again_while_it_runs_and_only_then() {
        let scratch = Scratch::new();
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id().cast_signed();
        let one = Remembered::of("rbd:p/x".into(), "10.0.0.1:0/7".into(), pid, "00ff".into()).unwrap();
        one.save(scratch.path(), "disk").unwrap();
        let again = Remembered::load(scratch.path(), "disk").unwrap();
        assert_eq!(again, one);
        assert!(again.process().is_some());
        assert!(
            Remembered { began: one.began + 1, ..one.clone() }.process().is_none(),
            "another of that pid"
        );
        assert!(Remembered { boot: "another".into(), ..one.clone() }.process().is_none(), "before a reboot");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(again.process().is_none());
        Remembered::forget(scratch.path(), "disk");
        assert_eq!(Remembered::load(scratch.path(), "disk"), None);
    }

    #[test]
    fn damaged_file_breaks_no_lock() {
        let scratch = Scratch::new();
        fs::create_dir(scratch.path().join("rbd")).unwrap();
        fs::write(scratch.path().join("rbd/disk.json"), "{").unwrap();
        assert_eq!(Remembered::load(scratch.path(), "disk"), None);
    }
}
