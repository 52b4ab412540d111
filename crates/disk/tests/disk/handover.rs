//! A volume that goes from one disk process to another, while a client writes and processes are killed: what was
//! acknowledged is there, and never do two write.

use std::{
    fs::{File, OpenOptions},
    net::Shutdown,
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use vhost::VhostBackend;
use vmseal_disk::frame;
use vmseal_keys::random_bytes;
use vmseal_luks::{OwnerBlock, OwnerState};
use vmseal_model::{
    control::{ControlReply, ControlRequest, ExportKind, Ownership, Phase},
    id::HostId,
};

use crate::{
    loop_device::LoopDevice,
    nbd_client::*,
    rig::{MIB, Plan, Rig, Scratch, Spec, kill, lock, pattern, wait_gone},
    vhost_driver::{ALL, Driver},
    vhost_user::{self, directory_in_memory},
};

const BYTES: u64 = 4 * MIB;

pub(crate) fn host(number: u8) -> HostId {
    HostId::from_bytes([number; 16])
}

/// A started disk of this host, with its owner block.
pub(crate) fn held_by(host: HostId, spec: Spec) -> Rig {
    let mut plan = Plan::new(&[spec]);
    plan.host = Some(host);
    OwnerBlock::NEVER_HELD.taken_by(host).write(&plan.disks[0].open()).unwrap();
    plan.start()
}

/// A reply, or why it was refused; `None` if nobody answers.
fn try_ask(rig: &Rig, request: &ControlRequest) -> Option<Result<ControlReply, String>> {
    let stream = UnixStream::connect(rig.path("control.sock")).ok()?;
    frame::send(&stream, request, &[]).ok()?;
    match frame::receive(&stream).ok()?? {
        (ControlReply::Refused { message }, _) => Some(Err(message)),
        (reply, _) => Some(Ok(reply)),
    }
}

/// The same of a process that lives, or whose keeper does.
pub(crate) fn ask(rig: &Rig, request: &ControlRequest) -> Result<ControlReply, String> {
    match rig.ask(request) {
        ControlReply::Refused { message } => Err(message),
        reply => Ok(reply),
    }
}

pub(crate) fn drain(rig: &Rig) -> Result<(), String> {
    ask(rig, &ControlRequest::Drain { limit_ms: 0 }).map(|reply| assert_eq!(reply, ControlReply::Drained))
}

fn generation(disks: &[Ownership]) -> u64 {
    let [one] = disks else { panic!("{disks:?}") };
    assert!(!one.lock_of_helper);
    one.generation
}

pub(crate) fn hand_over_all(rig: &Rig, to: HostId) -> Result<Vec<Ownership>, String> {
    match ask(rig, &ControlRequest::HandOver { to })? {
        ControlReply::HandedOver { disks } => Ok(disks),
        other => panic!("{other:?}"),
    }
}

pub(crate) fn hand_over(rig: &Rig, to: HostId) -> Result<u64, String> {
    hand_over_all(rig, to).map(|disks| generation(&disks))
}

pub(crate) fn activate_all(rig: &Rig) -> Result<Vec<Ownership>, String> {
    match ask(rig, &ControlRequest::Activate { ended: None })? {
        ControlReply::Serving { disks } => Ok(disks),
        other => panic!("{other:?}"),
    }
}

fn serving(reply: ControlReply) -> u64 {
    match reply {
        ControlReply::Serving { disks } => generation(&disks),
        other => panic!("{other:?}"),
    }
}

pub(crate) fn activate(rig: &Rig, ended: Option<HostId>) -> Result<u64, String> {
    ask(rig, &ControlRequest::Activate { ended }).map(serving)
}

pub(crate) fn resume(rig: &Rig, ended: Option<HostId>) -> Result<u64, String> {
    ask(rig, &ControlRequest::Resume { ended }).map(serving)
}

/// Asks again while the volume is in use: a process that died has its locks until the kernel has ended what it asked for.
fn soon(mut order: impl FnMut() -> Result<u64, String>) -> Result<u64, String> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match order() {
            Err(why) if why.contains("in use") && Instant::now() < deadline => thread::yield_now(),
            other => return other,
        }
    }
}

fn open(rig: &Rig) -> File {
    OpenOptions::new().read(true).write(true).open(&rig.disk().file).unwrap()
}

/// Whether a third one could take the volume now.
fn is_free(rig: &Rig) -> bool {
    lock(&open(rig), None)
}

fn block(rig: &Rig) -> OwnerBlock {
    OwnerBlock::read(&open(rig)).unwrap()
}

/// Where a client finds its disk, and its connection there.
struct Place(Mutex<(PathBuf, Option<UnixStream>)>);

impl Place {
    fn move_to(&self, rig: &Rig) {
        let mut place = self.0.lock().unwrap();
        place.0.clone_from(&rig.disk().socket);
        if let Some(stream) = place.1.take() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn connect(&self) -> Option<Client> {
        let mut place = self.0.lock().unwrap();
        let client = Client::connect(&place.0).ok()?;
        place.1 = Some(client.stream.try_clone().unwrap());
        Some(client)
    }
}

/// Writes blocks in batches until told to stop; gives what the disk holds by its acknowledgements. What was not answered is
/// sent again, wherever the disk is then.
fn write_on(
    place: &Place,
    seed: u64,
    stop: &AtomicBool,
    acknowledged: &mpsc::Sender<()>,
    mut model: Vec<u8>,
) -> Vec<u8> {
    let mut client = None;
    let mut round = seed;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        let writes: Vec<(u64, Vec<u8>)> = (0..4)
            .map(|quarter| {
                let seed = round * 4 + quarter;
                (
                    quarter * MIB + seed.wrapping_mul(0x9e37_79b9) % 240 * 4096,
                    pattern(seed, 4096 << (seed % 5)),
                )
            })
            .collect();
        loop {
            // A write that was begun ends, or the model would not know what is there.
            let Some(connected) = &mut client else {
                client = place.connect();
                continue;
            };
            match connected.write_batch(&writes) {
                Ok(()) => break,
                Err(Fault::Gone(_)) => client = None,
                Err(fault) => panic!("a write failed: {fault:?}"),
            }
        }
        for (at, data) in writes {
            model[at as usize..][..data.len()].copy_from_slice(&data);
        }
        let _ = acknowledged.send(());
    }
    model
}

/// What is killed, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    Nothing,
    SourceWorkerAfterDrain,
    SourceWorkerInHandOver,
    SourceWorkerAfterHandOver,
    SourceAfterDrain,
    SourceInHandOver,
    SourceAfterHandOver,
    WorkerBeforeActivate,
    WorkerInActivate,
    WorkerAfterActivate,
    DestinationBeforeActivate,
    DestinationInActivate,
    BothWantIt,
    SourceTakesItBack,
}

const BLOWS: [Blow; 14] = [
    Blow::Nothing,
    Blow::SourceWorkerAfterDrain,
    Blow::SourceWorkerInHandOver,
    Blow::SourceWorkerAfterHandOver,
    Blow::SourceAfterDrain,
    Blow::SourceInHandOver,
    Blow::SourceAfterHandOver,
    Blow::WorkerBeforeActivate,
    Blow::WorkerInActivate,
    Blow::WorkerAfterActivate,
    Blow::DestinationBeforeActivate,
    Blow::DestinationInActivate,
    Blow::BothWantIt,
    Blow::SourceTakesItBack,
];

fn kill_worker(rig: &Rig) {
    let pid = rig.status().worker_pid;
    kill(pid, libc::SIGKILL);
    wait_gone(pid);
}

fn kill_all(rig: &mut Rig) {
    let worker = rig.status().worker_pid;
    rig.keeper.kill().unwrap();
    rig.keeper.wait().unwrap();
    wait_gone(worker);
}

/// Some time in which an order may get anywhere. Where it gets is what the test is about; nothing depends on it.
fn some_time() {
    let [low, high, ..] = random_bytes::<16>().unwrap();
    thread::sleep(Duration::from_micros(u64::from(u16::from_le_bytes([low, high])) % 3000));
}

/// Gives an order and lets a blow fall while it is carried out.
fn beside(
    rig: &mut Rig,
    request: &ControlRequest,
    blow: impl FnOnce(&mut Rig),
) -> Option<Result<ControlReply, String>> {
    let control = rig.path("control.sock");
    let request = request.clone();
    let asked = thread::spawn(move || {
        let stream = UnixStream::connect(control).ok()?;
        frame::send(&stream, &request, &[]).ok()?;
        match frame::receive(&stream).ok()?? {
            (ControlReply::Refused { message }, _) => Some(Err(message)),
            (reply, _) => Some(Ok(reply)),
        }
    });
    some_time();
    blow(rig);
    asked.join().unwrap()
}

/// The process that serves and the host it is on.
type Side = (Rig, HostId);

/// One hand-over; gives who has the disk afterwards.
fn round(blow: Blow, (mut source, from): Side, to: HostId, place: &Place) -> Side {
    let mut destination = source.plan.elsewhere(to, true).start();
    assert_eq!(destination.status().phase, Phase::Waiting);
    assert!(activate(&destination, None).unwrap_err().contains("in use"), "the source has the lock");
    // Its client finds a disk, may look, and waits to write.
    let mut early = Client::connect(&destination.disk().socket).unwrap();
    assert_eq!(early.size, BYTES);
    early.read(0, 4096).unwrap();
    drop(early);

    drain(&source).unwrap();
    assert_eq!(block(&source).state, OwnerState::Held);
    let mut gone = false;
    match blow {
        Blow::SourceWorkerAfterDrain => kill_worker(&source),
        Blow::SourceAfterDrain => {
            kill_all(&mut source);
            gone = true;
        }
        _ => {}
    }
    if !gone {
        let order = ControlRequest::HandOver { to };
        match blow {
            Blow::SourceWorkerInHandOver => drop(beside(&mut source, &order, |rig| kill_worker(rig))),
            Blow::SourceInHandOver => {
                beside(&mut source, &order, kill_all);
                gone = true;
            }
            _ => {}
        }
    }
    if gone {
        place.move_to(&destination);
        // A free lock is not enough: the source may have ended before it gave the volume away.
        match soon(|| activate(&destination, None)) {
            Ok(_) => {}
            Err(why) => {
                assert!(why.contains(&from.to_string()) && why.contains("has not handed it over"), "{why}");
                assert_eq!((block(&destination).state, block(&destination).host), (OwnerState::Held, from));
                assert!(is_free(&destination), "a lock that was of no use is kept");
                activate(&destination, Some(from)).unwrap();
            }
        }
        assert!(!is_free(&destination));
        return (destination, to);
    }

    let given = hand_over(&source, to).unwrap();
    assert_eq!(hand_over(&source, to).unwrap(), given, "the order again");
    assert!(hand_over(&source, host(99)).unwrap_err().contains("handed over to host"));
    let says = block(&source);
    assert_eq!((says.state, says.host, says.hand_over_to), (OwnerState::HandedOver, from, Some(to)));
    assert_eq!(source.status().phase, Phase::HandedOver);
    assert!(is_free(&source), "locks are kept");
    match blow {
        Blow::SourceWorkerAfterHandOver => kill_worker(&source),
        Blow::SourceAfterHandOver => kill_all(&mut source),
        Blow::WorkerBeforeActivate => kill_worker(&destination),
        Blow::WorkerInActivate => {
            beside(&mut destination, &ControlRequest::Activate { ended: None }, |rig| kill_worker(rig));
        }
        Blow::DestinationBeforeActivate => {
            kill_all(&mut destination);
            let taken = soon(|| resume(&source, None)).unwrap();
            assert!(taken > given);
            place.move_to(&source);
            return (source, from);
        }
        Blow::DestinationInActivate => {
            beside(&mut destination, &ControlRequest::Activate { ended: None }, kill_all);
            return match soon(|| resume(&source, None)) {
                Ok(_) => {
                    place.move_to(&source);
                    (source, from)
                }
                Err(why) => {
                    assert!(why.contains(&to.to_string()) && why.contains("holds the volume"), "{why}");
                    let again = source.plan.elsewhere(to, true).start();
                    assert!(soon(|| activate(&again, None)).unwrap() > given);
                    place.move_to(&again);
                    (again, to)
                }
            };
        }
        Blow::BothWantIt => return both(source, from, destination, to, place),
        Blow::SourceTakesItBack => {
            assert!(resume(&source, None).unwrap() > given);
            assert!(activate(&destination, None).unwrap_err().contains("in use"));
            place.move_to(&source);
            return (source, from);
        }
        _ => {}
    }
    let taken = activate(&destination, None).unwrap();
    assert!(taken > given, "{taken} after {given}");
    let says = block(&destination);
    assert_eq!((says.state, says.host, says.hand_over_to), (OwnerState::Held, to, None));
    assert!(!is_free(&destination));
    if blow == Blow::WorkerAfterActivate {
        kill_worker(&destination);
    }
    assert_eq!(destination.status().phase, Phase::Serving);
    if blow != Blow::SourceAfterHandOver {
        let why = resume(&source, None).unwrap_err();
        assert!(why.contains("in use"), "{why}");
        assert_eq!(source.status().phase, Phase::HandedOver);
    }
    place.move_to(&destination);
    (destination, to)
}

/// Both want the volume at the same time. One gets it, or neither, and then each may try again.
fn both(source: Rig, from: HostId, destination: Rig, to: HostId, place: &Place) -> Side {
    loop {
        let (back, there) = thread::scope(|scope| {
            let back = scope.spawn(|| resume(&source, None));
            let there = activate(&destination, None);
            (back.join().unwrap(), there)
        });
        assert!(!is_free(&source) || back.is_err() && there.is_err());
        match (back, there) {
            (Ok(_), Ok(_)) => panic!("two have it"),
            (Ok(_), Err(_)) => {
                place.move_to(&source);
                return (source, from);
            }
            (Err(_), Ok(_)) => {
                place.move_to(&destination);
                return (destination, to);
            }
            (Err(_), Err(_)) => {}
        }
    }
}

#[test]
fn acknowledged_writes_survive_hand_overs_whatever_is_killed_and_never_do_two_write() {
    let rounds = if std::env::var_os("VMSEAL_SOAK").is_some() { 1000 } else { BLOWS.len() };
    // It outlives every process.
    let shared = Scratch::new();
    let spec = Spec { directory: Some(shared.0.clone()), ..Spec::fixed(BYTES) };
    let mut side = (held_by(host(1), spec), host(1));
    let mut model = vec![0; BYTES as usize];
    let mut writes = 0;
    let started = Instant::now();
    for number in 0..rounds {
        let blow = BLOWS[number % BLOWS.len()];
        let place = Arc::new(Place(Mutex::new((side.0.disk().socket.clone(), None))));
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, acknowledged) = mpsc::channel();
        let writer = {
            let (place, stop, sender) = (place.clone(), stop.clone(), sender.clone());
            thread::spawn(move || write_on(&place, number as u64 * 1_000_000, &stop, &sender, model))
        };
        for _ in 0..8 {
            acknowledged.recv_timeout(Duration::from_secs(20)).unwrap();
        }
        let to = host(2 + (number % 90) as u8);
        let to = if to == side.1 { host(98) } else { to };
        side = round(blow, side, to, &place);
        writes += acknowledged.try_iter().count();
        for _ in 0..8 {
            acknowledged
                .recv_timeout(Duration::from_secs(20))
                .unwrap_or_else(|_| panic!("{blow:?}: {}", side.0.log()));
        }
        stop.store(true, Ordering::Relaxed);
        model = writer.join().unwrap();
        let mut client = Client::connect(&side.0.disk().socket).unwrap();
        assert!(
            client.read(0, BYTES as u32).unwrap() == model,
            "round {number}, {blow:?}: through the server"
        );
        client.flush().unwrap();
        drop(client);
        assert!(side.0.disk().stored_plain() == model, "round {number}, {blow:?}: in the file");
        writes += 16;
    }
    println!("{rounds} hand-overs in {:?}, {writes} batches of 4 writes acknowledged", started.elapsed());
}

#[test]
fn requests_wait_while_a_disk_is_drained_and_none_is_carried_out_after_it_was_handed_over() {
    let memory = directory_in_memory("handover");
    for (directory, grows) in [(None, false), (Some(memory.0.clone()), true)] {
        let spec = if grows { Spec::growing(BYTES) } else { Spec::fixed(BYTES) };
        let source = held_by(host(1), Spec { directory, ..spec });
        let destination = source.plan.elsewhere(host(2), true).start();
        let mut client = Client::connect(&source.disk().socket).unwrap();
        client.write(0, &pattern(1, 4096), 0).unwrap();
        drain(&source).unwrap();
        client.send(WRITE, 0, 0, 4096).unwrap();
        std::io::Write::write_all(&mut client.stream, &pattern(2, 4096)).unwrap();
        client.stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert!(matches!(client.answer(0), Err(Fault::Gone(_))), "answered while drained");
        hand_over(&source, host(2)).unwrap();

        // A write of the next client waits too, and is carried out once the volume is there.
        let mut next = Client::connect(&destination.disk().socket).unwrap();
        assert!(next.read(0, 4096).unwrap() == pattern(1, 4096), "what is there may be looked at");
        next.flush().expect("there is nothing of this client's to be flushed");
        next.send(WRITE, 0, BYTES - 4096, 4096).unwrap();
        std::io::Write::write_all(&mut next.stream, &pattern(3, 4096)).unwrap();
        next.stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert!(matches!(next.answer(0), Err(Fault::Gone(_))), "answered while it waits");
        next.stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        activate(&destination, None).unwrap();
        next.answer(0).unwrap();
        assert!(next.read(BYTES - 4096, 4096).unwrap() == pattern(3, 4096));
        assert!(next.read(0, 4096).unwrap() == pattern(1, 4096), "the source wrote after it had handed over");
        // Neither in the process that had it nor in its next worker.
        kill_worker(&source);
        assert!(matches!(try_ask(&source, &ControlRequest::Status), Some(Ok(ControlReply::Status(_)))));
        assert!(next.read(0, 4096).unwrap() == pattern(1, 4096));
        if grows {
            let stored = destination.status().disks[0].stored_bytes;
            assert_eq!(stored, BYTES, "the destination sees how far the file reaches");
        }
    }
}

#[test]
fn drained_disk_goes_on_by_itself_if_nobody_hands_it_over() {
    let rig = held_by(host(1), Spec::fixed(BYTES));
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    assert_eq!(ask(&rig, &ControlRequest::Drain { limit_ms: 300 }), Ok(ControlReply::Drained));
    let asked = Instant::now();
    client.write(0, &pattern(1, 4096), 0).unwrap();
    assert!(asked.elapsed() >= Duration::from_millis(200), "it was not drained");
    assert_eq!(rig.status().phase, Phase::Serving);
    // So does the next worker of one that dies.
    assert_eq!(ask(&rig, &ControlRequest::Drain { limit_ms: 300 }), Ok(ControlReply::Drained));
    kill_worker(&rig);
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    client.write(0, &pattern(2, 4096), 0).unwrap();
    // And at once if it is told to.
    drain(&rig).unwrap();
    assert_eq!(rig.status().phase, Phase::Drained);
    resume(&rig, None).unwrap();
    client.write(0, &pattern(3, 4096), 0).unwrap();
    assert_eq!(block(&rig).generation, 1, "nothing was handed over");
}

#[test]
fn orders_that_make_no_sense_are_refused_with_what_to_do() {
    let nameless = Rig::with(Spec::fixed(BYTES));
    assert!(hand_over(&nameless, host(2)).unwrap_err().contains("without the id of its host"));
    let rig = held_by(host(1), Spec::fixed(BYTES));
    let waiting = rig.plan.elsewhere(host(2), true).start();
    assert!(resume(&waiting, None).unwrap_err().contains("waits for them"));
    assert!(drain(&waiting).unwrap_err().contains("waits for them"));
    assert!(hand_over(&waiting, host(3)).unwrap_err().contains("waits for them"));
    assert!(activate(&rig, None).is_ok(), "it serves already");
    // Given to a third.
    hand_over(&rig, host(3)).unwrap();
    let why = activate(&waiting, None).unwrap_err();
    assert!(why.contains(&host(3).to_string()) && why.contains("take it back on host"), "{why}");
    assert!(activate(&rig, None).unwrap_err().contains("were handed over"));
    // A block nobody can read is nobody's to take.
    for place in [vmseal_luks::OWNER_BLOCK_OFFSET, vmseal_luks::OWNER_COPY_OFFSET] {
        std::os::unix::fs::FileExt::write_all_at(&open(&rig), &[7; 512], place).unwrap();
    }
    for why in [activate(&waiting, Some(host(3))).unwrap_err(), resume(&rig, None).unwrap_err()] {
        assert!(why.contains("both copies") && why.contains("vmseal vm repair"), "{why}");
    }
    assert!(is_free(&rig), "a lock that was of no use is kept");
}

#[test]
fn waiting_process_ends_without_touching_the_volume() {
    let mut rig = held_by(host(1), Spec { detached_header: false, ..Spec::fixed(BYTES) });
    let mut waiting = rig.plan.elsewhere(host(2), true).start();
    let before = std::fs::read(&rig.disk().file).unwrap();
    assert_eq!(waiting.stop(false), ControlReply::Stopping);
    assert!(waiting.wait_for_keeper().success());
    assert!(std::fs::read(&rig.disk().file).unwrap() == before);
    assert_eq!(rig.stop(false), ControlReply::Stopping);
    assert!(rig.wait_for_keeper().success());
}

#[test]
fn owner_block_of_a_detached_header_is_the_one_that_is_written() {
    let mut plan = Plan::new(&[Spec { detached_header: true, payload_offset: 0, ..Spec::fixed(17 * MIB) }]);
    let header = plan.scratch.path("header");
    File::create(&header).unwrap().set_len(16 * MIB).unwrap();
    plan.host = Some(host(1));
    plan.disks[0].header = Some(header.clone());
    let source = plan.start();
    let data = source.disk().stored();
    let destination = source.plan.elsewhere(host(2), true).start();
    hand_over(&source, host(2)).unwrap();
    activate(&destination, None).unwrap();
    assert!(source.disk().stored() == data, "byte 15 MiB of the data is the guest's");
    let says = OwnerBlock::read(&File::open(&header).unwrap()).unwrap();
    assert_eq!((says.state, says.host, says.generation), (OwnerState::Held, host(2), 2));
    let header = OpenOptions::new().read(true).write(true).open(&header).unwrap();
    assert!(!lock(&header, None), "the header's bytes are locked too");
}

#[test]
fn volumes_of_a_vm_go_together_or_not_at_all() {
    let mut plan = Plan::new(&[Spec::fixed(MIB), Spec::fixed(MIB)]);
    plan.host = Some(host(1));
    let source = plan.start();
    let destination = source.plan.elsewhere(host(2), true).start();
    let files: Vec<File> = source.plan.disks.iter().map(|disk| disk.open()).collect();
    let blocks = || files.iter().map(|file| OwnerBlock::read(file).unwrap()).collect::<Vec<_>>();
    assert_eq!(hand_over_all(&source, host(2)).unwrap().len(), 2);
    // A third has the second one's lock: the first is not taken either, and free again.
    let before = blocks();
    assert!(lock(&files[1], None));
    assert!(activate_all(&destination).unwrap_err().contains("vdb"));
    assert_eq!(blocks(), before);
    assert!(lock(&files[0], None), "a lock that was of no use is kept");
    drop(files);
    // Taken by a process that died between the two blocks.
    let files: Vec<File> = source.plan.disks.iter().map(|disk| disk.open()).collect();
    before[0].taken_by(host(2)).write(&files[0]).unwrap();
    let why = ask(&source, &ControlRequest::Resume { ended: None }).unwrap_err();
    assert!(why.contains("vda") && why.contains(&host(2).to_string()), "{why}");
    assert_eq!(source.status().phase, Phase::HandedOver);
    let taken = activate_all(&destination).unwrap();
    assert_eq!(taken.iter().map(|disk| disk.generation).collect::<Vec<_>>(), [3, 2]);
    for disk in &destination.plan.disks {
        Client::connect(&disk.socket).unwrap().write(0, &pattern(1, 4096), FUA).unwrap();
    }
}

#[test]
fn block_device_is_taken_back_only_by_who_knows_that_nobody_takes_it() {
    let mut plan = Plan::new(&[Spec::fixed(MIB)]);
    let Some(device) = LoopDevice::of(&plan.disks[0].file) else { return };
    plan.disks[0].file.clone_from(&device.0);
    plan.host = Some(host(1));
    let source = plan.start();
    let destination = source.plan.elsewhere(host(2), true).start();
    let mut client = Client::connect(&source.disk().socket).unwrap();
    client.write(0, &pattern(1, 4096), 0).unwrap();
    hand_over(&source, host(2)).unwrap();
    let why = resume(&source, None).unwrap_err();
    assert!(why.contains("block device") && why.contains(&host(2).to_string()), "{why}");
    resume(&source, Some(host(2))).unwrap();
    client.write(4096, &pattern(2, 4096), 0).unwrap();
    hand_over(&source, host(2)).unwrap();
    activate(&destination, None).unwrap();
    let mut client = Client::connect(&destination.disk().socket).unwrap();
    assert!(client.read(0, 8192).unwrap() == [pattern(1, 4096), pattern(2, 4096)].concat());
}

/// A header that can be read and locked, and not written.
fn sealed_header() -> File {
    // SAFETY: a name that is terminated; the descriptor is new and this test's.
    let file = unsafe {
        let fd = libc::memfd_create(c"header".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(16 * MIB).unwrap();
    // SAFETY: seals of a descriptor that is open.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) }, 0);
    file
}

#[test]
fn hand_over_that_was_cut_short_writes_nothing_over_what_the_other_host_took() {
    let detached = Spec { detached_header: true, payload_offset: 0, ..Spec::fixed(17 * MIB) };
    let mut plan = Plan::new(&[Spec::fixed(MIB), detached]);
    let header = sealed_header();
    plan.disks[1].header = Some(format!("/proc/self/fd/{}", header.as_raw_fd()).into());
    let device = LoopDevice::of(&plan.disks[0].file);
    if let Some(device) = &device {
        plan.disks[0].file.clone_from(&device.0);
    }
    plan.host = Some(host(1));
    let source = plan.start();
    let first = source.plan.disks[0].open();
    let why = hand_over_all(&source, host(2)).unwrap_err();
    assert!(why.contains("vdb") && why.contains("owner block cannot be written"), "{why}");
    assert_eq!(source.status().phase, Phase::HandingOver);
    let given = OwnerBlock::read(&first).unwrap();
    assert_eq!((given.state, given.hand_over_to), (OwnerState::HandedOver, Some(host(2))));
    // Its lock tells the other host nothing, so what is on the medium counts, whatever was answered.
    if device.is_some() {
        let why = ask(&source, &ControlRequest::Resume { ended: None }).unwrap_err();
        assert!(why.contains("block device") && why.contains(&host(2).to_string()), "{why}");
    }
    let taken = given.taken_by(host(2));
    taken.write(&first).unwrap();
    for _ in 0..2 {
        let why = hand_over_all(&source, host(2)).unwrap_err();
        assert!(why.contains("vda") && why.contains(&host(2).to_string()), "{why}");
        assert_eq!(OwnerBlock::read(&first).unwrap(), taken);
        assert_eq!(source.status().phase, Phase::HandingOver);
    }
    if device.is_none() {
        assert!(!lock(&first, None), "the lock stays with who may have to take it back");
    }
}

#[test]
fn guest_with_its_own_queues_waits_while_its_disk_is_drained_and_goes_on() {
    let mut plan = Plan::new(&[Spec::fixed(MIB)]);
    plan.disks[0].setup.export = ExportKind::VhostUser;
    plan.host = Some(host(1));
    let rig = plan.start();
    let mut driver = Driver::new(vhost_user::connect(&rig.disk().socket), 1, ALL);
    assert_eq!(driver.write(0, &pattern(1, 4096)), 0);
    drain(&rig).unwrap();
    let (tell, told) = mpsc::channel();
    let driver = thread::scope(|scope| {
        let guest = scope.spawn(move || {
            tell.send(driver.write(8, &pattern(2, 4096))).unwrap();
            driver
        });
        told.recv_timeout(Duration::from_millis(100)).expect_err("answered while drained");
        resume(&rig, None).unwrap();
        assert_eq!(told.recv_timeout(Duration::from_secs(20)), Ok(0));
        guest.join().unwrap()
    });
    // A queue with nothing in it stops behind a shut gate, as for a migration, and is where it was.
    drain(&rig).unwrap();
    let base = driver.frontend.get_vring_base(0).unwrap();
    assert_eq!(base, 2);
    assert!(rig.disk().stored_plain()[..8192] == [pattern(1, 4096), pattern(2, 4096)].concat());
}
