//! Programs the tests need. One that is missing fails the test, unless `VMSEAL_SKIP_MISSING_TOOLS` is set.

// Each test target uses its own part of this.
#![allow(dead_code)]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// Where distributions put what only root uses.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Whether a program is there. Without it, the test either fails here or is to return, and the skip is printed.
pub(crate) fn available(program: &str, package: &str) -> bool {
    let there = PATH.split(':').any(|folder| Path::new(folder).join(program).is_file());
    if !there && env::var_os("VMSEAL_SKIP_MISSING_TOOLS").is_none() {
        panic!(
            "{program} is not installed (package {package}); VMSEAL_SKIP_MISSING_TOOLS=1 skips what needs it"
        );
    }
    if !there {
        println!("skipped: {program} is not installed");
    }
    there
}

/// A command whose output is English and whose configuration is its own.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", PATH).env("LC_ALL", "C");
    command
}

/// Runs cryptsetup to its end.
pub(crate) fn cryptsetup(args: &[&str]) -> Output {
    command("cryptsetup").args(args).output().expect("cryptsetup starts")
}

/// Runs cryptsetup, which must succeed; gives its standard output.
pub(crate) fn cryptsetup_does(args: &[&str]) -> String {
    let output = cryptsetup(args);
    assert!(output.status.success(), "cryptsetup {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("cryptsetup prints UTF-8")
}

/// Key derivation that costs nothing.
pub(crate) const CHEAP: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];

/// Formats a file as LUKS2 with the cipher that is served.
pub(crate) fn luks_format(volume: &Path, key_file: &Path, more: &[&str]) {
    let cipher = ["--cipher", "aes-xts-plain64", "--key-size", "512"];
    let (volume, key_file) = (text(volume), text(key_file));
    let first = ["luksFormat", "--batch-mode", "--type", "luks2", "--key-file", key_file];
    cryptsetup_does(&[&first[..], &cipher, &CHEAP, more, &[volume]].concat());
}

/// A scratch folder of its own, removed when dropped.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("the build's scratch folder can be written");
        Self(path)
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A file of zeros that takes no room.
    pub(crate) fn sparse(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.join(name);
        fs::File::create(&path).and_then(|file| file.set_len(bytes)).expect("a sparse file can be made");
        path
    }

    pub(crate) fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.join(name);
        fs::write(&path, content).expect("a file can be written");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("scratch paths are UTF-8")
}
