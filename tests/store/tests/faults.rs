//! Media that are full, fail, or fail to flush, below the real disk process: the guest gets the error, and nothing else
//! breaks. Needs root.

use std::fs::File;

use vmseal_keys::random_bytes;
use vmseal_luks::HEADER_BYTES;
use vmseal_model::id::VmId;
use vmseal_test_store::{
    disk_process::DiskProcess,
    fault::{Action, Fault, Kind},
    history::{History, Replay},
    mount::{Caching, Mounted},
    nbd_client::{Client, Request},
    stamp::{BLOCK, stamped},
    verifier::Verifier,
    volume::{Shape, Volume},
    workload::Noted,
};

const EIO: u32 = libc::EIO as u32;
const ENOSPC: u32 = libc::ENOSPC as u32;
const MIB: u64 = 1 << 20;

/// Two disks of one VM, each in a store of its own, served by one worker.
struct Rig {
    process: DiskProcess,
    volumes: [Volume; 2],
    _mounts: [(Mounted, File); 2],
}

fn rig(shape: Shape, caching: Caching) -> Rig {
    let vm = VmId::from_random(random_bytes().unwrap());
    let volumes = [(); 2].map(|()| Volume::make(vm, shape, &stamped(0, shape.stored / BLOCK, 1)));
    let mounts = [0, 1].map(|n: usize| {
        let mounted = Mounted::new(volumes[n].medium.clone(), caching);
        let mounted = mounted.expect("the test store needs root and FUSE");
        let file = mounted.open(if caching == Caching::None { libc::O_DIRECT } else { 0 }).unwrap();
        (mounted, file)
    });
    let process = DiskProcess::start(&[(&volumes[0], &mounts[0].1), (&volumes[1], &mounts[1].1)]);
    Rig { process, volumes, _mounts: mounts }
}

fn write(block: u64, blocks: u64, stamp: u64) -> Request {
    Request::Write { offset: block * BLOCK, data: stamped(block, blocks, stamp), fua: false }
}

fn read(block: u64, blocks: u64) -> Request {
    Request::Read { offset: block * BLOCK, len: (blocks * BLOCK) as u32 }
}

fn errno(client: &mut Noted<'_>, request: &Request) -> Option<u32> {
    client.call(request).unwrap().err()
}

/// A disk of the same worker that must not notice.
fn works(client: &mut Client, stamp: u64) {
    client.call(&write(8, 8, stamp)).unwrap().unwrap();
    client.call(&Request::Flush).unwrap().unwrap();
    assert_eq!(client.call(&read(8, 8)).unwrap().unwrap(), stamped(8, 8, stamp));
}

const WAYS: [Caching; 2] = [Caching::None, Caching::Pages];

#[test]
fn full_medium_is_enospc_to_the_guest_and_writes_work_when_there_is_room_again() {
    for caching in WAYS {
        let rig = rig(Shape::growing(512, 8 * MIB), caching);
        let (full, mut other) = (&rig.volumes[0], rig.process.connect_again(1));
        let mut history = History::default();
        let mut client = Noted::new(rig.process.connect_again(0), &mut history, &full.medium);
        // Two and a half MiB fit.
        full.medium.set_capacity(Some(HEADER_BYTES + 2 * MIB + MIB / 2));
        for mib in 0..2 {
            assert_eq!(errno(&mut client, &write(mib * 2048, 2048, mib + 2)), None);
        }
        assert_eq!(errno(&mut client, &write(4096, 2048, 9)), Some(ENOSPC), "{caching:?}");
        assert_eq!(errno(&mut client, &write(4096, 2048, 10)), Some(ENOSPC), "again");
        let zeros = Request::WriteZeroes { offset: 6 * MIB, len: 65536 };
        assert_eq!(errno(&mut client, &zeros), Some(ENOSPC));
        // What is there can be read, written over and flushed.
        assert_eq!(errno(&mut client, &write(100, 16, 11)), None);
        assert_eq!(errno(&mut client, &Request::Flush), None);
        for mib in 0..4 {
            client.call(&read(mib * 2048, 2048)).unwrap().unwrap();
        }
        works(&mut other, 5);
        // Room again: the same worker goes on.
        let worker = rig.process.status().worker_pid;
        full.medium.set_capacity(None);
        assert_eq!(errno(&mut client, &write(4096, 2048, 12)), None);
        assert_eq!(errno(&mut client, &write(8 * 2048 - 8, 8, 13)), None);
        assert_eq!(errno(&mut client, &Request::Flush), None);
        client.call(&read(0, 8 * 2048)).unwrap().unwrap();
        assert_eq!(rig.process.status().worker_pid, worker);
        assert!(full.medium.failures() >= 3);
        let mut replay = Replay::new(&history, Verifier::new(&full.initial));
        replay.go_to_end().unwrap();
    }
}

#[test]
fn failing_medium_is_eio_for_what_it_fails_and_for_nothing_else() {
    for caching in WAYS {
        let rig = rig(Shape::fixed(512, MIB), caching);
        let (bad, mut other) = (&rig.volumes[0], rig.process.connect_again(1));
        let mut history = History::default();
        let mut client = Noted::new(rig.process.connect_again(0), &mut history, &bad.medium);
        let range = HEADER_BYTES + 64 * BLOCK..HEADER_BYTES + 72 * BLOCK;
        bad.medium.inject(Fault::on(Kind::Write, Action::Fail(libc::EIO)).within(range.clone()));
        bad.medium.inject(Fault::on(Kind::Read, Action::Fail(libc::EIO)).within(range));
        // Beside good ones, all under way at once.
        let requests = [write(0, 64, 2), write(64, 4, 3), write(200, 8, 4), read(68, 2), write(80, 8, 5)];
        for request in &requests {
            client.send(request).unwrap();
        }
        let answers = client.answers().unwrap();
        assert_eq!(
            answers.iter().filter(|answer| answer.as_ref().err() == Some(&EIO)).count(),
            2,
            "{caching:?}"
        );
        assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 3);
        assert_eq!(errno(&mut client, &write(60, 8, 6)), Some(EIO), "a part of it");
        works(&mut other, 5);
        assert_eq!(errno(&mut client, &Request::Flush), None, "what was acknowledged is there");
        bad.medium.heal();
        assert_eq!(errno(&mut client, &write(64, 8, 7)), None);
        client.call(&read(0, 256)).unwrap().unwrap();
        client.call(&read(64, 8)).unwrap().unwrap();
        let mut replay = Replay::new(&history, Verifier::new(&bad.initial));
        replay.go_to_end().unwrap();
    }
}

#[test]
fn failed_flush_fails_for_good_also_in_the_next_worker_and_for_no_other_disk() {
    for caching in WAYS {
        let rig = rig(Shape::fixed(512, MIB), caching);
        let (bad, mut other) = (&rig.volumes[0], rig.process.connect_again(1));
        let mut client = rig.process.connect_again(0);
        client.call(&write(0, 8, 2)).unwrap().unwrap();
        client.call(&Request::Flush).unwrap().unwrap();
        bad.medium.inject(Fault::on(Kind::Flush, Action::Fail(libc::EIO)).times(1));
        client.call(&write(0, 8, 3)).unwrap().unwrap();
        assert_eq!(client.call(&Request::Flush).unwrap(), Err(EIO), "{caching:?}");
        // The kernel says it once only; the disk goes on saying it.
        for _ in 0..3 {
            assert_eq!(client.call(&Request::Flush).unwrap(), Err(EIO));
        }
        let durable = Request::Write { offset: 0, data: stamped(0, 1, 4), fua: true };
        assert_eq!(client.call(&durable).unwrap(), Err(EIO));
        assert_eq!(client.call(&read(8, 8)).unwrap().unwrap(), stamped(8, 8, 1));
        works(&mut other, 5);
        let worker = rig.process.kill_worker();
        worker.wait();
        let (mut client, mut other) = (rig.process.connect_again(0), rig.process.connect_again(1));
        assert_eq!(client.call(&Request::Flush).unwrap(), Err(EIO), "after a restart, {caching:?}");
        works(&mut other, 6);
        assert!(rig.process.log().contains("flush failed"), "{}", rig.process.log());
    }
}

#[test]
fn flushes_that_wait_for_a_failing_one_all_fail() {
    let rig = rig(Shape::fixed(512, MIB), Caching::None);
    let bad = &rig.volumes[0];
    let mut clients: Vec<Client> = (0..3).map(|_| rig.process.connect_again(0)).collect();
    for client in &mut clients {
        client.call(&write(0, 8, 2)).unwrap().unwrap();
    }
    // The first is held and then fails: it is put in doubt while the others wait.
    bad.medium.inject(Fault::on(Kind::Flush, Action::Hold).times(1));
    for client in &mut clients {
        client.send(&Request::Flush).unwrap();
    }
    bad.medium.wait_held(1);
    bad.medium.fail_held(libc::EIO);
    for client in &mut clients {
        assert_eq!(client.answer().unwrap().1, Err(EIO));
    }
}

#[test]
fn requests_go_past_one_that_the_medium_does_not_answer() {
    let rig = rig(Shape::fixed(512, MIB), Caching::None);
    let (slow, mut other) = (&rig.volumes[0], rig.process.connect_again(1));
    let mut client = rig.process.connect_again(0);
    slow.medium.inject(Fault::on(Kind::Write, Action::Hold).times(1));
    let held = client.send(&write(0, 8, 2)).unwrap();
    slow.medium.wait_held(1);
    let later: Vec<u64> = (1..=8).map(|n| client.send(&write(n * 8, 8, 2 + n)).unwrap()).collect();
    let mut answered: Vec<u64> = later.iter().map(|_| client.answer().unwrap().0).collect();
    answered.sort_unstable();
    assert_eq!(answered, later, "they do not wait for the one that is held");
    works(&mut other, 5);
    slow.medium.release();
    let (number, answer) = client.answer().unwrap();
    assert_eq!((number, answer), (held, Ok(vec![])));
}
