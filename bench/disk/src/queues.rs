//! Four queues beside one, of our vhost-user-blk, with as many requests in flight together.

use std::thread;

use vmseal_bench_report::{Report, Row};
use vmseal_model::control::ExportKind;

use crate::{
    error::BenchError,
    job::Job,
    options::Options,
    ours::{Keeper, Plan},
    place::{Medium, Scratch},
    sample::{median, sample},
    vhost::{Device, Queue},
};

const QUEUES: usize = 4;

/// Adds these rows. Nothing is demanded of them: what there is to gain depends on how many cores are left.
///
/// # Errors
///
/// [`BenchError`] if it could not be measured.
pub(crate) fn measure(options: &Options, report: &mut Report) -> Result<(), BenchError> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let name = |job: Job| {
        format!("tmpfs: ours vhost-user, {QUEUES} queues / 1 on {cores} cores, {job}, {}", job.unit())
    };
    let jobs: Vec<Job> = [Job::SEQUENTIAL, Job::DEEP].into_iter().flat_map(Job::both).collect();
    let jobs: Vec<Job> = jobs.into_iter().filter(|job| options.wants(&name(*job))).collect();
    if jobs.is_empty() {
        return Ok(());
    }
    let volumes = Scratch::on(Medium::Memory, 2 << 30)?;
    let sockets = Scratch::short()?;
    let kinds = [ExportKind::VhostUser; 2];
    let mut keeper = Keeper::start(Plan::new("queues", &kinds, volumes.path(), &sockets)?)?;
    let mut one = Device::new(keeper.connect(0)?, "ours, one queue", 1)?;
    let mut many = Device::new(keeper.connect(1)?, "ours, many queues", QUEUES)?;
    for job in jobs {
        let mut pairs = Vec::new();
        for round in 0..options.rounds {
            let seed = round as u64 + 1;
            let single = together(one.queues(), job, options.seconds, seed)?;
            pairs.push((together(many.queues(), job, options.seconds, seed)?, single));
        }
        let (ours, peer) = (median(pairs.iter().map(|p| p.0)), median(pairs.iter().map(|p| p.1)));
        let ratio = median(pairs.iter().map(|p| p.0 / p.1));
        report.row(Row { name: name(job), ours, peer, ratio, floor: 0.0 });
    }
    Ok(())
}

/// The rate of all queues at once, a thread each, `job`'s depth shared out among them.
fn together(queues: &mut [Queue], job: Job, seconds: f64, seed: u64) -> Result<f64, BenchError> {
    let share = Job { depth: job.depth / queues.len(), ..job };
    thread::scope(|scope| {
        let threads: Vec<_> = queues
            .iter_mut()
            .zip(seed..)
            .map(|(queue, seed)| scope.spawn(move || sample(queue, share, seconds, seed, &[])))
            .collect();
        let rates = threads.into_iter().map(|thread| thread.join().expect("a client does not panic"));
        rates.map(|sample| sample.map(|sample| sample.rate)).sum()
    })
}
