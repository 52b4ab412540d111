//! Who gets in.

use std::{
    fs,
    io::Read,
    os::unix::{net::UnixStream, process::CommandExt},
    process::{Command, Stdio},
};

use vmseal_model::control::{ControlReply, ControlRequest};

use crate::{
    nbd_client::*,
    rig::{MIB, Plan, Rig, Spec},
    tools::{fails, ok, tool},
};

fn with_pid_file(content: Option<String>) -> Rig {
    let mut plan = Plan::new(&[Spec::fixed(4 * MIB)]);
    plan.pid_file = "vm.pid".into();
    if let Some(content) = content {
        fs::write(plan.scratch.path("vm.pid"), content).unwrap();
    }
    plan.start()
}

#[test]
fn process_in_the_pid_file_is_served_and_may_have_several_connections() {
    let rig = with_pid_file(Some(format!("{}\n", std::process::id())));
    let mut one = Client::connect(&rig.disk().socket).unwrap();
    let mut two = Client::connect(&rig.disk().socket).unwrap();
    one.write(0, &[1; 512], 0).unwrap();
    assert_eq!(two.read(0, 512).unwrap(), [1; 512]);
    let status = rig.status();
    assert_eq!(status.disks[0].client_pid as u32, std::process::id());
    assert_eq!(status.disks[0].refused_clients, 0);
}

#[test]
fn every_other_process_is_dropped_and_counted() {
    for content in [Some("1\n".into()), Some("nonsense".into()), None] {
        let rig = with_pid_file(content);
        for _ in 0..3 {
            assert!(greet(&rig.disk().socket).is_err());
        }
        assert_eq!(rig.status().disks[0].refused_clients, 3);
        assert_eq!(rig.log().matches("vda: refused: process").count(), 3, "{}", rig.log());
        // From now on the file is right.
        fs::write(rig.path("vm.pid"), std::process::id().to_string()).unwrap();
        assert!(Client::connect(&rig.disk().socket).is_ok());
    }
}

#[test]
fn qemu_is_known_by_libvirts_pid_file() {
    let Some(qemu_io) = tool("qemu-io") else { return };
    let rig = with_pid_file(Some("1".into()));
    let qemu_io = qemu_io.get_program().to_owned();
    let uri = rig.disk().uri();
    let text = fails(Command::new(&qemu_io).args(["-f", "raw", "-c", "write 0 64k", &uri]));
    assert!(text.contains("can't open"), "{text}");
    // As libvirt does: the pid is written before QEMU is executed by the same process.
    let script = "echo $$ > \"$1\"; shift; exec \"$@\"";
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", script, "sh"]).arg(rig.path("vm.pid")).arg(&qemu_io);
    ok(shell.args(["-f", "raw", "-c", "write -P 7 0 64k", "-c", "read -P 7 0 64k", &uri]));
}

#[test]
fn second_process_is_refused_until_the_first_is_gone() {
    let Some(nbdinfo) = tool("nbdinfo") else { return };
    let rig = Rig::with(Spec::fixed(MIB));
    let nbdinfo = || {
        let mut command = Command::new(nbdinfo.get_program());
        command.args(["--size", &rig.disk().uri()]);
        command
    };
    let client = Client::connect(&rig.disk().socket).unwrap();
    fails(&mut nbdinfo());
    assert!(rig.log().contains("is using"), "{}", rig.log());
    assert!(rig.status().disks[0].refused_clients >= 1);
    drop(client);
    assert_eq!(ok(&mut nbdinfo()).trim(), "1048576");
}

#[test]
fn connections_of_one_process_are_bounded() {
    let rig = Rig::with(Spec::fixed(MIB));
    let clients: Vec<_> = (0..16).map(|_| Client::connect(&rig.disk().socket).unwrap()).collect();
    assert!(greet(&rig.disk().socket).is_err());
    drop(clients);
    assert!(Client::connect(&rig.disk().socket).is_ok());
}

#[test]
fn other_users_reach_neither_disk_nor_control_socket() {
    // SAFETY: geteuid has no arguments.
    if unsafe { libc::geteuid() } != 0 {
        return crate::tools::missing("root, to become another user");
    }
    let rig = Rig::with(Spec::fixed(MIB));
    for name in ["vda.sock", "control.sock"] {
        let path = rig.path(name);
        Command::new("/bin/chmod").arg("0777").arg(&path).arg(&rig.plan.scratch.0).status().unwrap();
        let script = "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.settimeout(20)\n\
                      s.connect(sys.argv[1])\nsys.stdout.buffer.write(s.recv(100))";
        let Some(mut python) = tool("/usr/bin/python3") else { return };
        let output = python
            .args(["-c", script])
            .arg(&path)
            .uid(65534)
            .gid(65534)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        assert!(output.stdout.is_empty(), "{name} answered {:?}", output.stdout);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() || text.contains("ConnectionReset"), "{text}");
    }
    assert!(rig.log().matches("(uid 65534) may not use this socket").count() == 2, "{}", rig.log());
    assert!(matches!(rig.ask(&ControlRequest::Status), ControlReply::Status(_)));
}

#[test]
fn nonsense_on_the_control_socket_is_answered_and_survived() {
    let rig = Rig::with(Spec::fixed(MIB));
    let worker = rig.status().worker_pid;
    for bytes in [b"\xff\xff\xff\xff".as_slice(), b"\x02\0\0\0{}", b"\x05\0\0\0hello", b"\x09\0\0\0x"] {
        let mut stream = UnixStream::connect(rig.path("control.sock")).unwrap();
        std::io::Write::write_all(&mut stream, bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        assert!(answer.contains("refused"), "{answer:?}");
    }
    assert_eq!(rig.status().worker_pid, worker);
}
