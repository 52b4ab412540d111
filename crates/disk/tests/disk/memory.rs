//! What a core dump taken by root holds after real use.

use std::{fs, path::Path};

use vmseal_keys::{Protection, protection};

use crate::{
    nbd_client::*,
    rig::{MIB, Rig, Spec, pattern},
    tools::{ok, tool},
};

/// A core dump of a running process.
fn core_of(pid: i32, directory: &Path) -> Option<Vec<u8>> {
    let mut gcore = tool("gcore")?;
    ok(gcore.arg("-o").arg(directory.join("core")).arg(pid.to_string()));
    let path = directory.join(format!("core.{pid}"));
    let core = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    Some(core)
}

fn count(haystack: &[u8], needle: &[u8]) -> usize {
    let mut count = 0;
    let mut rest = haystack;
    while let Some(at) = rest.iter().position(|byte| *byte == needle[0]) {
        count += usize::from(rest[at..].starts_with(needle));
        rest = &rest[at + 1..];
    }
    count
}

#[test]
fn core_dumps_of_keeper_and_worker_hold_no_key() {
    if tool("gcore").is_none() {
        return;
    }
    let rig = Rig::with(Spec::fixed(4 * MIB));
    // Real use over two connections: two ciphers, reads and writes. What was read last is plaintext in a buffer of the
    // worker, as a guest's data has to be; it shows that the search finds what is there.
    let planted = pattern(77, 64);
    let mut data = pattern(78, 65536);
    data[1024..1088].copy_from_slice(&planted);
    let mut one = Client::connect(&rig.disk().socket).unwrap();
    let mut two = Client::connect(&rig.disk().socket).unwrap();
    for i in 0..16 {
        one.write(i * 65536, &data, 0).unwrap();
        assert!(two.read(i * 65536, 65536).unwrap() == data);
    }
    one.read(0, 65536).unwrap();
    let worker = rig.status().worker_pid;
    let (Some(of_worker), Some(of_keeper)) =
        (core_of(worker, &rig.plan.scratch.0), core_of(rig.keeper.id() as i32, &rig.plan.scratch.0))
    else {
        return;
    };
    assert!(count(&of_worker, &planted) > 0, "the search finds what is in the worker");
    let name = rig.disk().id.to_string();
    assert!(count(&of_keeper, name.as_bytes()) > 0, "the search finds what is in the keeper");

    let key = &rig.disk().payload;
    assert_eq!(count(&of_worker, &key[..64]), 0, "the data key in one piece");
    let found = |core: &[u8]| -> Vec<usize> { key.chunks(32).map(|part| count(core, part)).collect() };
    let (worker_has, keeper_has) = (found(&of_worker), found(&of_keeper));
    println!(
        "{}: data key, tweak key, slot secret in worker {worker_has:?}, in keeper {keeper_has:?}",
        protection()
    );
    // The keeper never maps the key memory, whatever its protection.
    assert_eq!(keeper_has, [0, 0, 0], "in the keeper");
    if protection() == Protection::MemfdSecret {
        assert_eq!(worker_has, [0, 0, 0], "in the worker");
    }
}
