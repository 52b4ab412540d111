//! Wardens: root's processes that make block devices of disks, started once a VM's disk process serves, ended before it.
//!
//! A VM's plan in; `/dev/vmseal/<disk id>` for each of its disks of that class out. A warden lives in a session of its
//! own; its command line says whose it is, so an agent that comes back finds it without having written anything down.
//! One that ends by itself is started again with the same arguments and goes on with the device that is there.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs,
    io::{BufRead as _, BufReader, Read as _},
    os::unix::{ffi::OsStrExt as _, fs::FileTypeExt as _},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use vmseal_model::{
    class::DiskClass,
    id::{DiskId, DomainUuid},
};

use super::{BackendError, BackendLost, Backends, END, OOM_SCORE, READY, Slot, lock, process::Process};
use crate::{
    accounts,
    causes::causes,
    config::AgentConfig,
    domain_xml::RECONNECT_SECONDS,
    spawn::spawn_apart,
    start::plan::{Plan, PlannedDisk},
    ublk,
};

/// Most queues of a device, each with memory of its own; QEMU fills no more from its threads.
const QUEUES: u32 = 4;
/// Requests under way in one queue.
const DEPTH: u32 = 64;
/// Most bytes of what a warden says.
const MAX_LINE: u64 = 4096;
/// Most characters of why it failed that are told.
const MAX_REASON: usize = 500;
/// Most bytes of a command line that are looked at.
const MAX_COMMAND: u64 = 8192;
/// Bytes of a process's short name.
const SHORT_NAME: usize = 15;

/// A VM's wardens. Changed only while the VM's keeper is locked, but for one that ends by itself.
pub(super) type Wardens = HashMap<DiskId, Warden>;

/// One of them.
pub(super) struct Warden {
    generation: u64,
    process: Arc<Process>,
}

impl Backends {
    /// Makes sure that ublk can be used, before anything is begun for a VM that needs it.
    pub(super) fn check_devices(&self, plan: &Plan) -> Result<(), BackendError> {
        match devices(plan).next() {
            Some(disk) => ublk::load(&self.root).map_err(|reason| no_device(plan, disk, reason)),
            None => Ok(()),
        }
    }

    /// Has a warden for each disk that needs one: known, found, or started and ready.
    pub(super) fn have_devices(&self, plan: &Plan, slot: &Arc<Slot>) -> Result<(), BackendError> {
        let alive = |disk: &DiskId| {
            let wardens = lock(&slot.wardens);
            wardens.get(disk).is_some_and(|warden| !warden.process.wait_for(Duration::ZERO))
        };
        let missing: Vec<&PlannedDisk> = devices(plan).filter(|disk| !alive(&disk.disk)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let mut found: HashMap<DiskId, Process> = self.find_wardens(plan.domain).into_iter().collect();
        let mut starting = Vec::new();
        let plan = Arc::new(plan.clone());
        for disk in missing {
            match found.remove(&disk.disk) {
                Some(process) => {
                    tracing::info!(domain = %plan.domain, disk = %disk.disk, warden = process.pid(), "took on a warden");
                    self.watch_warden(&plan, disk.disk, process, None, slot);
                }
                None => starting.push((disk, self.start_warden(&plan, disk))),
            }
        }
        let until = Instant::now() + READY;
        let mut first = Ok(());
        for (disk, started) in starting {
            match started.and_then(|starting| starting.ready(until)) {
                Ok((process, child)) => self.watch_warden(&plan, disk.disk, process, Some(child), slot),
                Err(reason) => first = first.and_then(|()| Err(no_device(&plan, disk, reason))),
            }
        }
        first
    }

    /// Ends the wardens of a VM, and with them its block devices, and waits for that; without `force` only if nobody has
    /// one of them open.
    pub(super) fn end_devices(
        &self,
        domain: DomainUuid,
        slot: &Slot,
        force: bool,
    ) -> Result<(), BackendError> {
        let mut wardens: Vec<(DiskId, Arc<Process>)> =
            lock(&slot.wardens).iter().map(|(disk, warden)| (*disk, Arc::clone(&warden.process))).collect();
        for (disk, process) in self.find_wardens(domain) {
            if wardens.iter().all(|(_, known)| known.pid() != process.pid()) {
                wardens.push((disk, Arc::new(process)));
            }
        }
        if !force {
            let device = |disk: &DiskId| PathBuf::from(AgentConfig::ublk_device(*disk));
            let mut open = wardens.iter().map(|(disk, _)| device(disk));
            if let Some(reason) =
                open.find_map(|device| Some(format!("{} has {}", holder(&device)?, device.display())))
            {
                return Err(BackendError::InUse { reason });
            }
        }
        // What ends from here on was asked to.
        lock(&slot.wardens).clear();
        wardens.iter().for_each(|(_, process)| process.terminate());
        let until = Instant::now() + END;
        for (disk, process) in wardens {
            if !process.wait_until(Some(until)) {
                tracing::error!(
                    %domain, %disk, warden = process.pid(),
                    "a warden did not end; killed it: its device may stay until the VM is started again"
                );
                process.kill();
                process.wait_for(END);
            }
        }
        Ok(())
    }

    /// Wardens of a domain's disks that run, whoever started them.
    fn find_wardens(&self, domain: DomainUuid) -> Vec<(DiskId, Process)> {
        let dir = self.config.vm_dir(domain);
        // Most VMs never had one.
        let has_socket = |entry: fs::DirEntry| entry.file_name().as_bytes().ends_with(b".ublk.sock");
        if !fs::read_dir(&dir).into_iter().flatten().flatten().any(has_socket) {
            return Vec::new();
        }
        let program = self.config.ublk_program();
        let name = program.file_name().unwrap_or_default();
        processes().filter_map(|pid| find_warden(pid, name, &dir)).collect()
    }

    fn start_warden(&self, plan: &Plan, disk: &PlannedDisk) -> Result<Starting, String> {
        let program = self.config.ublk_program();
        let socket = self.config.ublk_socket(plan.domain, &disk.target);
        let queues = plan.cpus.clamp(1, QUEUES);
        let args = arguments(disk.disk, &socket, queues);
        let (log, log_path) = self.open_log(plan.domain).map_err(|e| causes(&e))?;
        let mut child = spawn_apart(&program, &args, Stdio::from(log)).map_err(|e| causes(&e))?;
        let process = match Process::open(child.id().cast_signed()) {
            Ok(process) => process,
            Err(error) => {
                let _ = child.kill().and_then(|()| child.wait());
                return Err(format!("its warden cannot be watched: {error}"));
            }
        };
        if accounts::is_root() {
            let _ = fs::write(format!("/proc/{}/oom_score_adj", process.pid()), OOM_SCORE);
        }
        let (said, line) = mpsc::channel();
        let out = child.stdout.take().expect("it is piped");
        let read = move || {
            let mut line = String::new();
            let _ = BufReader::new(out.take(MAX_LINE)).read_line(&mut line);
            let _ = said.send(line);
        };
        if let Err(error) = thread::Builder::new().name("warden-line".to_owned()).spawn(read) {
            process.kill();
            let _ = child.wait();
            return Err(format!("its warden is not heard: {error}"));
        }
        Ok(Starting { device: AgentConfig::ublk_device(disk.disk), process, child, line, log: log_path })
    }

    /// Has the end of a warden waited for, and reported if nobody asked for it.
    fn watch_warden(
        &self,
        plan: &Arc<Plan>,
        disk: DiskId,
        process: Process,
        child: Option<Child>,
        slot: &Arc<Slot>,
    ) {
        let generation = self.generations.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let process = Arc::new(process);
        lock(&slot.wardens).insert(disk, Warden { generation, process: Arc::clone(&process) });
        let (slot, lost, plan) = (Arc::clone(slot), self.lost.clone(), Arc::clone(plan));
        let domain = plan.domain;
        let wait = move || {
            process.wait_until(None);
            let status = child.and_then(|mut child| child.wait().ok());
            let mut wardens = lock(&slot.wardens);
            if wardens.get(&disk).is_some_and(|warden| warden.generation == generation) {
                wardens.remove(&disk);
                let how = status.map_or("ended".to_owned(), |status| format!("ended: {status}"));
                tracing::error!(%domain, %disk, warden = process.pid(), "a warden of VM '{}' {how}", plan.name);
                let _ = lost.send(BackendLost { plan });
            }
        };
        if let Err(error) = thread::Builder::new().name("warden-watch".to_owned()).spawn(wait) {
            tracing::error!(%domain, %disk, "a warden is not watched: {error}");
        }
    }
}

/// Disks that are block devices.
fn devices(plan: &Plan) -> impl Iterator<Item = &PlannedDisk> {
    plan.disks.iter().filter(|disk| disk.class == DiskClass::Ublk)
}

fn no_device(plan: &Plan, disk: &PlannedDisk, reason: String) -> BackendError {
    BackendError::NoDevice { name: plan.name.clone(), target: disk.target.clone(), reason }
}

/// What a warden is started with, and known by. It waits for another disk process as long as QEMU would for one on a
/// socket.
fn arguments(disk: DiskId, socket: &Path, queues: u32) -> [OsString; 10] {
    [
        "--disk".into(),
        disk.to_string().into(),
        "--socket".into(),
        socket.into(),
        "--queues".into(),
        queues.to_string().into(),
        "--depth".into(),
        DEPTH.to_string().into(),
        "--linger".into(),
        RECONNECT_SECONDS.to_string().into(),
    ]
}

/// A warden that has not said yet how it goes.
struct Starting {
    device: String,
    process: Process,
    child: Child,
    line: mpsc::Receiver<String>,
    log: PathBuf,
}

impl Starting {
    /// Waits for its one line; on failure it has ended, and the reason is in one line.
    fn ready(mut self, until: Instant) -> Result<(Process, Child), String> {
        let left = until.saturating_duration_since(Instant::now());
        let line = self.line.recv_timeout(left).ok();
        let reason = match line
            .as_deref()
            .map(|line| line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")))
        {
            Some(("ready", device)) if device == self.device => return Ok((self.process, self.child)),
            Some(("ready", other)) => {
                format!("its warden made {} of it and not {}", other.escape_debug(), self.device)
            }
            Some(("failed", reason)) if !reason.is_empty() => {
                reason.escape_debug().take(MAX_REASON).collect()
            }
            Some(("", _)) => format!("its warden ended without a word; see {}", self.log.display()),
            Some(_) => format!("its warden says what is not understood; see {}", self.log.display()),
            None => format!("its warden is not ready in time; see {}", self.log.display()),
        };
        // One that failed ends by itself, and one that is asked to takes its device with it.
        self.process.terminate();
        if !self.process.wait_for(END) {
            self.process.kill();
        }
        let _ = self.child.wait();
        Err(reason)
    }
}

/// All processes, by number.
fn processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The warden with this number, if it is one of that directory's sockets, and of our own user.
fn find_warden(pid: i32, program: &OsStr, dir: &Path) -> Option<(DiskId, Process)> {
    // The command line of a process that hangs can hang its reader, so the short name is asked first.
    let short = fs::read(format!("/proc/{pid}/comm")).ok()?;
    let name = program.as_bytes();
    if short.trim_ascii_end() != &name[..name.len().min(SHORT_NAME)] {
        return None;
    }
    // SAFETY: takes nothing and cannot fail.
    let own = unsafe { libc::geteuid() };
    let process = Process::open_of(pid, own).ok()?;
    let mut command = Vec::new();
    // Read after the handle was got: if the process ended between the two, the handle says so.
    fs::File::open(format!("/proc/{pid}/cmdline")).ok()?.take(MAX_COMMAND).read_to_end(&mut command).ok()?;
    Some((disk_of(&command, program, dir)?, process))
}

/// The disk in a warden's command line.
fn disk_of(command: &[u8], program: &OsStr, dir: &Path) -> Option<DiskId> {
    let args: Vec<&OsStr> = command.split(|byte| *byte == 0).map(OsStr::from_bytes).collect();
    let at = args.iter().position(|arg| *arg == "--disk")?;
    let (before, after) = (args.get(at.checked_sub(1)?)?, args.get(at + 1..at + 4)?);
    let named = Path::new(before).file_name() == Some(program);
    let in_dir = after[1] == "--socket" && Path::new(after[2]).parent() == Some(dir);
    if named && in_dir { after[0].to_str()?.parse().ok() } else { None }
}

/// A process that has a block device open. Known by the device's own name, for QEMU has a `/dev` of its own; nothing that
/// is open is looked at, which could hang.
fn holder(device: &Path) -> Option<String> {
    let device = fs::canonicalize(device).ok()?;
    if !fs::metadata(&device).ok()?.file_type().is_block_device() {
        return None;
    }
    processes().find_map(|pid| {
        let mut open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
        open.find(|entry| fs::read_link(entry.path()).is_ok_and(|to| to.file_name() == device.file_name()))?;
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Some(format!("process {pid} ({})", name.trim_end().escape_debug()))
    })
}

#[cfg(test)]
mod tests;
