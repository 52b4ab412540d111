//! The agent dies at every place there is, and the next one finishes or undoes what it finds.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use vmseal_model::{
    class::ClassChoice,
    id::{DomainUuid, TaskId},
    refusal::Code,
    state::{InnerFormat, VmState},
    task::{SourceFate, TaskState},
};

use super::lab::*;
use crate::{
    domain_xml::DiskSource,
    ports::Hypervisor,
    tasks::{
        command::{TaskCommand, Work},
        context::CrashAt,
    },
};

const SIZE: usize = 300_001;
const CHECK: TaskId = TaskId::from_bytes([0xcc; 16]);

/// Places of one kind of task, in order, from a run without a crash.
fn places(make: &dyn Fn() -> (Lab, Work)) -> Vec<String> {
    let (mut lab, work) = make();
    let (listener, places) = listen();
    let runner = lab.start(Some(listener));
    runner.submit(TaskCommand { task: TASK, work });
    runner.wait();
    let end = lab.told.last(TASK);
    assert_eq!(end.state, TaskState::Succeeded, "{end:?}");
    let places = places.lock().unwrap().clone();
    assert!(places.len() > 20, "{places:?}");
    places
}

fn run_with(lab: &mut Lab, work: Work, crash_at: CrashAt) {
    let runner = lab.start(Some(crash_at));
    runner.submit(TaskCommand { task: TASK, work });
    runner.wait();
}

fn encrypting() -> (Lab, Work) {
    encrypting_as(ClassChoice::Auto)
}

fn encrypting_as(class: ClassChoice) -> (Lab, Work) {
    let lab = Lab::new();
    let raw = lab.raw_image("a.img", SIZE);
    lab.define(&[("vda", &raw, "raw")]);
    (lab, encrypt_as(class))
}

fn decrypting() -> (Lab, Work) {
    decrypting_from(ClassChoice::Auto)
}

fn decrypting_from(class: ClassChoice) -> (Lab, Work) {
    let (mut lab, work) = encrypting_as(class);
    assert_eq!(lab.run_as(TaskId::from_bytes([1; 16]), work).state, TaskState::Succeeded);
    (lab, decrypt(&[], SourceFate::Wipe))
}

/// The bytes of the image that [`encrypting`] begins with, as a volume gives them back.
fn plaintext() -> Vec<u8> {
    let mut bytes = noise(SIZE, "a.img".len() as u64);
    bytes.resize(SIZE.next_multiple_of(512), 0);
    bytes
}

fn names(lab: &Lab) -> Vec<String> {
    lab.files().into_keys().collect()
}

fn check_back(lab: &mut Lab) {
    let report = lab.run_as(CHECK, decrypt(&[], SourceFate::Wipe));
    assert_eq!(report.state, TaskState::Succeeded, "{report:?}");
    assert!(fs::read(lab.image("a.img")).unwrap() == plaintext());
}

#[test]
fn encrypting_goes_on_after_a_crash_at_every_place() {
    encrypting_goes_on(ClassChoice::Auto);
}

#[test]
fn encrypting_as_fast_goes_on_after_a_crash_at_every_place() {
    encrypting_goes_on(ClassChoice::Fast);
}

fn encrypting_goes_on(class: ClassChoice) {
    for (n, place) in places(&|| encrypting_as(class)).iter().enumerate() {
        let (mut lab, work) = encrypting_as(class);
        run_with(&mut lab, work, crash_at(n));
        let end = lab.resume();
        assert_eq!(end.state, TaskState::Succeeded, "{place}: {end:?}");
        assert_eq!(names(&lab), ["a.img.vmseal"], "{place}: the clear image is gone, nothing is left over");
        let stored = lab.store().vms();
        assert_eq!((stored.len(), stored[0].disks.len()), (1, 1), "{place}");
        check_back(&mut lab);
    }
}

#[test]
fn decrypting_goes_on_after_a_crash_at_every_place() {
    decrypting_goes_on(ClassChoice::Auto);
}

#[test]
fn decrypting_a_fast_disk_goes_on_after_a_crash_at_every_place() {
    decrypting_goes_on(ClassChoice::Fast);
}

fn decrypting_goes_on(class: ClassChoice) {
    for (n, place) in places(&|| decrypting_from(class)).iter().enumerate() {
        let (mut lab, work) = decrypting_from(class);
        run_with(&mut lab, work, crash_at(n));
        let end = lab.resume();
        assert_eq!(end.state, TaskState::Succeeded, "{place}: {end:?}");
        assert_eq!(names(&lab), ["a.img"], "{place}");
        assert!(fs::read(lab.image("a.img")).unwrap() == plaintext(), "{place}");
        assert_eq!(lab.xml().metadata().unwrap(), None);
        assert!(lab.store().vms()[0].disks[0].retired, "{place}");
    }
}

#[test]
fn creating_goes_on_after_a_crash_at_every_place() {
    let create = || {
        let lab = Lab::new();
        lab.define(&[]);
        let path = lab.image("new.vmseal").to_str().unwrap().to_owned();
        let work = Work::CreateDisk {
            domain: DOMAIN,
            target: "vdb".into(),
            path,
            format: InnerFormat::Qcow2,
            bytes: 1 << 30,
            key: key(),
            class: ClassChoice::Auto,
            hosts: hosts(),
        };
        (lab, work)
    };
    for (n, place) in places(&create).iter().enumerate() {
        let (mut lab, work) = create();
        run_with(&mut lab, work, crash_at(n));
        let end = lab.resume();
        assert_eq!(end.state, TaskState::Succeeded, "{place}: {end:?}");
        assert_eq!(names(&lab), ["new.vmseal"], "{place}");
        assert_eq!(lab.xml().disks().len(), 1, "{place}");
    }
}

#[test]
fn new_vm_is_there_once_after_a_crash_at_every_place() {
    let create = || {
        let lab = Lab::new();
        let path = lab.image("new.img");
        let xml = format!(
            "<domain><name>n</name><devices><disk type='file'><source file='{}'/><target dev='vda'/></disk></devices>\
             </domain>",
            path.display()
        );
        (
            lab,
            Work::CreateVm {
                xml,
                key: key(),
                class: ClassChoice::Auto,
                hosts: hosts(),
                sizes: BTreeMap::from([("vda".into(), 100_000)]),
            },
        )
    };
    for (n, place) in places(&create).iter().enumerate() {
        let (mut lab, work) = create();
        run_with(&mut lab, work, crash_at(n));
        let end = lab.resume();
        assert_eq!(end.state, TaskState::Succeeded, "{place}: {end:?}");
        assert_eq!(names(&lab), ["new.img.vmseal"], "{place}");
        assert_eq!(lab.libvirt.domains().unwrap().len(), 1, "{place}");
    }
}

#[test]
fn two_crashes_are_no_worse_than_one() {
    let all = places(&encrypting).len();
    for first in (1..all).step_by(5) {
        for second in [1, 4, 9] {
            let (mut lab, work) = encrypting();
            run_with(&mut lab, work, crash_at(first));
            let runner = lab.start(Some(crash_at(second)));
            runner.resume_all();
            runner.wait();
            let end = lab.resume();
            assert_eq!(end.state, TaskState::Succeeded, "{first}, {second}: {end:?}");
            assert_eq!(names(&lab), ["a.img.vmseal"]);
            check_back(&mut lab);
        }
    }
}

#[test]
fn two_disks_are_switched_together_or_not_at_all() {
    let both = || {
        let lab = Lab::new();
        let (raw, qcow2) = (lab.raw_image("a.img", SIZE), lab.qcow2_image("b.qcow2"));
        lab.define(&[("vda", &raw, "raw"), ("vdb", &qcow2, "qcow2")]);
        (lab, encrypt(&[], SourceFate::Keep))
    };
    for (n, place) in places(&both).iter().enumerate().step_by(3) {
        let (mut lab, work) = both();
        let before = lab.xml();
        run_with(&mut lab, work, crash_at(n));
        let ours =
            lab.xml().disks().iter().filter(|d| matches!(d.source, DiskSource::NbdUnix { .. })).count();
        assert!(matches!(ours, 0 | 2), "{place}: {ours} of two disks");
        assert!(ours == 2 || lab.xml() == before);
        let end = lab.resume();
        assert_eq!(end.state, TaskState::Succeeded, "{place}: {end:?}");
        assert_eq!(names(&lab), ["a.img", "a.img.vmseal", "b.qcow2", "b.qcow2.vmseal"], "{place}");
    }
}

/// Cancels at the `n`-th place.
fn cancelling(lab: &mut Lab, work: Work, n: usize, then: impl Fn(&str) -> bool + Send + Sync + 'static) {
    let cancel: Arc<Mutex<Option<Arc<crate::tasks::context::Control>>>> = Arc::default();
    let (control, seen) = (cancel.clone(), Mutex::new(0));
    let runner = lab.start(Some(Arc::new(move |place: &str| {
        let mut seen = seen.lock().unwrap();
        if *seen == n {
            // The task is in the table before its thread comes far: the table is locked until then.
            control.lock().unwrap().as_ref().expect("it was submitted").cancel();
        }
        *seen += 1;
        then(place)
    })));
    let held = cancel.lock();
    runner.submit(TaskCommand { task: TASK, work });
    let control = runner.lock()[&TASK].control.clone();
    *held.unwrap() = Some(control);
    runner.wait();
}

#[test]
fn cancelled_before_the_switch_everything_is_as_before() {
    for make in [&encrypting as &dyn Fn() -> (Lab, Work), &decrypting] {
        let places = places(make);
        let switched = places.iter().position(|p| p.ends_with("switched:before")).unwrap();
        for (n, place) in places.iter().enumerate() {
            let (mut lab, work) = make();
            let (files, xml) = (lab.files(), lab.xml());
            cancelling(&mut lab, work, n, |_| false);
            let end = lab.told.last(TASK);
            if n < switched {
                assert_eq!(end.state, TaskState::Cancelled, "{place}: {end:?}");
                assert_eq!(lab.files(), files, "{place}");
                assert_eq!(lab.xml(), xml, "{place}");
                let live = |d: &&crate::store::StoredDisk| !d.retired;
                let encrypted = xml.metadata().unwrap().map_or(0, |m| m.disks.len());
                assert_eq!(
                    lab.store().vms().iter().flat_map(|v| &v.disks).filter(live).count(),
                    encrypted,
                    "{place}"
                );
            } else {
                assert_eq!(end.state, TaskState::Succeeded, "{place}: {end:?}");
                assert_eq!(names(&lab).len(), 1, "{place}");
            }
        }
    }
}

#[test]
fn crash_while_going_back_goes_on_going_back() {
    for make in [&encrypting as &dyn Fn() -> (Lab, Work), &decrypting] {
        let n = places(make).iter().position(|p| p.ends_with("verified:after")).unwrap();
        for place in ["rolling-back:written", "rolling-back:begin", "rolling-back:after", "finished:before"] {
            let (mut lab, work) = make();
            let (files, xml) = (lab.files(), lab.xml());
            let dead = AtomicBool::new(false);
            cancelling(&mut lab, work, n, move |reached| {
                dead.fetch_or(reached.ends_with(place), Ordering::AcqRel) || reached.ends_with(place)
            });
            let end = lab.resume();
            assert_eq!(end.state, TaskState::Cancelled, "{place}: {end:?}");
            assert_eq!((lab.files(), lab.xml()), (files, xml), "{place}");
        }
    }
}

#[test]
fn resumed_task_waits_for_its_key_and_can_be_cancelled_meanwhile() {
    let (mut lab, work) = encrypting();
    run_with(&mut lab, work.clone(), crash_at_name("encrypt:allocated:after"));
    *lab.keys.missing.lock().unwrap() = 3;
    let end = lab.resume();
    assert_eq!(end.state, TaskState::Succeeded);
    let waited = lab.told.all().into_iter().find(|r| r.state == TaskState::Waiting).unwrap();
    assert_eq!(waited.code, Some(Code::ServerUnreachable));
    assert!(waited.message.contains("cannot be had"), "{waited:?}");

    let (mut lab, work) = encrypting();
    let files = lab.files();
    run_with(&mut lab, work, crash_at_name("encrypt:allocated:after"));
    *lab.keys.missing.lock().unwrap() = u32::MAX;
    let runner = lab.start(None);
    runner.resume_all();
    runner.cancel(TASK);
    runner.wait();
    assert_eq!(lab.told.last(TASK).state, TaskState::Cancelled);
    assert_eq!(lab.files(), files);
}

#[test]
fn resumed_task_waits_for_libvirtd() {
    let (mut lab, work) = encrypting();
    run_with(&mut lab, work, crash_at_name("encrypt:planned:before"));
    let (libvirt, told) = (Arc::clone(&lab.libvirt), Arc::clone(&lab.told));
    libvirt.away.store(true, Ordering::Release);
    let runner = lab.start(None);
    runner.resume_all();
    let until = Instant::now() + Duration::from_secs(10);
    while !told.all().iter().any(|r| r.code == Some(Code::HostNotReady)) {
        assert!(Instant::now() < until, "{:?}", told.all());
        std::thread::yield_now();
    }
    assert_eq!(told.last(TASK).state, TaskState::Waiting);
    libvirt.away.store(false, Ordering::Release);
    runner.wait();
    assert_eq!(told.last(TASK).state, TaskState::Succeeded);
    check_back(&mut lab);
}

#[test]
fn first_run_without_its_key_is_refused_and_nothing_is_left() {
    let (mut lab, work) = encrypting();
    let files = lab.files();
    *lab.keys.missing.lock().unwrap() = 1;
    let end = lab.run(work);
    assert_eq!((end.state, end.code), (TaskState::Failed, Some(Code::ServerUnreachable)), "{end:?}");
    assert_eq!(lab.files(), files);
    assert_eq!(*lab.keys.asked.lock().unwrap(), 1);
}

#[test]
fn answer_of_libvirt_may_be_lost_before_or_after_it_acted() {
    for trouble in [Trouble::LostBefore, Trouble::LostAfter] {
        for make in [&encrypting as &dyn Fn() -> (Lab, Work), &decrypting] {
            let (mut lab, work) = make();
            lab.libvirt.defines.lock().unwrap().push_back(trouble);
            let end = lab.run(work);
            assert_eq!(end.state, TaskState::Succeeded, "{trouble:?}: {end:?}");
            assert_eq!(names(&lab).len(), 1);
        }
    }
}

#[test]
fn refused_or_garbled_definition_leaves_everything_as_before() {
    for trouble in [Trouble::Refuses, Trouble::Garbles] {
        for make in [&encrypting as &dyn Fn() -> (Lab, Work), &decrypting] {
            let (mut lab, work) = make();
            let (files, xml) = (lab.files(), lab.xml());
            lab.libvirt.defines.lock().unwrap().push_back(trouble);
            let end = lab.run(work.clone());
            // Decrypting takes the metadata out anyway: garbled like that it is what was wanted.
            if matches!((trouble, &work), (Trouble::Garbles, Work::DecryptVm { .. })) {
                assert_eq!(end.state, TaskState::Succeeded);
                continue;
            }
            assert_eq!(
                (end.state, end.code),
                (TaskState::Failed, Some(Code::Failed)),
                "{trouble:?}: {end:?}"
            );
            assert_eq!((lab.files(), lab.xml().disks()), (files, xml.disks()), "{trouble:?}");
        }
    }
}

#[test]
fn vm_started_or_redefined_meanwhile_is_left_as_it_is() {
    type Meddle = fn(&Libvirt);
    let cases: [(Meddle, Code); 2] = [
        (|libvirt| libvirt.change(DOMAIN, |info, _| info.state = VmState::Running), Code::VmRunning),
        (
            |libvirt| libvirt.change(DOMAIN, |_, xml| *xml = xml.replace("a.img'", "other.img'")),
            Code::Conflict,
        ),
    ];
    for (meddle, code) in cases {
        let (mut lab, work) = encrypting();
        let (files, libvirt) = (lab.files(), lab.libvirt.clone());
        let meddler: CrashAt = Arc::new(move |place: &str| {
            if place == "encrypt:switched:begin" {
                meddle(&libvirt);
            }
            false
        });
        run_with(&mut lab, work, meddler);
        let end = lab.told.last(TASK);
        assert_eq!((end.state, end.code), (TaskState::Failed, Some(code)), "{end:?}");
        assert_eq!(lab.files(), files);
        assert!(!lab.xml().has_metadata());
    }
}

#[test]
fn image_changed_meanwhile_is_not_encrypted() {
    for place in ["encrypt:verified:begin", "encrypt:verified:before"] {
        let (mut lab, work) = encrypting();
        let path = lab.image("a.img");
        let (changed, wanted) = (path.clone(), place.to_owned());
        let writer: CrashAt = Arc::new(move |place: &str| {
            if place == wanted.replace("verified:before", "copied:before") {
                let mut bytes = fs::read(&changed).unwrap();
                bytes[5] ^= 1;
                fs::write(&changed, bytes).unwrap();
            }
            false
        });
        run_with(&mut lab, work, writer);
        let end = lab.told.last(TASK);
        assert_eq!(end.state, TaskState::Failed, "{end:?}");
        assert_eq!(names(&lab), ["a.img"]);
        assert_eq!(
            fs::read(&path).unwrap()[5],
            noise(SIZE, 5)[5] ^ 1,
            "the image keeps what was written to it"
        );
    }
}

#[test]
fn image_is_wiped_when_libvirt_answers_again() {
    let (mut lab, work) = encrypting();
    run_with(&mut lab, work, crash_at_name("encrypt:switched:after"));
    lab.libvirt.away.store(true, Ordering::Release);
    let (libvirt, told) = (lab.libvirt.clone(), lab.told.clone());
    let runner = lab.start(None);
    runner.resume_all();
    while told.last(TASK).state != TaskState::Waiting {
        std::thread::yield_now();
    }
    libvirt.away.store(false, Ordering::Release);
    runner.wait();
    assert_eq!(told.last(TASK).state, TaskState::Succeeded);
    assert_eq!(names(&lab), ["a.img.vmseal"]);
}

#[test]
fn job_that_dies_is_told_with_its_last_line() {
    use std::os::unix::fs::PermissionsExt;
    let (mut lab, work) = encrypting();
    let files = lab.files();
    let program = lab.scratch.path().join("program");
    fs::write(&program, "#!/bin/sh\necho first >&2\necho 'out of luck' >&2\nexit 7\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    lab.program = Some(program);
    let end = lab.run(work);
    assert_eq!(end.state, TaskState::Failed);
    assert!(end.message.contains("exit status: 7") && end.message.contains("out of luck"), "{end:?}");
    assert!(end.message.contains("disk vda"), "{end:?}");
    assert_eq!(lab.files(), files);
}

#[test]
fn damaged_journal_is_told_and_nothing_is_deleted() {
    let (mut lab, work) = encrypting();
    run_with(&mut lab, work, crash_at_name("encrypt:copied:after"));
    let before = lab.files();
    let journal = crate::journal::directory(&lab.scratch.path().join("state")).join(TASK.to_string());
    let mut bytes = fs::read(&journal).unwrap();
    bytes[40] ^= 0x20;
    fs::write(&journal, bytes).unwrap();
    let end = lab.resume();
    assert_eq!((end.state, end.code), (TaskState::Waiting, Some(Code::Failed)));
    assert!(end.message.contains("damaged at byte 16"), "{end:?}");
    assert_eq!(lab.files(), before);
}

#[test]
fn foreign_file_in_the_way_is_never_taken_for_our_own() {
    // Put there while the agent was dead, after it had planned and before it had made its own.
    let (mut lab, work) = encrypting();
    run_with(&mut lab, work, crash_at_name("encrypt:keyed:after"));
    fs::write(lab.image("a.img.vmseal"), "somebody's").unwrap();
    let end = lab.resume();
    assert_eq!((end.state, end.code), (TaskState::Failed, Some(Code::Exists)), "{end:?}");
    assert_eq!(fs::read_to_string(lab.image("a.img.vmseal")).unwrap(), "somebody's");
    assert_eq!(names(&lab), ["a.img", "a.img.vmseal"]);
    assert_eq!(fs::read(lab.image("a.img")).unwrap().len(), SIZE);
}

#[test]
fn other_vm_is_not_held_up() {
    let (mut lab, work) = encrypting();
    let other = DomainUuid::from_bytes([9; 16]);
    let path = lab.raw_image("zz.img", 1000);
    lab.libvirt.put(other, "other", &[("vda", &path, "raw")]);
    run_with(&mut lab, work, crash_at_name("encrypt:copied:after"));
    let runner = lab.start(None);
    assert!(!runner.busy(other) && !runner.busy(DOMAIN));
    runner.resume_all();
    assert!(!runner.busy(other));
    let second = TaskId::from_bytes([2; 16]);
    let key = key();
    let work = Work::EncryptVm {
        domain: other,
        targets: vec![],
        key,
        class: ClassChoice::Auto,
        hosts: hosts(),
        source: SourceFate::Wipe,
    };
    runner.submit(TaskCommand { task: second, work });
    runner.wait();
    assert_eq!(lab.told.last(second).state, TaskState::Succeeded);
    assert_eq!(lab.told.last(TASK).state, TaskState::Succeeded);
    assert!(Path::new(&format!("{path}.vmseal")).exists());
}
