//! Passes over a volume: the agent's side of `vmseal-disk job`.

use std::{
    fs::{self, File, OpenOptions},
    os::{
        fd::AsFd,
        unix::{fs::MetadataExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::Child,
};

use aws_lc_rs::digest::{SHA256, digest};
use vmseal_disk::frame;
use vmseal_keys::random_bytes;
use vmseal_model::{
    control::{CONTROL_VERSION, Job, JobEvent, JobSetup},
    id::VmId,
};

use crate::{
    growth::SmallFileSystem,
    rig::{Disk, MIB, Scratch, Spec, cipher, hex, key_memory, pattern, spawn},
};

struct Bench {
    scratch: Scratch,
    vm: VmId,
    disks: [Disk; 1],
    clear: PathBuf,
}

impl Bench {
    fn new(spec: Spec, clear: &[u8]) -> Self {
        let scratch = Scratch::new();
        let vm = VmId::from_random(random_bytes().unwrap());
        let disks = [Disk::make(&scratch.0, "vda", 0, vm, &spec)];
        let path = scratch.path("clear.raw");
        fs::write(&path, clear).unwrap();
        Self { scratch, vm, disks, clear: path }
    }

    fn disk(&self) -> &Disk {
        &self.disks[0]
    }

    fn start(&self, job: Job, clear: &Path, from: u64, bytes: u64) -> (Child, UnixStream) {
        let (child, socket) = spawn("job", &self.scratch.path("log"));
        let disk = self.disk();
        let setup =
            JobSetup { version: CONTROL_VERSION, vm: self.vm, disk: disk.setup.clone(), job, bytes, from };
        let keys = key_memory(&self.disks);
        let data = disk.open();
        let mut options = OpenOptions::new();
        let clear =
            options.read(true).write(job == Job::Decrypt).create(job == Job::Decrypt).open(clear).unwrap();
        let fds = [keys.as_fd(), data.as_fd(), clear.as_fd()];
        frame::send(&socket, &setup, if job == Job::Zero { &fds[..2] } else { &fds }).unwrap();
        (child, socket)
    }

    /// Runs to the end: events, exit code.
    fn run(&self, job: Job, clear: &Path, from: u64, bytes: u64) -> (Vec<JobEvent>, i32) {
        let (mut child, socket) = self.start(job, clear, from, bytes);
        let mut events = Vec::new();
        while let Ok(Some((event, _))) = frame::receive(&socket) {
            events.push(event);
        }
        (events, child.wait().unwrap().code().unwrap())
    }

    fn done(&self, job: Job, clear: &Path, bytes: u64) -> String {
        let (events, code) = self.run(job, clear, 0, bytes);
        let Some(JobEvent::Done { sha256 }) = events.last() else { panic!("{events:?}") };
        assert_eq!(code, 0);
        sha256.clone()
    }

    fn failed(&self, job: Job, from: u64, bytes: u64) -> (String, i32) {
        let (events, code) = self.run(job, &self.clear, from, bytes);
        let Some(JobEvent::Failed { message }) = events.last() else { panic!("{events:?}") };
        (message.clone(), code)
    }
}

#[test]
fn clear_file_goes_in_compares_equal_and_comes_out_the_same() {
    for unit in [512, 4096] {
        // Data, a long zero, data, and a tail that is no whole unit.
        let mut clear = pattern(1, (5 << 20) + 100);
        clear[1 << 20..3 << 20].fill(0);
        let bench = Bench::new(Spec { stored: 0, unit, ..Spec::fixed(6 * MIB) }, &clear);
        let bytes = clear.len() as u64;
        assert_eq!(bench.done(Job::Encrypt, &bench.clear, bytes), "");
        let mut expected = clear.clone();
        expected.resize(clear.len().next_multiple_of(unit as usize), 0);
        cipher(&bench.disk().payload, unit).encrypt(0, &mut expected).unwrap();
        assert!(bench.disk().stored() == expected);
        // The rest of the disk, so that it is as long as it says.
        let rest = expected.len() as u64;
        assert_eq!(bench.run(Job::Zero, &bench.clear, rest, 6 * MIB).1, 0);
        assert!(bench.disk().stored()[..rest as usize] == expected[..]);
        assert!(bench.disk().stored_plain()[rest as usize..].iter().all(|byte| *byte == 0));

        assert_eq!(bench.done(Job::Verify, &bench.clear, bytes), hex(digest(&SHA256, &clear).as_ref()));
        let out = bench.scratch.path("out.raw");
        bench.done(Job::Decrypt, &out, bytes);
        assert!(fs::read(&out).unwrap() == clear);
        let meta = fs::metadata(&out).unwrap();
        assert!(meta.blocks() * 512 < meta.len() - MIB, "zeros stay holes: {} blocks", meta.blocks());
        assert_eq!(bench.done(Job::Verify, &out, bytes), hex(digest(&SHA256, &clear).as_ref()));
    }
}

#[test]
fn decrypting_over_an_older_file_leaves_nothing_of_it() {
    let clear = vec![0; 1 << 20];
    let bench = Bench::new(Spec { stored: 0, ..Spec::fixed(MIB) }, &clear);
    bench.done(Job::Encrypt, &bench.clear, MIB);
    let out = bench.scratch.path("out.raw");
    fs::write(&out, pattern(3, 1 << 20)).unwrap();
    bench.done(Job::Decrypt, &out, MIB);
    assert!(fs::read(&out).unwrap() == clear);
}

#[test]
fn job_that_was_killed_goes_on_where_it_was_durable() {
    let bytes = 130 * MIB;
    let bench = Bench::new(Spec { stored: 0, ..Spec::fixed(bytes) }, &[]);
    let source = OpenOptions::new().write(true).open(&bench.clear).unwrap();
    source.set_len(bytes).unwrap();
    for at in [0, 60, 64, 100, 129] {
        std::os::unix::fs::FileExt::write_all_at(&source, &pattern(at, 1 << 20), at * MIB).unwrap();
    }
    let (mut child, socket) = bench.start(Job::Encrypt, &bench.clear, 0, bytes);
    let (first, _) = frame::receive::<JobEvent>(&socket).unwrap().unwrap();
    assert_eq!(first, JobEvent::Progress { durable: 64 * MIB });
    child.kill().unwrap();
    child.wait().unwrap();
    let (events, code) = bench.run(Job::Encrypt, &bench.clear, 64 * MIB, bytes);
    assert_eq!(code, 0);
    assert_eq!(
        events,
        [
            JobEvent::Progress { durable: 128 * MIB },
            JobEvent::Progress { durable: bytes },
            JobEvent::Done { sha256: String::new() }
        ]
    );
    let sha256 = bench.done(Job::Verify, &bench.clear, bytes);
    assert_eq!(sha256, hex(digest(&SHA256, &fs::read(&bench.clear).unwrap()).as_ref()));
}

#[test]
fn comparison_names_the_first_byte_that_differs() {
    let mut clear = pattern(1, 2 << 20);
    let bench = Bench::new(Spec { stored: 0, ..Spec::fixed(2 * MIB) }, &clear);
    bench.done(Job::Encrypt, &bench.clear, 2 * MIB);
    clear[1_500_000] ^= 1;
    fs::write(&bench.clear, &clear).unwrap();
    let (message, code) = bench.failed(Job::Verify, 0, 2 * MIB);
    assert_eq!((message.as_str(), code), ("volume and clear file differ at byte 1500000", 1));
}

#[test]
fn clear_file_may_end_within_the_last_block_and_no_earlier() {
    let clear = pattern(1, (1 << 20) - 3000);
    let bench = Bench::new(Spec { stored: 0, ..Spec::fixed(MIB) }, &clear);
    bench.done(Job::Encrypt, &bench.clear, MIB);
    assert!(bench.disk().stored_plain() == [clear, vec![0; 3000]].concat());
    fs::write(&bench.clear, pattern(1, (1 << 20) - 4096)).unwrap();
    let (message, code) = bench.failed(Job::Encrypt, 0, MIB);
    assert!(message.contains("ends at byte 1044480") && code == 1, "{message}");
}

#[test]
fn bad_orders_are_refused_and_touch_nothing() {
    let bench = Bench::new(Spec::fixed(MIB), &pattern(1, 1 << 20));
    let before = bench.disk().stored();
    for (from, bytes) in [(0, 2 * MIB), (2 * MIB, MIB), (100, MIB)] {
        let (message, code) = bench.failed(Job::Encrypt, from, bytes);
        assert!(message.contains("not within the disk") && code == 2, "{message}");
    }
    let mut other = Bench::new(Spec::fixed(MIB), &pattern(1, 1 << 20));
    let others = other.disk().stored();
    other.disks[0].payload[70] ^= 1;
    for job in [Job::Encrypt, Job::Decrypt, Job::Zero, Job::Verify] {
        let (message, code) = other.failed(job, 0, MIB);
        assert!(message.contains("key check") && code == 2, "{message}");
    }
    assert!(fs::read(&other.clear).unwrap() == pattern(1, 1 << 20));
    assert!(bench.disk().stored() == before && other.disk().stored() == others);
    // Going on past what is there would leave a gap of nothing.
    let short = Bench::new(Spec { stored: 0, ..Spec::fixed(2 * MIB) }, &pattern(1, 2 << 20));
    let (message, code) = short.failed(Job::Encrypt, MIB, 2 * MIB);
    assert!(message.contains("the volume ends at byte 0") && code == 2, "{message}");
    let (message, code) = short.failed(Job::Verify, 0, 2 * MIB);
    assert!(message.contains("ended early") && code == 2, "{message}");
}

#[test]
fn missing_descriptors_and_nonsense_end_a_job_with_code_2() {
    let scratch = Scratch::new();
    let null = File::open("/dev/null").unwrap();
    let setups: [&[u8]; 3] = [b"{}", b"[]", br#"{"version":9"#];
    for setup in setups {
        let (mut child, socket) = spawn("job", &scratch.path("log"));
        frame::send_raw(&socket, setup, &[null.as_fd()]).unwrap();
        let event = frame::receive::<JobEvent>(&socket).unwrap().unwrap().0;
        assert!(matches!(event, JobEvent::Failed { .. }), "{event:?}");
        assert_eq!(child.wait().unwrap().code(), Some(2));
    }
    let (mut child, socket) = spawn("job", &scratch.path("log"));
    drop(socket);
    assert_eq!(child.wait().unwrap().code(), Some(2));
}

#[test]
fn job_ends_when_the_agent_goes_away() {
    let bytes = 4096 * MIB;
    let bench = Bench::new(Spec { presented: bytes, ..Spec::growing(bytes) }, &[]);
    let source = OpenOptions::new().write(true).open(&bench.clear).unwrap();
    source.set_len(bytes).unwrap();
    let (mut child, socket) = bench.start(Job::Verify, &bench.clear, 0, bytes);
    drop(socket);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(fs::read_to_string(bench.scratch.path("log")).unwrap().contains("agent went away"));
}

#[test]
fn full_file_system_fails_the_job_with_a_reason() {
    let scratch = Scratch::new();
    let Some(small) = SmallFileSystem::mount(&scratch) else { return };
    let spec = Spec { stored: 0, directory: Some(small.0.clone()), ..Spec::fixed(32 * MIB) };
    let bench = Bench::new(spec, &pattern(1, 32 << 20));
    let (message, code) = bench.failed(Job::Encrypt, 0, 32 * MIB);
    assert!(message.contains("no space left") && code == 1, "{message}");
    drop(bench);
}
