//! A Ceph cluster of one OSD for a house (`tests/lab/ceph.sh`): loopback only, in the lab's folder.

use std::path::{Path, PathBuf};

use crate::{lab::Lab, shell};

/// A cluster, ended when dropped: before its lab, whose folder says which processes those are.
#[derive(Debug)]
pub struct Ceph(PathBuf);

impl Ceph {
    /// Starts one; none, and said, where Ceph's programs are missing, unless VMSEAL_NEED_CEPH is set.
    pub fn start(lab: &Lab) -> Option<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let have = |name: &str| std::env::split_paths(&path).any(|directory| directory.join(name).is_file());
        let needed = ["ceph-mon", "ceph-osd", "ceph-mgr", "ceph", "rbd"];
        if let Some(missing) = needed.iter().find(|name| !have(name)) {
            assert!(
                std::env::var_os("VMSEAL_NEED_CEPH").is_none(),
                "{missing} is missing: tests/lab/setup.sh ceph"
            );
            println!("skipped: {missing} is missing (`make test-rbd` installs it)");
            return None;
        }
        let ceph = Self(lab.folder("ceph"));
        shell::must(shell::tool(SCRIPT).arg("start").arg(&ceph.0));
        Some(ceph)
    }

    /// What clients are told of it.
    pub fn conf(&self) -> PathBuf {
        self.0.join("ceph.conf")
    }

    /// `rbd` with these arguments; what it says.
    pub fn rbd(&self, arguments: &[&str]) -> String {
        shell::must(shell::tool("rbd").arg("-c").arg(self.conf()).args(arguments)).stdout
    }

    /// An image as it is in the cluster, in a file.
    pub fn export(&self, image: &str, to: &Path) {
        let _ = std::fs::remove_file(to);
        shell::must(shell::tool("rbd").arg("-c").arg(self.conf()).args(["export", image]).arg(to));
    }
}

impl Drop for Ceph {
    fn drop(&mut self) {
        let _ = shell::run(shell::tool(SCRIPT).arg("stop").arg(&self.0));
    }
}

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../lab/ceph.sh");
