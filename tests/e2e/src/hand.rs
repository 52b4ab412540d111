//! The host's part done by hand: a volume under a provider's KEK, its disk process, a QEMU on it. What the agent does
//! for a domain, for demos and tests of the rooms below it.

use std::{
    fs::{self, File, OpenOptions},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{FileExt, OpenOptionsExt},
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use vmseal_keys::{Dek, NewDiskRecord, SecretShare, random_bytes, seal_disk};
use vmseal_luks::{Geometry, HEADER_BYTES, VmsealToken, create};
use vmseal_model::{
    control::{CONTROL_VERSION, DiskSetup, KEY_SLOT_BYTES, Setup},
    id::{DiskId, DomainUuid, RecordId, VmId},
    record::{HeaderKind, KeyRecord, RecipientKind, RecordState, UnitBytes},
};

use crate::{
    console::Console,
    house::path,
    lab::{Lab, bin},
    shell,
};

/// One VM with one encrypted raw disk.
pub struct HandMade {
    /// Its volume.
    pub volume: PathBuf,
    name: String,
    folder: PathBuf,
    serial: PathBuf,
    image: PathBuf,
    record: KeyRecord,
    dek: Dek,
    bytes: u64,
    domain: DomainUuid,
}

impl HandMade {
    /// Makes the volume under a new KEK of the provider in a verified backup.
    pub fn create(lab: &Lab, image: PathBuf, name: &str, backup: &Path, password: &str, bytes: u64) -> Self {
        let provider = vmseal_provider::import(&fs::read(backup).expect("the backup is there"), password)
            .expect("the backup opens with its password");
        let kek_id = provider.new_kek_id().expect("an imported provider is backed up");
        let kek = provider.derive(&kek_id).expect("a new id derives");
        let dek = Dek::generate().expect("there is secret memory");
        let disk = DiskId::from_random(random_bytes().expect("there is randomness"));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        let new = NewDiskRecord {
            record: RecordId::from_random(random_bytes().expect("there is randomness")),
            vm: VmId::from_random(random_bytes().expect("there is randomness")),
            disk,
            header: HeaderKind::Attached,
            unit: UnitBytes::B512,
            payload_offset: HEADER_BYTES,
            created_ms: now,
            state: RecordState { epoch: 1, stored_bytes: bytes, presented_bytes: bytes },
        };
        let record =
            seal_disk(&new, &dek, &kek, RecipientKind::Native, provider.id()).expect("a fresh record seals");
        let token = VmsealToken { records: vec![record.encode()] };
        let header = create(&dek, disk, &Geometry::attached(512), &token).expect("a fresh header is made");
        let volume = lab.folder("images").join(format!("{name}.vmseal"));
        let file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&volume).expect("own folder");
        file.write_all_at(&header, 0).expect("own file");
        file.set_len(HEADER_BYTES + bytes).expect("own file");
        file.sync_all().expect("own file");
        let domain = DomainUuid::from_random(random_bytes().expect("there is randomness"));
        let folder = lab.run.join(format!("libvirt-{domain}"));
        fs::create_dir_all(&folder).expect("own folder");
        let serial = lab.folder("serial");
        for own in [&folder, &serial] {
            shell::must(shell::tool("chown").arg("libvirt-qemu").arg(own));
        }
        Self { volume, name: name.to_owned(), folder, serial, image, record, dek, bytes, domain }
    }

    /// Starts keeper and worker; the keeper outlives this process.
    #[expect(clippy::zombie_processes, reason = "the keeper is meant to live on")]
    pub fn serve(&self) {
        let mut keys = SecretShare::create(KEY_SLOT_BYTES).expect("there is secret memory");
        keys.as_mut_slice()[..Dek::LEN].copy_from_slice(self.dek.payload());
        let listen = |name: &str| {
            let path = self.folder.join(name);
            let _ = fs::remove_file(&path);
            let listener = UnixListener::bind(&path).expect("own folder");
            shell::must(shell::tool("chown").arg("libvirt-qemu").arg(&path));
            listener
        };
        let (control, disk) = (listen("control.sock"), listen("vda.sock"));
        let pids = File::open(&self.folder).expect("own folder");
        let data = OpenOptions::new().read(true).write(true).open(&self.volume).expect("the volume is there");
        let setup = Setup {
            version: CONTROL_VERSION,
            vm: self.record.head.vm,
            domain: self.domain,
            pid_file: format!("{}.pid", self.name),
            disks: vec![DiskSetup {
                disk: self.record.head.disk(),
                target: "vda".into(),
                key_slot: 0,
                key_check: self.record.head.key_check.iter().map(|b| format!("{b:02x}")).collect(),
                unit_bytes: 512,
                payload_offset: HEADER_BYTES,
                detached_header: false,
                presented_bytes: self.bytes,
                grows: false,
                read_only: false,
                discard: true,
            }],
        };
        let (ours, theirs) = UnixStream::pair().expect("a socket pair can be made");
        let log = File::create(self.folder.join("disk.log")).expect("own folder");
        // The keeper finds its setup socket as descriptor 3.
        Command::new("/bin/sh")
            .args(["-c", "exec \"$0\" keeper 3<&0 </dev/null"])
            .arg(bin("vmseal-disk"))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("vmseal-disk starts");
        let fds = [keys.as_fd(), control.as_fd(), pids.as_fd(), data.as_fd(), disk.as_fd()];
        vmseal_disk::frame::send(&ours, &setup, &fds).expect("the keeper takes its setup");
        shell::until("the disk answers", Duration::from_secs(20), || self.pids().is_some());
    }

    /// Keeper and worker.
    pub fn pids(&self) -> Option<(i32, i32)> {
        let status = crate::scan::disk_status(&self.folder.join("control.sock"))?;
        Some((status.keeper_pid, status.worker_pid))
    }

    /// Starts QEMU as its own user, on the disk's NBD socket.
    pub fn boot(&self) -> Console {
        let console = self.serial.join(&self.name);
        let drive = format!(
            "{{\"driver\":\"nbd\",\"node-name\":\"d0\",\"server\":{{\"type\":\"unix\",\"path\":\"{}\"}},\"export\":\"{}\",\
             \"reconnect-delay\":600,\"cache\":{{\"direct\":true}},\"discard\":\"unmap\"}}",
            self.folder.join("vda.sock").display(),
            self.record.head.disk()
        );
        shell::must(
            shell::tool("setpriv")
                .args(["--reuid=libvirt-qemu", "--regid=kvm", "--clear-groups", "--", "qemu-system-x86_64"])
                .args([
                    "-name",
                    &self.name,
                    "-machine",
                    "q35,accel=tcg",
                    "-cpu",
                    "qemu64",
                    "-m",
                    "192",
                    "-display",
                    "none",
                ])
                .args(["-nodefaults", "-daemonize", "-append", "console=ttyS0 quiet panic=-1", "-no-reboot"])
                .arg("-kernel")
                .arg(self.image.join("vmlinuz"))
                .arg("-initrd")
                .arg(self.image.join("initrd.gz"))
                .arg("-pidfile")
                .arg(self.pid_file())
                .args(["-chardev", &format!("socket,id=s0,path={},server=on,wait=off", path(&console))])
                .args(["-serial", "chardev:s0", "-blockdev", &drive, "-device", "virtio-blk-pci,drive=d0"]),
        );
        let mut console = Console::open(&console);
        console.wait_ready();
        console
    }

    fn pid_file(&self) -> PathBuf {
        self.folder.join(format!("{}.pid", self.name))
    }

    /// QEMU's pid, while it runs.
    pub fn qemu_pid(&self) -> Option<i32> {
        let pid = fs::read_to_string(self.pid_file()).ok()?.trim().parse().ok()?;
        Path::new(&format!("/proc/{pid}")).exists().then_some(pid)
    }

    /// Powers the guest off from within.
    pub fn power_off(&self, console: &mut Console) {
        console.send("sync; poweroff -f\n");
        shell::until("the guest is off", Duration::from_secs(90), || self.qemu_pid().is_none());
    }
}

impl std::fmt::Debug for HandMade {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HandMade").field("volume", &self.volume).finish_non_exhaustive()
    }
}
