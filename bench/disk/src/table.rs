//! Every figure of every export, for whoever reads a row of the report and asks why.

use crate::{
    export::Export,
    job::Job,
    place::Medium,
    sample::{Sample, median},
};

/// The samples of each export under each load, in the order of the rounds.
pub(crate) type Samples = std::collections::BTreeMap<(Medium, Job, Export), Vec<Sample>>;

/// Prints them: medians of the rounds, the 99th percentile of all operations together.
pub(crate) fn print(samples: &Samples) {
    for medium in Medium::ALL {
        for job in Job::all() {
            let of_job = Export::ALL
                .iter()
                .filter_map(|export| samples.get(&(medium, job, *export)).map(|samples| (export, samples)));
            let mut head = Some(());
            for (export, samples) in of_job {
                if head.take().is_some() {
                    println!(
                        "\n{:<24} {:>10} {:>12} {:>10}",
                        format!("{medium}, {job}"),
                        job.unit(),
                        "CPU us/op",
                        "p99 us"
                    );
                }
                println!("{}", line(&export.to_string(), samples));
            }
        }
    }
    println!();
}

fn line(export: &str, samples: &[Sample]) -> String {
    let rate = median(samples.iter().map(|sample| sample.rate));
    let cpu = median(samples.iter().map(Sample::cpu_us_of_all));
    let mut latencies = crate::histogram::Histogram::new();
    samples.iter().for_each(|sample| latencies.merge(&sample.latencies));
    let mut text = format!("  {export:<22} {rate:>10.1} {cpu:>12.2} {:>10.1}", latencies.quantile_us(0.99));
    // Keeper, worker, and QEMU between: its part is what an NBD disk costs there.
    if samples.iter().all(|sample| sample.cpu_us.len() == 3) {
        let qemu = median(samples.iter().filter_map(|sample| sample.cpu_us.last().copied()));
        text += &format!("  of it QEMU's {qemu:.2}");
    }
    text
}
