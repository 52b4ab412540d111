//! `make bench-xts`: gigabytes a second on one core, by each kernel this processor can run, beside what its AES units can
//! do at most, aws-lc and memcpy, all in one run. Writes `bench/out/xts.json`; fails below a floor.
//!
//! Requests are 128 KiB, as disks get them, in units of 512 bytes, 4 KiB and 64 KiB. Floors are for the kernel that disks
//! on this processor get.

mod buffer;
mod ceiling;
mod sample;

use std::{hint::black_box, process::ExitCode};

use buffer::Buffer;
use ceiling::Ceiling;
use sample::{Job, Rates};
use vmseal_bench_report::{Report, Row};
use vmseal_xts::{Cipher, Kernel};

/// Bytes of a request.
const REQUEST: usize = 128 << 10;
/// Bytes of a buffer that no cache holds.
const LARGE: usize = 256 << 20;
/// The least of what the AES units can do; the goal is 0.90.
const OF_CEILING: f64 = 0.78;
/// The least of memcpy where memory is the limit.
const OF_MEMCPY: f64 = 0.95;
const KEY: [u8; 64] = *b"VMSEAL-TEST-SECRET-xts-data-key-VMSEAL-TEST-SECRET-xts-tweak-key";

/// A data unit, and the least that is asked beside aws-lc with it.
struct Unit {
    bytes: usize,
    name: &'static str,
    of_library: f64,
}

const UNITS: [Unit; 3] = [
    Unit { bytes: 512, name: "512 B", of_library: 1.9 },
    Unit { bytes: 4096, name: "4 KiB", of_library: 1.1 },
    Unit { bytes: 65536, name: "64 KiB", of_library: 0.0 },
];

fn main() -> ExitCode {
    let mut report = Report::new("xts");
    println!(
        "disks on this processor get the kernel {}; figures are GB/s of one core's own time",
        Kernel::detected()
    );
    let (src, mut dst) = (Buffer::new(REQUEST), Buffer::new(REQUEST));
    for unit in &UNITS {
        in_cache(&mut report, unit, &src, &mut dst);
    }
    for unit in &UNITS[..2] {
        one_small_request(&mut report, unit, &src, &mut dst);
    }
    drop((src, dst));
    let (src, mut dst) = (Buffer::new(LARGE), Buffer::new(LARGE));
    for unit in &UNITS {
        out_of_cache(&mut report, unit, &src, &mut dst);
    }
    for absent in Kernel::ALL.into_iter().filter(|kernel| !kernel.is_available()) {
        report.skip(format!("{absent}: all rows"), "this processor or this build cannot run it");
    }
    if Kernel::detected() == Kernel::AwsLc {
        report.skip(
            "all floors",
            "they are for kernels of ours, and this processor or this build can run none",
        );
    }
    report.finish()
}

/// Source and destination in the cache, where the processor's own speed shows.
fn in_cache(report: &mut Report, unit: &Unit, src: &Buffer, dst: &mut Buffer) {
    let ciphers = ciphers(unit);
    let (from, to) = (src.base(), dst.base_mut());
    // Two jobs each, then their ceilings, then memcpy.
    let mut jobs: Vec<Job<'_>> = Vec::new();
    for cipher in &ciphers {
        jobs.push(Job::new(REQUEST, move |_| run(cipher, true, from, to, REQUEST)));
        jobs.push(Job::new(REQUEST, move |_| run(cipher, false, from, to, REQUEST)));
    }
    let library = jobs.len() - 2;
    let first_ceiling = jobs.len();
    for ceiling in ciphers.iter().filter_map(|cipher| Ceiling::of(cipher.kernel())) {
        jobs.push(Job::new(REQUEST, move |_| ceiling.run(REQUEST)));
    }
    let memcpy = jobs.len();
    // SAFETY: both buffers are that long, and are two.
    jobs.push(Job::new(REQUEST, move |_| unsafe { from.copy_to_nonoverlapping(to, REQUEST) }));
    // What reads a request's result has it in the cache; so do we.
    // SAFETY: the buffer is that long; nobody writes to it between the samples.
    let rates = Rates::of(&mut jobs, || unsafe {
        black_box(std::slice::from_raw_parts(to, REQUEST).iter().fold(0u8, |sum, byte| sum ^ byte));
    });
    for (n, cipher) in ciphers.iter().enumerate() {
        for (way, what) in ["encrypts", "decrypts"].into_iter().enumerate() {
            let name = |peer| format!("{} {what} {} units, of {peer}", cipher.kernel(), unit.name);
            let mut add = |name, peer, floor| report.row(row(&rates, name, 2 * n + way, peer, floor));
            if Ceiling::of(cipher.kernel()).is_some() {
                add(name("the VAES ceiling"), first_ceiling + n, demanded(cipher, OF_CEILING));
                add(name("aws-lc"), library + way, demanded(cipher, unit.of_library));
            }
            if way == 0 {
                add(name("memcpy"), memcpy, 0.0);
            }
        }
    }
}

/// A guest's most common request, one a call.
fn one_small_request(report: &mut Report, unit: &Unit, src: &Buffer, dst: &mut Buffer) {
    const SMALL: usize = 4096;
    let ciphers = ciphers(unit);
    let (from, to) = (src.base(), dst.base_mut());
    let job = |cipher| Job::new(SMALL, move |_| run(cipher, true, from, to, SMALL));
    let mut jobs: Vec<Job<'_>> = ciphers.iter().map(job).collect();
    let rates = Rates::of(&mut jobs, || ());
    for (n, cipher) in ciphers[..ciphers.len() - 1].iter().enumerate() {
        let name = format!("{} encrypts one 4 KiB request, {} units, of aws-lc", cipher.kernel(), unit.name);
        report.row(row(&rates, name, n, ciphers.len() - 1, 0.0));
    }
}

/// Source and destination in no cache, where memory is the limit: encrypting must cost no more than copying.
fn out_of_cache(report: &mut Report, unit: &Unit, src: &Buffer, dst: &mut Buffer) {
    const REQUESTS: usize = LARGE / REQUEST;
    /// Coprime to their number: every request is visited, and none beside the last one.
    const STRIDE: usize = 773;
    let ciphers = ciphers(unit);
    let (from, to) = (src.base(), dst.base_mut());
    // Guests have their buffers here and there. One by one, memcpy finds the next request's beginning already fetched, and how
    // far ahead of that anybody gets depends on what else the memory serves.
    for (order, stride) in [("here and there", STRIDE), ("one by one", 1)] {
        let place = move |n: usize| n * stride % REQUESTS * REQUEST;
        // Two jobs each, then memcpy.
        let mut jobs: Vec<Job<'_>> = Vec::new();
        for cipher in &ciphers {
            jobs.push(Job::new(REQUEST, move |n| {
                // SAFETY: requests divide the buffers.
                let (from, to) = unsafe { (from.add(place(n)), to.add(place(n))) };
                run(cipher, true, from, to, REQUEST);
            }));
            jobs.push(Job::new(REQUEST, move |n| {
                // SAFETY: as above.
                let to = unsafe { to.add(place(n)) };
                run(cipher, true, to, to, REQUEST);
            }));
        }
        jobs.push(Job::new(REQUEST, move |n| {
            // SAFETY: as above; two buffers.
            unsafe { from.add(place(n)).copy_to_nonoverlapping(to.add(place(n)), REQUEST) };
        }));
        let memcpy = jobs.len() - 1;
        let rates = Rates::of(&mut jobs, || ());
        for (n, cipher) in ciphers.iter().enumerate() {
            for (way, what) in ["copies", "in place"].into_iter().enumerate() {
                let kernel = cipher.kernel();
                let name = format!("{kernel}, {} units, {what}, out of cache {order}, of memcpy", unit.name);
                report.row(row(&rates, name, 2 * n + way, memcpy, demanded(cipher, OF_MEMCPY)));
            }
        }
    }
}

/// One of each kernel that runs here; aws-lc, which always does, is the last.
fn ciphers(unit: &Unit) -> Vec<Cipher> {
    let available = Kernel::ALL.into_iter().filter(|kernel| kernel.is_available());
    available
        .map(|kernel| Cipher::with_kernel(&KEY, unit.bytes, kernel).expect("available, and the unit fits"))
        .collect()
}

/// A floor, if the kernel is the one that disks get here, and is ours.
fn demanded(cipher: &Cipher, floor: f64) -> f64 {
    let ours = cipher.kernel() == Kernel::detected() && cipher.kernel() != Kernel::AwsLc;
    if ours { floor } else { 0.0 }
}

fn row(rates: &Rates, name: String, ours: usize, peer: usize, floor: f64) -> Row {
    Row { name, ours: rates.median(ours), peer: rates.median(peer), ratio: rates.ratio(ours, peer), floor }
}

fn run(cipher: &Cipher, encrypt: bool, src: *const u8, dst: *mut u8, len: usize) {
    const SECTOR: u64 = 1 << 20;
    // SAFETY: callers pass places in two buffers, or one place twice, that are `len` long from there.
    let done = unsafe {
        if encrypt {
            cipher.encrypt_raw(SECTOR, src, dst, len)
        } else {
            cipher.decrypt_raw(SECTOR, src, dst, len)
        }
    };
    done.expect("whole units");
}
