//! Samples of several jobs in turns, by the CPU time of this thread: what else the machine does meanwhile is in all of
//! them, and little of it is counted.

/// Samples of each job.
const ROUNDS: usize = 101;
/// Seconds a sample takes, about.
const SAMPLE_S: f64 = 0.7e-3;

/// Something to repeat.
pub(crate) struct Job<'a> {
    bytes: usize,
    /// Takes a number that is another each time.
    work: Box<dyn FnMut(usize) + 'a>,
}

impl<'a> Job<'a> {
    /// `work` does `bytes` bytes.
    pub(crate) fn new(bytes: usize, work: impl FnMut(usize) + 'a) -> Self {
        Self { bytes, work: Box::new(work) }
    }
}

/// Gigabytes a second of each job in each round.
pub(crate) struct Rates(Vec<Vec<f64>>);

impl Rates {
    /// Takes the samples; `before` is called before each, and is not measured.
    pub(crate) fn of(jobs: &mut [Job<'_>], mut before: impl FnMut()) -> Self {
        // Counts up over all jobs: none walks over what another has just brought into the cache.
        let mut place = 0;
        let repeats: Vec<usize> = jobs.iter_mut().map(|job| repeats(job, &mut place)).collect();
        let mut rates = vec![Vec::with_capacity(ROUNDS); jobs.len()];
        for _ in 0..ROUNDS {
            for ((job, repeats), rates) in jobs.iter_mut().zip(&repeats).zip(&mut rates) {
                before();
                rates.push(rate(job, *repeats, &mut place));
            }
        }
        Self(rates)
    }

    /// Median of a job.
    pub(crate) fn median(&self, job: usize) -> f64 {
        median(self.0[job].clone())
    }

    /// Median over the rounds of how much faster `job` was than `peer` in the same one.
    pub(crate) fn ratio(&self, job: usize, peer: usize) -> f64 {
        median(self.0[job].iter().zip(&self.0[peer]).map(|(ours, peer)| ours / peer).collect())
    }
}

/// How often a job is done in one sample.
fn repeats(job: &mut Job<'_>, place: &mut usize) -> usize {
    let mut repeats = 1;
    while (repeats * job.bytes) as f64 / 1e9 / rate(job, repeats, place) < SAMPLE_S {
        repeats *= 2;
    }
    repeats
}

fn rate(job: &mut Job<'_>, repeats: usize, place: &mut usize) -> f64 {
    let before = cpu_s();
    for _ in 0..repeats {
        (job.work)(*place);
        *place += 1;
    }
    (repeats * job.bytes) as f64 / 1e9 / (cpu_s() - before)
}

fn cpu_s() -> f64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a whole timespec; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}
