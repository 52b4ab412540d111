//! A block device that is a file's.

use std::{
    fs::OpenOptions,
    path::{Path, PathBuf},
};

use crate::tools::{missing, ok, tool};

/// The device; gone when dropped, once nobody has it open.
pub(crate) struct LoopDevice(pub(crate) PathBuf, PathBuf);

impl LoopDevice {
    /// A device of this file; none where that is not allowed.
    pub(crate) fn of(file: &Path) -> Option<Self> {
        let output = tool("losetup")?.args(["--find", "--show"]).arg(file).output().unwrap();
        if !output.status.success() {
            missing("the right to make a loop device");
            return None;
        }
        let path = String::from_utf8(output.stdout).unwrap();
        Some(Self(path.trim_end().into(), file.into()))
    }

    /// Makes it larger.
    pub(crate) fn resize(&self, bytes: u64) {
        OpenOptions::new().write(true).open(&self.1).unwrap().set_len(bytes).unwrap();
        ok(tool("losetup").unwrap().arg("--set-capacity").arg(&self.0));
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = tool("losetup").map(|mut losetup| losetup.arg("--detach").arg(&self.0).status());
    }
}
