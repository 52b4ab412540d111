//! `make bench-start`: what finding records, unwrapping keys and starting the disk process adds to `virsh start`.
//!
//! The same guest clear and encrypted, under one libvirtd with the hook installed, started in pairs whose order changes.
//! Prints a table, writes `bench/out/start.json`, exits non-zero if an encrypted start takes more than [`LIMIT_MS`]
//! longer than the clear one beside it, in the median.

use std::{fs, process::ExitCode, time::Duration};

use serde::Serialize;
use vmseal_e2e::{domain::Guest, house::House, lab, lab::Lab};

/// What may be added, milliseconds.
const LIMIT_MS: f64 = 100.0;
/// Pairs a row.
const PAIRS: usize = 12;

/// One row of the table. `ratio` is `peer / ours`; at `floor` exactly [`LIMIT_MS`] are added.
#[derive(Serialize)]
struct Row {
    name: String,
    /// Milliseconds of `virsh start`, encrypted: `peer` and what is added.
    ours: f64,
    /// The same, clear; median.
    peer: f64,
    ratio: f64,
    floor: f64,
    /// Median of the differences within pairs.
    added_ms: f64,
}

fn main() -> ExitCode {
    let mut house = House::start(Lab::for_test("bench-start"));
    let one = pair(&house, "one", &[("vda", "16M", "raw")]);
    let four = pair(
        &house,
        "four",
        &[("vda", "16M", "raw"), ("vdb", "16M", "raw"), ("vdc", "16M", "qcow2"), ("vdd", "16M", "raw")],
    );
    let rows = [
        measure(&mut house, "1 disk, key held by the agent", &one, |_| {}),
        measure(&mut house, "4 disks, key held by the agent", &four, |_| {}),
        measure(&mut house, "1 disk, key asked of the server", &one, |house| {
            house.kill_agent();
            house.start_agent();
        }),
    ];
    println!(
        "{:<34} {:>13} {:>9} {:>9} {:>7} {:>7}",
        "virsh start of a VM with", "encrypted ms", "clear ms", "added ms", "ratio", "floor"
    );
    for row in &rows {
        println!(
            "{:<34} {:>13.1} {:>9.1} {:>9.1} {:>7.2} {:>7.2}",
            row.name, row.ours, row.peer, row.added_ms, row.ratio, row.floor
        );
    }
    let out = lab::tree().join("bench/out");
    fs::create_dir_all(&out).expect("the tree can be written");
    let json = serde_json::to_vec_pretty(&rows).expect("rows serialise");
    fs::write(out.join("start.json"), json).expect("the tree can be written");
    if rows.iter().all(|row| row.ratio >= row.floor) {
        ExitCode::SUCCESS
    } else {
        eprintln!("below its floor: more than {LIMIT_MS} ms are added");
        ExitCode::FAILURE
    }
}

/// Two guests with the same disks: clear, encrypted.
fn pair(house: &House, name: &str, disks: &[(&str, &str, &str)]) -> (Guest, Guest) {
    let clear = house.guest(&format!("{name}-clear"), disks);
    let encrypted = house.guest(&format!("{name}-encrypted"), disks);
    house.define(&clear);
    house.define(&encrypted);
    house.must_vmseal(&["vm", "encrypt", &encrypted.name]);
    (clear, encrypted)
}

fn measure(
    house: &mut House,
    name: &str,
    (clear, encrypted): &(Guest, Guest),
    before: impl Fn(&mut House),
) -> Row {
    // Once unmeasured: programs and images are in the page cache then, for both.
    start(house, clear);
    start(house, encrypted);
    let mut pairs = Vec::with_capacity(PAIRS);
    for n in 0..PAIRS {
        before(house);
        // Whoever is second finds things warmer, so they take turns.
        pairs.push(if n % 2 == 0 {
            let clear = start(house, clear);
            (start(house, encrypted), clear)
        } else {
            (start(house, encrypted), start(house, clear))
        });
    }
    let peer = median(pairs.iter().map(|p| p.1));
    // Within pairs: what the machine does meanwhile is in both.
    let added_ms = median(pairs.iter().map(|p| p.0 - p.1));
    let ours = peer + added_ms;
    Row { name: name.to_owned(), ours, peer, ratio: peer / ours, floor: peer / (peer + LIMIT_MS), added_ms }
}

/// Milliseconds `virsh start` takes; the guest is off again after that.
fn start(house: &House, guest: &Guest) -> f64 {
    let outcome = house.libvirtd.virsh(&["start", &guest.name]);
    assert!(outcome.ok(), "virsh start {}: {}\n{}", guest.name, outcome.all(), house.logs());
    house.libvirtd.must_virsh(&["destroy", &guest.name]);
    milliseconds(outcome.took)
}

fn milliseconds(took: Duration) -> f64 {
    took.as_secs_f64() * 1000.0
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}
