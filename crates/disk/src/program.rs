//! What workers are started from: the program the keeper was started from, until another has shown that it serves.
//!
//! A worker that was taken over could ask for an upgrade too. So a program must be one that such a worker cannot have
//! made: root's, or of who started the keeper, writable for nobody else, with a name in a file system.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

/// A program to start workers from.
#[derive(Debug, Default)]
pub struct Program(Option<File>);

impl Program {
    /// A path to start it by; of use in this process and its children.
    pub fn path(&self) -> String {
        match &self.0 {
            Some(file) => format!("/proc/self/fd/{}", file.as_raw_fd()),
            // Also if its file was replaced meanwhile.
            None => "/proc/self/exe".to_owned(),
        }
    }
}

/// Programs, and how far an upgrade is.
#[derive(Debug, Default)]
pub struct Programs {
    current: Program,
    /// What the current one replaced and is to prove itself against.
    previous: Option<Program>,
    /// What the next worker is to be started from.
    next: Option<Program>,
}

impl Programs {
    /// Takes a program for the next worker, if it may be; `owner` started the keeper.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn offer(&mut self, program: OwnedFd, owner: u32) -> io::Result<()> {
        let file = File::from(program);
        let about = file.metadata()?;
        let defect = if !about.is_file() || about.nlink() == 0 {
            "is no file with a name"
        } else if about.uid() != 0 && about.uid() != owner {
            "belongs to neither root nor who started the keeper"
        } else if about.mode() & 0o022 != 0 {
            "can be written by others than its owner"
        } else if about.mode() & 0o111 == 0 {
            "is not executable"
        } else {
            self.next = Some(Program(Some(file)));
            return Ok(());
        };
        Err(io::Error::other(defect))
    }

    /// Whether another program waits for the next worker.
    pub fn has_next(&self) -> bool {
        self.next.is_some()
    }

    /// What to start a worker from now.
    pub fn choose(&mut self) -> &Program {
        if let Some(next) = self.next.take() {
            // One that never served is no one to go back to.
            let replaced = std::mem::replace(&mut self.current, next);
            self.previous.get_or_insert(replaced);
        }
        &self.current
    }

    /// The current program serves: it stays.
    pub fn confirm(&mut self) {
        self.previous = None;
    }

    /// Whether the current program has yet to show that it serves.
    pub fn on_trial(&self) -> bool {
        self.previous.is_some()
    }

    /// Goes back to what served before, if the current program is on trial.
    pub fn fall_back(&mut self) -> bool {
        let back = self.previous.take();
        let is_back = back.is_some();
        if let Some(back) = back {
            self.current = back;
        }
        is_back
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, Permissions},
        os::unix::fs::PermissionsExt,
        path::PathBuf,
    };

    use super::*;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("vmseal-program-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
        fn file(&self, mode: u32) -> OwnedFd {
            let path = self.0.join("program");
            fs::write(&path, "x").unwrap();
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            File::open(path).unwrap().into()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn own_uid() -> u32 {
        // SAFETY: takes nothing and cannot fail.
        unsafe { libc::geteuid() }
    }

    #[test]
    fn program_that_does_not_serve_gives_way_to_the_one_before() {
        let scratch = Scratch::new("trial");
        let mut programs = Programs::default();
        assert_eq!(programs.choose().path(), "/proc/self/exe");
        assert!(!programs.fall_back());
        programs.offer(scratch.file(0o755), own_uid()).unwrap();
        assert!(programs.has_next() && !programs.on_trial());
        let tried = programs.choose().path();
        assert!(tried.starts_with("/proc/self/fd/") && programs.on_trial());
        // Another one before the first has served: what served last is still the one to go back to.
        programs.offer(scratch.file(0o755), own_uid()).unwrap();
        assert_ne!(programs.choose().path(), tried);
        assert!(programs.fall_back());
        assert_eq!(programs.choose().path(), "/proc/self/exe");
    }

    #[test]
    fn program_that_served_stays() {
        let scratch = Scratch::new("good");
        let mut programs = Programs::default();
        programs.offer(scratch.file(0o755), own_uid()).unwrap();
        let path = programs.choose().path();
        programs.confirm();
        assert!(!programs.on_trial() && !programs.fall_back());
        assert_eq!(programs.choose().path(), path);
    }

    #[test]
    fn what_a_worker_could_have_made_is_refused() {
        let scratch = Scratch::new("bad");
        let refused = |program: OwnedFd, owner: u32| -> String {
            Programs::default().offer(program, owner).unwrap_err().to_string()
        };
        assert!(refused(scratch.file(0o644), own_uid()).contains("not executable"));
        for mode in [0o775, 0o757] {
            assert!(refused(scratch.file(mode), own_uid()).contains("by others"));
        }
        assert!(refused(File::open("/dev/null").unwrap().into(), own_uid()).contains("no file"));
        let gone = scratch.file(0o755);
        fs::remove_file(scratch.0.join("program")).unwrap();
        assert!(refused(gone, own_uid()).contains("no file with a name"));
        if own_uid() == 0 {
            let other = scratch.file(0o755);
            std::os::unix::fs::chown(scratch.0.join("program"), Some(65534), None).unwrap();
            assert!(refused(other, 0).contains("belongs to neither"));
        }
    }
}
