//! A libvirtd of the test's own (`tests/lab/libvirtd.sh`), and virsh against it.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use crate::{
    lab::{self, Lab},
    shell::{self, Outcome},
};

/// The running libvirtd.
#[derive(Debug)]
pub struct Libvirtd {
    child: Child,
    state: PathBuf,
    run: PathBuf,
    hook: PathBuf,
}

impl Libvirtd {
    /// Starts it and waits until it answers.
    pub fn start(lab: &Lab, hook: PathBuf) -> Self {
        let child = spawn(&lab.state, &lab.run, &hook);
        let this = Self { child, state: lab.state.clone(), run: lab.run.clone(), hook };
        this.wait_answers();
        this
    }

    /// Its URI, for `virsh -c`.
    pub fn uri(&self) -> String {
        uri(&self.run)
    }

    /// Where QEMU's pid files are, seen from outside its mount namespace.
    pub fn pid_files(&self) -> PathBuf {
        self.state.join("run/qemu")
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A virsh command.
    pub fn virsh(&self, args: &[&str]) -> Outcome {
        shell::run(shell::tool("virsh").args(["-q", "-c", &self.uri()]).args(args))
    }

    /// A virsh command that must succeed; its output.
    pub fn must_virsh(&self, args: &[&str]) -> String {
        shell::must(shell::tool("virsh").args(["-q", "-c", &self.uri()]).args(args)).stdout
    }

    /// Pid of a running domain's QEMU.
    pub fn qemu_pid(&self, domain: &str) -> Option<i32> {
        fs::read_to_string(self.pid_files().join(format!("{domain}.pid"))).ok()?.trim().parse().ok()
    }

    /// kill -9, and gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again after [`Libvirtd::kill`], without waiting.
    pub fn start_again(&mut self) {
        self.child = spawn(&self.state, &self.run, &self.hook);
    }

    /// Waits until it answers.
    pub fn wait_answers(&self) {
        shell::until("libvirtd answers", Duration::from_secs(60), || self.virsh(&["list", "--all"]).ok());
    }

    /// Leaves it running when this value is dropped.
    pub fn leave(self) {
        let _left = std::mem::ManuallyDrop::new(self);
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        // Guests first: QEMU outlives its libvirtd.
        if let Ok(files) = fs::read_dir(self.pid_files()) {
            for file in files.flatten().filter(|f| f.path().extension().is_some_and(|e| e == "pid")) {
                if file.file_name() != "driver.pid"
                    && let Some(pid) =
                        fs::read_to_string(file.path()).ok().and_then(|t| t.trim().parse::<i32>().ok())
                    && is_qemu(pid)
                {
                    // SAFETY: sends a signal to a process that this libvirtd started, as its pid file and name say.
                    unsafe { libc::kill(pid, libc::SIGKILL) };
                }
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// URI of the libvirtd of a run folder.
pub fn uri(run: &std::path::Path) -> String {
    format!("qemu+unix:///system?socket={}/libvirt/libvirt-sock", run.display())
}

fn is_qemu(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("qemu-system"))
}

fn spawn(state: &std::path::Path, run: &std::path::Path, hook: &std::path::Path) -> Child {
    let log = fs::File::create(state.join("libvirtd.out")).expect("own folder");
    Command::new(lab::tree().join("tests/lab/libvirtd.sh"))
        .args([state, run, hook])
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a file can be shared"))
        .stderr(log)
        .spawn()
        .expect("tests/lab/libvirtd.sh starts")
}
