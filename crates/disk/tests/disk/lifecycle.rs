//! Keeper and worker: birth, orders, bad setups, ends.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{
            net::{UnixListener, UnixStream},
            process::ExitStatusExt,
        },
    },
    process::Command,
};

use vmseal_disk::frame;
use vmseal_model::control::{ControlReply, ControlRequest};

use crate::{
    nbd_client::*,
    rig::{BINARY, MIB, Plan, Rig, Scratch, Spec, kill, pattern, spawn, wait_gone},
};

#[test]
fn status_tells_who_serves_what() {
    let mut rig = Plan::new(&[
        Spec::fixed(MIB),
        Spec { detached_header: true, payload_offset: 0, ..Spec::growing(MIB) },
    ])
    .start();
    let status = rig.status();
    assert_eq!(status.vm, rig.plan.vm);
    assert_eq!(status.keeper_pid as u32, rig.keeper.id());
    assert_eq!(status.version, env!("CARGO_PKG_VERSION"));
    assert_eq!(status.secret_memory, vmseal_keys::protection().to_string());
    let stored: Vec<_> = status.disks.iter().map(|disk| (disk.target.as_str(), disk.stored_bytes)).collect();
    assert_eq!(stored, [("vda", MIB), ("vdb", 0)]);
    let mut client = Client::connect(&rig.plan.disks[1].socket).unwrap();
    client.write(0, &[1; 1024], 0).unwrap();
    client.read(0, 512).unwrap();
    let status = rig.status();
    let disk = &status.disks[1];
    assert_eq!((disk.written_bytes, disk.read_bytes, disk.stored_bytes), (1024, 512, 1024));
    assert_eq!(disk.client_pid as u32, std::process::id());
    drop(client);
    assert_eq!(rig.stop(true), ControlReply::Stopping);
    assert_eq!(rig.wait_for_keeper().code(), Some(0));
}

#[test]
fn order_to_end_is_refused_while_a_client_is_there_unless_forced() {
    let mut rig = Rig::with(Spec::fixed(MIB));
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    let ControlReply::Refused { message } = rig.stop(false) else { panic!("it was not refused") };
    assert_eq!(message, format!("vda is in use by process {}", std::process::id()));
    client.write(0, &pattern(1, 4096), 0).unwrap();
    let worker = rig.status().worker_pid;
    assert_eq!(rig.stop(true), ControlReply::Stopping);
    assert!(client.is_closed());
    assert_eq!(rig.wait_for_keeper().code(), Some(0));
    wait_gone(worker);
    assert!(rig.disk().stored_plain()[..4096] == pattern(1, 4096));
}

#[test]
fn order_to_end_without_a_client_ends_both() {
    let mut rig = Rig::with(Spec::fixed(MIB));
    drop(Client::connect(&rig.disk().socket).unwrap());
    let worker = rig.status().worker_pid;
    // The connection just dropped may still be known; then the order is refused, and right to be given again.
    while rig.stop(false) != ControlReply::Stopping {}
    assert_eq!(rig.wait_for_keeper().code(), Some(0));
    wait_gone(worker);
}

#[test]
fn sigterm_to_either_ends_both_in_good_order() {
    for to_worker in [false, true] {
        let mut rig = Rig::with(Spec::fixed(MIB));
        let worker = rig.status().worker_pid;
        kill(if to_worker { worker } else { rig.keeper.id() as i32 }, libc::SIGTERM);
        assert_eq!(rig.wait_for_keeper().code(), Some(0), "{}", rig.log());
        wait_gone(worker);
        assert!(rig.log().contains("ending on a signal"), "{}", rig.log());
    }
}

#[test]
fn keeper_that_is_killed_takes_its_worker_along() {
    let mut rig = Rig::with(Spec::fixed(MIB));
    let worker = rig.status().worker_pid;
    rig.keeper.kill().unwrap();
    assert_eq!(rig.wait_for_keeper().signal(), Some(libc::SIGKILL));
    wait_gone(worker);
}

#[test]
fn agents_death_changes_nothing_and_the_keeper_has_a_session_of_its_own() {
    let mut rig = Rig::with(Spec::fixed(MIB));
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    drop(rig.setup_socket.take());
    client.write(0, &[3; 512], 0).unwrap();
    // A worker started after that is served as well.
    let worker = rig.status().worker_pid;
    kill(worker, libc::SIGKILL);
    wait_gone(worker);
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    assert_eq!(client.read(0, 512).unwrap(), [3; 512]);
    assert_ne!(rig.status().worker_pid, worker);
    let keeper = rig.keeper.id() as i32;
    // SAFETY: getsid takes an integer.
    assert_eq!(unsafe { libc::getsid(keeper) }, keeper);
}

#[test]
fn agent_sees_the_keepers_end_on_the_setup_socket() {
    let rig = Rig::with(Spec::fixed(MIB));
    let mut setup = rig.setup_socket.as_ref().unwrap();
    while rig.stop(false) != ControlReply::Stopping {}
    assert_eq!(setup.read(&mut [0; 1]).unwrap(), 0);
}

/// Descriptors of a process by number and target.
fn descriptors(pid: i32) -> Vec<(i32, String)> {
    let mut all: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| {
            let entry = entry.unwrap();
            let target = fs::read_link(entry.path()).ok()?;
            Some((entry.file_name().to_str()?.parse().ok()?, target.to_string_lossy().into_owned()))
        })
        .collect();
    all.sort();
    all
}

#[test]
fn processes_hold_the_descriptors_they_need_and_no_others() {
    // An agent that forgot close-on-exec.
    let scratch = Scratch::new();
    let leak = File::create(scratch.path("forgotten")).unwrap();
    // SAFETY: F_SETFD sets a flag of an open descriptor.
    unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&leak), libc::F_SETFD, 0) };
    let rig = Rig::with(Spec::fixed(MIB));
    let worker = rig.status().worker_pid;
    for pid in [worker, rig.keeper.id() as i32] {
        let all = descriptors(pid);
        let files = |name: &str| all.iter().filter(|(_, target)| target.contains(name)).count();
        assert_eq!(files("forgotten"), 0, "{all:?}");
        assert_eq!(files("vda.img"), 1, "{all:?}");
        // Keeper: setup, control, disk, and to its worker. Worker: control, disk, twice to its keeper, and another while
        // it answers.
        assert!((4..=5).contains(&files("socket:")), "{all:?}");
        let above: Vec<_> = all.iter().filter(|(fd, _)| *fd > 2).map(|(_, target)| target.as_str()).collect();
        let own = rig.plan.scratch.0.to_str().unwrap();
        let known = |target: &&str| {
            target.starts_with("socket:")
                || target.starts_with("/secretmem")
                || target.starts_with("/memfd:")
                || target == &"anon_inode:[signalfd]"
                || target == &"anon_inode:[eventfd]"
                || target.starts_with(own)
        };
        assert!(above.iter().all(known), "{all:?}");
    }
    let status = fs::read_to_string(format!("/proc/{worker}/limits")).unwrap();
    let core = status.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
}

/// A setup that cannot be served: refused once on the control socket, then both end with code 2.
fn refused(change: impl FnOnce(&mut Plan)) -> String {
    let mut plan = Plan::new(&[Spec::fixed(MIB)]);
    change(&mut plan);
    let before = fs::read(&plan.disks[0].file).unwrap();
    let mut rig = plan.start();
    let ControlReply::Refused { message } = rig.ask(&ControlRequest::Status) else {
        panic!("it was not refused")
    };
    assert_eq!(rig.wait_for_keeper().code(), Some(2), "{}", rig.log());
    assert_eq!(fs::read(&rig.disk().file).unwrap(), before, "the volume was not touched");
    message
}

#[test]
fn wrong_key_is_refused_before_the_first_byte() {
    let message = refused(|plan| plan.disks[0].payload[0] ^= 1);
    assert!(
        message.contains("vda") && message.contains("does not match the record's key check"),
        "{message}"
    );
    let message = refused(|plan| plan.vm = vmseal_model::id::VmId::from_random([9; 16]));
    assert!(message.contains("key check"), "{message}");
}

#[test]
fn setups_that_cannot_be_are_refused_with_a_reason() {
    let message = refused(|plan| plan.disks[0].setup.presented_bytes += 512);
    assert!(message.contains("ended early"), "{message}");
    let message = refused(|plan| plan.disks[0].setup.unit_bytes = 1000);
    assert!(message.contains("data unit"), "{message}");
    let message = refused(|plan| plan.disks[0].setup.key_slot = 3);
    assert!(message.contains("key check"), "an empty slot: {message}");
    let message = refused(|plan| plan.disks[0].setup.key_slot = 100);
    assert!(message.contains("key memory"), "a slot that is not there: {message}");
    let message = refused(|plan| plan.disks[0].setup.key_slot = u32::MAX);
    assert!(message.contains("key slot"), "{message}");
    let message = refused(|plan| plan.pid_file = "../vm.pid".into());
    assert!(message.contains("pid file"), "{message}");
    let message = refused(|plan| plan.disks[0].setup.payload_offset = 5);
    assert!(message.contains("payload offset"), "{message}");
}

#[test]
fn setup_of_another_version_or_with_missing_descriptors_is_refused() {
    let scratch = Scratch::new();
    let null = File::open("/dev/null").unwrap();
    for (setup, expected) in [
        (r#"{"version":1}"#, "cannot be read"),
        (
            r#"{"version":3,"vm":"00000000000000000000000000000001","domain":"00000000000000000000000000000001","pid_file":"","disks":[]}"#,
            "version 3",
        ),
        (
            r#"{"version":2,"vm":"00000000000000000000000000000001","domain":"00000000000000000000000000000001","pid_file":"","disks":[],"waiting":true}"#,
            "does not say which host",
        ),
        (
            r#"{"version":1,"vm":"00000000000000000000000000000001","domain":"00000000000000000000000000000001","pid_file":"","disks":[]}"#,
            "no disk",
        ),
    ] {
        let path = scratch.path("control.sock");
        let _ = fs::remove_file(&path);
        let control = UnixListener::bind(&path).unwrap();
        let (mut keeper, socket) = spawn("keeper", &scratch.path("log"));
        let fds: [BorrowedFd<'_>; 3] = [null.as_fd(), control.as_fd(), null.as_fd()];
        frame::send_raw(&socket, setup.as_bytes(), &fds).unwrap();
        let asker = UnixStream::connect(&path).unwrap();
        frame::send(&asker, &ControlRequest::Status, &[]).unwrap();
        let (reply, _) = frame::receive::<ControlReply>(&asker).unwrap().unwrap();
        let ControlReply::Refused { message } = reply else { panic!("{reply:?}") };
        assert!(message.contains(expected), "{message}");
        assert_eq!(keeper.wait().unwrap().code(), Some(2));
    }
}

#[test]
fn keeper_without_a_setup_ends_with_code_2() {
    let scratch = Scratch::new();
    let (mut keeper, socket) = spawn("keeper", &scratch.path("log"));
    drop(socket);
    assert_eq!(keeper.wait().unwrap().code(), Some(2));
    let (mut keeper, mut socket) = spawn("keeper", &scratch.path("log"));
    socket.write_all(&[0xff; 4]).unwrap();
    assert_eq!(keeper.wait().unwrap().code(), Some(2));
}

#[test]
fn command_line_explains_itself() {
    let output = Command::new(BINARY).arg("--version").output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        format!("vmseal-disk {}\n", env!("CARGO_PKG_VERSION"))
    );
    for arguments in [
        &[][..],
        &["serve"],
        &["keeper", "x"],
        &["worker"],
        &["worker", "a", "b"],
        &["keeper"],
        &["job"],
        &["worker", "1", "0"],
    ] {
        let output =
            Command::new(BINARY).args(arguments).stdin(std::process::Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).starts_with("usage: vmseal-disk"), "{arguments:?}");
    }
}

#[test]
fn worker_without_its_keeper_ends() {
    let scratch = Scratch::new();
    let (mut worker, _socket) = {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new(BINARY);
        command.args(["worker", "1", "0"]).stderr(File::create(scratch.path("log")).unwrap());
        let fd = std::os::fd::AsRawFd::as_raw_fd(&theirs);
        // SAFETY: dup2 is async-signal-safe, and `fd` is open until after the spawn.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(&mut command, move || {
                if libc::dup2(fd, 3) < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
            });
        }
        (command.spawn().unwrap(), ours)
    };
    assert_eq!(worker.wait().unwrap().code(), Some(2));
    assert!(fs::read_to_string(scratch.path("log")).unwrap().contains("has no keeper"));
}
