//! Volumes that grow, and file systems that do not.

use std::{ffi::CString, fs, os::unix::ffi::OsStrExt, path::PathBuf};

use crate::{
    nbd_client::*,
    rig::{MIB, Rig, Scratch, Spec, kill, pattern, wait_gone},
    tools::{missing, ok, tool},
};

#[test]
fn volume_grows_by_writes_and_reads_zeros_beyond() {
    let rig = Rig::with(Spec { unit: 4096, ..Spec::growing(256 * MIB) });
    let disk = rig.disk();
    let mut client = Client::connect(&disk.socket).unwrap();
    assert_eq!(client.size, 256 * MIB);
    assert_eq!(client.read(255 * MIB, 4096).unwrap(), [0; 4096]);
    assert_eq!(client.block_status(0, 256 << 20, 0).unwrap(), [(256 << 20, 1)]);
    client.write(MIB, &pattern(1, 4096), 0).unwrap();
    assert_eq!(rig.status().disks[0].stored_bytes, MIB + 4096);
    let extents = client.block_status(0, 256 << 20, 0).unwrap();
    assert_eq!(extents, [(MIB as u32 + 4096, 0), ((255 << 20) - 4096, 1)]);
    assert_eq!(fs::metadata(&disk.file).unwrap().len(), 17 * MIB + 4096);
    let plain = disk.stored_plain();
    assert!(plain[..1 << 20].iter().all(|byte| *byte == 0), "the gap holds encrypted zeros");
    assert_eq!(plain[1 << 20..], pattern(1, 4096));
    assert_eq!(
        client.read(MIB - 4096, 12288).unwrap(),
        [&[0; 4096], &pattern(1, 4096)[..], &[0; 4096]].concat()
    );
    client.request(WRITE_ZEROES, 0, 2 * MIB, 1 << 20).unwrap();
    assert_eq!(rig.status().disks[0].stored_bytes, 3 * MIB);
    client.request(TRIM, 0, 200 * MIB, 1 << 20).unwrap();
    assert_eq!(rig.status().disks[0].stored_bytes, 3 * MIB, "a discard beyond the end is nothing");
}

#[test]
fn gap_wider_than_64_mib_is_left_as_a_hole() {
    let rig = Rig::with(Spec::growing(256 * MIB));
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    client.write(65 * MIB, &[1; 512], 0).unwrap();
    let extents = client.block_status(0, 65 << 20, 0).unwrap();
    assert_eq!(extents, [(65 << 20, 1)]);
    client.write(65 * MIB + 512 + 2 * MIB, &[2; 512], 0).unwrap();
    assert_eq!(client.read(65 * MIB + 512, 2 << 20).unwrap(), vec![0; 2 << 20]);
}

#[test]
fn connections_that_grow_the_volume_together_lose_nothing() {
    let rig = Rig::with(Spec::growing(64 * MIB));
    let threads: Vec<_> = (0..4u64)
        .map(|thread| {
            let socket = rig.disk().socket.clone();
            std::thread::spawn(move || {
                let mut client = Client::connect(&socket).unwrap();
                for i in 0..40 {
                    let at = (i * 4 + thread) * 65536;
                    client.write(at, &pattern(at, 65536), 0).unwrap();
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let plain = rig.disk().stored_plain();
    assert_eq!(plain.len(), 160 * 65536);
    for (i, piece) in plain.chunks(65536).enumerate() {
        assert!(piece == pattern(i as u64 * 65536, 65536), "piece {i}");
    }
}

/// A file system of 24 MiB that is unmounted again.
pub(crate) struct SmallFileSystem(pub(crate) PathBuf);

impl SmallFileSystem {
    pub(crate) fn mount(scratch: &Scratch) -> Option<Self> {
        let path = scratch.path("small");
        fs::create_dir(&path).unwrap();
        let target = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: all strings are NUL-terminated and outlive the call.
        let done = unsafe {
            libc::mount(c"none".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, c"size=24m".as_ptr().cast())
        };
        if done == 0 {
            return Some(Self(path));
        }
        missing("the right to mount a tmpfs");
        None
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let target = CString::new(self.0.as_os_str().as_bytes()).unwrap();
        // SAFETY: the string is NUL-terminated; what is mounted there is ours.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

#[test]
fn full_file_system_is_enospc_to_the_client_and_the_data_stays() {
    let scratch = Scratch::new();
    let Some(small) = SmallFileSystem::mount(&scratch) else { return };
    let rig = Rig::with(Spec { directory: Some(small.0.clone()), ..Spec::growing(64 * MIB) });
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    let mut written = 0;
    let errno = loop {
        match client.write(written * MIB, &pattern(written, 1 << 20), 0) {
            Ok(()) => written += 1,
            Err(fault) => break fault.errno(),
        }
        assert!(written < 64);
    };
    assert_eq!(errno, Some(ENOSPC));
    assert!((16..=24).contains(&written), "{written} MiB fitted");
    assert_eq!(client.request(WRITE_ZEROES, 0, 40 * MIB, 1 << 20).unwrap_err().errno(), Some(ENOSPC));
    client.flush().unwrap();
    // The same after the worker has been started anew and measured the file.
    for round in 0..2 {
        for i in 0..written {
            assert!(client.read(i * MIB, 1 << 20).unwrap() == pattern(i, 1 << 20), "MiB {i}, round {round}");
        }
        assert_eq!(client.read(50 * MIB, 4096).unwrap(), [0; 4096]);
        drop(client);
        let worker = rig.status().worker_pid;
        kill(worker, libc::SIGKILL);
        wait_gone(worker);
        client = Client::connect(&rig.disk().socket).unwrap();
    }
    // QEMU is told the same, in its own words.
    drop(client);
    if let Some(mut qemu_io) = tool("qemu-io") {
        let output =
            qemu_io.args(["-f", "raw", "-c", "write 30M 8M"]).arg(rig.disk().uri()).output().unwrap();
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("No space left on device"), "{text}");
    }
    // Discarded space can be written again.
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    client.request(TRIM, 0, 0, 4 << 20).unwrap();
    client.write(written * MIB, &pattern(99, 1 << 20), FUA).unwrap();
    drop(client);
    drop(rig);
    drop(small);
}

#[test]
fn file_that_may_not_grow_further_is_enospc_and_not_a_signal() {
    let Some(mut prlimit) = tool("prlimit") else { return };
    let rig = Rig::with(Spec::growing(64 * MIB));
    let worker = rig.status().worker_pid;
    ok(prlimit.arg(format!("--pid={worker}")).arg(format!("--fsize={}", 18 * MIB)));
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    client.write(0, &[1; 1 << 20], 0).unwrap();
    assert_eq!(client.write(4 * MIB, &[1; 1 << 20], 0).unwrap_err().errno(), Some(ENOSPC));
    assert_eq!(client.read(0, 1 << 20).unwrap(), [1; 1 << 20]);
    assert_eq!(rig.status().worker_pid, worker);
}
