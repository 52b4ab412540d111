//! Drives one export with one load for a moment: rate, CPU time of the processes that serve it, latencies.
//!
//! The moment begins after a warm-up and ends before what is in flight is waited for, so that neither the empty queue
//! at the start nor the one at the end counts.

use std::time::{Duration, Instant};

use crate::{error::BenchError, histogram::Histogram, job::Job, process::cpu_seconds};

/// A connection to an export: requests in slots, each with its own memory.
pub(crate) trait Client {
    /// Size of the disk.
    fn bytes(&self) -> u64;
    /// Makes a request ready; slot `n` of requests of `len` bytes lies at `n * len` of the client's memory.
    fn submit(&mut self, slot: usize, write: bool, offset: u64, len: usize);
    /// Makes a flush ready.
    fn submit_flush(&mut self, slot: usize);
    /// Hands over what was made ready.
    fn send(&mut self) -> Result<(), BenchError>;
    /// Sleeps until at least one request is answered; gives the slots of those that are.
    fn wait(&mut self, done: &mut Vec<usize>) -> Result<(), BenchError>;
    /// Puts bytes into the client's memory.
    fn fill(&mut self, at: usize, bytes: &[u8]);
    /// Takes bytes out of the client's memory.
    fn take(&self, at: usize, bytes: &mut [u8]);
}

/// What one moment gave.
#[derive(Clone)]
pub(crate) struct Sample {
    /// MB/s, or thousands of operations a second where the load is random.
    pub(crate) rate: f64,
    /// CPU microseconds an operation, of each serving process.
    pub(crate) cpu_us: Vec<f64>,
    /// How long each operation took.
    pub(crate) latencies: Histogram,
}

impl Sample {
    /// CPU microseconds an operation, of all serving processes together.
    pub(crate) fn cpu_us_of_all(&self) -> f64 {
        self.cpu_us.iter().sum()
    }
}

/// Numbers that look random: the same for every export.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// One moment of `seconds`.
///
/// # Errors
///
/// [`BenchError`] if the export fails a request.
pub(crate) fn sample(
    client: &mut dyn Client,
    job: Job,
    seconds: f64,
    seed: u64,
    pids: &[i32],
) -> Result<Sample, BenchError> {
    let mut random = Random::new(seed);
    let blocks = client.bytes() / job.bytes as u64;
    let mut next = random.next() % blocks;
    let mut free: Vec<usize> = (0..job.depth).collect();
    let mut begun = vec![Instant::now(); job.depth];
    let mut done = Vec::with_capacity(job.depth);
    let mut latencies = Histogram::new();
    let mut operations = 0u64;

    let warm = Duration::from_secs_f64(seconds / 8.0);
    let moment = Duration::from_secs_f64(seconds);
    let start = Instant::now();
    let mut measuring: Option<(Instant, Vec<f64>)> = None;
    let mut now = start;
    let (elapsed, cpu_us) = loop {
        match &measuring {
            None if now - start >= warm => {
                let cpu = cpu_of(pids)?;
                measuring = Some((Instant::now(), cpu));
            }
            Some((since, before)) if now - *since >= moment => {
                let elapsed = since.elapsed();
                let used = cpu_of(pids)?;
                let each = |(after, before): (f64, &f64)| (after - before) * 1e6 / operations as f64;
                break (elapsed, used.into_iter().zip(before).map(each).collect());
            }
            _ => {}
        }
        for slot in free.drain(..) {
            let block = if job.random { random.next() % blocks } else { next };
            next = (block + 1) % blocks;
            if let Some(begun) = begun.get_mut(slot) {
                *begun = now;
            }
            client.submit(slot, job.write, block * job.bytes as u64, job.bytes);
        }
        client.send()?;
        client.wait(&mut done)?;
        now = Instant::now();
        if measuring.is_some() {
            operations += done.len() as u64;
            for slot in &done {
                latencies.add(begun.get(*slot).map_or(0, |begun| (now - *begun).as_nanos() as u64));
            }
        }
        free.append(&mut done);
    };
    let mut in_flight = job.depth - free.len();
    while in_flight > 0 {
        client.wait(&mut done)?;
        in_flight -= done.len();
        done.clear();
    }
    let a_second = operations as f64 / elapsed.as_secs_f64();
    let rate = if job.random { a_second / 1e3 } else { a_second * job.bytes as f64 / 1e6 };
    Ok(Sample { rate, cpu_us, latencies })
}

fn cpu_of(pids: &[i32]) -> Result<Vec<f64>, BenchError> {
    pids.iter().map(|pid| cpu_seconds(*pid)).collect()
}

/// The middle one; of an even number the upper.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
