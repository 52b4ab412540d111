//! What is demanded: one export beside another under one load, a floor, and where it is to go.

use crate::{
    export::{
        Export,
        Way::{Nbd, Vhost},
    },
    job::Job,
    place::Medium,
};

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Figure {
    /// Bytes or operations a second.
    Rate,
    /// CPU time an operation, of all that serve it.
    Cpu,
}

/// One row.
#[derive(Debug, Clone)]
pub(crate) struct Demand {
    pub(crate) medium: Medium,
    pub(crate) job: Job,
    pub(crate) ours: Export,
    pub(crate) peer: Export,
    pub(crate) figure: Figure,
    /// Below this ratio the benchmark fails.
    pub(crate) floor: f64,
    /// Where it is to go; the floor itself if nowhere further.
    pub(crate) goal: f64,
}

impl Demand {
    /// Its name in the report.
    pub(crate) fn name(&self) -> String {
        let unit = match self.figure {
            Figure::Rate => self.job.unit(),
            Figure::Cpu => "CPU us/op",
        };
        let goal =
            if self.goal > self.floor { format!(" (goal {:.4})", Short(self.goal)) } else { String::new() };
        format!("{}: {} / {}, {}, {unit}{goal}", self.medium, self.ours, self.peer, self.job)
    }
}

/// A number without zeros at its end.
struct Short(f64);

impl std::fmt::Display for Short {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", (self.0 * 100.0).round() / 100.0)
    }
}

/// All of them.
pub(crate) fn all() -> Vec<Demand> {
    let mut rows = Vec::new();
    let mut add = |medium, ours, peer, jobs: &[Job], figure, floor: f64, goal: f64| {
        for job in jobs.iter().flat_map(|job| job.both()) {
            rows.push(Demand { medium, job, ours, peer, figure, floor, goal });
        }
    };
    let sequential = [Job::STREAM, Job::SEQUENTIAL];
    let small = [Job::SINGLE, Job::DEEP];
    let every = [Job::STREAM, Job::SEQUENTIAL, Job::SINGLE, Job::DEEP];
    let (memory, disk) = (Medium::Memory, Medium::Disk);
    use Export::{Ours, OursInQemu, OursPlain, QemuLuks, QemuRaw};
    use Figure::{Cpu, Rate};

    // Encrypted beside encrypted, where the disk is no limit.
    add(memory, Ours(Vhost), QemuLuks(Vhost), &sequential, Rate, 6.0, 12.0);
    add(memory, Ours(Vhost), QemuLuks(Vhost), &[Job::SINGLE], Rate, 3.0, 8.0);
    add(memory, Ours(Vhost), QemuLuks(Vhost), &[Job::SINGLE], Cpu, 4.0, 4.0);
    add(memory, Ours(Vhost), QemuLuks(Vhost), &[Job::DEEP], Rate, 3.5, 6.0);
    add(memory, Ours(Nbd), QemuLuks(Nbd), &sequential, Rate, 4.0, 4.0);
    add(memory, Ours(Nbd), QemuLuks(Nbd), &small, Rate, 2.5, 2.5);
    add(memory, OursInQemu, QemuLuks(Vhost), &sequential, Rate, 3.5, 3.5);
    add(memory, OursInQemu, QemuLuks(Vhost), &small, Rate, 1.0, 1.5);

    // Encrypted beside QEMU's clear disks.
    add(memory, Ours(Vhost), QemuRaw(Vhost), &small, Rate, 1.0, 1.0);
    add(disk, Ours(Vhost), QemuRaw(Vhost), &every, Rate, 1.0, 1.0);

    // What the cipher costs.
    for way in [Vhost, Nbd] {
        add(memory, Ours(way), OursPlain(way), &small, Rate, 0.95, 0.95);
        add(memory, Ours(way), OursPlain(way), &[Job::STREAM], Rate, 0.6, 0.85);
        add(memory, Ours(way), OursPlain(way), &small, Cpu, 1.0 / 1.08, 1.0 / 1.05);
    }
    rows
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn rows_have_names_of_their_own() {
        let names: BTreeSet<String> = all().iter().map(Demand::name).collect();
        assert_eq!(names.len(), all().len());
        assert!(
            names.contains("tmpfs: ours vhost-user / qemu luks vhost-user, seq read 1M qd1, MB/s (goal 12)"),
            "{names:#?}"
        );
    }
}
