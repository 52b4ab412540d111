//! `make bench-xts`: bytes per second of one core's own time, everything interleaved in one run, medians.

#[cfg(target_arch = "x86_64")]
mod ceiling;

use std::{hint::black_box, process::ExitCode};

use vmseal_bench_report::{Report, Row};
use vmseal_xts::{Cipher, Kernel};

/// Bytes of a request that stays in the processor's cache.
const REQUEST: usize = 128 << 10;
/// Bytes of each of two buffers that no cache holds.
const LARGE: usize = 256 << 20;
/// Bytes that are in turn at a time out of cache.
const STRETCH: usize = 8 << 20;
/// Least CPU time of a sample.
const SAMPLE: f64 = 0.7e-3;
const ROUNDS: usize = 101;
const UNITS: [usize; 3] = [512, 4096, 65536];

/// CPU time of this thread in seconds: what else runs on the machine does not count.
fn cpu() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: one timespec, valid for the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// GB/s of `work`, which does `bytes` each time, over one sample.
fn sample(bytes: usize, mut work: impl FnMut()) -> f64 {
    let start = cpu();
    let mut done = 0;
    loop {
        work();
        done += bytes;
        let taken = cpu() - start;
        if taken >= SAMPLE {
            return done as f64 / taken / 1e9;
        }
    }
}

fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}

fn ciphers(unit: usize) -> Vec<(Kernel, Cipher)> {
    let key: [u8; 64] = std::array::from_fn(|i| i as u8);
    Kernel::ALL
        .into_iter()
        .filter(|kernel| kernel.is_available())
        .map(|kernel| (kernel, Cipher::with_kernel(&key, unit, kernel).expect("the unit is one of these")))
        .collect()
}

/// GB/s in cache.
struct InCache {
    kernels: Vec<(Kernel, f64)>,
    decrypt: f64,
    ceiling: Option<f64>,
    memcpy: f64,
}

fn in_cache(unit: usize) -> InCache {
    let ciphers = ciphers(unit);
    let (from, mut to) = (vec![1u8; REQUEST], vec![0u8; REQUEST]);
    let mut kernels: Vec<Vec<f64>> = vec![Vec::new(); ciphers.len()];
    let (mut decrypt, mut top, mut memcpy) = (Vec::new(), Vec::new(), Vec::new());
    let has_ceiling = Kernel::Vaes512.is_available();
    for _ in 0..ROUNDS {
        for ((_, cipher), samples) in ciphers.iter().zip(&mut kernels) {
            samples.push(sample(REQUEST, || cipher.encrypt_copy(1 << 20, &from, &mut to).expect("whole units")));
        }
        let first = &ciphers[0].1;
        decrypt.push(sample(REQUEST, || first.decrypt_copy(1 << 20, &from, &mut to).expect("whole units")));
        #[cfg(target_arch = "x86_64")]
        if has_ceiling {
            // SAFETY: the kernel's processor features include these.
            top.push(sample(REQUEST, || unsafe { ceiling::run(REQUEST / ceiling::BYTES) }));
        }
        memcpy.push(sample(REQUEST, || {
            to.copy_from_slice(black_box(&from));
            black_box(&mut to);
        }));
    }
    InCache {
        kernels: ciphers
            .iter()
            .zip(&mut kernels)
            .map(|((kernel, _), samples)| (*kernel, median(samples)))
            .collect(),
        decrypt: median(&mut decrypt),
        ceiling: has_ceiling.then(|| median(&mut top)),
        memcpy: median(&mut memcpy),
    }
}

/// GB/s of the fastest kernel and of memcpy between buffers that no cache holds, and the median of their ratios.
fn out_of_cache(unit: usize, from: &[u8], to: &mut [u8]) -> (f64, f64, f64) {
    let cipher = &ciphers(unit)[0].1;
    let (mut ours, mut memcpy, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let stretches = LARGE / STRETCH;
    for round in 0..ROUNDS {
        // Each works where neither was lately; which of them goes first changes.
        let here = [round % stretches, (round + stretches / 2) % stretches];
        let mut speed = [0.0; 2];
        for turn in [round % 2, 1 - round % 2] {
            let place = here[turn] * STRETCH..(here[turn] + 1) * STRETCH;
            let pieces = from[place.clone()].chunks(REQUEST).zip(to[place].chunks_mut(REQUEST));
            let start = cpu();
            for (from, to) in pieces {
                if turn == 0 {
                    cipher.encrypt_copy(1 << 20, from, to).expect("whole units");
                } else {
                    to.copy_from_slice(black_box(from));
                }
            }
            speed[turn] = STRETCH as f64 / (cpu() - start) / 1e9;
        }
        ours.push(speed[0]);
        memcpy.push(speed[1]);
        ratios.push(speed[0] / speed[1]);
    }
    (median(&mut ours), median(&mut memcpy), median(&mut ratios))
}

fn main() -> ExitCode {
    let mut report = Report::new("xts");
    let detected = Kernel::detected();
    println!("this processor gets {detected}; GB/s of one core's own time, {} KiB requests", REQUEST >> 10);
    let (from, mut to) = (vec![1u8; LARGE], vec![2u8; LARGE]);
    for unit in UNITS {
        let measured = in_cache(unit);
        let of =
            |wanted: Kernel| measured.kernels.iter().find(|(k, _)| *k == wanted).map(|(_, speed)| *speed);
        let awslc = of(Kernel::AwsLc).unwrap_or(f64::NAN);
        let name = |what: &str| format!("{unit} B units: {what}");
        match (of(Kernel::Vaes512), measured.ceiling) {
            (Some(own), Some(ceiling)) => {
                report.row(Row::more(name("vaes-avx512 / VAES ceiling (goal 0.90)"), own, ceiling, 0.78));
                let floor = match unit {
                    512 => 1.9,
                    4096 => 1.1,
                    _ => 0.0,
                };
                report.row(Row::more(name("vaes-avx512 / aws-lc"), own, awslc, floor));
                report.row(Row::more(name("decryption / encryption"), measured.decrypt, own, 0.9));
                report.row(Row::more(name("vaes-avx512 / memcpy in cache"), own, measured.memcpy, 0.0));
                let (ours, memcpy, ratio) = out_of_cache(unit, &from, &mut to);
                let row = Row::more(name("vaes-avx512 / memcpy out of cache"), ours, memcpy, 0.95);
                report.row(Row { ratio, ..row });
            }
            _ => report.skip(name("vaes-avx512"), "this processor, or this build, has no VAES with AVX-512"),
        }
        match of(Kernel::Vaes256) {
            Some(own) => report.row(Row::more(name("vaes-avx2 / aws-lc on this processor"), own, awslc, 0.0)),
            None => report.skip(name("vaes-avx2"), "this processor, or this build, has no VAES with AVX2"),
        }
    }
    report.finish()
}
