//! What a core dump taken by root holds after real use.

use std::{fs, path::Path};

use vmseal_keys::{Protection, protection};
use vmseal_xts::Kernel;

use crate::{
    nbd_client::*,
    rig::{MIB, Rig, Spec, pattern},
    round_keys::aes256_round_keys,
    tools::{ok, tool},
    vhost_user::{self, directory_in_memory},
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

/// Everything a key is known by: its parts of 32 bytes, and every round key of the two AES-256 keys, in both directions.
struct Traces {
    needles: Vec<(String, Vec<u8>)>,
}

impl Traces {
    fn of(payload: &[u8; 96]) -> Self {
        let mut needles = Vec::new();
        for (name, part) in ["data key", "tweak key", "slot secret"].iter().zip(payload.chunks(32)) {
            needles.push(((*name).to_owned(), part.to_vec()));
            if *name == "slot secret" {
                continue;
            }
            let keys = aes256_round_keys(part.try_into().unwrap());
            assert_eq!(keys.len(), 15 + 13);
            for (round, key) in keys.iter().enumerate() {
                needles.push((format!("round key {round} of the {name}"), key.to_vec()));
            }
        }
        Self { needles }
    }

    /// Which of them lie anywhere in the dump, at whatever address.
    fn found(&self, core: &[u8]) -> Vec<&str> {
        // Most places begin like none of them.
        let mut begins = vec![false; 1 << 16];
        let start = |bytes: &[u8]| usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        self.needles.iter().for_each(|(_, needle)| begins[start(needle)] = true);
        let mut found = vec![false; self.needles.len()];
        for at in 0..core.len() - 1 {
            if begins[start(&core[at..])] {
                for (needle, found) in self.needles.iter().zip(&mut found) {
                    *found |= core[at..].starts_with(&needle.1);
                }
            }
        }
        self.needles.iter().zip(found).filter(|(_, found)| *found).map(|(needle, _)| &*needle.0).collect()
    }
}

/// Whether a dump has the vector registers of its threads (NT_X86_XSTATE).
fn has_vector_registers(core: &[u8]) -> bool {
    let head = |bytes: &[u8]| {
        bytes[..4] == [6, 0, 0, 0] && bytes[8..12] == [2, 2, 0, 0] && &bytes[12..] == b"LINUX\0"
    };
    core.windows(18).any(head)
}

/// Looks through keeper and worker after real use.
fn search(rig: &Rig, planted: &[u8]) {
    let worker = rig.status().worker_pid;
    let (Some(of_worker), Some(of_keeper)) =
        (core_of(worker, &rig.plan.scratch.0), core_of(rig.keeper.id() as i32, &rig.plan.scratch.0))
    else {
        return;
    };
    assert!(count(&of_worker, planted) > 0, "the search finds what is in the worker");
    let name = rig.disk().id.to_string();
    assert!(count(&of_keeper, name.as_bytes()) > 0, "the search finds what is in the keeper");
    if cfg!(target_arch = "x86_64") {
        assert!(has_vector_registers(&of_worker), "registers are in the dump");
    }
    let traces = Traces::of(&rig.disk().payload);
    let all: Vec<u8> = traces.needles.iter().flat_map(|(_, needle)| [&[7], &needle[..]].concat()).collect();
    assert_eq!(traces.found(&all).len(), traces.needles.len(), "the search finds each of them");
    let (worker_has, keeper_has) = (traces.found(&of_worker), traces.found(&of_keeper));
    println!(
        "{}, {}: of {} traces {} are in {} MiB of worker, {} in {} MiB of keeper",
        protection(),
        Kernel::detected(),
        traces.needles.len(),
        worker_has.len(),
        of_worker.len() >> 20,
        keeper_has.len(),
        of_keeper.len() >> 20
    );
    // The keeper never maps the key memory, whatever its protection.
    assert_eq!(keeper_has, [""; 0], "in the keeper");
    if protection() == Protection::MemfdSecret {
        assert_eq!(worker_has, [""; 0], "in the worker");
    }
}

/// What was read last is plaintext in memory of the worker, or mapped there, as a guest's data has to be: it shows that
/// the search finds what is there.
fn data_with_plant() -> (Vec<u8>, Vec<u8>) {
    let planted = pattern(77, 64);
    let mut data = pattern(78, 65536);
    data[1024..1088].copy_from_slice(&planted);
    (data, planted)
}

#[test]
fn core_dumps_after_use_by_nbd_hold_no_key_and_no_schedule() {
    if tool("gcore").is_none() {
        return;
    }
    // In memory (one request after another) and on a file system (io_uring).
    for directory in [None, Some(directory_in_memory("core"))] {
        let directory = directory.as_ref().map(|scratch| scratch.0.clone());
        let rig = Rig::with(Spec { directory, ..Spec::fixed(4 * MIB) });
        let (data, planted) = data_with_plant();
        let mut one = Client::connect(&rig.disk().socket).unwrap();
        let mut two = Client::connect(&rig.disk().socket).unwrap();
        for i in 0..16 {
            one.write(i * 65536, &data, 0).unwrap();
            assert!(two.read(i * 65536, 65536).unwrap() == data);
        }
        // Of one unit and of an odd number of them: other paths through the kernels.
        for len in [512, 1024 * 3 + 512] {
            one.write(MIB, &data[..len as usize], 0).unwrap();
            assert!(two.read(MIB, len).unwrap() == data[..len as usize]);
        }
        one.request(WRITE_ZEROES, 0, 2 * MIB, 1 << 20).unwrap();
        one.read(0, 65536).unwrap();
        search(&rig, &planted);
    }
}

#[test]
fn core_dumps_after_use_by_vhost_user_hold_no_key_and_no_schedule() {
    if tool("gcore").is_none() {
        return;
    }
    let rig = vhost_user::rig(&[Spec::fixed(4 * MIB)]);
    let mut driver = vhost_user::driver(&rig, 2, 0);
    let (data, _) = data_with_plant();
    for i in 0..16 {
        assert_eq!(driver.write(i * 8, &data[..4096]), 0);
        assert!(driver.read(i * 8, 4096) == (0, data[..4096].to_vec()));
    }
    // The guest's data is in the guest's memory only, which is not dumped with the worker.
    search(&rig, rig.disk().id.to_string().as_bytes());
}
