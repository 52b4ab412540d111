//! Where one house lives: a state folder below `target/lab`, and a short run folder for sockets.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use crate::{interrupt, orphans, shell};

/// The folders of one house. Dropped: unmounted and removed, unless the test failed or it is kept.
#[derive(Debug)]
pub struct Lab {
    name: String,
    /// Where the folders really are.
    home: PathBuf,
    /// State, as QEMU reaches it.
    pub state: PathBuf,
    /// Sockets; short, because a unix socket's path has 107 bytes.
    pub run: PathBuf,
    keep: bool,
}

impl Lab {
    /// Fresh folders for a test of this name.
    pub fn for_test(name: &str) -> Self {
        Self::at(&format!("{name}-{}", std::process::id()), target_dir().join("lab").join(name), false)
    }

    /// Folders that stay when the program ends: the demo's.
    pub fn kept(name: &str, home: PathBuf) -> Self {
        Self::at(name, home, true)
    }

    fn at(name: &str, home: PathBuf, keep: bool) -> Self {
        assert!(is_root(), "this needs root: it starts a libvirtd and guests. Run make as root.");
        orphans::take_in();
        interrupt::notice();
        let run = Path::new("/run").join(format!("vmseal-{name}"));
        remove(&home, &run);
        fs::create_dir_all(&home).expect("the lab folder can be made");
        fs::create_dir_all(&run).expect("the run folder can be made");
        fs::set_permissions(&run, fs::Permissions::from_mode(0o755)).expect("own folder");
        let state = reachable(&home, &run);
        Self { name: name.to_owned(), home, state, run, keep }
    }

    /// Its name, unique on this machine while it lives.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A folder below the state folder, made.
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.state.join(name);
        fs::create_dir_all(&path).expect("a folder below the state folder can be made");
        path
    }

    /// Removes the folders of a lab that stayed.
    pub fn remove(name: &str, home: &Path) {
        remove(home, &Path::new("/run").join(format!("vmseal-{name}")));
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.keep {
            // The demo goes on without this process.
        } else if std::thread::panicking() {
            remove_run(&self.run);
            eprintln!("kept for a look: {}", self.home.display());
        } else {
            remove(&self.home, &self.run);
        }
    }
}

/// Cargo's target folder this program was built in.
pub fn target_dir() -> PathBuf {
    bin_dir().parent().expect("a profile folder has a parent").to_owned()
}

/// The folder with the product's programs, beside this one.
pub fn bin_dir() -> PathBuf {
    let exe = env::current_exe().expect("a program knows where it is");
    let folder = exe.parent().expect("a program lies in a folder");
    if folder.ends_with("deps") {
        folder.parent().expect("deps has a parent").to_owned()
    } else {
        folder.to_owned()
    }
}

/// One of the product's programs.
pub fn bin(name: &str) -> PathBuf {
    let path = bin_dir().join(name);
    assert!(
        path.exists(),
        "{} is not built: run `cargo build --bins` for the same profile first",
        path.display()
    );
    path
}

/// The repository.
pub fn tree() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .expect("the tree is where it was built")
}

/// Whether this process is root.
pub fn is_root() -> bool {
    // SAFETY: takes nothing, cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// QEMU runs as `libvirt-qemu`. Where that user cannot walk to the folder, it gets a bind mount it can walk to.
fn reachable(home: &Path, run: &Path) -> PathBuf {
    let reaches = shell::run(
        shell::tool("setpriv")
            .args(["--reuid=libvirt-qemu", "--clear-groups", "--regid=kvm", "test", "-x"])
            .arg(home),
    );
    if reaches.ok() {
        return home.to_owned();
    }
    let mount = run.join("state");
    fs::create_dir_all(&mount).expect("own folder");
    shell::must(shell::tool("mount").arg("--bind").arg(home).arg(&mount));
    mount
}

fn remove(home: &Path, run: &Path) {
    remove_run(run);
    let _ = fs::remove_dir_all(home);
}

/// Removes the sockets, after the mount below them, if there is one, lest its files go.
fn remove_run(run: &Path) {
    let mount = run.join("state");
    if mount.exists() {
        let _ = shell::run(shell::tool("umount").arg("--lazy").arg(&mount));
        if fs::remove_dir(&mount).is_err() {
            return;
        }
    }
    let _ = fs::remove_dir_all(run);
}
