//! Every refusal: its code, the way out it names, and that nothing was changed.

use std::{fs, os::unix::fs::symlink, process::Command, sync::atomic::Ordering};

use vmseal_model::{
    class::ClassChoice,
    id::{DomainUuid, TaskId},
    refusal::Code,
    state::{InnerFormat, VmState},
    task::{SourceFate, TaskState},
};

use super::lab::*;
use crate::tasks::command::Work;

/// Runs it and looks that it was refused, and that nothing is different.
fn refused(mut lab: Lab, work: Work, code: Code, hint: &str) -> String {
    let before = (lab.files(), *lab.libvirt.defined.lock().unwrap(), lab.store().vms());
    let report = lab.run(work);
    assert_eq!((report.state, report.code), (TaskState::Failed, Some(code)), "{report:?}");
    assert!(report.hint.contains(hint), "{report:?}");
    assert!(!report.message.is_empty());
    let after = (lab.files(), *lab.libvirt.defined.lock().unwrap(), lab.store().vms());
    assert_eq!(after, before);
    assert_eq!(*lab.keys.asked.lock().unwrap(), 0, "no key is asked for what is refused");
    report.message
}

fn all() -> Work {
    encrypt(&[], SourceFate::Wipe)
}

fn one_raw() -> Lab {
    let lab = Lab::new();
    let raw = lab.raw_image("a.img", 100_000);
    lab.define(&[("vda", &raw, "raw")]);
    lab
}

/// A lab whose one disk has this XML in place of `<source …/>`, or more after it.
fn with_disk(edit: impl FnOnce(String) -> String) -> Lab {
    let lab = one_raw();
    lab.libvirt.change(DOMAIN, |_, xml| *xml = edit(xml.clone()));
    lab
}

#[test]
fn vm_that_is_not_off() {
    for state in [VmState::Running, VmState::Paused] {
        let lab = one_raw();
        lab.libvirt.change(DOMAIN, |info, _| info.state = state);
        let message = refused(lab, all(), Code::VmRunning, "virsh shutdown web01");
        assert!(message.contains(state.as_str()));
    }
}

#[test]
fn vm_without_a_definition_that_stays() {
    let lab = one_raw();
    lab.libvirt.change(DOMAIN, |info, _| info.persistent = false);
    refused(lab, all(), Code::VmTransient, "virsh define");
    let work = Work::DecryptVm {
        domain: DomainUuid::from_bytes([1; 16]),
        targets: vec![],
        source: SourceFate::Keep,
    };
    refused(one_raw(), work, Code::NotFound, "");
}

#[test]
fn vm_with_snapshots_or_a_saved_image() {
    let lab = one_raw();
    *lab.libvirt.snapshots.lock().unwrap() = 2;
    let message = refused(lab, all(), Code::VmHasSnapshots, "virsh snapshot-delete web01");
    assert!(message.contains("2 snapshots"));
    let mut lab = one_raw();
    assert_eq!(lab.run_as(TaskId::from_bytes([1; 16]), all()).state, TaskState::Succeeded);
    *lab.keys.asked.lock().unwrap() = 0;
    *lab.libvirt.snapshots.lock().unwrap() = 1;
    refused(lab, decrypt(&[], SourceFate::Wipe), Code::VmHasSnapshots, "virsh start web01: libvirt deletes");
    let lab = one_raw();
    lab.libvirt.saved.store(true, Ordering::Release);
    refused(lab, all(), Code::VmHasSavedImage, "virsh managedsave-remove web01");
    let lab = one_raw();
    lab.libvirt.change(DOMAIN, |info, _| info.state = VmState::Saved);
    refused(lab, all(), Code::VmHasSavedImage, "virsh start web01");
}

#[test]
fn libvirt_that_does_not_answer() {
    let lab = one_raw();
    lab.libvirt.away.store(true, Ordering::Release);
    refused(lab, all(), Code::HostNotReady, "libvirtd");
}

#[test]
fn disk_that_is_not_there_or_named_twice() {
    let message = refused(one_raw(), encrypt(&["vdx"], SourceFate::Wipe), Code::NotFound, "");
    assert!(message.contains("it has: vda"), "{message}");
    refused(one_raw(), encrypt(&["vda", "vda"], SourceFate::Wipe), Code::BadRequest, "");
}

#[test]
fn nothing_to_do() {
    let lab = Lab::new();
    lab.define(&[]);
    refused(lab, all(), Code::NothingToDo, "");
    refused(one_raw(), decrypt(&[], SourceFate::Keep), Code::NothingToDo, "");
    refused(one_raw(), decrypt(&["vda"], SourceFate::Keep), Code::NothingToDo, "");
    let mut lab = one_raw();
    assert_eq!(lab.run_as(vmseal_model::id::TaskId::from_bytes([9; 16]), all()).state, TaskState::Succeeded);
    *lab.keys.asked.lock().unwrap() = 0;
    refused(lab, encrypt(&["vda"], SourceFate::Wipe), Code::NothingToDo, "");
}

#[test]
fn disk_of_a_kind_this_version_does_not_handle() {
    let put = |text: &'static str| move |xml: String| xml.replace("</disk>", &format!("{text}</disk>"));
    refused(with_disk(put("<shareable/>")), all(), Code::UnsupportedDisk, "<shareable/>");
    refused(with_disk(put("<transient/>")), all(), Code::UnsupportedDisk, "");
    refused(with_disk(put("<encryption format='luks'/>")), all(), Code::UnsupportedDisk, "qemu-img convert");
    let is = |from: &'static str, to: &'static str| move |xml: String| xml.replace(from, to);
    refused(with_disk(is("device='disk'", "device='lun'")), all(), Code::UnsupportedDisk, "");
    refused(
        with_disk(is("type='raw'", "type='vmdk'")),
        all(),
        Code::UnsupportedDisk,
        "qemu-img convert -O qcow2",
    );
    let block =
        |xml: String| xml.replace("type='file'", "type='block'").replace("source file=", "source dev=");
    let message = refused(with_disk(block), all(), Code::UnsupportedDisk, "");
    assert!(message.contains("block device"), "{message}");
    let network = |xml: String| xml.replace("type='file'", "type='network'");
    refused(with_disk(network), all(), Code::UnsupportedDisk, "");
    let cdrom = with_disk(is("device='disk'", "device='cdrom'"));
    refused(cdrom, encrypt(&["vda"], SourceFate::Keep), Code::UnsupportedDisk, "");
    let sliced = |xml: String| xml.replace(".img'/>", ".img'><slices/></source>");
    refused(with_disk(sliced), all(), Code::UnsupportedDisk, "");
}

#[test]
fn one_unsupported_disk_among_others_says_how_to_take_the_rest() {
    let lab = Lab::new();
    let raw = lab.raw_image("a.img", 1000);
    lab.define(&[("vda", &raw, "raw"), ("vdb", "/dev/null", "raw")]);
    refused(lab, all(), Code::UnsupportedDisk, "name them: vda");
}

#[test]
fn image_with_a_chain() {
    let overlay = |lab: &Lab| {
        let base = lab.qcow2_image("base.qcow2");
        let top = lab.image("top.qcow2").to_str().unwrap().to_owned();
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top]);
        top
    };
    let lab = Lab::new();
    let top = overlay(&lab);
    lab.define(&[("vda", &top, "qcow2")]);
    let message = refused(lab, all(), Code::BackingChain, "qemu-img rebase -b ''");
    assert!(message.contains("base.qcow2"), "{message}");

    let chain = "<backingStore type='file'><source file='/x'/></backingStore></disk>";
    let lab = with_disk(|xml| xml.replace("</disk>", chain));
    refused(lab, all(), Code::BackingChain, "blockpull");

    // The base itself: another domain stands on it, although that one's definition does not name it.
    let lab = Lab::new();
    let top = overlay(&lab);
    lab.define(&[("vda", lab.image("base.qcow2").to_str().unwrap(), "qcow2")]);
    lab.libvirt.put(DomainUuid::from_bytes([2; 16]), "other", &[("vda", &top, "qcow2")]);
    let message = refused(lab, all(), Code::ImageShared, "");
    assert!(message.contains("disk vda of other"), "{message}");
}

#[test]
fn qcow2_image_that_is_not_whole_or_not_clear() {
    let lab = Lab::new();
    let path = lab.image("x.qcow2").to_str().unwrap().to_owned();
    let data = format!("data_file={}", lab.image("x.data").display());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &data, &path, "1M"]);
    lab.define(&[("vda", &path, "qcow2")]);
    refused(lab, all(), Code::UnsupportedDisk, "qemu-img convert");

    let lab = Lab::new();
    let path = lab.image("x.qcow2").to_str().unwrap().to_owned();
    let secret = ["--object", "secret,id=s,data=abc", "-o", "encrypt.format=luks,encrypt.key-secret=s"];
    let args = ["create", "-q", "-f", "qcow2", secret[0], secret[1], secret[2], secret[3]];
    qemu_img(&[&args[..], &["-o", "encrypt.iter-time=10", &path, "1M"]].concat());
    lab.define(&[("vda", &path, "qcow2")]);
    let message = refused(lab, all(), Code::UnsupportedDisk, "");
    assert!(message.contains("encrypted by QEMU"), "{message}");

    let lab = Lab::new();
    let path = lab.qcow2_image("x.qcow2");
    // Incompatible feature bit 0: not closed.
    let mut bytes = fs::read(&path).unwrap();
    bytes[79] |= 1;
    fs::write(&path, bytes).unwrap();
    lab.define(&[("vda", &path, "qcow2")]);
    refused(lab, all(), Code::UnsupportedDisk, "qemu-img check");
}

#[test]
fn format_that_is_not_what_the_file_is() {
    let lab = one_raw();
    lab.libvirt.change(DOMAIN, |_, xml| *xml = xml.replace("type='raw'", "type='qcow2'"));
    refused(lab, all(), Code::UnsupportedDisk, "");
    let lab = Lab::new();
    let path = lab.qcow2_image("x.qcow2");
    lab.define(&[("vda", &path, "raw")]);
    lab.libvirt.change(DOMAIN, |_, xml| *xml = xml.replace("type='raw'", ""));
    refused(lab, all(), Code::UnsupportedDisk, "<driver name='qemu' type='qcow2'/>");
}

#[test]
fn image_somebody_else_uses() {
    let other = DomainUuid::from_bytes([2; 16]);
    let lab = one_raw();
    let path = lab.image("a.img").to_str().unwrap().to_owned();
    lab.libvirt.put(other, "db01", &[("sda", &path, "raw")]);
    let message = refused(lab, all(), Code::ImageShared, "virt-clone");
    assert!(message.contains("disk sda of db01"), "{message}");

    // By another path.
    let lab = one_raw();
    let link = lab.scratch.path().join("pool");
    symlink(lab.scratch.path().join("images"), &link).unwrap();
    lab.libvirt.put(other, "db01", &[("sda", link.join("a.img").to_str().unwrap(), "raw")]);
    refused(lab, all(), Code::ImageShared, "");

    // By another disk of its own.
    let lab = one_raw();
    let path = lab.image("a.img").to_str().unwrap().to_owned();
    lab.define(&[("vda", &path, "raw"), ("vdb", &path, "raw")]);
    refused(lab, encrypt(&["vda"], SourceFate::Keep), Code::ImageShared, "");
}

#[test]
fn image_in_use_by_a_process_libvirt_does_not_know() {
    let lab = one_raw();
    let path = lab.image("a.img").to_str().unwrap().to_owned();
    // A real QEMU block layer with the image open for writing, until its standard input closes.
    let mut child = Command::new("qemu-io")
        .args(["-f", "raw", &path])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("qemu-io is installed");
    let mut prompt = [0; 1];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut prompt).unwrap();
    refused(lab, all(), Code::VolumeInUse, "fuser");
    drop(child.stdin.take());
    child.wait().unwrap();
}

#[test]
fn what_is_no_plain_file() {
    let lab = one_raw();
    let link = lab.image("link.img");
    symlink(lab.image("a.img"), &link).unwrap();
    lab.define(&[("vda", link.to_str().unwrap(), "raw")]);
    refused(lab, all(), Code::UnsupportedDisk, "a.img");

    let lab = one_raw();
    fs::hard_link(lab.image("a.img"), lab.image("b.img")).unwrap();
    refused(lab, all(), Code::UnsupportedDisk, "find / -xdev -inum");

    for (path, code) in [
        ("/dev/null", Code::UnsupportedDisk),
        ("/proc", Code::UnsupportedDisk),
        ("relative.img", Code::BadRequest),
        ("/nonexistent/x.img", Code::NotFound),
        ("/x/new&#10;line.img", Code::BadRequest),
    ] {
        let lab = Lab::new();
        lab.define(&[("vda", path, "raw")]);
        refused(lab, all(), code, "");
    }
    let lab = Lab::new();
    let empty = lab.raw_image("empty.img", 0);
    lab.define(&[("vda", &empty, "raw")]);
    refused(lab, all(), Code::UnsupportedDisk, "");
}

#[test]
fn name_that_is_taken() {
    let lab = one_raw();
    fs::write(lab.image("a.img.vmseal"), "x").unwrap();
    refused(lab, all(), Code::Exists, "mv ");
    let lab = one_raw();
    symlink("/nowhere", lab.image("a.img.vmseal")).unwrap();
    refused(lab, all(), Code::Exists, "");
}

#[test]
fn too_little_space() {
    // A sparse image larger than the file system it is on.
    let lab = one_raw();
    let path = lab.image("a.img");
    let huge = fs::File::options().write(true).open(&path).unwrap();
    huge.set_len(8 << 40).unwrap();
    let before = length(&path);
    let mut lab = lab;
    let report = lab.run(all());
    assert_eq!(report.code, Some(Code::NoSpace), "{report:?}");
    assert!(report.message.contains("8.0 TiB are needed") && report.message.contains("free"), "{report:?}");
    assert_eq!((length(&path), lab.image("a.img.vmseal").exists()), (before, false));
}

#[test]
fn metadata_of_another_domain_or_vm() {
    let mut lab = one_raw();
    let path = lab.raw_image("bb.img", 1000);
    lab.define(&[("vda", lab.image("a.img").to_str().unwrap(), "raw"), ("vdb", &path, "raw")]);
    let first =
        lab.run_as(vmseal_model::id::TaskId::from_bytes([9; 16]), encrypt(&["vdb"], SourceFate::Keep));
    assert_eq!(first.state, TaskState::Succeeded, "{first:?}");
    *lab.keys.asked.lock().unwrap() = 0;
    // As virt-clone leaves it: our metadata under a new UUID.
    let clone = DomainUuid::from_bytes([0xc1; 16]);
    let xml = lab.xml().to_xml().replace(&format!("<uuid>{DOMAIN}"), &format!("<uuid>{clone}"));
    lab.libvirt.put_xml(clone, "clone", &xml);
    let work = Work::EncryptVm {
        domain: clone,
        targets: vec![],
        key: key(),
        class: ClassChoice::Auto,
        hosts: hosts(),
        source: SourceFate::Wipe,
    };
    let message = refused(lab, work, Code::UnknownVm, "vmseal vm adopt clone");
    assert!(message.contains(&DOMAIN.to_string()), "{message}");
}

#[test]
fn new_disk_that_makes_no_sense() {
    let work = |lab: &Lab, target: &str, name: &str, bytes: u64| Work::CreateDisk {
        domain: DOMAIN,
        target: target.into(),
        path: if name.starts_with('/') { name.into() } else { lab.image(name).to_str().unwrap().into() },
        format: InnerFormat::Raw,
        bytes,
        key: key(),
        class: ClassChoice::Auto,
        hosts: hosts(),
    };
    let cases = [
        ("vda", "n", 1, Code::Exists),
        ("../v", "n", 1, Code::BadRequest),
        ("vdb", "n", 0, Code::BadRequest),
        ("vdb", "n", u64::MAX, Code::BadRequest),
        ("vdb", "a.img", 1, Code::Exists),
        ("vdb", "/nonexistent/n", 1, Code::NotFound),
        ("vdb", "/", 1, Code::BadRequest),
        ("vdb", "n", 63 << 40, Code::NoSpace),
    ];
    for (target, name, bytes, code) in cases {
        let lab = one_raw();
        let work = work(&lab, target, name, bytes);
        refused(lab, work, code, "");
    }
}

#[test]
fn new_vm_that_makes_no_sense() {
    let work = |xml: &str| Work::CreateVm {
        xml: xml.into(),
        key: key(),
        class: ClassChoice::Auto,
        hosts: hosts(),
        sizes: Default::default(),
    };
    for (xml, code) in [
        ("<domain/>", Code::BadRequest),
        ("<network/>", Code::BadRequest),
        ("no xml", Code::BadRequest),
        ("<domain><name>n</name></domain>", Code::BadRequest),
        ("<domain><name>web01</name><devices/></domain>", Code::Exists),
    ] {
        refused(one_raw(), work(xml), code, "");
    }
    let same = format!("<domain><name>n</name><uuid>{DOMAIN}</uuid></domain>");
    refused(one_raw(), work(&same), Code::Exists, "virsh dominfo");
}
