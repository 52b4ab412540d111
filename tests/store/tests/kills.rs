//! Workers that are killed with requests under way, some of them held by the medium: no acknowledged write is lost, none
//! comes late. Clients do as QEMU does: connect again, send again what was not answered. Needs root.

use std::time::Duration;

use vmseal_keys::random_bytes;
use vmseal_model::id::VmId;
use vmseal_test_store::{
    disk_process::DiskProcess,
    fault::{Action, Fault, Kind},
    history::{History, Replay},
    mount::{Caching, Mounted},
    nbd_client::Request,
    seed::Random,
    stamp::{BLOCK, stamped},
    verifier::Verifier,
    volume::{Shape, Volume},
    workload::{Noted, Workload},
};

/// `make test` kills a few times, `VMSEAL_SOAK=1` often.
fn rounds() -> u64 {
    if std::env::var_os("VMSEAL_SOAK").is_some() { 500 } else { 10 }
}

fn kill_under_load(shape: Shape, caching: Caching, mut random: Random) {
    let vm = VmId::from_random(random_bytes().unwrap());
    let volume = Volume::make(vm, shape, &stamped(0, shape.stored / BLOCK, 1));
    let mounted = Mounted::new(volume.medium.clone(), caching).expect("the test store needs root and FUSE");
    let file = mounted.open(if caching == Caching::None { libc::O_DIRECT } else { 0 }).unwrap();
    let process = DiskProcess::start(&[(&volume, &file)]);
    let mut history = History::default();
    let mut workload = Workload::new(shape, Random::new(random.next_u64()));
    let mut client = Noted::new(process.connect_again(0), &mut history, &volume.medium);
    let whole = Request::Read { offset: 0, len: shape.presented as u32 };
    let (mut again, mut held_at_kill) = (0, 0);
    for _ in 0..rounds() {
        // Some requests that end, then some that do not all.
        for _ in 0..random.below(12) {
            client.send(&workload.change()).unwrap();
        }
        for answer in client.answers().unwrap() {
            answer.unwrap();
        }
        let held = random.below(4);
        let kind = if random.chance(1, 2) { Action::Hold } else { Action::HoldAnswer };
        volume.medium.inject(Fault::on(Kind::Write, kind).after(random.below(4)).times(held));
        for _ in 0..16 {
            client.send(&workload.change()).unwrap();
        }
        // Some were answered already. Behind a write that is held, the page cache holds all others.
        if held == 0 {
            for _ in 0..random.below(4) {
                client.answer().unwrap().unwrap();
            }
        }
        let worker = process.kill_worker();
        held_at_kill += volume.medium.held();
        volume.medium.heal();
        // What was held is done when the worker is gone, as far as it can go before that, and in either order.
        worker.ends_within(Duration::from_millis(20));
        if random.chance(1, 2) {
            volume.medium.release();
        } else {
            volume.medium.release_backwards();
        }
        worker.wait();
        while client.answer().is_ok() {}
        let requests = client.reconnect(process.connect_again(0));
        again += requests.len();
        for request in &requests {
            client.send(request).unwrap();
        }
        for answer in client.answers().unwrap() {
            answer.unwrap();
        }
        client.call(&whole).unwrap().unwrap();
    }
    drop(client);
    assert_eq!(process.log().matches("died (signal 9)").count() as u64, rounds(), "{}", process.log());
    assert_eq!(volume.medium.held(), 0);
    drop(process);
    let mut replay = Replay::new(&history, Verifier::new(&volume.initial));
    replay.go_to_end().unwrap();
    // The same in the file, decrypted by other means than the server's.
    let nothing = [];
    let bytes = volume.medium.all_bytes();
    let states = vmseal_test_store::crash_states::CrashStates::new(bytes, &nothing, random);
    let image = states.into_iter().next().unwrap().image;
    replay.verifier.check_read(0, &volume.plain(&image)).unwrap();
    println!(
        "{caching:?}, {}: {} kills, {again} requests sent again, {held_at_kill} held when it died, {} blocks checked",
        shape.unit,
        rounds(),
        replay.verifier.checked()
    );
    assert!(again > 0, "requests were under way when workers died");
}

#[test]
fn killed_worker_of_a_direct_volume_loses_no_write_and_none_comes_late() {
    kill_under_load(Shape::fixed(512, 256 * BLOCK), Caching::None, Random::for_test("kills"));
}

#[test]
fn killed_worker_of_a_cached_volume_that_grows_loses_no_write_and_none_comes_late() {
    kill_under_load(Shape::growing(4096, 64 * 4096), Caching::Pages, Random::for_test("kills"));
}

#[test]
fn no_worker_starts_while_writes_of_a_dead_one_are_under_way() {
    let shape = Shape::fixed(512, 256 * BLOCK);
    let volume = Volume::make(VmId::from_random(random_bytes().unwrap()), shape, &stamped(0, 256, 1));
    let mounted =
        Mounted::new(volume.medium.clone(), Caching::None).expect("the test store needs root and FUSE");
    let file = mounted.open(libc::O_DIRECT).unwrap();
    let process = DiskProcess::start(&[(&volume, &file)]);
    let mut history = History::default();
    let mut client = Noted::new(process.connect_again(0), &mut history, &volume.medium);
    volume.medium.inject(Fault::on(Kind::Write, Action::Hold).times(1));
    let write = |stamp| Request::Write { offset: 0, data: stamped(0, 8, stamp), fua: false };
    client.send(&write(2)).unwrap();
    volume.medium.wait_held(1);
    // The process ends at once; what it gave to its ring does not.
    process.kill_worker().wait();
    process.wait_for_log("storage still works on what it asked for");
    assert_eq!(process.log().matches("serving").count(), 1, "{}", process.log());
    assert_eq!(volume.medium.release(), 1);
    while client.answer().is_ok() {}
    assert_eq!(client.reconnect(process.connect_again(0)), [write(2)]);
    client.call(&write(3)).unwrap().unwrap();
    client.call(&Request::Read { offset: 0, len: 4096 }).unwrap().unwrap();
    drop(client);
    let mut replay = Replay::new(&history, Verifier::new(&volume.initial));
    replay.go_to_end().unwrap();
}
