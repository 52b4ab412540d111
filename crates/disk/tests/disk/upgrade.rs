//! Another program takes over while the disk is in use; one that cannot gives way to the one before.

use std::{
    fs::{self, File, Permissions},
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::PermissionsExt,
    },
    path::PathBuf,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use vmseal_model::control::{ControlReply, ControlRequest, DiskStatus};

use crate::{
    crash::writer,
    nbd_client::*,
    rig::{BINARY, MIB, Rig, Spec, kill, pattern, wait_gone},
    tools::tool,
};

/// A copy of a program in the rig's directory.
pub(crate) fn copy(rig: &Rig, of: &str, name: &str) -> PathBuf {
    let path = rig.path(name);
    fs::copy(of, &path).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    path
}

pub(crate) fn upgrade(rig: &Rig, program: &PathBuf) -> ControlReply {
    let file = File::open(program).unwrap();
    rig.ask_with(&ControlRequest::Upgrade, &[file.as_fd()])
}

/// Waits for a worker other than that one.
fn next_worker(rig: &Rig, before: i32) -> DiskStatus {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let status = rig.status();
        if status.worker_pid != before {
            return status;
        }
        assert!(Instant::now() < deadline, "no other worker");
    }
}

fn program_of(pid: i32) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/exe")).unwrap()
}

#[test]
fn no_acknowledged_write_is_lost_when_the_program_is_replaced_under_load() {
    let rig = Rig::with(Spec::fixed(16 * MIB));
    let stop = Arc::new(AtomicBool::new(false));
    let (sender, acknowledged) = mpsc::channel();
    let writers: Vec<_> = (0..2)
        .map(|part| {
            let (socket, stop, sender) = (rig.disk().socket.clone(), stop.clone(), sender.clone());
            thread::spawn(move || writer(&socket, part, &stop, &sender))
        })
        .collect();
    let mut worker = rig.status().worker_pid;
    for round in 0..4 {
        for _ in 0..20 {
            acknowledged.recv().unwrap();
        }
        let program = copy(&rig, BINARY, &format!("vmseal-disk-{round}"));
        assert_eq!(upgrade(&rig, &program), ControlReply::Upgrading);
        wait_gone(worker);
        worker = next_worker(&rig, worker).worker_pid;
        assert_eq!(program_of(worker), program);
    }
    // The file may go: a worker that dies is replaced from the same program all the same.
    fs::remove_file(rig.path("vmseal-disk-3")).unwrap();
    kill(worker, libc::SIGKILL);
    wait_gone(worker);
    worker = next_worker(&rig, worker).worker_pid;
    assert!(program_of(worker).to_str().unwrap().ends_with("vmseal-disk-3 (deleted)"));
    for _ in 0..20 {
        acknowledged.recv().unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    let model: Vec<u8> = writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect();
    let log = rig.log();
    assert_eq!(log.matches("serves from the new program").count(), 4, "{log}");
    assert!(!log.contains("disk is in use") && !log.contains("going back"), "{log}");
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    assert!(client.read(0, 16 << 20).unwrap() == model, "through the server");
    assert!(rig.disk().stored_plain() == model, "in the file");
}

#[test]
fn what_was_asked_before_is_answered_and_what_comes_after_waits_for_the_next_worker() {
    let rig = Rig::with(Spec::fixed(64 * MIB));
    let worker = rig.status().worker_pid;
    let mut busy = Client::connect(&rig.disk().socket).unwrap();
    let data = pattern(5, 1 << 20);
    for i in 0..16 {
        busy.send(READ, 0, i << 20, 1 << 20).unwrap();
    }
    let program = copy(&rig, BINARY, "new");
    let mut answers = 0;
    thread::scope(|scope| {
        scope.spawn(|| assert_eq!(upgrade(&rig, &program), ControlReply::Upgrading));
        // The answers that were sent can still be read, whole; then the end.
        let mut head = [0; 20];
        while busy.stream.read(&mut head[..1]).is_ok_and(|got| got == 1) {
            busy.stream.read_exact(&mut head[1..]).unwrap();
            assert_eq!(head[..8], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1], "data");
            let mut data = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
            busy.stream.read_exact(&mut data).unwrap();
            answers += 1;
        }
    });
    println!("{answers} of 16 were taken before the upgrade, and answered");
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    client.write(0, &data, 0).unwrap();
    assert!(client.read(0, 1 << 20).unwrap() == data);
    assert_ne!(rig.status().worker_pid, worker);
}

#[test]
fn qemu_notices_nothing_of_an_upgrade() {
    let Some(mut qemu_io) = tool("qemu-io") else { return };
    let rig = Rig::with(Spec::growing(16 * MIB));
    let options = format!(
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},file.export={},file.reconnect-delay=20",
        rig.disk().socket.display(),
        rig.disk().id
    );
    let mut qemu_io = qemu_io
        .args(["--image-opts", &options])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut orders = qemu_io.stdin.take().unwrap();
    let mut lines = BufReader::new(qemu_io.stdout.take().unwrap()).lines();
    for round in 0..3u8 {
        let started = Instant::now();
        writeln!(orders, "write -P {round} {round}M 1M").unwrap();
        let wrote =
            lines.by_ref().map(Result::unwrap).find(|line| line.contains("wrote") || line.contains("ailed"));
        assert!(wrote.as_deref().is_some_and(|line| line.contains("wrote 1048576/1048576")), "{wrote:?}");
        println!("write {round}: {} ms", started.elapsed().as_millis());
        assert_eq!(upgrade(&rig, &copy(&rig, BINARY, &format!("new-{round}"))), ControlReply::Upgrading);
    }
    writeln!(orders, "flush\nquit").unwrap();
    drop(orders);
    assert!(qemu_io.wait().unwrap().success());
    let plain = rig.disk().stored_plain();
    assert!(plain.chunks(1 << 20).enumerate().all(|(i, piece)| piece.iter().all(|byte| *byte == i as u8)));
}

#[test]
fn program_that_does_not_serve_gives_way_to_the_one_before() {
    let rig = Rig::with(Spec::fixed(MIB));
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    client.write(0, &pattern(1, 4096), FUA).unwrap();
    let text = rig.path("text");
    fs::write(&text, "no program").unwrap();
    fs::set_permissions(&text, Permissions::from_mode(0o755)).unwrap();
    // Ends well, ends badly, runs on without ever serving, is none.
    let broken = [
        copy(&rig, "/bin/true", "ends"),
        copy(&rig, "/bin/false", "fails"),
        copy(&rig, "/usr/bin/yes", "hangs"),
        text,
    ];
    for (round, program) in broken.iter().enumerate() {
        let worker = rig.status().worker_pid;
        assert_eq!(upgrade(&rig, program), ControlReply::Upgrading);
        wait_gone(worker);
        let status = next_worker(&rig, worker);
        assert_eq!(program_of(status.worker_pid), PathBuf::from(BINARY), "{}", program.display());
        let log = rig.log();
        assert_eq!(log.matches("going back to the one before").count(), round + 1, "{log}");
        let mut client = Client::connect(&rig.disk().socket).unwrap();
        assert!(client.read(0, 4096).unwrap() == pattern(1, 4096));
    }
}

#[test]
fn program_that_a_worker_could_have_made_is_refused() {
    let rig = Rig::with(Spec::fixed(MIB));
    let worker = rig.status().worker_pid;
    let refused = |reply: ControlReply, why: &str| match reply {
        ControlReply::Refused { message } => assert!(message.contains(why), "{message}"),
        other => panic!("{other:?}"),
    };
    let program = copy(&rig, BINARY, "new");
    for mode in [0o775, 0o757, 0o644] {
        fs::set_permissions(&program, Permissions::from_mode(mode)).unwrap();
        refused(upgrade(&rig, &program), "executable file of root's");
    }
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    let file = File::open(&program).unwrap();
    fs::remove_file(&program).unwrap();
    let one: [BorrowedFd<'_>; 1] = [file.as_fd()];
    refused(rig.ask_with(&ControlRequest::Upgrade, &one), "executable file of root's");
    refused(rig.ask_with(&ControlRequest::Upgrade, &[]), "one descriptor");
    refused(rig.ask_with(&ControlRequest::Upgrade, &[file.as_fd(), file.as_fd()]), "one descriptor");
    assert_eq!(rig.status().worker_pid, worker);
    assert!(Client::connect(&rig.disk().socket).is_ok());
    assert!(rig.log().contains("upgrade refused: the program can be written by others"), "{}", rig.log());
}
