use std::os::unix::net::UnixListener;

use vmseal_model::{
    class::DiskClass,
    control::{Phase, SandboxStatus},
    id::{DiskId, HostId, VmId},
    state::InnerFormat,
};

use super::*;
use vmseal_luks::{OwnerBlock, OwnerState};

use crate::{
    lock::{Claim, claim},
    scratch::Scratch,
};

const DOMAIN: DomainUuid = DomainUuid::from_bytes([1; 16]);
const VM: VmId = VmId::from_bytes([3; 16]);

fn backends(scratch: &Scratch) -> Backends {
    let config = AgentConfig {
        run_dir: scratch.path().join("run"),
        disk_user: String::new(),
        ..AgentConfig::default()
    };
    Backends::new(Arc::new(config), mpsc::channel().0)
}

fn plan() -> Plan {
    Plan { domain: DOMAIN, name: "web01".into(), vm: VM, bound: true, cpus: 1, disks: Vec::new() }
}

/// Answers one question on the VM's control socket with a status whose keeper is this test's child.
fn answer_once(backends: &Backends, vm: VmId, keeper_pid: i32) -> thread::JoinHandle<()> {
    fs::create_dir_all(backends.config.vm_dir(DOMAIN)).unwrap();
    let listener = UnixListener::bind(backends.config.control_socket(DOMAIN)).unwrap();
    let status = DiskStatus {
        vm,
        domain: DOMAIN,
        version: "0".into(),
        worker_pid: 0,
        keeper_pid,
        secret_memory: "mlock".into(),
        sandbox: SandboxStatus::default(),
        phase: Phase::default(),
        disks: Vec::new(),
    };
    thread::spawn(move || {
        let (caller, _) = listener.accept().unwrap();
        assert_eq!(control_frame::receive::<ControlRequest>(&caller).unwrap(), ControlRequest::Status);
        control_frame::send(&caller, &ControlReply::Status(status), &[]).unwrap();
    })
}

fn sleeper() -> Child {
    std::process::Command::new("sleep").arg("1000").spawn().unwrap()
}

#[test]
fn vm_without_a_process_has_none_to_take_on_or_to_end() {
    let scratch = Scratch::new();
    let backends = backends(&scratch);
    assert!(!backends.adopt(&plan()).unwrap());
    assert!(backends.status(DOMAIN).is_none());
    backends.clear_out(DOMAIN, Instant::now());
}

#[test]
fn dead_socket_of_a_killed_process_is_no_process() {
    let scratch = Scratch::new();
    let backends = backends(&scratch);
    fs::create_dir_all(backends.config.vm_dir(DOMAIN)).unwrap();
    drop(UnixListener::bind(backends.config.control_socket(DOMAIN)).unwrap());
    assert!(!backends.adopt(&plan()).unwrap());
    backends.clear_out(DOMAIN, Instant::now());
    assert!(!backends.config.vm_dir(DOMAIN).exists());
}

#[test]
fn process_of_an_earlier_agent_is_taken_on_and_its_end_is_reported() {
    let scratch = Scratch::new();
    let (lost, heard) = mpsc::channel();
    let backends = Backends { lost, ..backends(&scratch) };
    let before = Instant::now();
    let mut keeper = sleeper();
    let answering = answer_once(&backends, VM, keeper.id() as i32);
    assert!(backends.adopt(&plan()).unwrap());
    answering.join().unwrap();
    // What was decided before it was there is not about it.
    backends.clear_out(DOMAIN, before);
    assert_eq!(backends.domains(), [DOMAIN]);
    keeper.kill().unwrap();
    keeper.wait().unwrap();
    assert_eq!(*heard.recv_timeout(Duration::from_secs(20)).unwrap().plan, plan());
    assert!(backends.domains().is_empty());
}

#[test]
fn process_of_another_vm_is_not_taken_on() {
    let scratch = Scratch::new();
    let backends = backends(&scratch);
    let mut keeper = sleeper();
    let answering = answer_once(&backends, VmId::from_bytes([9; 16]), keeper.id() as i32);
    assert!(matches!(backends.adopt(&plan()), Err(BackendError::OtherVm)));
    answering.join().unwrap();
    keeper.kill().unwrap();
    keeper.wait().unwrap();
}

#[test]
fn what_open_refuses_is_the_answer_and_nothing_is_made() {
    let scratch = Scratch::new();
    let backends = backends(&scratch);
    let refused = Refusal::new(Code::Integrity, "wrong");
    let until = Instant::now() + Duration::from_secs(60);
    let answer = backends.start(plan(), Why::Starts { until }, || Err(refused.clone()));
    assert_eq!(answer, Err(refused));
    assert!(!backends.config.vm_dir(DOMAIN).exists());
}

#[test]
fn nothing_is_started_for_a_caller_that_has_given_up() {
    let scratch = Scratch::new();
    let backends = backends(&scratch);
    let why = Why::Starts { until: Instant::now() };
    let answer: Result<(), BackendError> = backends.start(plan(), why, || panic!("opened for nobody"));
    assert!(matches!(answer, Err(BackendError::TooLate)));
}

#[test]
fn process_of_a_running_guest_is_kept_and_not_replaced() {
    let scratch = Scratch::new();
    let backends = backends(&scratch);
    let mut keeper = sleeper();
    let answering = answer_once(&backends, VM, keeper.id() as i32);
    let open = || -> Result<_, BackendError> { panic!("opened although it is served") };
    backends.start(plan(), Why::Runs, open).unwrap();
    answering.join().unwrap();
    // Known from now on, so it is not even asked.
    backends.start(plan(), Why::Runs, open).unwrap();
    assert!(keeper.try_wait().unwrap().is_none());
    keeper.kill().unwrap();
    keeper.wait().unwrap();
}

#[test]
fn sockets_of_a_silent_process_stay_since_it_is_found_by_them_alone() {
    let scratch = Scratch::new();
    let backends = backends(&scratch);
    fs::create_dir_all(backends.config.vm_dir(DOMAIN)).unwrap();
    let _silent = UnixListener::bind(backends.config.control_socket(DOMAIN)).unwrap();
    backends.clear_out(DOMAIN, Instant::now());
    assert!(backends.config.control_socket(DOMAIN).exists());
}

#[test]
fn owner_block_that_says_nothing_is_written_anew_and_no_other() {
    use std::os::unix::fs::FileExt;

    let scratch = Scratch::new();
    let source = scratch.path().join("web01.vmseal");
    let file = fs::File::options().read(true).write(true).create_new(true).open(&source).unwrap();
    file.set_len(17 << 20).unwrap();
    let disk = PlannedDisk {
        target: "vda".into(),
        disk: DiskId::from_bytes([5; 16]),
        source,
        header: None,
        format: InnerFormat::Raw,
        class: DiskClass::default(),
        serial: String::new(),
        read_only: false,
        in_metadata: None,
        stored: None,
    };
    let plan = Plan { disks: vec![disk], ..plan() };
    let (here, there) = (HostId::from_bytes([1; 16]), HostId::from_bytes([2; 16]));
    let given = OwnerBlock::NEVER_HELD.taken_by(here).handed_over(here, there);
    given.write(&file).unwrap();
    let config = AgentConfig::default();
    let repaired = |plan: &Plan| repair_owner_blocks(&config, plan).join("\n");
    assert_eq!(repaired(&plan), "");
    release(&plan, Some(here));
    assert_eq!(OwnerBlock::read(&file), Ok(given), "what was handed over waits for its receiver");
    let taken = given.taken_by(there);
    taken.write(&file).unwrap();
    for host in [Some(here), None] {
        release(&plan, host);
        assert_eq!(OwnerBlock::read(&file), Ok(taken), "it is that host's");
    }
    release(&plan, Some(there));
    assert_eq!(OwnerBlock::read(&file), Ok(taken.released()));
    for place in [vmseal_luks::OWNER_BLOCK_OFFSET, vmseal_luks::OWNER_COPY_OFFSET] {
        file.write_all_at(&[1; 512], place).unwrap();
    }
    claim(&file, Claim::Volume).unwrap();
    assert!(repaired(&plan).contains("of vda was not looked at: ") && repaired(&plan).contains("in use"));
    drop(file);
    assert_eq!(repaired(&plan), "the damaged owner block of vda was written anew");
    let block = OwnerBlock::read(&fs::File::open(&plan.disks[0].source).unwrap()).unwrap();
    assert_eq!((block.state, block.generation), (OwnerState::Free, 1));
}
