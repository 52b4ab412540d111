use std::os::unix::net::UnixListener;

use vmseal_model::{
    control::{ControlReply, ControlRequest},
    id::VmId,
    state::InnerFormat,
};

use super::*;
use crate::{backend::Keeper, control_frame, scratch::Scratch, tasks::Refusal};

const DOMAIN: DomainUuid = DomainUuid::from_bytes([1; 16]);
const DISK: DiskId = DiskId::from_bytes([4; 16]);
/// What a real one does, seen from here: one line, then it stays until it is asked to go, without a process of its own.
const READY: &str = "echo ready /dev/vmseal/$2";
const STAYS: &str = "while :; do read line <&9; done";

/// A host with ublk, whose wardens are a script.
struct Lab {
    scratch: Scratch,
    backends: Backends,
    lost: mpsc::Receiver<BackendLost>,
}

impl Lab {
    fn new(does: &str) -> Self {
        let scratch = Scratch::new();
        fs::create_dir(scratch.path().join("dev")).unwrap();
        fs::write(scratch.path().join("dev/ublk-control"), "").unwrap();
        let lab = Self::of_agent(scratch);
        fs::create_dir_all(lab.backends.config.vm_dir(DOMAIN)).unwrap();
        fs::write(lab.backends.config.ublk_socket(DOMAIN, "vda"), "").unwrap();
        lab.does(does);
        lab
    }

    /// An agent on a host that is there.
    fn of_agent(scratch: Scratch) -> Self {
        let config = AgentConfig {
            run_dir: scratch.path().join("run"),
            log_dir: scratch.path().join("log"),
            ublk_binary: Some(scratch.path().join("vmseal-ublk")),
            disk_user: String::new(),
            ..AgentConfig::default()
        };
        let (lost, heard) = mpsc::channel();
        let root = scratch.path().to_owned();
        Self { backends: Backends { root, ..Backends::new(Arc::new(config), lost) }, lost: heard, scratch }
    }

    fn again(self) -> Self {
        Self::of_agent(self.scratch)
    }

    fn does(&self, what: &str) {
        use std::os::unix::fs::PermissionsExt as _;
        let (dir, path) = (self.scratch.path().display(), self.scratch.path().join("vmseal-ublk"));
        let never = std::process::Command::new("mkfifo").arg(self.scratch.path().join("never")).status();
        assert!(never.unwrap().success());
        let text = format!(
            "#!/bin/sh\ntrap 'echo term >> {dir}/said; exit 0' TERM\necho \"$*\" >> {dir}/said\n{what}\n\
             exec 9<>{dir}/never\n{STAYS}\n"
        );
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// One line for each start and each end that was asked for.
    fn said(&self) -> Vec<String> {
        let text = fs::read_to_string(self.scratch.path().join("said")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn start(&self) -> String {
        let socket = self.backends.config.ublk_socket(DOMAIN, "vda");
        format!("--disk {DISK} --socket {} --queues 2 --depth 64 --linger 600", socket.display())
    }

    fn slot(&self) -> Arc<Slot> {
        self.backends.slot(DOMAIN)
    }

    fn have(&self) -> Result<(), BackendError> {
        self.backends.have_devices(&plan(), &self.slot())
    }

    fn end(&self) {
        self.backends.end_devices(DOMAIN, &self.slot(), false).unwrap();
    }

    fn running(&self) -> Vec<i32> {
        self.backends.find_wardens(DOMAIN).iter().map(|(_, process)| process.pid()).collect()
    }
}

fn disk(target: &str, class: DiskClass) -> PlannedDisk {
    PlannedDisk {
        target: target.into(),
        disk: DISK,
        source: "/x".into(),
        header: None,
        format: InnerFormat::Raw,
        class,
        serial: String::new(),
        read_only: false,
        in_metadata: None,
        stored: None,
    }
}

fn plan() -> Plan {
    let disks = vec![disk("vda", DiskClass::Ublk), disk("vdb", DiskClass::Compatible)];
    let vm = VmId::from_bytes([3; 16]);
    Plan { domain: DOMAIN, name: "web01".into(), vm, bound: true, cpus: 2, disks }
}

#[test]
fn warden_is_started_once_with_its_arguments_and_asked_to_end() {
    let lab = Lab::new(READY);
    lab.have().unwrap();
    lab.have().unwrap();
    assert_eq!(lab.said(), [lab.start()]);
    assert_eq!(lab.running().len(), 1);
    lab.end();
    assert_eq!(lab.said(), [lab.start(), "term".into()]);
    assert!(lab.running().is_empty());
    lab.end();
    assert!(lab.lost.try_recv().is_err(), "nobody is told of an end that was asked for");
}

#[test]
fn warden_lives_in_a_session_of_its_own_with_nothing_of_ours_open() {
    let _kept_out = fs::File::open("/dev/null").unwrap();
    let lab =
        Lab::new(&format!("{{ ps -o sid= -p $$; echo $$; ls /proc/$$/fd; }} | xargs >> $4.seen\n{READY}"));
    lab.have().unwrap();
    let seen = lab.backends.config.ublk_socket(DOMAIN, "vda").with_extension("sock.seen");
    let seen = fs::read_to_string(seen).unwrap();
    let words: Vec<&str> = seen.split_whitespace().collect();
    assert_eq!(words[0], words[1], "{seen}");
    // Ten is the script itself, as the shell reads it.
    assert!(words[2..].iter().all(|fd| ["0", "1", "2", "10", "255"].contains(fd)), "{seen}");
    lab.end();
}

#[test]
fn device_has_a_queue_for_each_cpu_up_to_four() {
    for (cpus, queues) in [(0, "--queues 1 "), (3, "--queues 3 "), (64, "--queues 4 ")] {
        let lab = Lab::new(READY);
        lab.backends.have_devices(&Plan { cpus, ..plan() }, &lab.slot()).unwrap();
        assert!(lab.said()[0].contains(queues), "{:?}", lab.said());
        lab.end();
    }
}

#[test]
fn warden_that_fails_is_told_in_its_words_with_what_to_do() {
    for (does, said) in [
        ("echo failed the disk is in use; exit 1", "the disk is in use"),
        ("exit 1", "ended without a word; see "),
        ("echo hello", "says what is not understood"),
        ("echo failed; exit 1", "says what is not understood"),
        ("echo ready /dev/sda", "made /dev/sda of it and not /dev/vmseal/"),
        ("kill -9 $$", "ended without a word"),
    ] {
        let lab = Lab::new(does);
        let refusal = Refusal::from(lab.have().unwrap_err());
        assert!(refusal.message.contains("disk vda gets no block device (ublk): "), "{refusal:?}");
        assert!(refusal.message.contains(said), "{does}: {refusal:?}");
        assert!(refusal.hint.ends_with("vmseal disk set --class compatible web01 vda"), "{refusal:?}");
        assert!(lab.running().is_empty() && lock(&lab.slot().wardens).is_empty(), "{does}");
        assert!(lab.lost.try_recv().is_err(), "{does}");
    }
    let lab = Lab::new(READY);
    fs::remove_file(lab.scratch.path().join("vmseal-ublk")).unwrap();
    assert!(lab.have().unwrap_err().to_string().contains("cannot start"), "the program is named");
}

#[test]
fn warden_of_an_earlier_agent_is_found_and_ended() {
    let lab = Lab::new(READY);
    lab.have().unwrap();
    let running = lab.running();
    let lab = lab.again();
    lab.have().unwrap();
    assert_eq!((lab.said().len(), lab.running()), (1, running), "it is not started twice");
    // By an agent that knows nothing of it yet, too.
    let lab = lab.again();
    lab.backends.clear_out(DOMAIN, Instant::now());
    assert_eq!(lab.said().last().map(String::as_str), Some("term"));
    assert!(!lab.backends.config.vm_dir(DOMAIN).exists());
}

#[test]
fn warden_that_ends_by_itself_is_told_of_and_started_again_with_the_same_arguments() {
    let lab = Lab::new(READY);
    lab.have().unwrap();
    lock(&lab.slot().wardens)[&DISK].process.kill();
    assert_eq!(*lab.lost.recv_timeout(Duration::from_secs(20)).unwrap().plan, plan());
    lab.have().unwrap();
    assert_eq!(lab.said(), [lab.start(), lab.start()]);
    lab.end();
}

#[test]
fn warden_ends_before_the_disk_process_it_brings_its_device_to() {
    let lab = Lab::new(READY);
    lab.have().unwrap();
    let listener = UnixListener::bind(lab.backends.config.control_socket(DOMAIN)).unwrap();
    let mut process = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let keeper = Keeper {
        generation: 0,
        process: Arc::new(Process::open(process.id() as i32).unwrap()),
        plan: Arc::new(plan()),
        since: Instant::now(),
        images: Default::default(),
    };
    let log = lab.scratch.path().join("said");
    thread::scope(|scope| {
        let seen = scope.spawn(|| {
            let (caller, _) = listener.accept().unwrap();
            let asked = control_frame::receive::<ControlRequest>(&caller).unwrap();
            let seen = (asked, fs::read_to_string(&log).unwrap().lines().last().map(str::to_owned));
            control_frame::send(&caller, &ControlReply::Stopping, &[]).unwrap();
            process.kill().unwrap();
            process.wait().unwrap();
            seen
        });
        lab.backends.end(&keeper, false).unwrap();
        assert_eq!(seen.join().unwrap(), (ControlRequest::Stop { force: false }, Some("term".into())));
    });
}

#[test]
fn host_without_ublk_is_found_before_anything_is_begun() {
    let lab = Lab::new(READY);
    fs::remove_file(lab.scratch.path().join("dev/ublk-control")).unwrap();
    fs::create_dir_all(lab.scratch.path().join("proc/sys/kernel")).unwrap();
    fs::write(lab.scratch.path().join("proc/sys/kernel/osrelease"), "6.1.0\n").unwrap();
    let why = super::super::Why::Starts { until: Instant::now() + Duration::from_secs(60) };
    let open = || -> Result<_, BackendError> { panic!("opened for nothing") };
    let error = lab.backends.start(plan(), why, open).unwrap_err().to_string();
    assert!(error.contains("vda") && error.contains("6.1.0 has no module ublk_drv"), "{error}");
    let mut other = plan();
    other.disks.remove(0);
    lab.backends.check_devices(&other).unwrap();
    assert!(lab.said().is_empty());
}

#[test]
fn command_line_of_another_is_no_wardens() {
    let (program, dir) = (OsStr::new("vmseal-ublk"), Path::new("/run/vmseal/libvirt-x"));
    let command = |parts: &[&str]| parts.join("\0").into_bytes();
    let id = DISK.to_string();
    let good =
        ["/usr/libexec/vmseal/vmseal-ublk", "--disk", &id, "--socket", "/run/vmseal/libvirt-x/vda.ublk.sock"];
    assert_eq!(disk_of(&command(&good), program, dir), Some(DISK));
    for (at, other) in [
        (0, "/usr/bin/vi"),
        (1, "--disks"),
        (2, "no id"),
        (3, "--sockets"),
        (4, "/run/vmseal/libvirt-y/vda.ublk.sock"),
    ] {
        let mut parts = good;
        parts[at] = other;
        assert_eq!(disk_of(&command(&parts), program, dir), None, "{other}");
    }
    assert_eq!(disk_of(b"", program, dir), None);
    assert_eq!(disk_of(b"--disk\0", program, dir), None);
}

#[test]
fn process_that_has_a_block_device_open_is_named() {
    assert_eq!(holder(Path::new("/dev/null")), None, "that is none");
    assert_eq!(holder(Path::new("/nonexistent")), None);
    let Some((path, open)) = (0..8).find_map(|n| {
        let path = PathBuf::from(format!("/dev/loop{n}"));
        let is_free = holder(&path).is_none();
        Some((fs::File::open(&path).ok().filter(|_| is_free)?, path)).map(|(open, path)| (path, open))
    }) else {
        eprintln!("skipped: no block device of this machine can be opened");
        return;
    };
    let who = holder(&path).unwrap();
    assert!(who.starts_with(&format!("process {} (", std::process::id())), "{who}");
    drop(open);
}
