//! A recorded workload is cut off everywhere, with everything a loss of power may do to what was not flushed, and each
//! image that results is opened and read by other means than the program's. Needs root.

use std::{collections::BTreeMap, fs::File};

use vmseal_keys::random_bytes;
use vmseal_luks::{HEADER_BYTES, Header, OwnerBlock, VmsealToken};
use vmseal_model::id::{HostId, VmId};
use vmseal_test_store::{
    crash_states::{CrashKind, CrashStates},
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

fn soak() -> bool {
    std::env::var_os("VMSEAL_SOAK").is_some()
}

fn vm() -> VmId {
    VmId::from_random(random_bytes().unwrap())
}

fn mount(volume: &Volume, caching: Caching) -> (Mounted, File) {
    let mounted = Mounted::new(volume.medium.clone(), caching).expect("the test store needs root and FUSE");
    let file = mounted.open(if caching == Caching::None { libc::O_DIRECT } else { 0 }).unwrap();
    (mounted, file)
}

/// Works on a volume through its disk process; gives what was done.
fn record(volume: &Volume, caching: Caching, requests: usize, random: Random) -> History {
    let (_mounted, file) = mount(volume, caching);
    let process = DiskProcess::start(&[(volume, &file)]);
    let mut history = History::default();
    let mut workload = Workload::new(volume.shape, random);
    let mut client = Noted::new(process.connect_again(0), &mut history, &volume.medium);
    let mut sent = 0;
    while sent < requests {
        // Some at a time, whether or not they touch each other.
        let together = 1 + workload.below(5) as usize;
        for _ in 0..together {
            client.send(&workload.change()).unwrap();
        }
        sent += together;
        client.send(&workload.read()).unwrap();
        for answer in client.answers().unwrap() {
            answer.unwrap();
        }
        client.call(&workload.read()).unwrap().unwrap();
    }
    history
}

/// Checks every crash of a recorded workload; gives how many there were, by kind.
fn check(
    name: &str,
    volume: &Volume,
    base: Vec<u8>,
    history: &History,
    random: Random,
) -> BTreeMap<&'static str, u64> {
    let (log, _) = volume.medium.take_log();
    let initial = || Verifier::new(&volume.initial);
    let mut strict = Replay::new(history, initial());
    strict.go_to_end().unwrap_or_else(|fault| panic!("{name}, while it ran: {fault}"));
    // A file that became longer may hold anything where it was not written before.
    let known = volume.shape.stored / BLOCK;
    let mut replay = Replay::new(history, initial().unknown_from(known));
    let mut counts = BTreeMap::new();
    for state in CrashStates::new(base, &log, random).exhaustive(8).samples(200) {
        replay.go_to(state.mark).unwrap_or_else(|fault| panic!("{name}, while it ran: {fault}"));
        let mut verifier = replay.verifier.clone();
        verifier.crash();
        let describe =
            || format!("{name}: crash after entry {} of {}, {:?}", state.position, log.len(), state.kind);
        if state.image.differs_within(0, HEADER_BYTES) {
            assert!(volume.header_is_accepted(&state.image), "{}: the header", describe());
        }
        verifier
            .check_read(0, &volume.plain(&state.image))
            .unwrap_or_else(|fault| panic!("{}: {fault}", describe()));
        let kind = match state.kind {
            CrashKind::Prefix => "prefixes",
            CrashKind::Torn { .. } => "torn",
            CrashKind::Chosen { .. } => "reordered",
        };
        *counts.entry(kind).or_default() += 1;
    }
    counts
}

#[test]
fn every_prefix_of_a_recorded_workload_reopens_in_a_legal_state() {
    let random = Random::for_test("prefixes");
    let requests = if soak() { 4000 } else { 250 };
    for (unit, caching) in [(512, Caching::None), (512, Caching::Pages), (4096, Caching::None)] {
        let presented = if unit == 512 { 128 * BLOCK } else { 64 * 4096 };
        for shape in [Shape::fixed(unit, presented), Shape::growing(unit, presented)] {
            let initial = stamped(0, shape.stored / BLOCK, 1);
            let volume = Volume::make(vm(), shape, &initial);
            let base = volume.medium.all_bytes();
            assert!(volume.header_is_accepted(
                &CrashStates::new(base.clone(), &[], random.clone()).next().unwrap().image
            ));
            let history = record(&volume, caching, requests, random.clone());
            let name = format!("{} {unit} {caching:?}", if shape.stored > 0 { "fixed" } else { "growing" });
            let counts = check(&name, &volume, base, &history, random.clone());
            println!("{name}: {requests} requests, legal states: {counts:?}");
            assert!(counts["prefixes"] as usize > requests / 2 && counts["reordered"] > 100, "{counts:?}");
        }
    }
}

#[test]
fn disk_that_lies_about_a_flush_is_found_out() {
    let mut random = Random::new(5);
    let shape = Shape::fixed(512, 64 * BLOCK);
    let volume = Volume::make(vm(), shape, &stamped(0, 64, 1));
    let base = volume.medium.all_bytes();
    volume.medium.inject(Fault::on(Kind::Flush, Action::Lie).after(4));
    let history = record(&volume, Caching::None, 60, random.clone());
    let (log, _) = volume.medium.take_log();
    let mut replay = Replay::new(&history, Verifier::new(&volume.initial));
    random = Random::new(random.next_u64());
    let found = CrashStates::new(base, &log, random).any(|state| {
        replay.go_to(state.mark).unwrap();
        let mut verifier = replay.verifier.clone();
        verifier.crash();
        verifier.check_read(0, &volume.plain(&state.image)).is_err()
    });
    assert!(found, "nothing was lost by a disk that did not flush");
}

#[test]
fn torn_token_write_leaves_a_header_with_the_old_or_the_new_token() {
    let volume = Volume::make(vm(), Shape::fixed(512, 8 * BLOCK), &stamped(0, 8, 1));
    let base = volume.medium.all_bytes();
    let (_mounted, file) = mount(&volume, Caching::Pages);
    let token = |text: &str| VmsealToken { records: vec![text.as_bytes().repeat(300)] };
    let old = Header::read(&file, false).unwrap().token();
    volume.medium.take_log();
    for (number, text) in ["first", "second"].iter().enumerate() {
        Header::write_token(&file, false, &token(text)).unwrap();
        volume.medium.mark(number as u64 + 1);
    }
    let (log, _) = volume.medium.take_log();
    let tokens = [old, Some(token("first")), Some(token("second"))];
    let (mut states, mut seen) = (0, [0; 3]);
    for state in CrashStates::new(base, &log, Random::new(3)) {
        let header = Header::read(&state.image.to_file().unwrap(), false)
            .unwrap_or_else(|error| panic!("entry {}, {:?}: {error}", state.position, state.kind));
        let found =
            tokens.iter().position(|token| *token == header.token()).expect("a token that was written");
        assert!(
            (state.mark as usize..=state.mark as usize + 1).contains(&found),
            "token {found} after {} were written: entry {}, {:?}",
            state.mark,
            state.position,
            state.kind
        );
        seen[found] += 1;
        states += 1;
    }
    println!("token: {states} legal states, of which old, first, second: {seen:?}");
    assert!(states > 500 && seen.iter().all(|seen| *seen > 0), "{states}: {seen:?}");
}

#[test]
fn torn_owner_block_is_the_old_or_the_new_one() {
    let volume = Volume::make(vm(), Shape::fixed(512, 8 * BLOCK), &stamped(0, 8, 1));
    let base = volume.medium.all_bytes();
    let (_mounted, file) = mount(&volume, Caching::Pages);
    volume.medium.take_log();
    let mut blocks = vec![OwnerBlock::NEVER_HELD];
    for host in [1, 2, 3u8] {
        let last = *blocks.last().unwrap();
        blocks.push(last.taken_by(HostId::from_bytes([host; 16])));
        blocks.push(
            blocks[blocks.len() - 1]
                .handed_over(HostId::from_bytes([host; 16]), HostId::from_bytes([host + 1; 16])),
        );
        blocks.push(blocks[blocks.len() - 1].released());
    }
    for (number, block) in blocks.iter().enumerate().skip(1) {
        block.write(&file).unwrap();
        volume.medium.mark(number as u64);
    }
    let (log, _) = volume.medium.take_log();
    let mut states = 0;
    for state in CrashStates::new(base, &log, Random::new(3)) {
        assert!(volume.header_is_accepted(&state.image));
        let mark = state.mark as usize;
        let found = OwnerBlock::read(&state.image.to_file().unwrap());
        let found =
            found.unwrap_or_else(|error| panic!("{error}: entry {}, {:?}", state.position, state.kind));
        let allowed = &blocks[mark..(mark + 2).min(blocks.len())];
        assert!(allowed.contains(&found), "{found:?} after {mark}: {:?}", state.kind);
        states += 1;
    }
    println!("owner block: {states} legal states, each the block before or the new one");
    assert!(states > 200, "{states}");
}

#[test]
fn failed_flush_promises_nothing_and_no_later_one_does() {
    let volume = Volume::make(vm(), Shape::fixed(512, 64 * BLOCK), &stamped(0, 64, 1));
    let base = volume.medium.all_bytes();
    let (_mounted, file) = mount(&volume, Caching::Pages);
    let process = DiskProcess::start(&[(&volume, &file)]);
    let mut history = History::default();
    let mut workload = Workload::new(volume.shape, Random::new(11));
    let mut client = Noted::new(process.connect_again(0), &mut history, &volume.medium);
    let mut flush_and_write = |client: &mut Noted<'_>, good: bool| {
        for _ in 0..6 {
            let Request::Write { offset, data, .. } = workload.write(3) else { unreachable!() };
            client.call(&Request::Write { offset, data, fua: false }).unwrap().unwrap();
        }
        assert_eq!(client.call(&Request::Flush).unwrap().is_ok(), good);
    };
    flush_and_write(&mut client, true);
    volume.medium.inject(Fault::on(Kind::Flush, Action::Fail(libc::EIO)).times(1));
    flush_and_write(&mut client, false);
    // The medium flushes again, and the disk does not say so.
    flush_and_write(&mut client, false);
    drop(client);
    let counts = check("failed flush", &volume, base, &history, Random::new(2));
    println!("failed flush: legal states: {counts:?}");
    assert!(counts["reordered"] > 100, "{counts:?}");
}
