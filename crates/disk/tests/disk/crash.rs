//! Workers that are killed while they work. Clients do as QEMU does: connect again, send again what was not answered.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};

use crate::{
    nbd_client::*,
    rig::{MIB, Rig, Spec, kill, pattern},
    tools::tool,
};

/// Writes batches within its half of a disk of 16 MiB until told to stop; gives what that holds by its acknowledgements. A
/// connection that ends is made again, as QEMU does; an error is the test's failure.
pub(crate) fn writer(
    socket: &Path,
    part: u64,
    stop: &AtomicBool,
    acknowledged: &mpsc::Sender<()>,
) -> Vec<u8> {
    let base = part * 8 * MIB;
    let mut model = vec![0; 8 << 20];
    let mut client = None;
    for round in 0u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        // Four pieces that do not overlap, so that their order does not matter.
        let writes: Vec<(u64, Vec<u8>)> = (0..4)
            .map(|quarter| {
                let seed = round * 8 + quarter * 2 + part;
                let at = quarter * 2 * MIB + (seed.wrapping_mul(0x9e37_79b9) % 448) * 4096;
                (base + at, pattern(seed, 4096 << (seed % 7)))
            })
            .collect();
        loop {
            let Some(connected) = &mut client else {
                client = Client::connect(socket).ok();
                continue;
            };
            match connected.write_batch(&writes) {
                Ok(()) => break,
                Err(Fault::Gone(_)) => client = None,
                Err(fault) => panic!("a write failed: {fault:?}"),
            }
        }
        for (at, data) in writes {
            let at = (at - base) as usize;
            model[at..at + data.len()].copy_from_slice(&data);
        }
        let _ = acknowledged.send(());
    }
    model
}

#[test]
fn no_acknowledged_write_is_lost_when_workers_are_killed_under_load() {
    let rig = Rig::with(Spec::fixed(16 * MIB));
    let stop = Arc::new(AtomicBool::new(false));
    let (sender, acknowledged) = mpsc::channel();
    let writers: Vec<_> = (0..2)
        .map(|part| {
            let (socket, stop, sender) = (rig.disk().socket.clone(), stop.clone(), sender.clone());
            thread::spawn(move || writer(&socket, part, &stop, &sender))
        })
        .collect();
    let mut workers = vec![rig.status().worker_pid];
    for _ in 0..5 {
        for _ in 0..40 {
            acknowledged.recv().unwrap();
        }
        kill(workers[workers.len() - 1], libc::SIGKILL);
        workers.push(rig.status().worker_pid);
    }
    for _ in 0..20 {
        acknowledged.recv().unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    let model: Vec<u8> = writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect();
    workers.dedup();
    assert_eq!(workers.len(), 6, "each kill had a new worker");
    assert_eq!(rig.log().matches("died (signal 9)").count(), 5, "{}", rig.log());
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    assert!(client.read(0, 16 << 20).unwrap() == model, "through the server");
    assert!(rig.disk().stored_plain() == model, "in the file");
}

#[test]
fn qemu_goes_on_after_its_worker_was_killed() {
    let Some(mut qemu_io) = tool("qemu-io") else { return };
    let rig = Rig::with(Spec::growing(16 * MIB));
    let options = format!(
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},file.export={},file.reconnect-delay=20",
        rig.disk().socket.display(),
        rig.disk().id
    );
    let mut qemu_io = qemu_io
        .args(["--image-opts", &options])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut orders = qemu_io.stdin.take().unwrap();
    let mut lines = BufReader::new(qemu_io.stdout.take().unwrap()).lines();
    for round in 0..3u8 {
        writeln!(orders, "write -P {round} {round}M 1M").unwrap();
        let wrote =
            lines.by_ref().map(Result::unwrap).find(|line| line.contains("wrote") || line.contains("ailed"));
        assert!(wrote.as_deref().is_some_and(|line| line.contains("wrote 1048576/1048576")), "{wrote:?}");
        kill(rig.status().worker_pid, libc::SIGKILL);
    }
    writeln!(orders, "flush\nquit").unwrap();
    drop(orders);
    assert!(qemu_io.wait().unwrap().success());
    let plain = rig.disk().stored_plain();
    assert_eq!(plain.len(), 3 << 20);
    assert!(plain.chunks(1 << 20).enumerate().all(|(i, piece)| piece.iter().all(|byte| *byte == i as u8)));
}
