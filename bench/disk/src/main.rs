//! `make bench-disk`: our disks beside the peers', all in one run, taking turns, so that a noisy machine hits all alike.
//!
//! Prints every figure, then the rows that have a floor; writes `bench/out/disk.json`; exits non-zero if a row is below
//! its floor. A ratio is the median of the ratios within each round, so it is not the ratio of the medians beside it.

mod demand;
mod error;
mod export;
mod histogram;
mod house;
mod image;
mod job;
mod nbd;
mod options;
mod ours;
mod peers;
mod place;
mod process;
mod queues;
mod sample;
mod stand;
mod table;
mod verify;
mod vhost;

use std::{collections::BTreeSet, error::Error, process::ExitCode};

use vmseal_bench_report::{Report, Row};

use crate::{
    demand::{Demand, Figure},
    error::BenchError,
    export::Export,
    job::Job,
    options::Options,
    place::Medium,
    process::{keep_on, processors},
    sample::{Sample, median, sample},
    stand::{Stall, Stand},
    table::Samples,
};

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(report) => report.finish(),
        Err(error) => {
            eprint!("bench-disk: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<Report, BenchError> {
    let demands: Vec<Demand> = demand::all().into_iter().filter(|row| options.wants(&row.name())).collect();
    let mut report = Report::new(if options.partly { "disk-part" } else { "disk" });
    // First, while nothing else of ours runs that would share its memory.
    house::measure(options, &mut report)?;
    let mut samples = Samples::new();
    for medium in Medium::ALL {
        compare(medium, options, &demands, &mut samples)?;
    }
    table::print(&samples);
    for demand in &demands {
        report.row(row(demand, &samples));
    }
    queues::measure(options, &mut report)?;
    Ok(report)
}

/// Measures on one medium what the demands need; without a choice, everything.
fn compare(
    medium: Medium,
    options: &Options,
    demands: &[Demand],
    samples: &mut Samples,
) -> Result<(), BenchError> {
    let all = options.only.is_empty();
    let wanted = |job: Job, export: Export| {
        let needs = |row: &Demand| {
            row.medium == medium && row.job == job && (row.ours == export || row.peer == export)
        };
        all || demands.iter().any(needs)
    };
    let exports: BTreeSet<Export> =
        Export::ALL.into_iter().filter(|export| Job::all().any(|job| wanted(job, *export))).collect();
    if exports.is_empty() {
        return Ok(());
    }
    eprintln!("bench-disk: {medium}: making volumes, starting servers");
    let mut stand = Stand::new(medium, &exports)?;
    for (seed, stall) in (1..).zip(&mut stand.stalls) {
        verify::verify(stall, seed)?;
    }
    eprintln!("bench-disk: {medium}: {} rounds", options.rounds);
    for round in 0..options.rounds {
        for job in Job::all() {
            // Whoever comes later finds the machine warmer, so the order turns.
            let mut turns: Vec<usize> = (0..stand.stalls.len()).collect();
            if round % 2 == 1 {
                turns.reverse();
            }
            for turn in turns {
                let stall = &mut stand.stalls[turn];
                if !wanted(job, stall.export) {
                    continue;
                }
                let taken = take_turn(stall, job, options.seconds, round)?;
                samples.entry((medium, job, stall.export)).or_default().push(taken);
            }
        }
    }
    Ok(())
}

/// One turn. A lone small request is worked on by one side at a time, so client and servers share a processor then:
/// otherwise it is chance whether waking the other side means waking another processor, which takes several times as
/// long as all that is to be compared.
fn take_turn(stall: &mut Stall, job: Job, seconds: f64, round: usize) -> Result<Sample, BenchError> {
    let together = job.depth == 1 && job.random;
    let mut all = stall.pids.clone();
    all.push(std::process::id() as i32);
    if together {
        let allowed = processors();
        keep_on(&all, Some(allowed[round % allowed.len()]))?;
    }
    let taken = sample(&mut *stall.client, job, seconds, round as u64 + 1, &stall.pids);
    if together {
        keep_on(&all, None)?;
    }
    taken
}

fn row(demand: &Demand, samples: &Samples) -> Row {
    let figure: fn(&Sample) -> f64 = match demand.figure {
        Figure::Rate => |sample| sample.rate,
        Figure::Cpu => Sample::cpu_us_of_all,
    };
    let of = |export| {
        samples
            .get(&(demand.medium, demand.job, export))
            .into_iter()
            .flatten()
            .map(figure)
            .collect::<Vec<f64>>()
    };
    let (ours, peer) = (of(demand.ours), of(demand.peer));
    let ahead = |(ours, peer): (&f64, &f64)| match demand.figure {
        Figure::Rate => ours / peer,
        Figure::Cpu => peer / ours,
    };
    let ratios: Vec<f64> = ours.iter().zip(&peer).map(ahead).collect();
    Row {
        name: demand.name(),
        ratio: median(ratios.into_iter()),
        ours: median(ours.into_iter()),
        peer: median(peer.into_iter()),
        floor: demand.floor,
    }
}
