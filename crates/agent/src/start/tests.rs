//! Refusals with real volumes and records. The disk program is one that ends at once, so the furthest a start gets
//! here is that failure; whole starts are tried with a guest.

use std::{fs, path::PathBuf, sync::mpsc};

use vmseal_keys::{NewDiskRecord, SecretBytes, restate, seal_disk};
use vmseal_luks::HEADER_BYTES;
use vmseal_model::{
    class::DiskClass,
    id::{DomainUuid, RecordId, VmId},
    record::{HeaderKind, RecipientKind, RecordState, UnitBytes},
    state::InnerFormat,
};

use super::*;
use crate::{
    new_volume::{Ownership, create_exclusive, fill},
    scratch::Scratch,
    volume::open_locked,
};

const DOMAIN: DomainUuid = DomainUuid::from_bytes([1; 16]);
const VM: VmId = VmId::from_bytes([3; 16]);
const DISK: DiskId = DiskId::from_bytes([4; 16]);

/// Gives its key, or none.
struct Keys(Option<Arc<Kek>>);

impl KeySource for Keys {
    fn kek(
        &self,
        provider: &ProviderId,
        kek: &KekId,
        _: &KeyPurpose,
        _: Duration,
    ) -> Result<Arc<Kek>, KeyMissing> {
        self.0.clone().ok_or_else(|| KeyMissing {
            provider: provider.clone(),
            kek: kek.clone(),
            reason: "deactivated".into(),
            code: Code::KeyMissing,
            since_ms: 7,
        })
    }
}

struct Lab {
    scratch: Scratch,
    starter: Starter,
    record: KeyRecord,
    dek: Dek,
}

impl Lab {
    fn new(has_key: bool) -> Self {
        let scratch = Scratch::new();
        let kek = Kek::new(KekId::from_bytes(b"17".to_vec()).unwrap(), SecretBytes::random().unwrap());
        let dek = Dek::generate().unwrap();
        let new = NewDiskRecord {
            record: RecordId::from_bytes([5; 16]),
            vm: VM,
            disk: DISK,
            header: HeaderKind::Attached,
            unit: UnitBytes::B512,
            payload_offset: HEADER_BYTES,
            created_ms: 1,
            state: RecordState { epoch: 2, stored_bytes: 1 << 20, presented_bytes: 1 << 20 },
        };
        let record = seal_disk(&new, &dek, &kek, RecipientKind::Kek, &"main".parse().unwrap()).unwrap();
        let file = create_exclusive(&scratch.path().join("web01.vmseal"), Ownership::default()).unwrap();
        fill(&file, &dek, &record).unwrap();
        drop(file);

        let program = scratch.path().join("vmseal-disk");
        fs::write(&program, "#!/bin/sh\nexit 2\n").unwrap();
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(scratch.path().join("pids")).unwrap();
        let config = Arc::new(AgentConfig {
            run_dir: scratch.path().join("run"),
            libvirt_run_dir: scratch.path().join("pids"),
            log_dir: scratch.path().join("log"),
            disk_binary: Some(program),
            disk_user: String::new(),
            ..AgentConfig::default()
        });
        let uplink = Arc::new(Uplink::new("no server"));
        let (lost, _) = mpsc::channel();
        let starter = Starter {
            store: Arc::new(Store::open(scratch.path()).unwrap()),
            keys: Arc::new(Keys(has_key.then(|| Arc::new(kek)))),
            floors: Arc::new(Floors::new(Arc::clone(&uplink))),
            backends: Arc::new(Backends::new(Arc::clone(&config), lost)),
            host: Box::new(|| None),
            config,
            uplink,
        };
        Self { scratch, starter, record, dek }
    }

    fn volume(&self) -> PathBuf {
        self.scratch.path().join("web01.vmseal")
    }

    fn store(&self, record: &KeyRecord) {
        let disk = StoredDisk {
            target: "vda".into(),
            disk: DISK,
            source: self.volume().to_str().unwrap().into(),
            header: None,
            format: InnerFormat::Raw,
            class: DiskClass::Compatible,
            record: record.encode(),
            epoch: record.state.epoch,
            epoch_unverified: false,
            retired: false,
        };
        self.starter.store.put_disk(VM, DOMAIN, disk).unwrap();
    }

    fn prepare(&self) -> Result<Option<Plan>, NoStart> {
        let socket = self.starter.config.disk_socket(DOMAIN, "vda");
        let xml = format!(
            "<domain><name>web01</name><uuid>{DOMAIN}</uuid><devices><disk type='network' device='disk'>\
             <source protocol='nbd' name='{DISK}'><host transport='unix' socket='{}'/></source>\
             <target dev='vda'/></disk></devices></domain>",
            socket.display()
        );
        self.starter.prepare(&DomainXml::parse(&xml).unwrap(), Instant::now() + Duration::from_secs(60))
    }

    fn refusal(&self) -> Refusal {
        match self.prepare() {
            Err(NoStart::Refused(refusal)) => refusal,
            other => panic!("a refusal, not {other:?}"),
        }
    }
}

#[test]
fn clear_vm_is_none_of_ours() {
    let lab = Lab::new(true);
    let xml = DomainXml::parse("<domain><name>a</name></domain>").unwrap();
    assert_eq!(lab.starter.prepare(&xml, Instant::now()), Ok(None));
}

#[test]
fn missing_key_locks_the_vm_in_one_line_with_key_and_provider() {
    let lab = Lab::new(false);
    lab.store(&lab.record);
    let locked = lab.prepare().unwrap_err();
    let line = locked.line("web01");
    for part in ["web01", "key 17", "provider main", "deactivated", "vmseal vm show web01"] {
        assert!(line.contains(part), "{line}");
    }
    assert!(!line.contains('\n'));
    assert!(!lab.starter.config.vm_dir(DOMAIN).exists());
}

#[test]
fn process_that_fails_leaves_no_socket_and_no_lock() {
    let lab = Lab::new(true);
    lab.store(&lab.record);
    let refusal = lab.refusal();
    assert_eq!(refusal.code, Code::HostNotReady);
    assert!(refusal.message.contains("disk-01010101"), "{refusal:?}");
    assert!(!lab.starter.config.vm_dir(DOMAIN).exists());
    let open = || open_locked(&lab.volume(), None, &lab.record, &lab.dek, "vda", 0, false);
    // A child of another test may have a copy of the lock for a moment.
    let until = Instant::now() + Duration::from_secs(20);
    while let Err(error) = open() {
        assert!(error.code() == Code::VolumeInUse && Instant::now() < until, "{error}");
        thread::yield_now();
    }
}

#[test]
fn volume_in_use_is_refused_as_such() {
    let lab = Lab::new(true);
    lab.store(&lab.record);
    let _held = open_locked(&lab.volume(), None, &lab.record, &lab.dek, "vda", 0, false).unwrap();
    let refusal = lab.refusal();
    assert_eq!(refusal.code, Code::VolumeInUse);
    assert!(refusal.message.starts_with("disk vda: "), "{refusal:?}");
}

#[test]
fn truncated_volume_is_refused_as_such() {
    let lab = Lab::new(true);
    lab.store(&lab.record);
    let file = fs::OpenOptions::new().write(true).open(lab.volume()).unwrap();
    file.set_len(HEADER_BYTES + 4096).unwrap();
    let refusal = lab.refusal();
    assert!(refusal.message.contains("truncated"), "{refusal:?}");
}

#[test]
fn volume_rolled_back_to_an_old_record_is_refused_when_nothing_newer_is_left() {
    let lab = Lab::new(true);
    let newer = RecordState { epoch: 3, ..lab.record.state };
    let mut newer = restate(&lab.record, lab.dek.payload(), newer).unwrap();
    newer.mac[0] ^= 1;
    lab.store(&newer);
    let refusal = lab.refusal();
    assert!(matches!(refusal.code, Code::Integrity | Code::EpochTooOld), "{refusal:?}");
    assert!(!lab.starter.config.vm_dir(DOMAIN).exists());
}
