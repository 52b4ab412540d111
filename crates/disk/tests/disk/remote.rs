//! Volumes on Ceph RBD, with the real `vmseal-rbd` and a real cluster of one OSD (`tests/lab/ceph.sh`). Skipped where
//! Ceph's packages are missing, unless VMSEAL_NEED_CEPH is set: `make test-rbd` installs them and sets it.

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Read, Write},
    mem,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use vmseal_keys::Dek;
use vmseal_luks::{VmsealToken, create, create::Geometry, inspect};
use vmseal_model::store_helper::{MAX_BATCH, MESSAGE_BYTES, StoreMessage, StoreOp};

use crate::{
    crash::writer,
    handover::{activate_all, hand_over_all, host, resume},
    nbd_client::{Client, FUA},
    rig::{BINARY, MIB, Plan, Rig, Scratch, Spec, kill, pattern},
    tools::{fails, ok},
};

/// A cluster, ended when dropped.
pub(crate) struct Ceph(Scratch);

impl Ceph {
    pub(crate) fn start() -> Option<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let have = |name: &str| std::env::split_paths(&path).any(|directory| directory.join(name).is_file());
        if let Some(missing) =
            ["ceph-mon", "ceph-osd", "ceph-mgr", "ceph", "rbd"].iter().find(|name| !have(name))
        {
            assert!(
                std::env::var_os("VMSEAL_NEED_CEPH").is_none(),
                "{missing} is missing: tests/lab/setup.sh ceph"
            );
            println!("skipped: {missing} is missing (`make test-rbd` installs it)");
            return None;
        }
        let ceph = Self(Scratch::new());
        ok(&mut ceph.script("start"));
        Some(ceph)
    }

    fn script(&self, order: &str) -> Command {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/lab/ceph.sh"));
        command.arg(order).arg(self.0.path("ceph"));
        command
    }

    fn conf(&self) -> PathBuf {
        self.0.path("ceph/ceph.conf")
    }

    fn rbd(&self, arguments: &[&str]) -> String {
        ok(Command::new("rbd").arg("-c").arg(self.conf()).arg("--no-progress").args(arguments))
    }
}

impl Drop for Ceph {
    fn drop(&mut self) {
        let _ = self.script("stop").status();
    }
}

/// `vmseal-rbd`, before it is known whether it gets the lock.
struct Starting(Child);

/// One that has it.
pub(crate) struct Helper {
    process: Child,
    pub(crate) owner: String,
}

impl Starting {
    fn new(ceph: &Ceph, socket: &Path, take_over: Option<&str>) -> Self {
        let binary = Path::new(BINARY).with_file_name("vmseal-rbd");
        assert!(binary.is_file(), "{} is missing: cargo build -p vmseal-rbd", binary.display());
        let mut command = Command::new(binary);
        command
            .args(["--pool", "rbd", "--image", "vol", "--socket"])
            .arg(socket)
            .arg("--conf")
            .arg(ceph.conf());
        if let Some(owner) = take_over {
            command.args(["--take-over", owner]);
        }
        Self(command.stdout(Stdio::piped()).spawn().unwrap())
    }

    /// `Err` is the exit code of one that did not get it.
    fn decide(mut self) -> Result<Helper, Option<i32>> {
        let mut line = String::new();
        BufReader::new(self.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        match line.trim_end().strip_prefix("owner ") {
            Some(owner) => Ok(Helper { process: self.0, owner: owner.into() }),
            None => Err(self.0.wait().unwrap().code()),
        }
    }
}

impl Helper {
    pub(crate) fn start(ceph: &Ceph, socket: &Path, take_over: Option<&str>) -> Self {
        Starting::new(ceph, socket, take_over).decide().expect("the lock is free")
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Ends in order, which gives the lock back.
    fn end(mut self) {
        kill(self.process.id() as i32, libc::SIGTERM);
        assert!(self.process.wait().unwrap().success());
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A listening socket that keeps packets apart.
fn packet_listener(path: &Path) -> OwnedFd {
    // SAFETY: sockaddr_un is plain data and long enough for the path; the descriptor is new and ours alone.
    unsafe {
        let mut address: libc::sockaddr_un = mem::zeroed();
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        let bytes = path.as_os_str().as_bytes();
        assert!(bytes.len() < address.sun_path.len());
        for (to, from) in address.sun_path.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        let fd = libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0);
        assert!(fd >= 0);
        let length = mem::size_of_val(&address) as libc::socklen_t;
        assert_eq!(libc::bind(fd, (&raw const address).cast(), length), 0);
        assert_eq!(libc::listen(fd, 8), 0);
        OwnedFd::from_raw_fd(fd)
    }
}

/// A disk whose image is in the cluster, with our header; not started yet.
pub(crate) fn plan(ceph: &Ceph, bytes: u64) -> Plan {
    let mut plan = Plan::new(&[Spec::fixed(bytes)]);
    let socket = plan.scratch.path("store.sock");
    let disk = &mut plan.disks[0];
    let dek = Dek::from_payload_slice(&disk.payload).unwrap();
    let header = create(&dek, disk.id, &Geometry::attached(512), &VmsealToken::default()).unwrap();
    OpenOptions::new().write(true).open(&disk.file).unwrap().write_all_at(&header, 0).unwrap();
    ceph.rbd(&["import", disk.file.to_str().unwrap(), "rbd/vol"]);
    disk.store = Some(packet_listener(&socket));
    plan
}

/// Puts what is in the cluster where the rig looks for the volume's bytes.
fn export(ceph: &Ceph, rig: &Rig) {
    std::fs::remove_file(&rig.disk().file).unwrap();
    ceph.rbd(&["export", "rbd/vol", rig.disk().file.to_str().unwrap()]);
}

#[test]
fn volume_in_ceph_is_ciphertext_under_our_header() {
    let Some(ceph) = Ceph::start() else { return };
    let plan = plan(&ceph, 8 * MIB);
    let socket = plan.scratch.path("store.sock");
    let helper = Helper::start(&ceph, &socket, None);
    let rig = plan.start();
    assert_eq!(rig.status().disks[0].stored_bytes, 8 * MIB);
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    let mut model = vec![0; 8 << 20];
    for (at, length) in
        [(0, 512), (4096, 4096), (MIB - 512, 3 << 20), (5 * MIB + 1024, 1536), (8 * MIB - 512, 512)]
    {
        let data = pattern(at, length);
        client.write(at, &data, if length == 512 { FUA } else { 0 }).unwrap();
        model[at as usize..][..length].copy_from_slice(&data);
    }
    client.request(crate::nbd_client::WRITE_ZEROES, 0, 2 * MIB, 300 << 10).unwrap();
    model[2 << 20..][..300 << 10].fill(0);
    client.flush().unwrap();
    assert_eq!(client.read(0, 8 << 20).unwrap(), model);
    client.request(crate::nbd_client::TRIM, 0, 6 * MIB, 1 << 20).unwrap();
    assert_eq!(client.read(0, 6 << 20).unwrap(), model[..6 << 20]);
    export(&ceph, &rig);
    let stored = rig.disk().stored_plain();
    assert!(stored[..6 << 20] == model[..6 << 20], "what lies in the cluster decrypts to what was written");
    let raw = rig.disk().stored();
    assert!(
        !raw.windows(64).any(|window| window == &model[MIB as usize..][..64]),
        "plaintext in the cluster"
    );
    let mut volume = File::open(&rig.disk().file).unwrap();
    let verdict = inspect(&mut volume, Some(false)).unwrap();
    assert!(verdict.accepted(), "{verdict}");
    // Others are kept out while it is served.
    let told = fails(
        Command::new("rbd")
            .arg("-c")
            .arg(ceph.conf())
            .args(["bench", "rbd/vol", "--io-type", "write"])
            .args(["--io-total", "4K", "--rbd-default-clone-format=2"]),
    );
    assert!(told.contains("lock") || told.contains("Read-only"), "{told}");
    drop(rig);
    drop(helper);
}

#[test]
fn requests_wait_for_the_next_helper_and_no_client_sees_an_error() {
    if std::env::var_os("VMSEAL_NEED_CEPH").is_none() {
        // A guest's disk loses its helpers in tests/e2e.
        println!("skipped: `make test-rbd` has it");
        return;
    }
    let Some(ceph) = Ceph::start() else { return };
    let plan = plan(&ceph, 16 * MIB);
    let store = plan.scratch.path("store.sock");
    let mut helper = Helper::start(&ceph, &store, None);
    let rig = plan.start();
    let stop = Arc::new(AtomicBool::new(false));
    let (sender, acknowledged) = mpsc::channel();
    let writers: Vec<_> = (0..2)
        .map(|part| {
            let (socket, stop, sender) = (rig.disk().socket.clone(), stop.clone(), sender.clone());
            thread::spawn(move || writer(&socket, part, &stop, &sender))
        })
        .collect();
    let soak = std::env::var_os("VMSEAL_SOAK").is_some();
    let (mut helpers, mut workers) = (0, 0);
    let rounds = if soak { 200 } else { 8 };
    for round in 0..rounds {
        for _ in 0..12 {
            acknowledged.recv_timeout(Duration::from_secs(60)).expect("writers go on");
        }
        if round % 4 == 3 {
            kill(rig.status().worker_pid, libc::SIGKILL);
            workers += 1;
        } else {
            helper.kill();
            helper = Helper::start(&ceph, &store, Some(&helper.owner.clone()));
            helpers += 1;
        }
    }
    for _ in 0..12 {
        acknowledged.recv_timeout(Duration::from_secs(60)).expect("writers go on");
    }
    stop.store(true, Ordering::Relaxed);
    let model: Vec<u8> = writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect();
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    assert!(client.read(0, 16 << 20).unwrap() == model, "what the disk shows");
    export(&ceph, &rig);
    assert!(rig.disk().stored_plain() == model, "what the cluster holds");
    println!("{helpers} helpers and {workers} workers killed under load");
}

/// A worker's side of the first channel, by hand: the socket, the memory that goes with it, and replies that came in one
/// packet with another.
struct Peer(File, File, VecDeque<StoreMessage>);

/// Receives a packet that comes with one descriptor.
fn receive_with_memory(socket: &File) -> Option<(StoreMessage, File)> {
    let (mut bytes, mut control) = ([0; MESSAGE_BYTES], [0u64; 8]);
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: msghdr is plain data; all zero is its empty value, and every pointer put in outlives the call. The
    // descriptor in the control message is new and ours alone.
    unsafe {
        let mut message: libc::msghdr = mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&mut part, 1);
        (message.msg_control, message.msg_controllen) =
            (control.as_mut_ptr().cast(), mem::size_of_val(&control) as _);
        let got = libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC);
        let header = libc::CMSG_FIRSTHDR(&message);
        if got != MESSAGE_BYTES as isize || header.is_null() {
            return None;
        }
        let memory = File::from_raw_fd(libc::CMSG_DATA(header).cast::<i32>().read_unaligned());
        Some((StoreMessage::decode(&bytes)?, memory))
    }
}

impl Peer {
    /// The next helper that is alive: one that was ended may have knocked before.
    fn accept(listener: &OwnedFd) -> Self {
        loop {
            // SAFETY: no address is asked for; the descriptor is new and ours alone.
            let stream = unsafe {
                let (address, length) = (std::ptr::null_mut(), std::ptr::null_mut());
                let fd = libc::accept4(listener.as_raw_fd(), address, length, libc::SOCK_CLOEXEC);
                assert!(fd >= 0);
                File::from_raw_fd(fd)
            };
            let Some((hello, memory)) = receive_with_memory(&stream) else { continue };
            assert_eq!(hello, StoreMessage::hello(hello.offset));
            let peer = Self(stream, memory, VecDeque::new());
            if (&peer.0).write(&hello.encode()).is_ok() {
                return peer;
            }
        }
    }

    fn say(&self, message: &StoreMessage) {
        assert_eq!((&self.0).write(&message.encode()).unwrap(), MESSAGE_BYTES);
    }

    fn hear(&mut self) -> StoreMessage {
        while self.2.is_empty() {
            let mut packet = [0; MESSAGE_BYTES * MAX_BATCH];
            let got = self.0.read(&mut packet).unwrap();
            self.2.extend(StoreMessage::decode_packet(&packet[..got]).expect("the helper is there"));
        }
        self.2.pop_front().expect("one came")
    }

    /// A request about 4 KiB at `offset`, and at the same place in the channel's memory.
    fn request(op: StoreOp, offset: u64) -> StoreMessage {
        let (buffer, length) = (offset as u32, 4096);
        StoreMessage { token: offset, op, flags: 0, errno: 0, offset, length, buffer }
    }

    /// Writes what the channel's memory holds; gives the errno.
    fn write(&mut self) -> i32 {
        let request = Self::request(StoreOp::Write, 0);
        self.say(&request);
        let reply = self.hear();
        assert_eq!(StoreMessage { errno: 0, ..reply }, request);
        reply.errno as i32
    }

    /// Fills the first places of the memory with a byte and asks for all of them to be written; hears nothing yet.
    fn begin_writes(&self, byte: u8) {
        for place in 0..IN_FLIGHT {
            self.1.write_all_at(&[byte; 4096], place * 4096).unwrap();
            self.say(&Self::request(StoreOp::Write, place * 4096));
        }
    }

    /// The outcomes of what was begun.
    fn end_writes(&mut self) -> Vec<i32> {
        (0..IN_FLIGHT).map(|_| self.hear().errno as i32).collect()
    }

    /// The first byte of each place, as the cluster has it.
    fn read_back(&mut self) -> Vec<u8> {
        let mut found = Vec::new();
        for place in 0..IN_FLIGHT {
            self.say(&Self::request(StoreOp::Read, place * 4096));
            assert_eq!(self.hear().errno, 0);
            let mut bytes = [0; 4096];
            self.1.read_exact_at(&mut bytes, place * 4096).unwrap();
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a write is whole or not there");
            found.push(bytes[0]);
        }
        found
    }
}

/// Requests under way when an owner is stopped.
const IN_FLIGHT: u64 = 32;

/// Stops a process, and lets it go on when dropped.
struct Stopped(i32);

impl Stopped {
    fn new(process: &Child) -> Self {
        kill(process.id() as i32, libc::SIGSTOP);
        Self(process.id() as i32)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        kill(self.0, libc::SIGCONT);
    }
}

#[test]
fn of_two_owners_one_writes() {
    let Some(ceph) = Ceph::start() else { return };
    ceph.rbd(&["create", "--size", "16M", "rbd/vol"]);
    let set = |name: &str| std::env::var_os(name).is_some();
    let rounds = if set("VMSEAL_SOAK") {
        1000
    } else if set("VMSEAL_NEED_CEPH") {
        50
    } else {
        8
    };
    let sockets = [ceph.0.path("a.sock"), ceph.0.path("b.sock")];
    let listeners = sockets.each_ref().map(|path| packet_listener(path));
    let (mut won, mut fenced, mut stopped, mut landed, mut kept_out) = ([0, 0], 0, 0, 0, 0);
    let began = Instant::now();
    for round in 0..rounds {
        let both = sockets.each_ref().map(|socket| Starting::new(&ceph, socket, None));
        let [a, b] = both.map(Starting::decide);
        let (winner, place) = match (a, b) {
            (Ok(winner), Err(Some(3))) => (winner, 0),
            (Err(Some(3)), Ok(winner)) => (winner, 1),
            (a, b) => {
                panic!("round {round}: {:?} {:?}", a.map(|a| a.owner.clone()), b.map(|b| b.owner.clone()))
            }
        };
        won[place] += 1;
        let mut first = Peer::accept(&listeners[place]);
        assert_eq!(first.write(), 0);
        if round % 4 == 1 {
            // The owner is stopped with writes under way, as a host that hangs and comes back.
            first.begin_writes(1);
            let hangs = Stopped::new(&winner.process);
            let taker = Helper::start(&ceph, &sockets[1 - place], Some(&winner.owner));
            let mut second = Peer::accept(&listeners[1 - place]);
            second.begin_writes(2);
            assert!(second.end_writes().iter().all(|errno| *errno == 0), "round {round}");
            drop(hangs);
            let outcomes = first.end_writes();
            assert!(
                outcomes.iter().all(|errno| [0, libc::ESHUTDOWN].contains(errno)),
                "round {round}: {outcomes:?}"
            );
            landed += outcomes.iter().filter(|errno| **errno == 0).count();
            kept_out += outcomes.iter().filter(|errno| **errno != 0).count();
            assert_eq!(first.write(), libc::ESHUTDOWN, "round {round}");
            assert_eq!(second.read_back(), [2; IN_FLIGHT as usize], "round {round}: a late write landed");
            stopped += 1;
            drop((winner, second));
            taker.end();
        } else if round % 2 == 0 {
            // The loser's host is told to take over: the winner is alive and does not know.
            let taker = Helper::start(&ceph, &sockets[1 - place], Some(&winner.owner));
            let mut second = Peer::accept(&listeners[1 - place]);
            assert_eq!(second.write(), 0);
            assert_eq!(first.write(), libc::ESHUTDOWN, "round {round}");
            assert_eq!(first.write(), libc::ESHUTDOWN, "round {round}: not tried again");
            assert_eq!(second.write(), 0);
            // Who expected another owner than there is takes nothing.
            let late = Starting::new(&ceph, &sockets[place], Some(&winner.owner)).decide();
            assert_eq!(late.map(|late| late.owner.clone()).err(), Some(Some(3)));
            fenced += 1;
            drop(winner);
            drop(second);
            taker.end();
        } else {
            drop(first);
            winner.end();
        }
    }
    println!(
        "{rounds} races, won {won:?}; {fenced} owners fenced while alive, {stopped} while stopped with {IN_FLIGHT} writes \
         under way each ({landed} had landed before, {kept_out} were refused after); {:?}",
        began.elapsed()
    );
}

#[test]
fn volume_in_ceph_changes_hands_with_its_lock() {
    let Some(ceph) = Ceph::start() else { return };
    let mut plan = plan(&ceph, 8 * MIB);
    plan.host = Some(host(1));
    let helper = Helper::start(&ceph, &plan.scratch.path("store.sock"), None);
    let mut there = plan.elsewhere(host(2), true);
    let store = there.scratch.path("store.sock");
    there.disks[0].store = Some(packet_listener(&store));
    let (source, destination) = (plan.start(), there.start());
    let mut client = Client::connect(&source.disk().socket).unwrap();
    client.write(MIB, &pattern(1, 65536), 0).unwrap();
    // It shows its size although it cannot have a helper yet: the image has one lock.
    assert_eq!(Client::connect(&destination.disk().socket).unwrap().size, 8 * MIB);
    assert_eq!(Starting::new(&ceph, &store, None).decide().err(), Some(Some(3)));
    assert!(activate_all(&destination).unwrap_err().contains("store helper is not connected"));
    let given = hand_over_all(&source, host(2)).unwrap();
    assert!(given.iter().all(|disk| disk.lock_of_helper && disk.generation == 1), "{given:?}");
    assert!(activate_all(&destination).unwrap_err().contains("store helper is not connected"));
    helper.end();
    let _helper = Helper::start(&ceph, &store, None);
    let deadline = Instant::now() + Duration::from_secs(20);
    let taken = loop {
        // It says that it has the lock, and connects.
        match activate_all(&destination) {
            Ok(taken) => break taken,
            Err(why) => assert!(why.contains("not connected") && Instant::now() < deadline, "{why}"),
        }
    };
    assert!(taken.iter().all(|disk| disk.lock_of_helper && disk.generation == 2), "{taken:?}");
    assert!(resume(&source, None).unwrap_err().contains("store helper is not connected"));
    let mut client = Client::connect(&destination.disk().socket).unwrap();
    assert!(client.read(MIB, 65536).unwrap() == pattern(1, 65536));
    client.write(2 * MIB, &pattern(2, 65536), FUA).unwrap();
    assert!(client.read(2 * MIB, 65536).unwrap() == pattern(2, 65536));
}
