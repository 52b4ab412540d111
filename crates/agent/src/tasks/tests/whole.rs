//! Whole tasks: what is there at their end.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
};

use vmseal_luks::{HEADER_BYTES, OwnerBlock, OwnerState};
use vmseal_model::{
    class::ClassChoice,
    id::TaskId,
    record::KeyRecord,
    refusal::Code,
    state::{InnerFormat, VmState},
    task::{SourceFate, TaskState},
};

use super::lab::*;
use crate::{
    domain_xml::{DiskSource, DomainXml},
    ports::{Definition, Hypervisor},
    tasks::{
        command::{TaskCommand, Work},
        context::CrashAt,
    },
    volume::{open_locked, token_record},
};

/// The definition, the store, the header and the file all say the same of an encrypted disk.
fn check_encrypted(lab: &Lab, target: &str, path: &str, format: InnerFormat) {
    let xml = lab.xml();
    let metadata = xml.metadata().unwrap().expect("metadata is there");
    let entry = metadata.disks.iter().find(|d| d.target == target).unwrap();
    let (vm, stored) = lab.store().disk(entry.disk).unwrap();
    assert_eq!((vm, metadata.domain), (metadata.vm, DOMAIN));
    assert_eq!(entry.source, format!("{path}.vmseal"));
    assert_eq!((entry.format, &entry.record, stored.retired), (format, &stored.record, false));
    let socket = format!("/run/vmseal/libvirt-{DOMAIN}/{target}.sock");
    let disk = xml.disk(target).unwrap();
    assert_eq!(disk.source, DiskSource::NbdUnix { socket, export: entry.disk.to_string() });
    assert_eq!(disk.format.as_deref(), Some(format.as_str()));
    assert_eq!(token_record(Path::new(&entry.source), None, entry.disk), Some(entry.record.clone()));
    let record = KeyRecord::decode(&entry.record).unwrap();
    assert_eq!(record.state.epoch, 1);
    assert_eq!(length(Path::new(&entry.source)), HEADER_BYTES + record.state.stored_bytes);
    let owner = OwnerBlock::read(&fs::File::open(&entry.source).unwrap()).unwrap();
    assert_eq!((owner.state, owner.generation > 0), (OwnerState::Free, true));
}

fn contains(path: &Path, needle: &[u8]) -> bool {
    fs::read(path).unwrap().windows(needle.len()).any(|w| w == needle)
}

#[test]
fn raw_and_qcow2_disks_are_encrypted_and_come_back_as_they_were() {
    let mut lab = Lab::new();
    // An odd size: not a whole number of sectors.
    let (raw, qcow2) = (lab.raw_image("data.img", 3_000_123), lab.qcow2_image("root.qcow2"));
    lab.define(&[("vda", &qcow2, "qcow2"), ("vdb", &raw, "raw")]);
    let (raw_before, qcow2_before) = (fs::read(&raw).unwrap(), sha256(Path::new(&qcow2)));
    let xml_before = lab.xml();

    let report = lab.run(encrypt(&[], SourceFate::Wipe));
    assert_eq!(report.state, TaskState::Succeeded, "{report:?}");
    assert!(report.message.contains("web01 encrypted: vda, vdb"), "{report:?}");
    assert_eq!((report.done_bytes, report.total_bytes > 7_000_000), (report.total_bytes, true));
    check_encrypted(&lab, "vda", &qcow2, InnerFormat::Qcow2);
    check_encrypted(&lab, "vdb", &raw, InnerFormat::Raw);
    assert_eq!(*lab.libvirt.defined.lock().unwrap(), 1, "one define for all disks");
    let names: Vec<_> = lab.files().into_keys().collect();
    assert_eq!(names, ["data.img.vmseal", "root.qcow2.vmseal"], "the clear images are gone");
    let needle = &raw_before[1_000_000..1_000_032];
    assert!(!contains(&lab.image("data.img.vmseal"), needle));

    let report = lab.run_as(TaskId::from_bytes([2; 16]), decrypt(&[], SourceFate::Wipe));
    assert_eq!(report.state, TaskState::Succeeded, "{report:?}");
    let names: Vec<_> = lab.files().into_keys().collect();
    assert_eq!(names, ["data.img", "root.qcow2"], "the old names were free");
    let raw_after = fs::read(&raw).unwrap();
    assert_eq!(&raw_after[..raw_before.len()], &raw_before[..]);
    assert_eq!(raw_after.len(), raw_before.len().next_multiple_of(512));
    assert!(raw_after[raw_before.len()..].iter().all(|b| *b == 0));
    // A whole number of sectors with qemu-img's own clusters: the very bytes.
    assert_eq!(sha256(Path::new(&qcow2)), qcow2_before);
    assert_eq!(lab.xml().metadata().unwrap(), None);
    assert_eq!(lab.xml().disk("vda").unwrap().source, DiskSource::File(qcow2));
    assert_eq!(lab.xml().disks().len(), xml_before.disks().len());
    assert!(lab.store().vms()[0].disks.iter().all(|d| d.retired), "records are kept, retired");
}

#[test]
fn one_disk_of_two_can_go_and_come_back() {
    let mut lab = Lab::new();
    let (a, b) = (lab.raw_image("a.img", 1 << 20), lab.raw_image("bb.img", 1 << 20));
    lab.define(&[("vda", &a, "raw"), ("vdb", &b, "raw")]);
    assert_eq!(lab.run(encrypt(&["vdb"], SourceFate::Keep)).state, TaskState::Succeeded);
    check_encrypted(&lab, "vdb", &b, InnerFormat::Raw);
    assert_eq!(lab.xml().disk("vda").unwrap().source, DiskSource::File(a.clone()));
    // The kept image is nobody's any more, and nobody else's to read.
    assert!(lab.files()["bb.img"].starts_with("100600 "));

    let second = lab.run_as(TaskId::from_bytes([3; 16]), encrypt(&[], SourceFate::Wipe));
    assert_eq!(second.state, TaskState::Succeeded, "{second:?}");
    let metadata = lab.xml().metadata().unwrap().unwrap();
    assert_eq!(metadata.disks.len(), 2);
    assert_eq!(lab.store().vms().len(), 1, "the same VM id");

    let back = lab.run_as(TaskId::from_bytes([4; 16]), decrypt(&["vdb"], SourceFate::Keep));
    assert_eq!(back.state, TaskState::Succeeded, "{back:?}");
    // The old name is taken by the image that was kept.
    let clear = format!("{b}.clear");
    assert_eq!(lab.xml().disk("vdb").unwrap().source, DiskSource::File(clear.clone()));
    assert_eq!(sha256(Path::new(&clear)), sha256(Path::new(&b)));
    assert!(lab.image("bb.img.vmseal").exists());
    check_encrypted(&lab, "vda", &a, InnerFormat::Raw);
}

#[test]
fn volume_opens_with_stock_cryptsetup_and_its_key() {
    let mut lab = Lab::new();
    let raw = lab.raw_image("a.img", 1 << 20);
    lab.define(&[("vda", &raw, "raw")]);
    assert_eq!(lab.run(encrypt(&[], SourceFate::Keep)).state, TaskState::Succeeded);
    let dump = Command::new("cryptsetup").arg("luksDump").arg(lab.image("a.img.vmseal")).output().unwrap();
    let text = String::from_utf8_lossy(&dump.stdout);
    assert!(text.contains("aes-xts-plain64") && text.contains("vmseal"), "{text}");
}

#[test]
fn new_disks_are_made_encrypted() {
    let mut lab = Lab::new();
    let raw = lab.raw_image("a.img", 1 << 20);
    lab.define(&[("vda", &raw, "raw")]);
    for (n, target, format, bytes) in
        [(1u8, "vdb", InnerFormat::Raw, (2u64 << 20) + 5), (2, "vdc", InnerFormat::Qcow2, 10 << 30)]
    {
        let path = lab.image(target).to_str().unwrap().to_owned();
        let work = Work::CreateDisk {
            domain: DOMAIN,
            target: target.into(),
            path: path.clone(),
            format,
            bytes,
            key: key(),
            class: ClassChoice::Auto,
            hosts: hosts(),
        };
        let report = lab.run_as(TaskId::from_bytes([n; 16]), work);
        assert_eq!(report.state, TaskState::Succeeded, "{report:?}");
        let metadata = lab.xml().metadata().unwrap().unwrap();
        let entry = metadata.disks.iter().find(|d| d.target == target).unwrap();
        assert_eq!((&entry.source, entry.format), (&path, format));
        let record = KeyRecord::decode(&entry.record).unwrap();
        match format {
            InnerFormat::Raw => assert_eq!(record.state.presented_bytes, bytes.next_multiple_of(512)),
            InnerFormat::Qcow2 => assert!(record.state.presented_bytes > 2 * bytes),
        }
    }
    assert_eq!(lab.files().len(), 3, "{:?}", lab.files());

    // Decrypted they are what was asked for.
    let back = lab.run_as(TaskId::from_bytes([9; 16]), decrypt(&[], SourceFate::Wipe));
    assert_eq!(back.state, TaskState::Succeeded, "{back:?}");
    let raw = lab.image("vdb.clear");
    assert!(fs::read(&raw).unwrap().iter().all(|b| *b == 0) && length(&raw) == (2 << 20) + 512);
    let info = Command::new("qemu-img")
        .args(["info", "--output", "json"])
        .arg(lab.image("vdc.clear"))
        .output()
        .unwrap();
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!((&info["format"], &info["virtual-size"]), (&"qcow2".into(), &(10u64 << 30).into()));
    qemu_img(&["check", "-q", lab.image("vdc.clear").to_str().unwrap()]);
}

#[test]
fn new_vm_has_no_clear_disk_when_it_is_defined() {
    let mut lab = Lab::new();
    let there = lab.qcow2_image("cloud.qcow2");
    let missing = lab.image("data.img").to_str().unwrap().to_owned();
    let xml = format!(
        "<domain type='kvm'><name>new</name><memory>1</memory><devices><disk type='file' device='disk'><driver \
         name='qemu' type='qcow2'/><source file='{there}'/><target dev='vda' bus='virtio'/></disk><disk type='file' \
         device='disk'><driver name='qemu' type='raw'/><source file='{missing}'/><target dev='vdb' bus='virtio'/></disk>\
         <disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk></devices></domain>"
    );
    let create = |sizes: &[(&str, u64)]| {
        let sizes = sizes.iter().map(|(t, b)| ((*t).to_owned(), *b)).collect();
        Work::CreateVm { xml: xml.clone(), key: key(), class: ClassChoice::Auto, hosts: hosts(), sizes }
    };
    let before = lab.files();
    let refused = lab.run_as(TaskId::from_bytes([1; 16]), create(&[]));
    assert_eq!(refused.code, Some(Code::NotFound));
    assert!(refused.hint.contains("--disk-size vdb=10G"), "{refused:?}");
    let refused = lab.run_as(TaskId::from_bytes([2; 16]), create(&[("vdz", 1)]));
    assert_eq!(refused.code, Some(Code::BadRequest), "{refused:?}");
    let refused = lab.run_as(TaskId::from_bytes([3; 16]), create(&[("vda", 1 << 20), ("vdb", 1 << 20)]));
    assert_eq!(refused.code, Some(Code::Exists), "{refused:?}");
    assert_eq!(lab.files(), before);

    let report = lab.run_as(TaskId::from_bytes([4; 16]), create(&[("vdb", 1 << 20)]));
    assert_eq!(report.state, TaskState::Succeeded, "{report:?}");
    assert!(report.message.contains("is kept"), "{report:?}");
    let info = lab.libvirt.domains().unwrap().into_iter().find(|d| d.name == "new").unwrap();
    let xml = DomainXml::parse(&lab.libvirt.xml(info.uuid, Definition::Persistent).unwrap()).unwrap();
    let metadata = xml.metadata().unwrap().unwrap();
    assert_eq!((metadata.domain, metadata.disks.len()), (info.uuid, 2));
    assert!(xml.disks().iter().all(|d| !matches!(d.source, DiskSource::File(_))));
    let twice = lab.run_as(TaskId::from_bytes([5; 16]), create(&[("vdb", 1 << 20)]));
    assert_eq!(twice.code, Some(Code::Exists), "{twice:?}");
}

#[test]
fn same_command_again_is_the_same_task() {
    let mut lab = Lab::new();
    let raw = lab.raw_image("a.img", 1 << 20);
    lab.define(&[("vda", &raw, "raw")]);
    let first = lab.run(encrypt(&[], SourceFate::Keep));
    let files = lab.files();
    let again = lab.run(encrypt(&[], SourceFate::Keep));
    assert_eq!((again.state, &again.message), (TaskState::Succeeded, &first.message));
    assert_eq!(lab.files(), files);
    assert_eq!(*lab.libvirt.defined.lock().unwrap(), 1);
    // A refusal is an answer too.
    let other = TaskId::from_bytes([3; 16]);
    assert_eq!(lab.run_as(other, encrypt(&[], SourceFate::Keep)).code, Some(Code::NothingToDo));
    lab.libvirt.put(DOMAIN, "web01", &[("vda", &raw, "raw")]);
    assert_eq!(lab.run_as(other, encrypt(&[], SourceFate::Keep)).code, Some(Code::NothingToDo));
}

#[test]
fn one_task_a_vm_and_the_vm_may_not_start_meanwhile() {
    let mut lab = Lab::new();
    let raw = lab.raw_image("a.img", 1 << 20);
    lab.define(&[("vda", &raw, "raw")]);
    // Held at a place until the test has looked.
    let (reached, gate) = (std::sync::mpsc::channel(), std::sync::mpsc::channel::<()>());
    let (tell, wait) = (std::sync::Mutex::new(reached.0), std::sync::Mutex::new(gate.1));
    let crash_at: crate::tasks::context::CrashAt = std::sync::Arc::new(move |place: &str| {
        if place == "encrypt:copied:begin" || place == "encrypt:source-gone:begin" {
            tell.lock().unwrap().send(()).unwrap();
            wait.lock().unwrap().recv().unwrap();
        }
        false
    });
    let told = lab.told.clone();
    let runner = lab.start(Some(crash_at));
    runner.submit(TaskCommand { task: TASK, work: encrypt(&[], SourceFate::Wipe) });
    reached.1.recv().unwrap();
    assert!(runner.busy(DOMAIN));
    let other = TaskId::from_bytes([3; 16]);
    runner.submit(TaskCommand { task: other, work: decrypt(&[], SourceFate::Wipe) });
    let refused = told.last(other);
    assert_eq!(refused.code, Some(Code::TaskRunning));
    assert!(refused.hint.contains(&format!("vmseal task cancel {TASK}")));
    gate.0.send(()).unwrap();
    reached.1.recv().unwrap();
    assert!(!runner.busy(DOMAIN), "after the switch it may start while the old image is wiped");
    gate.0.send(()).unwrap();
    runner.wait();
    assert_eq!(told.last(TASK).state, TaskState::Succeeded);
    assert!(!runner.busy(DOMAIN));
}

#[test]
fn image_is_locked_against_qemu_while_it_is_encrypted() {
    let mut lab = Lab::new();
    let raw = lab.raw_image("a.img", 1 << 20);
    lab.define(&[("vda", &raw, "raw")]);
    let (image, volume) = (raw.clone(), format!("{raw}.vmseal"));
    let opened = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = opened.clone();
    let look: crate::tasks::context::CrashAt = std::sync::Arc::new(move |place: &str| {
        if place == "encrypt:switched:before" {
            for path in [&image, &volume] {
                let convert = ["convert", "-f", "raw", "-O", "raw", path, "/dev/null"];
                let done = Command::new("qemu-img").args(convert).output().unwrap();
                seen.lock().unwrap().push(done.status.success());
            }
        }
        false
    });
    let runner = lab.start(Some(look));
    runner.submit(TaskCommand { task: TASK, work: encrypt(&[], SourceFate::Keep) });
    runner.wait();
    assert_eq!(*opened.lock().unwrap(), [false, false]);
    qemu_img(&["convert", "-f", "raw", "-O", "raw", &raw, lab.image("copy").to_str().unwrap()]);
}

#[test]
fn records_swapped_between_disks_or_vms_open_nothing() {
    let mut lab = Lab::new();
    let (a, b) = (lab.raw_image("a.img", 1 << 20), lab.raw_image("bb.img", 1 << 20));
    lab.define(&[("vda", &a, "raw"), ("vdb", &b, "raw")]);
    assert_eq!(lab.run(encrypt(&[], SourceFate::Wipe)).state, TaskState::Succeeded);
    let (good, files) = (lab.xml(), lab.files());
    let mut metadata = good.metadata().unwrap().unwrap();
    let (vm, other) = (metadata.vm, vmseal_model::id::VmId::from_bytes([0x0f; 16]));
    // Everything is moved: store, headers, metadata agree on the wrong pairing.
    let (first, second) = (metadata.disks[0].record.clone(), metadata.disks[1].record.clone());
    metadata.disks[0].record = second.clone();
    metadata.disks[1].record = first.clone();
    let mut xml = good.clone();
    xml.set_metadata(&metadata);
    lab.libvirt.change(DOMAIN, |_, kept| *kept = xml.to_xml());
    let store = lab.store();
    for disk in &metadata.disks {
        let (_, stored) = store.disk(disk.disk).unwrap();
        store
            .put_disk(vm, DOMAIN, crate::store::StoredDisk { record: disk.record.clone(), ..stored })
            .unwrap();
    }
    // The headers still have the right ones: those count, the swapped ones are passed over.
    let report = lab.run_as(TaskId::from_bytes([1; 16]), decrypt(&["vda"], SourceFate::Keep));
    assert_eq!(report.state, TaskState::Succeeded, "{report:?}");
    fs::remove_file(lab.image("a.img")).unwrap();
    lab.libvirt.change(DOMAIN, |_, kept| *kept = xml.to_xml());
    // No right copy anywhere: refused.
    for (disk, record) in metadata.disks.iter().zip([&second, &first]) {
        overwrite_token(&disk.source, record);
        let (_, stored) = lab.store().disk(disk.disk).unwrap();
        lab.store()
            .put_disk(vm, DOMAIN, crate::store::StoredDisk { record: record.clone(), ..stored })
            .unwrap();
    }
    for (n, target) in [(2, "vda"), (3, "vdb")] {
        let report = lab.run_as(TaskId::from_bytes([n; 16]), decrypt(&[target], SourceFate::Keep));
        assert_eq!((report.state, report.code), (TaskState::Failed, Some(Code::Integrity)), "{report:?}");
    }
    // The same disk under another VM.
    let mut moved = good.metadata().unwrap().unwrap();
    moved.vm = other;
    let mut xml = good.clone();
    xml.set_metadata(&moved);
    lab.libvirt.change(DOMAIN, |_, kept| *kept = xml.to_xml());
    let report = lab.run_as(TaskId::from_bytes([4; 16]), decrypt(&["vda"], SourceFate::Keep));
    assert_eq!(report.code, Some(Code::UnknownVm), "{report:?}");
    assert_eq!(lab.files().len(), files.len());
}

fn overwrite_token(path: &str, record: &[u8]) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let token = vmseal_luks::VmsealToken { records: vec![record.to_vec()] };
    vmseal_luks::Header::write_token(&file, false, &token).unwrap();
}

#[test]
fn record_older_than_one_seen_before_is_refused() {
    let mut lab = Lab::new();
    let a = lab.raw_image("a.img", 1 << 20);
    lab.define(&[("vda", &a, "raw")]);
    assert_eq!(lab.run(encrypt(&[], SourceFate::Wipe)).state, TaskState::Succeeded);
    let store = lab.store();
    let (vm, stored) = store.disk(lab.xml().metadata().unwrap().unwrap().disks[0].disk).unwrap();
    // The store has seen epoch 5, and its own copy of it is damaged.
    let damaged = crate::store::StoredDisk { epoch: 5, record: vec![1, 2, 3], ..stored };
    store.put_disk(vm, DOMAIN, damaged).unwrap();
    let report = lab.run_as(TaskId::from_bytes([2; 16]), decrypt(&[], SourceFate::Wipe));
    assert_eq!(report.code, Some(Code::EpochTooOld), "{report:?}");
    assert_eq!(lab.files().into_keys().collect::<Vec<_>>(), ["a.img.vmseal"]);
}

#[test]
fn clear_image_in_use_again_is_not_wiped() {
    let mut lab = Lab::new();
    let a = lab.raw_image("a.img", 1 << 20);
    lab.define(&[("vda", &a, "raw")]);
    let (libvirt, path) = (lab.libvirt.clone(), a.clone());
    let meanwhile: crate::tasks::context::CrashAt = std::sync::Arc::new(move |place: &str| {
        if place == "encrypt:source-gone:begin" {
            libvirt.put(vmseal_model::id::DomainUuid::from_bytes([3; 16]), "other", &[("vda", &path, "raw")]);
        }
        false
    });
    let before = sha256(Path::new(&a));
    let runner = lab.start(Some(meanwhile));
    runner.submit(TaskCommand { task: TASK, work: encrypt(&[], SourceFate::Wipe) });
    runner.wait();
    let report = lab.told.last(TASK);
    assert_eq!(report.state, TaskState::Succeeded);
    assert!(report.message.contains("still there") && report.message.contains("other"), "{report:?}");
    assert_eq!(sha256(Path::new(&a)), before);
}

#[test]
fn start_and_second_opening_see_the_same_volume() {
    let mut lab = Lab::new();
    let a = lab.raw_image("a.img", 1 << 20);
    lab.define(&[("vda", &a, "raw")]);
    assert_eq!(lab.run(encrypt(&[], SourceFate::Wipe)).state, TaskState::Succeeded);
    let disk = &lab.xml().metadata().unwrap().unwrap().disks[0];
    let record = KeyRecord::decode(&disk.record).unwrap();
    let kek = vmseal_keys::Kek::new(key().kek, vmseal_keys::SecretBytes::take_from(&mut [0x5e; 32]));
    let opened = vmseal_keys::open_disk(&record, None, Some(disk.disk), &kek, &key().provider).unwrap();
    let open = || open_locked(Path::new(&disk.source), None, &record, &opened.payload, "vda", 0, false);
    let held = open().unwrap();
    assert_eq!(open().unwrap_err().code(), Code::VolumeInUse);
    // Started by hand behind our back: the task is refused, nothing is changed.
    let report = lab.run_as(TaskId::from_bytes([2; 16]), decrypt(&[], SourceFate::Wipe));
    assert_eq!(report.code, Some(Code::VolumeInUse), "{report:?}");
    drop(held);
    lab.libvirt.change(DOMAIN, |info, _| info.state = VmState::Running);
    let report = lab.run_as(TaskId::from_bytes([3; 16]), decrypt(&[], SourceFate::Wipe));
    assert_eq!((report.code, report.hint.as_str()), (Some(Code::VmRunning), "virsh shutdown web01"));
}

#[test]
fn empty_image_is_made_where_only_the_agent_writes() {
    let mut lab = Lab::new();
    lab.define(&[]);
    let images = lab.scratch.path().join("images");
    let journals = crate::journal::directory(&lab.scratch.path().join("state"));
    let seen: Arc<Mutex<Vec<(bool, bool)>>> = Arc::default();
    let (heard, beside) = (seen.clone(), journals.clone());
    let any = |dir: &Path| {
        let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        names.into_iter().any(|name| name.ends_with(".empty"))
    };
    let listener: CrashAt = Arc::new(move |place: &str| {
        if place == "create-disk:copied:before" {
            heard.lock().unwrap().push((any(&images), any(&beside)));
        }
        false
    });
    let (path, bytes) = (lab.image("new.vmseal").to_str().unwrap().to_owned(), 1 << 30);
    let runner = lab.start(Some(listener));
    let (target, format) = ("vdb".into(), InnerFormat::Qcow2);
    runner.submit(TaskCommand {
        task: TASK,
        work: Work::CreateDisk {
            domain: DOMAIN,
            target,
            path,
            format,
            bytes,
            key: key(),
            class: ClassChoice::Auto,
            hosts: hosts(),
        },
    });
    runner.wait();
    assert_eq!(lab.told.last(TASK).state, TaskState::Succeeded);
    assert_eq!(*seen.lock().unwrap(), [(false, true)]);
    assert!(!any(&journals), "it is gone at the end");
}
