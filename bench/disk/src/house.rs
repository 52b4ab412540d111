//! What a VM's disk process costs beside I/O: until the first byte, when idle, in memory.

use std::{
    fs,
    time::{Duration, Instant},
};

use vmseal_bench_report::{Report, Row};
use vmseal_model::control::ExportKind;

use crate::{
    error::{BenchError, Trying},
    job::Job,
    nbd::NbdClient,
    options::Options,
    ours::{Keeper, Plan},
    place::{Medium, Scratch},
    process::cpu_seconds,
    sample::{Client, median, sample},
    vhost::{Device, GUEST_MEMORY, Memory},
};

/// Milliseconds from the start of a keeper to its first bytes.
const FIRST_BYTE_MS: f64 = 15.0;
/// Times that is tried.
const STARTS: usize = 20;
/// MiB of an idle VM with two disks; where it is to go.
const IDLE_MIB: f64 = 12.0;
const IDLE_MIB_GOAL: f64 = 8.0;
/// How long nothing is done, and CPU milliseconds that count as none.
const IDLE: Duration = Duration::from_secs(2);
const IDLE_CPU_MS: f64 = 1.0;
const SETTLE: Duration = Duration::from_millis(1500);

const KINDS: [(ExportKind, &str); 2] = [(ExportKind::Nbd, "nbd"), (ExportKind::VhostUser, "vhost-user")];

/// Adds these rows.
///
/// # Errors
///
/// [`BenchError`] if something could not be measured.
pub(crate) fn measure(options: &Options, report: &mut Report) -> Result<(), BenchError> {
    for (kind, way) in KINDS {
        let first = format!("first 4 KiB of ours {way} after the start, ms");
        if options.wants(&first) {
            let ms = first_byte_ms(kind)?;
            report.row(Row::less(first, ms, FIRST_BYTE_MS, 1.0));
        }
        let memory = format!("idle VM with 2 disks by {way}, MiB (goal {IDLE_MIB_GOAL})");
        let cpu = format!("idle VM with 2 disks by {way}, CPU ms in {} s", IDLE.as_secs());
        if options.wants(&memory) || options.wants(&cpu) {
            idle(kind, &memory, &cpu, report)?;
        }
    }
    Ok(())
}

fn client(keeper: &mut Keeper, kind: ExportKind, at: usize) -> Result<Box<dyn Client>, BenchError> {
    let stream = keeper.connect(at)?;
    Ok(match kind {
        ExportKind::VhostUser => Box::new(Device::new(stream, "ours", 1)?),
        _ => Box::new(NbdClient::new(stream, "ours", "")?),
    })
}

fn first_byte_ms(kind: ExportKind) -> Result<f64, BenchError> {
    let volumes = Scratch::on(Medium::Memory, 1 << 30)?;
    let mut took = Vec::with_capacity(STARTS);
    let sockets = Scratch::short()?;
    for n in 0..STARTS {
        let plan = Plan::new(&format!("first-{n}"), &[kind], volumes.path(), &sockets)?;
        // A guest has its memory before its disk is asked for anything.
        let memory = Memory::new(1)?;
        let begun = Instant::now();
        let mut process = plan.start()?;
        let stream = process.connect(plan.disks()[0].socket())?;
        let mut client: Box<dyn Client> = match kind {
            ExportKind::VhostUser => Box::new(Device::with_memory(memory, stream, "ours")?),
            _ => Box::new(NbdClient::new(stream, "ours", "")?),
        };
        client.submit(0, false, 0, 4096);
        client.send()?;
        client.wait(&mut Vec::new())?;
        took.push(begun.elapsed().as_secs_f64() * 1000.0);
        let file = plan.disks()[0].file();
        fs::remove_file(file).trying(|| format!("removing {}", file.display()))?;
    }
    Ok(median(took.into_iter()))
}

/// After use: buffers that are kept count.
fn idle(kind: ExportKind, memory: &str, cpu: &str, report: &mut Report) -> Result<(), BenchError> {
    let volumes = Scratch::on(Medium::Memory, 2 << 30)?;
    let sockets = Scratch::short()?;
    let mut keeper = Keeper::start(Plan::new("idle", &[kind, kind], volumes.path(), &sockets)?)?;
    let mut clients = Vec::new();
    for at in 0..2 {
        let mut client = client(&mut keeper, kind, at)?;
        for job in Job::all() {
            sample(&mut *client, job, 0.05, 1, &[])?;
        }
        clients.push(client);
    }
    let pids = keeper.pids();
    let used = || pids.iter().map(|pid| cpu_seconds(*pid)).sum::<Result<f64, _>>();
    // Memory that was kept for the next request is given back once, some time after the last: not idleness yet.
    std::thread::sleep(SETTLE);
    let before = used()?;
    std::thread::sleep(IDLE);
    let ms = (used()? - before) * 1000.0;
    // A ratio needs something to divide by.
    report.row(Row::less(cpu, ms.max(0.01), IDLE_CPU_MS, 1.0));
    let resident: Result<Vec<Resident>, _> = pids.iter().map(|pid| Resident::of(*pid)).collect();
    match resident {
        Ok(each) => {
            let sum = |part: fn(&Resident) -> u64| each.iter().map(part).sum::<u64>() as f64 / 1024.0;
            let (proportional, resident) = (sum(|r| r.pss_kib), sum(|r| r.rss_kib));
            println!(
                "{memory}: {proportional:.1} proportional (PSS), {resident:.1} resident (RSS), keeper and worker"
            );
            // The larger of the two: what a page is shared with may end.
            report.row(Row::less(memory, resident, IDLE_MIB, 1.0));
        }
        Err(error) => report.skip(memory, format!("only root may look into the process ({error})")),
    }
    Ok(())
}

/// Memory of a process that is resident, without the guest's: that is there anyway.
struct Resident {
    /// A page that several have counts in parts.
    pss_kib: u64,
    /// A page that several have counts for each.
    rss_kib: u64,
}

impl Resident {
    fn of(pid: i32) -> std::io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        Ok(Self::parse(&text))
    }

    fn parse(smaps: &str) -> Self {
        let mut resident = Self { pss_kib: 0, rss_kib: 0 };
        let mut guest = false;
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let (name, value) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            match name {
                "Pss:" if !guest => resident.pss_kib += value.parse().unwrap_or(0),
                "Rss:" if !guest => resident.rss_kib += value.parse().unwrap_or(0),
                // `addresses permissions offset device inode path` begins a mapping.
                range if range.contains('-') && !range.ends_with(':') => guest = line.contains(GUEST_MEMORY),
                _ => {}
            }
        }
        resident
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_the_guest_does_not_count() {
        let smaps = "55d0-55d1 r-xp 00000000 fe:00 12 /usr/bin/vmseal-disk\nSize: 8 kB\nRss: 8 kB\nPss: 4 kB\n\
            Pss_Dirty: 4 kB\nVmFlags: rd ex\n7f00-7f01 rw-s 00000000 00:01 7 /memfd:vmseal-bench-guest (deleted)\n\
            Rss: 4096 kB\nPss: 2048 kB\n7f02-7f03 rw-p 00000000 00:00 0\nRss: 16 kB\nPss: 16 kB\n";
        let resident = Resident::parse(smaps);
        assert_eq!((resident.pss_kib, resident.rss_kib), (20, 24));
    }
}
