//! A small Linux in emulation (`tests/lab/guest.sh`, `tests/lab/fio.sh`), driven by a shell on its serial line.

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use vmseal_model::control::ExportKind;

use crate::{
    rig::{Disk, Rig},
    tools::tool,
};

/// How long a guest may take for anything: it is emulated, on a shared machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A guest that runs; killed when dropped.
pub(crate) struct Guest {
    process: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    heard: String,
    commands: u32,
    log: PathBuf,
}

impl Guest {
    /// Boots one whose `/dev/vda` is the rig's first disk with two queues, as libvirt gives it to QEMU; `more` adds
    /// devices. None without QEMU.
    pub(crate) fn boot(rig: &Rig, more: &[&str]) -> Option<Self> {
        let mut qemu = tool("qemu-system-x86_64")?;
        let image = image();
        let initrd = rig.path("initrd");
        let mut both = fs::read(image.join("initrd.gz")).unwrap();
        // An archive begins at a multiple of four.
        both.resize(both.len().next_multiple_of(4), 0);
        both.extend(fs::read(image.join("fio.cpio")).unwrap());
        fs::write(&initrd, both).unwrap();
        let log = rig.path("qemu.log");
        let mut process = qemu
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "qemu64,+aes", "-smp", "2"])
            .args(["-object", "memory-backend-memfd,id=ram,share=on,size=768M", "-m", "768"])
            .args(["-machine", "q35,memory-backend=ram"])
            .arg("-kernel")
            .arg(image.join("vmlinuz"))
            .arg("-initrd")
            .arg(&initrd)
            .args(["-append", "console=ttyS0 quiet panic=-1"])
            .args(disk(rig.disk()))
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let input = process.stdin.take().unwrap();
        let mut said = process.stdout.take().unwrap();
        let (sender, output) = channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = said.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        let mut guest = Self { process, input, output, heard: String::new(), commands: 0, log };
        guest.listen("boot", |heard| heard.contains("GUEST-READY").then_some(()));
        // From here on it says what commands say, and no prompt.
        guest.sh("PS1= PS2=");
        Some(guest)
    }

    /// Runs a command: its exit status and what it printed.
    pub(crate) fn try_sh(&mut self, command: &str) -> (i32, String) {
        self.commands += 1;
        self.heard.clear();
        writeln!(self.input, "{command}\necho \"END\"{}=$?.", self.commands).unwrap();
        // Typed lines are not echoed; if one were, the mark would stand in it in two pieces.
        let mark = format!("END{}=", self.commands);
        self.listen(command, |heard| {
            let (said, status) = heard.split_once(&mark)?;
            let (status, _) = status.split_once('.')?;
            Some((status.parse().unwrap(), said.replace('\r', "").trim().to_owned()))
        })
    }

    /// Runs a command that must succeed.
    pub(crate) fn sh(&mut self, command: &str) -> String {
        let (status, said) = self.try_sh(command);
        assert_eq!(status, 0, "in the guest, `{command}` said:\n{said}");
        said
    }

    /// Takes what the guest says until it makes sense.
    fn listen<T>(&mut self, what: &str, sense: impl Fn(&str) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = sense(&self.heard) {
                return found;
            }
            match self.output.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.heard.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout) => {
                    panic!("`{what}` took the guest more than {PATIENCE:?}; it said:\n{}", self.heard)
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let log = fs::read_to_string(&self.log).unwrap();
                    panic!("QEMU ended during `{what}`: {log}\nthe guest said:\n{}", self.heard)
                }
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// QEMU's options for a disk: libvirt's `<reconnect enabled='yes' timeout='1'/>` with vhost-user, `<reconnect
/// delay='600'/>` with NBD.
fn disk(disk: &Disk) -> [String; 4] {
    let socket = disk.socket.display();
    match disk.setup.export {
        ExportKind::VhostUser => [
            "-chardev".into(),
            format!("socket,id=vda,path={socket},reconnect-ms=1000"),
            "-device".into(),
            "vhost-user-blk-pci,chardev=vda,num-queues=2,addr=0x4".into(),
        ],
        ExportKind::Nbd => [
            "-blockdev".into(),
            format!(
                "nbd,node-name=vda,server.type=unix,server.path={socket},export={},reconnect-delay=600,discard=unmap",
                disk.id
            ),
            "-device".into(),
            "virtio-blk-pci,drive=vda,num-queues=2,addr=0x4".into(),
        ],
        ExportKind::Ublk => unreachable!("tests/e2e/tests/ublk.rs has a guest with a kernel for it"),
    }
}

/// Where kernel and initramfs are, made once for this target folder; the end-to-end tests use the same.
fn image() -> PathBuf {
    let made = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("lab-guest");
    let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/lab");
    for script in ["guest.sh", "fio.sh"] {
        let status = Command::new(lab.join(script)).arg(&made).status().unwrap();
        assert!(status.success(), "{script}: {status}");
    }
    made
}
