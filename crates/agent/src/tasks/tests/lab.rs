//! A host for one test: files, agent state, an in-memory libvirt, a key source. The disks, headers, keys and the job
//! program are the real ones.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use vmseal_keys::{Kek, SecretBytes};
use vmseal_model::{
    class::{ClassChoice, GroupCapabilities, HostCapabilities},
    id::{DomainUuid, KekId, KeyUuid, ProviderId, TaskId},
    refusal::Code,
    state::VmState,
    task::SourceFate,
};

use crate::{
    config::AgentConfig,
    domain_xml::DomainXml,
    ports::{
        Definition, DomainInfo, Hypervisor, HypervisorError, KeyMissing, KeyPurpose, KeySource, TaskReport,
        TaskSink,
    },
    scratch::Scratch,
    store::Store,
    tasks::{
        Runner,
        command::{KeyChoice, TaskCommand, Work},
        context::{CrashAt, World},
    },
};

pub(crate) const DOMAIN: DomainUuid = DomainUuid::from_bytes([0xd0; 16]);
pub(crate) const TASK: TaskId = TaskId::from_bytes([0x7a; 16]);

/// A host.
pub(crate) struct Lab {
    pub(crate) scratch: Scratch,
    pub(crate) libvirt: Arc<Libvirt>,
    pub(crate) keys: Arc<Keys>,
    pub(crate) told: Arc<Told>,
    pub(crate) runner: Option<Runner>,
    /// Instead of the real job program.
    pub(crate) program: Option<PathBuf>,
    /// The configuration of a Ceph cluster.
    pub(crate) ceph: Option<PathBuf>,
    /// Whether it has ublk.
    pub(crate) ublk: bool,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let scratch = Scratch::new();
        fs::create_dir(scratch.path().join("images")).unwrap();
        Self {
            scratch,
            libvirt: Arc::default(),
            keys: Arc::default(),
            told: Arc::default(),
            runner: None,
            program: None,
            ceph: None,
            ublk: false,
        }
    }

    /// Starts the agent's runner, with a crash where asked for.
    pub(crate) fn start(&mut self, crash_at: Option<CrashAt>) -> &Runner {
        self.runner = None;
        let ublk = self.ublk;
        let config = self.config();
        self.runner = Some(Runner::with_world(World {
            store: Arc::new(Store::open(&config.state_dir).unwrap()),
            config,
            hypervisor: self.libvirt.clone(),
            keys: self.keys.clone(),
            sink: self.told.clone(),
            host: Mutex::new(Some(vmseal_model::id::HostId::from_bytes([0x40; 16]))),
            capabilities: Box::new(move || HostCapabilities { ublk, ..HostCapabilities::default() }),
            patience: Duration::from_millis(5),
            crash_at,
        }));
        self.runner.as_ref().unwrap()
    }

    pub(crate) fn config(&self) -> AgentConfig {
        let run_dir =
            if self.ceph.is_some() { self.scratch.path().join("run") } else { "/run/vmseal".into() };
        AgentConfig {
            state_dir: self.scratch.path().join("state"),
            run_dir,
            log_dir: self.scratch.path().join("log"),
            disk_binary: Some(self.program.clone().unwrap_or_else(disk_binary)),
            disk_user: String::new(),
            rbd_binary: Some(disk_binary().with_file_name("vmseal-rbd")),
            rbd_user: String::new(),
            ceph_conf: self.ceph.clone(),
            ..AgentConfig::default()
        }
    }

    /// Submits and waits; gives the last report.
    pub(crate) fn run(&mut self, work: Work) -> TaskReport {
        self.run_as(TASK, work)
    }

    pub(crate) fn run_as(&mut self, task: TaskId, work: Work) -> TaskReport {
        let runner = self.start(None);
        runner.submit(TaskCommand { task, work });
        runner.wait();
        self.told.last(task)
    }

    /// Starts the agent anew and lets it finish what it finds.
    pub(crate) fn resume(&mut self) -> TaskReport {
        let runner = self.start(None);
        runner.resume_all();
        runner.wait();
        self.told.last(TASK)
    }

    pub(crate) fn image(&self, name: &str) -> PathBuf {
        self.scratch.path().join("images").join(name)
    }

    /// A raw image of so many bytes that look like nothing.
    pub(crate) fn raw_image(&self, name: &str, bytes: usize) -> String {
        let path = self.image(name);
        fs::write(&path, noise(bytes, name.len() as u64)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// A qcow2 image with some data in it.
    pub(crate) fn qcow2_image(&self, name: &str) -> String {
        let path = self.image(name);
        let raw = self.image("tmp.raw");
        let mut data = noise(700_000, 7);
        data.resize(4 << 20, 0);
        fs::write(&raw, data).unwrap();
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), path.to_str().unwrap()]);
        fs::remove_file(raw).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Defines the test's domain with these disks: target, path, format.
    pub(crate) fn define(&self, disks: &[(&str, &str, &str)]) {
        self.libvirt.put(DOMAIN, "web01", disks);
    }

    pub(crate) fn xml(&self) -> DomainXml {
        DomainXml::parse(&self.libvirt.xml(DOMAIN, Definition::Persistent).unwrap()).unwrap()
    }

    pub(crate) fn store(&self) -> Store {
        Store::open(&self.scratch.path().join("state")).unwrap()
    }

    /// Every file of the image directory with its contents' hash and mode.
    pub(crate) fn files(&self) -> BTreeMap<String, String> {
        use std::os::unix::fs::PermissionsExt;
        fs::read_dir(self.scratch.path().join("images"))
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let mode = entry.metadata().unwrap().permissions().mode();
                let hash = if entry.path().is_file() { sha256(&entry.path()) } else { String::new() };
                (entry.file_name().to_str().unwrap().to_owned(), format!("{mode:o} {hash}"))
            })
            .collect()
    }
}

pub(crate) fn key() -> KeyChoice {
    KeyChoice { provider: provider(), kek: KekId::native(1, KeyUuid::from_bytes([0xee; 16])) }
}

fn provider() -> ProviderId {
    "main".parse().unwrap()
}

/// All other hosts have whatever this one has.
pub(crate) fn hosts() -> GroupCapabilities {
    GroupCapabilities { ublk: true, without_ublk: Vec::new() }
}

pub(crate) fn encrypt(targets: &[&str], source: SourceFate) -> Work {
    let targets = targets.iter().map(|t| (*t).to_owned()).collect();
    Work::EncryptVm { domain: DOMAIN, targets, key: key(), class: ClassChoice::Auto, hosts: hosts(), source }
}

pub(crate) fn encrypt_as(class: ClassChoice) -> Work {
    let (targets, source) = (Vec::new(), SourceFate::Wipe);
    Work::EncryptVm { domain: DOMAIN, targets, key: key(), class, hosts: hosts(), source }
}

pub(crate) fn decrypt(targets: &[&str], source: SourceFate) -> Work {
    Work::DecryptVm { domain: DOMAIN, targets: targets.iter().map(|t| (*t).to_owned()).collect(), source }
}

/// Hash of a file, but for a volume's owner block: who held it last is no part of what must not change.
pub(crate) fn sha256(path: &Path) -> String {
    let mut bytes = fs::read(path).unwrap();
    if bytes.starts_with(b"LUKS") {
        for place in [vmseal_luks::OWNER_BLOCK_OFFSET, vmseal_luks::OWNER_COPY_OFFSET] {
            bytes[place as usize..][..vmseal_luks::OWNER_BLOCK_LEN].fill(0);
        }
    }
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &bytes);
    crate::volume::hex(digest.as_ref())
}

pub(crate) fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

pub(crate) fn qemu_img(args: &[&str]) {
    let done = Command::new("qemu-img").args(args).output().expect("qemu-img is installed");
    assert!(done.status.success(), "{args:?}: {done:?}");
}

/// The real job program: built beside this test, or named by VMSEAL_DISK_BIN.
fn disk_binary() -> PathBuf {
    let beside = || {
        let exe = std::env::current_exe().unwrap();
        exe.parent().unwrap().parent().unwrap().join("vmseal-disk")
    };
    let path = std::env::var_os("VMSEAL_DISK_BIN").map_or_else(beside, PathBuf::from);
    assert!(
        path.is_file(),
        "{} is missing: build it with `cargo build -p vmseal-disk`, or name it in VMSEAL_DISK_BIN",
        path.display()
    );
    path
}

/// libvirt, as far as tasks see it.
#[derive(Default)]
pub(crate) struct Libvirt {
    domains: Mutex<BTreeMap<DomainUuid, (DomainInfo, String)>>,
    pub(crate) snapshots: Mutex<u32>,
    pub(crate) saved: AtomicBool,
    /// What the next defines do, before those that work.
    pub(crate) defines: Mutex<VecDeque<Trouble>>,
    pub(crate) defined: Mutex<u32>,
    pub(crate) away: AtomicBool,
    /// Definitions of running domains that differ from their persistent ones.
    pub(crate) live: Mutex<BTreeMap<DomainUuid, String>>,
    /// Domains that are listed and whose definition is not told.
    pub(crate) mute: Mutex<BTreeMap<DomainUuid, HypervisorError>>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Trouble {
    /// Says no.
    Refuses,
    /// Does nothing, and the answer is lost.
    LostBefore,
    /// Does it, and the answer is lost.
    LostAfter,
    /// Does it, and is gone.
    DiesAfter,
    /// Takes it, and keeps something else.
    Garbles,
}

impl Libvirt {
    pub(crate) fn put(&self, uuid: DomainUuid, name: &str, disks: &[(&str, &str, &str)]) {
        let mut xml =
            format!("<domain type='kvm'>\n  <name>{name}</name>\n  <uuid>{uuid}</uuid>\n  <devices>\n");
        for (target, path, format) in disks {
            xml += &format!(
                "    <disk type='file' device='disk'>\n      <driver name='qemu' type='{format}'/>\n      <source \
                 file='{path}'/>\n      <target dev='{target}' bus='virtio'/>\n    </disk>\n"
            );
        }
        self.put_xml(uuid, name, &(xml + "  </devices>\n</domain>\n"));
    }

    pub(crate) fn put_xml(&self, uuid: DomainUuid, name: &str, xml: &str) {
        let info =
            DomainInfo { uuid, name: name.into(), state: VmState::Off, persistent: true, autostart: false };
        self.domains.lock().unwrap().insert(uuid, (info, xml.to_owned()));
    }

    pub(crate) fn change(&self, uuid: DomainUuid, change: impl FnOnce(&mut DomainInfo, &mut String)) {
        let mut domains = self.domains.lock().unwrap();
        let (info, xml) = domains.get_mut(&uuid).unwrap();
        change(info, xml);
    }

    pub(crate) fn undefine(&self, uuid: DomainUuid) {
        self.domains.lock().unwrap().remove(&uuid).expect("it is defined");
    }

    fn there(&self) -> Result<(), HypervisorError> {
        if self.away.load(Ordering::Acquire) { Err(away()) } else { Ok(()) }
    }
}

fn away() -> HypervisorError {
    HypervisorError::Unreachable { uri: "test:///".into(), reason: "gone".into() }
}

pub(crate) fn missing(uuid: DomainUuid) -> HypervisorError {
    HypervisorError::NoDomain { domain: uuid.to_string() }
}

impl Hypervisor for Libvirt {
    fn domains(&self) -> Result<Vec<DomainInfo>, HypervisorError> {
        self.there()?;
        Ok(self.domains.lock().unwrap().values().map(|(info, _)| info.clone()).collect())
    }

    fn domain(&self, uuid: DomainUuid) -> Result<DomainInfo, HypervisorError> {
        self.there()?;
        self.domains.lock().unwrap().get(&uuid).map(|(info, _)| info.clone()).ok_or_else(|| missing(uuid))
    }

    fn xml(&self, uuid: DomainUuid, which: Definition) -> Result<String, HypervisorError> {
        self.there()?;
        if let Some(error) = self.mute.lock().unwrap().get(&uuid) {
            return Err(error.clone());
        }
        if let (Definition::Live, Some(xml)) = (which, self.live.lock().unwrap().get(&uuid)) {
            return Ok(xml.clone());
        }
        self.domains.lock().unwrap().get(&uuid).map(|(_, xml)| xml.clone()).ok_or_else(|| missing(uuid))
    }

    fn define(&self, xml: &str) -> Result<DomainUuid, HypervisorError> {
        self.there()?;
        let parsed = DomainXml::parse(xml).unwrap();
        let (uuid, name) = (parsed.uuid().unwrap(), parsed.name().unwrap().to_owned());
        let trouble = self.defines.lock().unwrap().pop_front();
        match trouble {
            Some(Trouble::Refuses) => {
                return Err(HypervisorError::Refused { action: "define", reason: "no".into() });
            }
            Some(Trouble::LostBefore) => return Err(away()),
            _ => {}
        }
        let mut kept = xml.to_owned();
        if let Some(Trouble::Garbles) = trouble {
            let mut garbled = parsed.clone();
            garbled.remove_metadata();
            kept = garbled.to_xml();
        }
        *self.defined.lock().unwrap() += 1;
        if self.domains.lock().unwrap().contains_key(&uuid) {
            self.change(uuid, |_, xml| *xml = kept);
        } else {
            self.put_xml(uuid, &name, &kept);
        }
        self.away.fetch_or(matches!(trouble, Some(Trouble::DiesAfter)), Ordering::AcqRel);
        match trouble {
            Some(Trouble::LostAfter | Trouble::DiesAfter) => Err(away()),
            _ => Ok(uuid),
        }
    }

    fn snapshots(&self, _: DomainUuid) -> Result<u32, HypervisorError> {
        Ok(*self.snapshots.lock().unwrap())
    }

    fn has_managed_save(&self, _: DomainUuid) -> Result<bool, HypervisorError> {
        Ok(self.saved.load(Ordering::Acquire))
    }

    fn start(&self, uuid: DomainUuid) -> Result<(), HypervisorError> {
        self.change(uuid, |info, _| info.state = VmState::Running);
        Ok(())
    }

    fn set_metadata(&self, _: DomainUuid, _: Option<&str>) -> Result<(), HypervisorError> {
        Ok(())
    }

    fn resume_after_io_error(&self, _: DomainUuid) -> Result<bool, HypervisorError> {
        Ok(false)
    }
}

/// A provider with one key.
#[derive(Default)]
pub(crate) struct Keys {
    /// So many questions are answered with "not now".
    pub(crate) missing: Mutex<u32>,
    pub(crate) asked: Mutex<u32>,
}

impl KeySource for Keys {
    fn kek(
        &self,
        provider_id: &ProviderId,
        kek: &KekId,
        _: &KeyPurpose,
        _: Duration,
    ) -> Result<Arc<Kek>, KeyMissing> {
        *self.asked.lock().unwrap() += 1;
        let mut missing = self.missing.lock().unwrap();
        if *missing > 0 || *provider_id != provider() || *kek != key().kek {
            *missing = missing.saturating_sub(1);
            return Err(KeyMissing {
                provider: provider_id.clone(),
                kek: kek.clone(),
                reason: "the server does not answer".into(),
                code: Code::ServerUnreachable,
                since_ms: 0,
            });
        }
        Ok(Arc::new(Kek::new(kek.clone(), SecretBytes::take_from(&mut [0x5e; 32]))))
    }
}

/// What was told.
#[derive(Default)]
pub(crate) struct Told(Mutex<Vec<TaskReport>>);

impl Told {
    pub(crate) fn all(&self) -> Vec<TaskReport> {
        self.0.lock().unwrap().clone()
    }

    pub(crate) fn last(&self, task: TaskId) -> TaskReport {
        self.all().into_iter().rev().find(|r| r.task == task).expect("something was told")
    }
}

impl TaskSink for Told {
    fn report(&self, report: TaskReport) {
        self.0.lock().unwrap().push(report);
    }
}

/// Crashes at the `n`-th place, counted from 0.
pub(crate) fn crash_at(n: usize) -> CrashAt {
    let seen = Mutex::new(0);
    Arc::new(move |_: &str| {
        let mut seen = seen.lock().unwrap();
        *seen += 1;
        // And at every later one: a dead process does nothing more.
        *seen > n
    })
}

/// Crashes at the place of that name.
pub(crate) fn crash_at_name(name: &str) -> CrashAt {
    let (name, dead) = (name.to_owned(), AtomicBool::new(false));
    Arc::new(move |place: &str| {
        if place == name {
            dead.store(true, Ordering::Release);
        }
        dead.load(Ordering::Acquire)
    })
}

/// Writes down every place that is reached, crashes nowhere.
pub(crate) fn listen() -> (CrashAt, Arc<Mutex<Vec<String>>>) {
    let places: Arc<Mutex<Vec<String>>> = Arc::default();
    let heard = places.clone();
    let listener: CrashAt = Arc::new(move |place: &str| {
        heard.lock().unwrap().push(place.to_owned());
        false
    });
    (listener, places)
}

pub(crate) fn length(path: &Path) -> u64 {
    File::open(path).unwrap().metadata().unwrap().len()
}
