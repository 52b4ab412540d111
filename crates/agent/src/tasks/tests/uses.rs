//! Who else uses an image: what is refused, what is only not overwritten, and what holds nothing up.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use vmseal_model::{
    id::DomainUuid,
    refusal::Code,
    task::{SourceFate, TaskState},
};

use super::lab::*;
use crate::{
    ports::{HypervisorError, TaskReport},
    tasks::command::{TaskCommand, Work},
};

const OTHER: DomainUuid = DomainUuid::from_bytes([0x0e; 16]);
const SIZE: usize = 100_000;

fn one_raw() -> (Lab, String) {
    let lab = Lab::new();
    let raw = lab.raw_image("a.img", SIZE);
    lab.define(&[("vda", &raw, "raw")]);
    (lab, raw)
}

fn all(source: SourceFate) -> Work {
    encrypt(&[], source)
}

fn mute(lab: &Lab) {
    lab.libvirt.put(OTHER, "db1", &[]);
    let error = HypervisorError::Refused { action: "give a domain's definition", reason: "busy".into() };
    lab.libvirt.mute.lock().unwrap().insert(OTHER, error);
}

/// Refused, and nothing was touched.
fn refused(mut lab: Lab, code: Code) -> TaskReport {
    let files = lab.files();
    let end = lab.run(all(SourceFate::Wipe));
    assert_eq!((end.state, end.code), (TaskState::Failed, Some(code)), "{end:?}");
    assert_eq!(lab.files(), files);
    end
}

/// Encrypted, and the clear image is left with a word about it.
fn left(mut lab: Lab, why: &str) {
    let end = lab.run(all(SourceFate::Wipe));
    assert_eq!(end.state, TaskState::Succeeded, "{end:?}");
    let image = lab.image("a.img");
    assert!(end.message.contains(&format!("the clear image {} is still there", image.display())), "{end:?}");
    assert!(end.message.contains(why) && end.message.contains("shred -u"), "{end:?}");
    assert!(fs::read(image).unwrap() == noise(SIZE, 5));
}

/// Another VM's overlay whose header says this of what it lies on.
fn overlay(lab: &Lab, backing: &str) {
    let top = lab.scratch.path().join("top.qcow2");
    let top = top.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", "raw", top, "1M"]);
    lab.libvirt.put(OTHER, "db1", &[("vdb", top, "qcow2")]);
}

#[test]
fn definition_that_is_not_told_may_use_the_image() {
    let (lab, _) = one_raw();
    mute(&lab);
    let end = refused(lab, Code::Failed);
    assert!(end.message.contains("busy"), "{end:?}");
    let (lab, _) = one_raw();
    lab.libvirt.put_xml(OTHER, "db1", "<domain><devices>");
    let end = refused(lab, Code::Failed);
    assert!(end.message.contains("definition of db1") && end.hint.contains("virsh dumpxml db1"), "{end:?}");
}

#[test]
fn image_is_not_overwritten_before_every_definition_was_told() {
    let (mut lab, raw) = one_raw();
    let runner = lab.start(Some(crash_at_name("encrypt:switched:after")));
    runner.submit(TaskCommand { task: TASK, work: all(SourceFate::Wipe) });
    runner.wait();
    mute(&lab);
    let told = lab.told.clone();
    lab.start(None).resume_all();
    let until = Instant::now() + Duration::from_secs(20);
    while !told.all().iter().any(|report| report.state == TaskState::Waiting) {
        assert!(Instant::now() < until, "{:?}", told.all());
        std::thread::yield_now();
    }
    assert!(fs::read(&raw).unwrap() == noise(SIZE, 5));
    lab.libvirt.mute.lock().unwrap().clear();
    lab.runner.as_ref().unwrap().wait();
    assert_eq!(told.last(TASK).state, TaskState::Succeeded);
    assert!(!Path::new(&raw).exists());
}

#[test]
fn definition_that_came_and_cannot_be_read_leaves_the_image() {
    let (mut lab, raw) = one_raw();
    let runner = lab.start(Some(crash_at_name("encrypt:switched:after")));
    runner.submit(TaskCommand { task: TASK, work: all(SourceFate::Wipe) });
    runner.wait();
    lab.libvirt.put_xml(OTHER, "db1", "<domain><devices>");
    let end = lab.resume();
    assert_eq!(end.state, TaskState::Succeeded, "{end:?}");
    assert!(end.message.contains("is still there (the definition of db1"), "{end:?}");
    assert!(fs::read(&raw).unwrap() == noise(SIZE, 5));
}

#[test]
fn domain_that_went_away_meanwhile_uses_nothing() {
    let (mut lab, raw) = one_raw();
    lab.libvirt.put(OTHER, "db1", &[]);
    lab.libvirt.mute.lock().unwrap().insert(OTHER, missing(OTHER));
    assert_eq!(lab.run(all(SourceFate::Wipe)).state, TaskState::Succeeded);
    assert!(!Path::new(&raw).exists());
}

#[test]
fn volume_of_a_storage_pool_stops_no_encrypting_and_the_image_stays() {
    let pool = |lab: &Lab| {
        let xml = "<domain><name>db1</name><devices><disk type='volume' device='disk'><source pool='default' \
                   volume='x'/><target dev='vdb'/></disk></devices></domain>";
        lab.libvirt.put_xml(OTHER, "db1", xml);
    };
    let (lab, _) = one_raw();
    pool(&lab);
    left(lab, "disk vdb of db1 (a volume of a storage pool) may use it");
    // Keeping it harms nobody.
    let (mut lab, _) = one_raw();
    pool(&lab);
    let end = lab.run(all(SourceFate::Keep));
    assert_eq!(end.state, TaskState::Succeeded, "{end:?}");
    assert!(end.message.contains("the clear image is kept"), "{end:?}");
}

#[test]
fn overlay_that_names_the_image_in_json_uses_it() {
    for form in [
        r#"json:{"driver":"raw","file":{"driver":"file","filename":"IMAGE"}}"#,
        r#"json:{"driver":"raw","file.driver":"file","file.filename":"IMAGE"}"#,
        "file:IMAGE",
    ] {
        let (lab, raw) = one_raw();
        overlay(&lab, &form.replace("IMAGE", &raw));
        let end = refused(lab, Code::ImageShared);
        assert!(end.message.contains("disk vdb of db1"), "{end:?}");
    }
}

#[test]
fn overlay_on_something_unknown_stops_no_encrypting_and_the_image_stays() {
    let (lab, raw) = one_raw();
    overlay(&lab, &format!(r#"json:{{"driver":"blkverify","test":{{"filename":"{raw}"}}}}"#));
    left(lab, "disk vdb of db1");
    let (lab, raw) = one_raw();
    let top = lab.scratch.path().join("top.qcow2");
    let top = top.to_str().unwrap();
    let elsewhere = lab.scratch.path().join("data.raw");
    let options = format!("data_file={}", elsewhere.display());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, top, "1M"]);
    lab.libvirt.put(OTHER, "db1", &[("vdb", top, "qcow2")]);
    assert!(Path::new(&raw).exists());
    left(lab, "its data is in another file");
}

#[test]
fn what_a_guest_wrote_into_a_raw_disk_is_no_header() {
    let (mut lab, raw) = one_raw();
    overlay(&lab, &raw);
    let top = lab.scratch.path().join("top.qcow2");
    lab.libvirt.put(OTHER, "db1", &[("vdb", top.to_str().unwrap(), "raw")]);
    assert_eq!(lab.run(all(SourceFate::Wipe)).state, TaskState::Succeeded);
    assert!(!Path::new(&raw).exists());
}
