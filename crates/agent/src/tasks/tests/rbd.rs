//! Tasks on Ceph RBD, with a real cluster of one OSD (`tests/lab/ceph.sh`), the real helper and the real job program.
//! Those with a cluster run only with VMSEAL_NEED_CEPH, which `make test-rbd` sets.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use vmseal_luks::OwnerBlock;
use vmseal_model::{
    class::ClassChoice, id::HostId, refusal::Code, state::InnerFormat, task::SourceFate, task::TaskState,
};

use super::lab::{DOMAIN, Lab, crash_at_name, decrypt, encrypt, hosts, key, noise};
use crate::{
    domain_xml::DiskSource,
    rbd::{Location, Served, Tool},
    tasks::{TaskCommand, Work},
};

/// A cluster, ended when dropped.
struct Ceph(PathBuf);

impl Ceph {
    /// In this directory.
    fn start(directory: &Path) -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let have = |name: &str| std::env::split_paths(&path).any(|directory| directory.join(name).is_file());
        let needed = ["ceph-mon", "ceph-osd", "ceph-mgr", "ceph", "rbd"];
        if let Some(missing) = needed.iter().find(|name| !have(name)) {
            panic!("{missing} is missing: tests/lab/setup.sh ceph");
        }
        let ceph = Self(directory.join("ceph"));
        let done = ceph.script("start").output().unwrap();
        assert!(done.status.success(), "{done:?}");
        ceph
    }

    fn script(&self, order: &str) -> Command {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/lab/ceph.sh"));
        command.arg(order).arg(&self.0);
        command
    }

    fn conf(&self) -> PathBuf {
        self.0.join("ceph.conf")
    }

    fn rbd(&self, arguments: &[&str]) -> String {
        let done = Command::new("rbd").arg("-c").arg(self.conf()).args(arguments).output().unwrap();
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    }

    /// Images of the pool, sorted.
    fn images(&self) -> Vec<String> {
        let mut images: Vec<_> = self.rbd(&["ls", "rbd"]).lines().map(str::to_owned).collect();
        images.sort();
        images
    }
}

impl Drop for Ceph {
    fn drop(&mut self) {
        let _ = self.script("stop").status();
    }
}

/// A lab whose agent knows the cluster; only where Ceph was asked for, since each takes ten seconds to start. What `make
/// test` has of it is in tests/e2e.
fn lab() -> Option<(Lab, Ceph)> {
    if std::env::var_os("VMSEAL_NEED_CEPH").is_none() {
        println!("skipped: `make test-rbd` has it");
        return None;
    }
    let mut lab = Lab::new();
    let ceph = Ceph::start(lab.scratch.path());
    lab.ceph = Some(ceph.conf());
    Some((lab, ceph))
}

/// An image with these bytes, and a domain whose disk it is, with a user and a secret of libvirt's.
fn with_image(lab: &Lab, ceph: &Ceph, bytes: &[u8]) {
    let file = lab.image("clear.raw");
    fs::write(&file, bytes).unwrap();
    ceph.rbd(&["import", file.to_str().unwrap(), "rbd/web01"]);
    fs::remove_file(file).unwrap();
    let xml = format!(
        "<domain type='kvm'>\n  <name>web01</name>\n  <uuid>{DOMAIN}</uuid>\n  <devices>\n    <disk type='network' \
         device='disk'>\n      <driver name='qemu' type='raw' cache='writeback'/>\n      <auth username='admin'>\n        \
         <secret type='ceph' uuid='b35eba3b-8f69-4e26-a2b6-0b1c9a5d8a11'/>\n      </auth>\n      <source protocol='rbd' \
         name='rbd/web01'/>\n      <target dev='vda' bus='virtio'/>\n    </disk>\n  </devices>\n</domain>\n"
    );
    lab.libvirt.put_xml(DOMAIN, "web01", &xml);
}

fn export(lab: &Lab, ceph: &Ceph, image: &str) -> Vec<u8> {
    let file = lab.image("out.raw");
    ceph.rbd(&["export", &format!("rbd/{image}"), file.to_str().unwrap()]);
    let bytes = fs::read(&file).unwrap();
    fs::remove_file(file).unwrap();
    bytes
}

fn tool(lab: &Lab) -> Tool {
    Tool::new(&lab.config()).unwrap()
}

#[test]
fn image_is_encrypted_beside_itself_and_comes_back_the_same() {
    let Some((mut lab, ceph)) = lab() else { return };
    let clear = noise((3 << 20) + 512, 5);
    with_image(&lab, &ceph, &clear);
    let before = lab.xml();

    let told = lab.run(encrypt(&[], SourceFate::Wipe));
    assert_eq!(told.state, TaskState::Succeeded, "{told:?}");
    assert!(told.message.contains("Ceph does not overwrite"), "{}", told.message);
    assert_eq!(ceph.images(), ["web01.vmseal"]);
    let volume = export(&lab, &ceph, "web01.vmseal");
    assert!(volume.starts_with(b"LUKS\xba\xbe"));
    assert!(!volume.windows(64).any(|window| window == &clear[..64]), "plaintext in the cluster");
    let xml = lab.xml();
    let metadata = xml.metadata().unwrap().unwrap();
    assert_eq!(metadata.disks[0].source, "rbd:rbd/web01.vmseal:id=admin");
    assert!(matches!(xml.disks()[0].source, DiskSource::NbdUnix { .. }));
    let disk = xml.to_xml();
    let disk = &disk[disk.find("<disk").unwrap()..];
    assert!(!disk.contains("<auth"), "{disk}");
    // Given up: anybody may have the image now.
    let at = Location::parse(&metadata.disks[0].source).unwrap();
    assert_eq!(tool(&lab).info(&at).unwrap().unwrap().watchers, Vec::<String>::new());

    let told = lab.run_as(vmseal_model::id::TaskId::from_bytes([2; 16]), decrypt(&[], SourceFate::Wipe));
    assert_eq!(told.state, TaskState::Succeeded, "{told:?}");
    assert_eq!(ceph.images(), ["web01"]);
    assert_eq!(export(&lab, &ceph, "web01"), clear);
    let (before, after) = (before.disks(), lab.xml().disks());
    assert_eq!(before, after);
    let xml = lab.xml().to_xml();
    assert!(xml.contains("b35eba3b-8f69-4e26-a2b6-0b1c9a5d8a11"), "libvirt's secret is named again: {xml}");
}

#[test]
fn task_that_dies_anywhere_goes_on_or_goes_back() {
    let Some((mut lab, ceph)) = lab() else { return };
    let clear = noise(1 << 20, 6);
    with_image(&lab, &ceph, &clear);
    let mut task = 0;
    for place in ["allocated:before", "copied:progress", "verified:after", "source-gone:begin"] {
        task += 1;
        let id = vmseal_model::id::TaskId::from_bytes([task; 16]);
        let runner = lab.start(Some(crash_at_name(&format!("encrypt:{place}"))));
        runner.submit(TaskCommand { task: id, work: encrypt(&[], SourceFate::Keep) });
        runner.wait();
        let runner = lab.start(None);
        runner.resume_all();
        runner.wait();
        let told = lab.told.last(id);
        assert_eq!(told.state, TaskState::Succeeded, "{place}: {told:?}");
        assert_eq!(ceph.images(), ["web01", "web01.vmseal"], "{place}");
        task += 1;
        ceph.rbd(&["rm", "rbd/web01"]);
        let id = vmseal_model::id::TaskId::from_bytes([task; 16]);
        let told = lab.run_as(id, decrypt(&[], SourceFate::Wipe));
        assert_eq!(told.state, TaskState::Succeeded, "{place}: {told:?}");
        assert_eq!(export(&lab, &ceph, "web01"), clear, "{place}");
    }
}

#[test]
fn new_disk_on_rbd_is_thin_only_in_its_header_and_reads_zeros() {
    let Some((mut lab, ceph)) = lab() else { return };
    lab.define(&[("vda", &lab.raw_image("x.img", 4096), "raw")]);
    let work = |path: &str, format| Work::CreateDisk {
        domain: DOMAIN,
        target: "vdb".into(),
        path: path.into(),
        format,
        bytes: 2 << 20,
        key: key(),
        class: ClassChoice::Auto,
        hosts: hosts(),
    };
    let told = lab.run(work("rbd:rbd/data", InnerFormat::Qcow2));
    assert_eq!((told.state, told.code), (TaskState::Failed, Some(Code::UnsupportedDisk)), "{told:?}");
    let id = |n| vmseal_model::id::TaskId::from_bytes([n; 16]);
    let told = lab.run_as(id(2), work("rbd:rbd/data", InnerFormat::Raw));
    assert_eq!(told.state, TaskState::Succeeded, "{told:?}");
    assert_eq!(export(&lab, &ceph, "data").len(), (16 << 20) + (2 << 20));
    let told = lab.run_as(id(3), decrypt(&["vdb"], SourceFate::Keep));
    assert_eq!(told.state, TaskState::Succeeded, "{told:?}");
    assert_eq!(ceph.images(), ["data", "data.clear"]);
    assert!(export(&lab, &ceph, "data.clear").iter().all(|byte| *byte == 0));
}

#[test]
fn image_that_cannot_be_had_is_refused_with_who_has_it_and_what_to_do() {
    let Some((mut lab, ceph)) = lab() else { return };
    with_image(&lab, &ceph, &noise(1 << 20, 7));
    let id = |n| vmseal_model::id::TaskId::from_bytes([n; 16]);
    let at = Location::parse("rbd:rbd/web01").unwrap();

    // Another client: as another host's helper it has the lock.
    let held = Served::open(&tool(&lab), &at, "elsewhere").unwrap();
    let told = lab.run(encrypt(&[], SourceFate::Wipe));
    assert_eq!((told.state, told.code), (TaskState::Failed, Some(Code::VolumeInUse)), "{told:?}");
    assert!(told.message.contains("127.0.0.1:0/"), "who: {}", told.message);
    assert!(told.hint.contains("rbd status rbd/web01"), "{}", told.hint);
    let error = Served::open(&tool(&lab), &at, "here").unwrap_err();
    assert!(error.to_string().contains("127.0.0.1:0/"), "{error}");
    assert!(error.hint().contains("vmseal-agent fence-rbd rbd/web01"), "{}", error.hint());
    drop(held);

    ceph.rbd(&["snap", "create", "rbd/web01@before"]);
    let told = lab.run_as(id(2), encrypt(&[], SourceFate::Wipe));
    assert!(told.message.contains("1 snapshots") && told.hint.contains("rbd snap purge"), "{told:?}");
    ceph.rbd(&["snap", "purge", "rbd/web01"]);

    for feature in ["object-map", "exclusive-lock"] {
        ceph.rbd(&["feature", "disable", "rbd/web01", feature]);
    }
    let told = lab.run_as(id(3), encrypt(&[], SourceFate::Wipe));
    assert!(told.hint.contains("rbd feature enable rbd/web01 exclusive-lock"), "{told:?}");

    ceph.rbd(&["rm", "rbd/web01"]);
    let told = lab.run_as(id(4), encrypt(&[], SourceFate::Wipe));
    assert_eq!(told.code, Some(Code::NotFound), "{told:?}");
}

#[test]
fn helper_that_dies_is_replaced_and_one_whose_image_was_held_elsewhere_is_not() {
    let Some((lab, ceph)) = lab() else { return };
    ceph.rbd(&["create", "--size", "32M", "rbd/vol"]);
    let at = Location::parse("rbd:rbd/vol").unwrap();
    let served = Served::open(&tool(&lab), &at, "disk").unwrap();
    let channel = served.channel().unwrap();
    let block = OwnerBlock::NEVER_HELD.taken_by(HostId::from_bytes([1; 16]));
    block.write(&channel).unwrap();
    drop(channel);
    served.remember_owner(&block.encode()).unwrap();

    let first = served.pid().unwrap();
    kill(first);
    let until = Instant::now() + Duration::from_secs(30);
    while served.pid().is_none_or(|pid| pid == first) {
        assert!(Instant::now() < until, "no other helper came");
        std::thread::yield_now();
    }
    let channel = served.channel().unwrap();
    assert_eq!(OwnerBlock::read(&channel).unwrap(), block);
    drop(channel);

    // An agent that comes back finds the helper by what it wrote down.
    let adopted = Served::adopt(&tool(&lab), &at, "disk");
    assert_eq!(adopted.pid(), served.pid());
    drop(adopted);

    // The host is thought dead: another takes its place, writes, and gives the image back. Stopped, so that nothing of
    // ours comes in between.
    let second = served.pid().unwrap();
    stop(second);
    let elsewhere = Tool::new(&crate::config::AgentConfig {
        state_dir: lab.scratch.path().join("elsewhere"),
        run_dir: lab.scratch.path().join("run2"),
        ..lab.config()
    })
    .unwrap();
    println!("{}", elsewhere.fence(&at).unwrap());
    let taken = Served::open(&elsewhere, &at, "disk").unwrap();
    let channel = taken.channel().unwrap();
    block.taken_by(HostId::from_bytes([2; 16])).write(&channel).unwrap();
    drop(channel);
    drop(taken);
    kill(second);
    let error = served.channel().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut, "nobody serves it here any more");
    let log = fs::read_to_string(lab.scratch.path().join("log/rbd-disk.log")).unwrap();
    assert!(log.contains("was held by another host meanwhile"), "{log}");
}

fn kill(pid: i32) {
    // SAFETY: a process of this test.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

fn stop(pid: i32) {
    // SAFETY: a process of this test.
    unsafe { libc::kill(pid, libc::SIGSTOP) };
}

#[test]
fn unreachable_cluster_is_said_within_the_time_a_start_has() {
    let scratch = crate::scratch::Scratch::new();
    let lab = Lab::new();
    if tool_without_cluster(&lab).check().is_err() {
        println!("skipped: librbd is missing");
        return;
    }
    let conf = scratch.path().join("ceph.conf");
    // Nobody listens there.
    fs::write(&conf, "[global]\nmon host = v2:127.0.0.1:1\nauth client required = none\n").unwrap();
    let config = crate::config::AgentConfig { ceph_conf: Some(conf), ..lab.config() };
    let began = Instant::now();
    let error = Tool::new(&config).unwrap().info(&Location::parse("rbd:rbd/x").unwrap()).unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
    let text = error.to_string();
    assert!(text.contains("no connection to the Ceph cluster") && text.contains("ceph -s"), "{text}");
}

fn tool_without_cluster(lab: &Lab) -> Tool {
    Tool::new(&lab.config()).unwrap()
}

#[test]
fn missing_library_is_named_with_its_package() {
    // In a mount namespace of its own the directories with the libraries are empty but for what the program needs.
    let lab = Lab::new();
    let program = lab.config().rbd_program();
    let script = format!(
        "set -e\nfor lib in librbd.so.1 librados.so.2; do\n  for dir in /usr/lib/*-linux-gnu /usr/lib64 /usr/lib; do\n    \
         if [ -e \"$dir/$lib\" ]; then mount --bind /dev/null \"$(readlink -f \"$dir/$lib\")\"; fi\n  done\ndone\nexec {} check",
        program.display()
    );
    let done = Command::new("unshare").args(["--mount", "sh", "-c", &script]).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    if done.status.code() == Some(1) && said.contains("unshare failed") {
        println!("skipped: no mount namespace can be had here ({})", said.trim());
        return;
    }
    assert_eq!(done.status.code(), Some(6), "{said}");
    assert!(said.contains("librados.so.2 cannot be loaded") && said.contains("librados2"), "{said}");
    let error = crate::rbd::tool::error_of(done.status.code(), "the libraries", &said);
    assert_eq!(error.code(), Code::HostNotReady);
    assert!(error.to_string().starts_with("Ceph's library cannot be used: librados.so.2"), "{error}");
    assert!(error.hint().contains("apt install librbd1"), "{}", error.hint());
}
