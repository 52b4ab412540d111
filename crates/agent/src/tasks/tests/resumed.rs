//! What the next run of the agent does to a VM whose definition may have been switched when the last one died.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use vmseal_model::{
    class::DiskClass,
    id::TaskId,
    refusal::Code,
    state::{InnerFormat, VmState},
    task::{SourceFate, TaskState},
};

use super::lab::*;
use crate::{
    domain_xml::EncryptedSource,
    lock::{Claim, claim},
    ports::{Definition, Hypervisor, TaskReport},
    tasks::{
        command::{TaskCommand, Work},
        context::{Control, CrashAt},
    },
};

const SIZE: usize = 100_000;

fn encrypting() -> (Lab, Work) {
    let lab = Lab::new();
    let raw = lab.raw_image("a.img", SIZE);
    lab.define(&[("vda", &raw, "raw")]);
    (lab, encrypt(&[], SourceFate::Wipe))
}

fn decrypting() -> (Lab, Work) {
    let (mut lab, work) = encrypting();
    assert_eq!(lab.run_as(TaskId::from_bytes([1; 16]), work).state, TaskState::Succeeded);
    (lab, decrypt(&[], SourceFate::Wipe))
}

fn run_with(lab: &mut Lab, work: Work, crash_at: CrashAt) {
    let runner = lab.start(Some(crash_at));
    runner.submit(TaskCommand { task: TASK, work });
    runner.wait();
}

/// The domain names the new files, and the journal does not say so.
fn died_at_the_switch((mut lab, work): (Lab, Work)) -> Lab {
    let word = if matches!(work, Work::DecryptVm { .. }) { "decrypt" } else { "encrypt" };
    run_with(&mut lab, work, crash_at_name(&format!("{word}:switched:before")));
    assert_eq!(*lab.libvirt.defined.lock().unwrap(), if word == "decrypt" { 2 } else { 1 });
    lab
}

/// The next run of the agent, whose task is cancelled before it reaches any place.
fn resume_cancelled(lab: &mut Lab) -> TaskReport {
    let cancelled = Arc::new((Mutex::new(false), Condvar::new()));
    let gate = Arc::clone(&cancelled);
    let runner = lab.start(Some(Arc::new(move |_: &str| {
        let held = gate.0.lock().unwrap();
        drop(gate.1.wait_while(held, |cancelled| !*cancelled).unwrap());
        false
    })));
    runner.resume_all();
    runner.cancel(TASK);
    *cancelled.0.lock().unwrap() = true;
    cancelled.1.notify_all();
    runner.wait();
    lab.told.last(TASK)
}

/// The next run of the agent, cancelled, until it has said something that fits.
fn resume_until(lab: &mut Lab, fits: impl Fn(&TaskReport) -> bool) {
    let told = lab.told.clone();
    let runner = lab.start(None);
    runner.resume_all();
    runner.cancel(TASK);
    let until = Instant::now() + Duration::from_secs(20);
    while !told.all().iter().any(&fits) {
        assert!(Instant::now() < until, "{:?}", told.all());
        std::thread::yield_now();
    }
}

/// The clear VM boots without asking anybody, and its guest writes.
fn boot_and_write(lab: &Lab) -> Vec<u8> {
    let image = lab.image("a.img");
    lab.libvirt.change(DOMAIN, |info, _| info.state = VmState::Running);
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(b"what the guest wrote", 4096).unwrap();
    fs::read(&image).unwrap()
}

#[test]
fn running_clear_vm_keeps_its_file_though_its_task_is_cancelled() {
    let mut lab = died_at_the_switch(decrypting());
    let written = boot_and_write(&lab);
    *lab.keys.missing.lock().unwrap() = u32::MAX;
    let end = resume_cancelled(&mut lab);
    assert_eq!(end.state, TaskState::Succeeded, "{end:?}");
    assert!(fs::read(lab.image("a.img")).unwrap() == written);
    assert_eq!(lab.files().into_keys().collect::<Vec<_>>(), ["a.img"]);
}

#[test]
fn clear_vm_keeps_its_file_though_the_old_volume_was_removed() {
    let mut lab = died_at_the_switch(decrypting());
    let written = boot_and_write(&lab);
    fs::remove_file(lab.image("a.img.vmseal")).unwrap();
    let end = lab.resume();
    assert_eq!(end.state, TaskState::Succeeded, "{end:?}");
    assert!(fs::read(lab.image("a.img")).unwrap() == written);
}

#[test]
fn encrypted_vm_keeps_its_volume_whatever_became_of_the_image_and_the_task() {
    type Meddle = fn(&Lab);
    let cases: [Meddle; 3] = [
        |lab| fs::remove_file(lab.image("a.img")).unwrap(),
        |lab| {
            let file = File::options().write(true).open(lab.image("a.img")).unwrap();
            file.write_all_at(b"later", 0).unwrap();
        },
        |_| {},
    ];
    for meddle in cases {
        let mut lab = died_at_the_switch(encrypting());
        meddle(&lab);
        let end = resume_cancelled(&mut lab);
        assert_eq!(end.state, TaskState::Succeeded, "{end:?}");
        assert!(lab.store().vms()[0].disks.iter().all(|d| !d.retired));
        let back = lab.run_as(TaskId::from_bytes([2; 16]), decrypt(&[], SourceFate::Wipe));
        assert_eq!(back.state, TaskState::Succeeded, "{back:?}");
        assert!(fs::read(lab.image("a.img")).unwrap()[..SIZE] == noise(SIZE, 5)[..]);
    }
}

#[test]
fn nothing_is_undone_while_libvirt_cannot_be_asked() {
    for make in [&encrypting as &dyn Fn() -> (Lab, Work), &decrypting] {
        let mut lab = died_at_the_switch(make());
        let files = lab.files();
        lab.libvirt.away.store(true, Ordering::Release);
        resume_until(&mut lab, |report| report.code == Some(Code::HostNotReady));
        assert_eq!((lab.told.last(TASK).state, lab.files()), (TaskState::Waiting, files));
        lab.libvirt.away.store(false, Ordering::Release);
        lab.runner.as_ref().unwrap().wait();
        let end = lab.told.last(TASK);
        assert_eq!(end.state, TaskState::Succeeded, "{end:?}");
        assert_eq!(lab.files().len(), 1);
    }
}

#[test]
fn define_whose_answer_was_lost_is_looked_for_by_the_next_run() {
    for make in [&encrypting as &dyn Fn() -> (Lab, Work), &decrypting] {
        let (mut lab, work) = make();
        lab.libvirt.defines.lock().unwrap().push_back(Trouble::DiesAfter);
        let told = lab.told.clone();
        lab.start(None).submit(TaskCommand { task: TASK, work });
        let until = Instant::now() + Duration::from_secs(20);
        while !told.all().iter().any(|report| report.code == Some(Code::HostNotReady)) {
            assert!(Instant::now() < until, "{:?}", told.all());
            std::thread::yield_now();
        }
        lab.runner = None;
        lab.libvirt.away.store(false, Ordering::Release);
        *lab.keys.missing.lock().unwrap() = u32::MAX;
        let end = resume_cancelled(&mut lab);
        assert_eq!(end.state, TaskState::Succeeded, "{end:?}");
        assert_eq!(lab.files().len(), 1);
    }
}

#[test]
fn definition_that_cannot_be_switched_wholly_is_not_undone_either() {
    // Both disks were switched, then one was put back by hand.
    let lab = Lab::new();
    let (a, b) = (lab.raw_image("a.img", SIZE), lab.raw_image("bb.img", SIZE));
    lab.define(&[("vda", &a, "raw"), ("vdb", &b, "raw")]);
    let before = lab.libvirt.xml(DOMAIN, Definition::Persistent).unwrap();
    let mut lab = died_at_the_switch((lab, encrypt(&[], SourceFate::Wipe)));
    let (files, switched) = (lab.files(), lab.libvirt.xml(DOMAIN, Definition::Persistent).unwrap());
    let mut half = lab.xml();
    half.clear_disk("vdb", lab.store().vms()[0].disks[1].disk, "/elsewhere.img", InnerFormat::Raw).unwrap();
    lab.libvirt.change(DOMAIN, |_, xml| *xml = half.to_xml());
    resume_until(&mut lab, |report| report.code == Some(Code::Conflict));
    assert_eq!((lab.told.last(TASK).state, lab.files()), (TaskState::Waiting, files.clone()));
    lab.runner = None;
    // What a running VM uses counts as much.
    lab.libvirt.change(DOMAIN, |info, xml| (info.state, *xml) = (VmState::Running, before.clone()));
    lab.libvirt.live.lock().unwrap().insert(DOMAIN, switched);
    resume_until(&mut lab, |report| report.code == Some(Code::VmRunning));
    lab.runner = None;
    assert_eq!(lab.files().len(), files.len());
    lab.libvirt.live.lock().unwrap().clear();
    lab.libvirt.change(DOMAIN, |info, xml| (info.state, *xml) = (VmState::Off, before));
    let end = resume_cancelled(&mut lab);
    assert_eq!(end.state, TaskState::Cancelled, "{end:?}");
    assert_eq!(lab.files().into_keys().collect::<Vec<_>>(), ["a.img", "bb.img"]);
}

#[test]
fn clear_file_below_a_snapshot_is_not_undone() {
    let mut lab = died_at_the_switch(decrypting());
    let (base, top) = (lab.image("a.img"), lab.image("a.snap1"));
    let (base, top) = (base.to_str().unwrap(), top.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top]);
    lab.define(&[("vda", top, "qcow2")]);
    let before = fs::read(base).unwrap();
    resume_until(&mut lab, |report| report.code == Some(Code::ImageShared));
    assert_eq!(lab.told.last(TASK).state, TaskState::Waiting);
    assert!(fs::read(base).unwrap() == before);
}

#[test]
fn file_of_an_undefined_vm_that_had_booted_is_left() {
    let mut lab = died_at_the_switch(decrypting());
    let written = boot_and_write(&lab);
    lab.libvirt.undefine(DOMAIN);
    let end = resume_cancelled(&mut lab);
    assert_eq!(end.state, TaskState::Cancelled, "{end:?}");
    assert!(end.message.contains("written to since") && end.message.contains("shred -u"), "{end:?}");
    assert!(fs::read(lab.image("a.img")).unwrap() == written);
    // One that had not is only a copy.
    let mut lab = died_at_the_switch(decrypting());
    lab.libvirt.undefine(DOMAIN);
    assert_eq!(resume_cancelled(&mut lab).state, TaskState::Cancelled);
    assert_eq!(lab.files().into_keys().collect::<Vec<_>>(), ["a.img.vmseal"]);
}

#[test]
fn volume_that_became_the_only_copy_is_left() {
    let (mut lab, work) = encrypting();
    run_with(&mut lab, work, crash_at_name("encrypt:verified:after"));
    fs::remove_file(lab.image("a.img")).unwrap();
    let end = lab.resume();
    assert_eq!((end.state, end.code), (TaskState::Failed, Some(Code::NotFound)), "{end:?}");
    assert!(end.message.contains("a.img.vmseal"), "{end:?}");
    assert_eq!(lab.files().into_keys().collect::<Vec<_>>(), ["a.img.vmseal"]);
    assert!(lab.store().vms()[0].disks.iter().all(|d| !d.retired));
}

/// Cancels at one place, dies at another if told to, and does something at it.
fn going_back(
    lab: &mut Lab,
    work: Work,
    cancel_at: &str,
    then: impl Fn(&str) -> bool + Send + Sync + 'static,
) {
    let control: Arc<Mutex<Option<Arc<Control>>>> = Arc::default();
    let (asked, cancel_at) = (control.clone(), cancel_at.to_owned());
    let runner = lab.start(Some(Arc::new(move |place: &str| {
        if place == cancel_at {
            asked.lock().unwrap().as_ref().expect("it was submitted").cancel();
        }
        then(place)
    })));
    let held = control.lock();
    runner.submit(TaskCommand { task: TASK, work });
    let found = runner.lock()[&TASK].control.clone();
    *held.unwrap() = Some(found);
    runner.wait();
}

#[test]
fn going_back_stops_at_files_that_the_definition_names() {
    for (make, word) in [(&encrypting as &dyn Fn() -> (Lab, Work), "encrypt"), (&decrypting, "decrypt")] {
        let (mut lab, work) = make();
        let dead = AtomicBool::new(false);
        going_back(&mut lab, work, &format!("{word}:verified:after"), move |place| {
            dead.fetch_or(place.ends_with("rolling-back:written"), Ordering::AcqRel)
                || place.ends_with("rolling-back:written")
        });
        let files = lab.files();
        // As if it had been defined after all: by hand, or by a libvirt that was slow.
        let mut named = lab.xml();
        if word == "decrypt" {
            named
                .clear_disk(
                    "vda",
                    lab.store().vms()[0].disks[0].disk,
                    lab.image("a.img").to_str().unwrap(),
                    InnerFormat::Raw,
                )
                .unwrap();
        } else {
            let disk = lab.store().vms()[0].disks[0].disk;
            let source = EncryptedSource {
                disk,
                format: InnerFormat::Raw,
                socket: "/x".into(),
                class: DiskClass::Compatible,
            };
            named.encrypt_disk("vda", &source).unwrap();
        }
        lab.libvirt.change(DOMAIN, |_, xml| *xml = named.to_xml());
        lab.libvirt.away.store(true, Ordering::Release);
        resume_until(&mut lab, |report| report.code == Some(Code::HostNotReady));
        assert_eq!(lab.files(), files);
        lab.libvirt.away.store(false, Ordering::Release);
        lab.runner.as_ref().unwrap().wait();
        let end = lab.told.last(TASK);
        assert_eq!(end.state, TaskState::Cancelled, "{end:?}");
        assert!(end.message.contains("web01 names the new disks already: nothing was deleted"), "{end:?}");
        assert_eq!(lab.files(), files);
        assert!(lab.store().vms()[0].disks.iter().all(|d| !d.retired));
    }
}

#[test]
fn clear_file_that_somebody_has_open_is_not_overwritten_when_going_back() {
    let (mut lab, work) = decrypting();
    let image = lab.image("a.img");
    let user: Arc<Mutex<Option<File>>> = Arc::default();
    let (path, opened) = (image.clone(), user.clone());
    going_back(&mut lab, work, "decrypt:verified:after", move |place| {
        if place == "decrypt:rolling-back:written" {
            let file = File::options().read(true).write(true).open(&path).unwrap();
            claim(&file, Claim::Source).unwrap();
            *opened.lock().unwrap() = Some(file);
        }
        false
    });
    let end = lab.told.last(TASK);
    assert_eq!(end.state, TaskState::Cancelled, "{end:?}");
    assert!(user.lock().unwrap().is_some());
    assert!(end.message.contains("not undone: the clear file") && end.message.contains("in use"), "{end:?}");
    assert!(end.message.contains(&format!("shred -u {}", image.display())), "{end:?}");
    assert!(fs::read(image).unwrap()[..SIZE] == noise(SIZE, 5)[..]);
}

#[test]
fn clear_image_that_somebody_has_open_is_not_overwritten_after_the_switch() {
    let (mut lab, work) = encrypting();
    run_with(&mut lab, work, crash_at_name("encrypt:switched:after"));
    let image = lab.image("a.img");
    let user = File::options().read(true).write(true).open(&image).unwrap();
    claim(&user, Claim::Source).unwrap();
    let end = lab.resume();
    assert_eq!(end.state, TaskState::Succeeded, "{end:?}");
    assert!(end.message.contains("is still there") && end.message.contains("in use"), "{end:?}");
    assert!(end.message.contains(&format!("shred -u {}", image.display())), "{end:?}");
    assert!(fs::read(image).unwrap() == noise(SIZE, 5));
}

#[test]
fn volume_that_somebody_has_open_is_not_made_useless_after_the_switch() {
    let (mut lab, work) = decrypting();
    run_with(&mut lab, work, crash_at_name("decrypt:switched:after"));
    let volume = lab.image("a.img.vmseal");
    let (before, user) =
        (fs::read(&volume).unwrap(), File::options().read(true).write(true).open(&volume).unwrap());
    claim(&user, Claim::Volume).unwrap();
    let end = lab.resume();
    assert_eq!(end.state, TaskState::Succeeded, "{end:?}");
    assert!(end.message.contains("is still there") && end.message.contains("rm "), "{end:?}");
    assert!(fs::read(volume).unwrap() == before);
}
