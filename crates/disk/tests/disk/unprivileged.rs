//! As the agent starts it in earnest: as a user of its own, who could open none of what it was handed.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    process::Command,
};

use crate::{
    nbd_client::*,
    rig::{BINARY, MIB, Plan, Rig, Spec, kill, pattern, wait_gone},
    tools::{missing, ok, tool},
};

/// A user that owns nothing.
const NOBODY: u32 = 65534;

/// A keeper of [`NOBODY`]'s, set up by root; `None` where this test is not root.
fn start() -> Option<Rig> {
    // SAFETY: geteuid has no arguments.
    if unsafe { libc::geteuid() } != 0 {
        missing("root, to start a process as another user");
        return None;
    }
    let mut plan = Plan::new(&[Spec::growing(8 * MIB)]);
    plan.pid_file = "vm.pid".into();
    fs::write(plan.scratch.path("vm.pid"), std::process::id().to_string()).unwrap();
    fs::set_permissions(&plan.disks[0].file, fs::Permissions::from_mode(0o600)).unwrap();
    // The build directory may be closed to that user.
    let binary = plan.scratch.path("vmseal-disk");
    fs::copy(BINARY, &binary).unwrap();
    let mut command = Command::new(&binary);
    command.uid(NOBODY).gid(NOBODY);
    let rig = plan.start_with(command);
    // An upgrade replaces the file while the keeper runs.
    rig.status();
    fs::remove_file(&binary).unwrap();
    Some(rig)
}

#[test]
fn own_user_serves_and_is_restarted_with_what_it_was_handed() {
    let Some(rig) = start() else { return };
    let worker = rig.status().worker_pid;
    let status = fs::read_to_string(format!("/proc/{worker}/status")).unwrap();
    let uid = status.lines().find(|line| line.starts_with("Uid:")).unwrap();
    assert_eq!(uid.split_whitespace().collect::<Vec<_>>()[1..], [NOBODY.to_string().as_str(); 4]);
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    client.write(0, &pattern(1, 1 << 20), FUA).unwrap();
    kill(worker, libc::SIGKILL);
    wait_gone(worker);
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    assert!(client.read(0, 1 << 20).unwrap() == pattern(1, 1 << 20));
    assert!(rig.disk().stored_plain() == pattern(1, 1 << 20));
}

#[test]
fn another_process_of_the_same_user_gets_no_orders_through() {
    // All VMs' disk processes share the user: one that was taken over must not end, or use, another's.
    let Some(rig) = start() else { return };
    ok(Command::new("/bin/chmod").arg("0777").args([rig.path("control.sock"), rig.disk().socket.clone()]));
    let script = "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.settimeout(20)\ns.connect(sys.argv[1])\n\
                  s.sendall(b'\\x12\\0\\0\\0{\"ask\":\"status\"}  ')\nsys.stdout.buffer.write(s.recv(100))";
    for name in ["control.sock", "vda.sock"] {
        let Some(mut python) = tool("/usr/bin/python3") else { return };
        let output =
            python.args(["-c", script]).arg(rig.path(name)).uid(NOBODY).gid(NOBODY).output().unwrap();
        assert!(output.stdout.is_empty(), "{name} answered {:?}", output.stdout);
    }
    let log = rig.log();
    assert!(log.contains("control: refused: process ") && log.contains("(uid 65534) may not"), "{log}");
    assert!(log.contains("vda: refused: process ") && log.contains("(uid 65534) wants the disk"), "{log}");
}
