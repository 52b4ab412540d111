//! Frames between the agent and `vmseal-disk`.
//!
//! A frame is a length (u32, little-endian, at most [`MAX_FRAME`]) and that many bytes of JSON; file descriptors
//! travel with its first byte (SCM_RIGHTS). Two sockets speak it: the *setup* socket a keeper or a job is born with
//! (fd 3), and the VM's `control.sock`. Format: `docs/formats/disk-control.md`.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::id::{DiskId, DomainUuid, HostId, VmId};

/// Most bytes of a frame's JSON.
pub const MAX_FRAME: usize = 1 << 20;
/// Version of these frames. Since 2 a VM is handed over: a program that knows 1 only would serve what it must not.
pub const CONTROL_VERSION: u32 = 2;
/// The oldest version of a setup that is still served.
pub const OLDEST_CONTROL_VERSION: u32 = 1;
/// How long a VM stays drained if nobody says otherwise, and at most.
pub const DRAINED_MS: u64 = 60_000;
/// The longest that may be asked for.
pub const MAX_DRAINED_MS: u64 = 600_000;
/// Bytes of one key slot in the key memory: 96 of payload, the rest zero.
pub const KEY_SLOT_BYTES: usize = 128;
/// Most queues of a vhost-user disk. QEMU does not start with more than the back end has.
pub const MAX_QUEUES: u16 = 16;
/// The descriptor a keeper, worker or job finds its setup socket on.
pub const SETUP_FD: i32 = 3;

/// What a keeper gets, once, and hands to each worker it starts. It does not look inside.
///
/// Descriptors in order: key memory, control listener, directory of libvirt's pid files; then for each disk in order:
/// data, [`DiskSetup::detached_header`] ? header : nothing, listening socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// [`CONTROL_VERSION`].
    pub version: u32,
    /// The VM.
    pub vm: VmId,
    /// Its libvirt UUID.
    pub domain: DomainUuid,
    /// Name of libvirt's pid file of the VM within the directory that was passed: the process in it may use the disks.
    /// Empty: root and the uid that started the keeper may (backup sockets of their own, tests).
    pub pid_file: String,
    /// Its disks.
    pub disks: Vec<DiskSetup>,
    /// Whose name stands in owner blocks. Without it the VM cannot be handed over.
    #[serde(default)]
    pub host: Option<HostId>,
    /// Whether the volumes are another process's still: their descriptors came without locks, nothing is written, and
    /// requests wait for [`ControlRequest::Activate`].
    #[serde(default)]
    pub waiting: bool,
}

/// One volume and how it is presented.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSetup {
    /// The disk; also the NBD export's name.
    pub disk: DiskId,
    /// Target device name in the guest, for messages: `vda`.
    pub target: String,
    /// Where its payload lies in the key memory: slot × [`KEY_SLOT_BYTES`].
    pub key_slot: u32,
    /// Key check of its record, lowercase hexadecimal: a worker with a wrong key stops before the first byte.
    pub key_check: String,
    /// 512 or 4096.
    pub unit_bytes: u32,
    /// Where data begins in the data descriptor.
    pub payload_offset: u64,
    /// Whether a header descriptor follows the data descriptor.
    pub detached_header: bool,
    /// Bytes the export shows.
    pub presented_bytes: u64,
    /// Whether the file may grow up to the presented size; reads past its end give zeros.
    pub grows: bool,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether a TRIM makes holes; otherwise it is accepted and does nothing.
    pub discard: bool,
    /// How it is shown. The listening socket that comes with the disk speaks this.
    #[serde(default)]
    pub export: ExportKind,
    /// What the guest reads as its serial number; empty: the disk's id. Only of [`ExportKind::VhostUser`]: of the others QEMU
    /// answers that itself.
    #[serde(default)]
    pub serial: String,
}

/// How a disk is shown to its one client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExportKind {
    /// NBD on a unix socket.
    #[default]
    Nbd,
    /// vhost-user-blk on a unix socket.
    VhostUser,
    /// A block device of the host. On the unix socket is its warden, which is root: see [`crate::ublk`].
    Ublk,
}

/// What a job process gets as its first frame, with descriptors: key memory, volume data, other file (none for
/// [`Job::Zero`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSetup {
    /// [`CONTROL_VERSION`].
    pub version: u32,
    /// The VM the volume belongs to; the key check is bound to it.
    pub vm: VmId,
    /// The volume.
    pub disk: DiskSetup,
    /// What to do.
    pub job: Job,
    /// Bytes of plaintext it is about.
    pub bytes: u64,
    /// Where to begin; everything before is durable already.
    pub from: u64,
}

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Job {
    /// Clear file → volume.
    Encrypt,
    /// Volume → clear file.
    Decrypt,
    /// Reads both and compares every byte; answers with the hash.
    Verify,
    /// Fills the volume with encrypted zeros (a new raw disk).
    Zero,
}

/// What a job says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum JobEvent {
    /// Everything before `durable` is written and flushed.
    Progress {
        /// Bytes.
        durable: u64,
    },
    /// Finished; the file and the volume are flushed.
    Done {
        /// SHA-256 of the plaintext, lowercase hexadecimal; of [`Job::Verify`] only, else empty.
        sha256: String,
    },
    /// Ended; nothing is lost on either side.
    Failed {
        /// One line for the administrator.
        message: String,
    },
}

/// What the agent may ask of a worker on `control.sock`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum ControlRequest {
    /// Who are you, what do you serve.
    Status,
    /// End worker and keeper. Without `force`, refused while a client is connected.
    Stop {
        /// End although a client is connected.
        force: bool,
    },
    /// Go on from another program, whose file comes as a descriptor opened for reading. Clients connect again and send
    /// what was not answered; keys, descriptors and locks stay with the keeper, which stays the program it is.
    Upgrade,
    /// Take nothing more of the guest, end what is under way, flush. Requests wait and do not fail. Goes on by itself
    /// after a while if nothing else is asked.
    Drain {
        /// How long it may stay so, in milliseconds; 0: [`DRAINED_MS`].
        #[serde(default)]
        limit_ms: u64,
    },
    /// Say in the owner blocks that another host may take the volumes, and give the locks back. This process writes
    /// nothing more.
    HandOver {
        /// Who may.
        to: HostId,
    },
    /// Take what was handed to this host, and serve it.
    Activate {
        /// A host whose process has ended, as the asker vouches: what it holds is taken from it.
        #[serde(default)]
        ended: Option<HostId>,
    },
    /// Take back what nobody has taken, and go on.
    Resume {
        /// As for [`ControlRequest::Activate`].
        #[serde(default)]
        ended: Option<HostId>,
    },
    /// Show more bytes of a disk. Fewer are not possible while it is in use.
    Resize {
        /// Which.
        disk: DiskId,
        /// How many.
        presented_bytes: u64,
    },
}

/// What a disk process may do with its VM's volumes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Reads and writes.
    #[default]
    Serving,
    /// They are another's; nothing is written.
    Waiting,
    /// Taking them; nothing is written yet.
    Activating,
    /// They are its own, and at rest.
    Drained,
    /// Giving them away; nothing is written any more.
    HandingOver,
    /// They were given away.
    HandedOver,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Serving => "serving",
            Self::Waiting => "waiting",
            Self::Activating => "activating",
            Self::Drained => "drained",
            Self::HandingOver => "handing over",
            Self::HandedOver => "handed over",
        })
    }
}

/// A volume's owner block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ownership {
    /// The disk.
    pub disk: DiskId,
    /// Its generation.
    pub generation: u64,
    /// Whether its lock is a store helper's, which the asker has to start and end.
    pub lock_of_helper: bool,
}

/// What a worker answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum ControlReply {
    /// To [`ControlRequest::Status`].
    Status(DiskStatus),
    /// To [`ControlRequest::Stop`]: sent before the end.
    Stopping,
    /// To [`ControlRequest::Upgrade`]: sent before the worker makes room. Whether the new one serves is for
    /// [`ControlRequest::Status`] to say: a program that does not is replaced by the one before.
    Upgrading,
    /// To [`ControlRequest::Drain`].
    Drained,
    /// To [`ControlRequest::HandOver`]: the blocks are on the disk, the locks given back.
    HandedOver {
        /// Volumes that are written.
        disks: Vec<Ownership>,
    },
    /// To [`ControlRequest::Activate`] and [`ControlRequest::Resume`].
    Serving {
        /// Volumes that are written.
        disks: Vec<Ownership>,
    },
    /// To [`ControlRequest::Resize`].
    Resized {
        /// What is shown now.
        presented_bytes: u64,
    },
    /// Not done.
    Refused {
        /// One line for the administrator.
        message: String,
    },
}

/// State of one VM's disk process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// The VM.
    pub vm: VmId,
    /// Its libvirt UUID.
    pub domain: DomainUuid,
    /// Version of the binary.
    pub version: String,
    /// The worker.
    pub worker_pid: i32,
    /// Its keeper.
    pub keeper_pid: i32,
    /// `memfd_secret` or `mlock`.
    pub secret_memory: String,
    /// What walls stand around the worker.
    #[serde(default)]
    pub sandbox: SandboxStatus,
    /// What it may do with its volumes.
    #[serde(default)]
    pub phase: Phase,
    /// Its disks.
    pub disks: Vec<ExportStatus>,
}

/// What a worker cannot do any more, whoever takes it over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxStatus {
    /// Whether system calls are filtered.
    pub seccomp: bool,
    /// Version of landlock's interface; 0 if this kernel has none: files can be opened by name then.
    pub landlock: u32,
    /// Whether it is in a network namespace without an interface that is up. It can make no socket either way.
    pub network: bool,
    /// System calls that workers before it, of the same keeper, had no business with; nearly each ended its worker.
    #[serde(default)]
    pub stopped: u32,
    /// Number of the last such call.
    #[serde(default)]
    pub last_stopped: Option<u32>,
}

/// State of one export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportStatus {
    /// The disk.
    pub disk: DiskId,
    /// Its target.
    pub target: String,
    /// Process that is connected; none if zero.
    pub client_pid: i32,
    /// Bytes the volume holds now.
    pub stored_bytes: u64,
    /// Bytes it shows now.
    #[serde(default)]
    pub presented_bytes: u64,
    /// Bytes read since this worker started.
    pub read_bytes: u64,
    /// Bytes written since this worker started.
    pub written_bytes: u64,
    /// Connections refused since this worker started.
    pub refused_clients: u64,
}
