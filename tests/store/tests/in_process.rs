//! Many short workloads on the disk crate's own volume, with no process and no kernel in between: every crash of each.

use vmseal_disk::volume::{Layout, Volume, VolumeError};
use vmseal_test_store::{
    crash_states::CrashStates,
    history::{History, Replay},
    nbd_client::{Answer, Request},
    seed::Random,
    stamp::{BLOCK, stamped},
    verifier::Verifier,
    volume::{self, Shape},
    workload::Workload,
};
use vmseal_xts::Cipher;

fn carry_out(volume: &Volume, request: &Request) -> Answer {
    let done = match request {
        Request::Read { offset, len } => {
            let mut data = vec![0; *len as usize];
            volume.read(*offset, &mut data).map(|()| data)
        }
        Request::Write { offset, data, fua } => {
            let written = volume.write(*offset, &mut data.clone());
            let durable = |()| if *fua { volume.flush() } else { Ok(()) };
            written.and_then(durable).map(|()| Vec::new())
        }
        Request::WriteZeroes { offset, len } => {
            volume.write_zeroes(*offset, u64::from(*len)).map(|()| Vec::new())
        }
        Request::Trim { offset, len } => volume.discard(*offset, u64::from(*len)).map(|()| Vec::new()),
        Request::Flush => volume.flush().map(|()| Vec::new()),
    };
    done.map_err(|error: VolumeError| panic!("{error}"))
}

#[test]
fn every_crash_of_many_short_workloads_is_legal() {
    let mut random = Random::for_test("in_process");
    let workloads = if std::env::var_os("VMSEAL_SOAK").is_some() { 2000 } else { 40 };
    let vm = vmseal_model::id::VmId::from_random([5; 16]);
    let mut states = 0u64;
    for number in 0..workloads {
        let unit = if random.chance(1, 2) { 512 } else { 4096 };
        let presented = 8 * u64::from(unit) * (1 + random.below(3));
        let shape =
            if random.chance(1, 2) { Shape::fixed(unit, presented) } else { Shape::growing(unit, presented) };
        let made = volume::Volume::make(vm, shape, &stamped(0, shape.stored / BLOCK, 1));
        let base = made.medium.all_bytes();
        let layout = Layout {
            unit: u64::from(unit),
            payload_offset: vmseal_luks::HEADER_BYTES,
            presented,
            grows: shape.stored < presented,
            read_only: false,
            discard: true,
        };
        let cipher = Cipher::new(made.dek().data_key(), unit as usize).unwrap();
        let volume = Volume::new(Box::new(made.medium.clone()), cipher, layout).unwrap();
        let (mut history, mut workload) =
            (History::default(), Workload::new(shape, Random::new(random.next_u64())));
        for _ in 0..20 {
            for request in [workload.change(), workload.read()] {
                let id = history.send(&request, &made.medium);
                history.answered(id, carry_out(&volume, &request), &made.medium);
            }
        }
        let (log, _) = made.medium.take_log();
        let known = Verifier::new(&made.initial).unknown_from(shape.stored / BLOCK);
        let mut replay = Replay::new(&history, known);
        for state in CrashStates::new(base, &log, Random::new(number)).exhaustive(6).samples(40) {
            replay.go_to(state.mark).unwrap();
            let mut verifier = replay.verifier.clone();
            verifier.crash();
            verifier.check_read(0, &made.plain(&state.image)).unwrap_or_else(|fault| {
                panic!("workload {number}, entry {}, {:?}: {fault}", state.position, state.kind)
            });
            states += 1;
        }
        let mut strict = Replay::new(&history, Verifier::new(&made.initial));
        strict.go_to_end().unwrap();
    }
    println!("{workloads} workloads, {states} legal states");
    assert!(states > 50 * workloads, "{states}");
}
