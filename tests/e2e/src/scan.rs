//! Looks for secrets where they must not be: files, other processes' memory, core dumps. And asks a disk process who
//! it is.

use std::{
    fs,
    io::{Read, Seek, SeekFrom, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use vmseal_model::control::{ControlReply, ControlRequest, DiskStatus, MAX_FRAME};

pub use crate::round_keys::aes256_round_keys;
use crate::shell;

/// Asks a worker for its status; `None` if nobody answers.
pub fn disk_status(socket: &Path) -> Option<DiskStatus> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let ask = serde_json::to_vec(&ControlRequest::Status).ok()?;
    stream.write_all(&(ask.len() as u32).to_le_bytes()).ok()?;
    stream.write_all(&ask).ok()?;
    let mut length = [0u8; 4];
    stream.read_exact(&mut length).ok()?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME {
        return None;
    }
    let mut answer = vec![0; length];
    stream.read_exact(&mut answer).ok()?;
    match serde_json::from_slice(&answer).ok()? {
        ControlReply::Status(status) => Some(status),
        _ => None,
    }
}

/// Files below a folder that hold any of the needles, with the needle's number. Sockets and devices are passed over.
pub fn files_with(folder: &Path, needles: &[&[u8]]) -> Vec<(PathBuf, usize)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file()
                && let Ok(file) = fs::File::open(entry.path())
            {
                found.extend(stream_with(file, needles).into_iter().map(|n| (entry.path(), n)));
            }
        }
    }
    found
}

/// Numbers of the needles that a stream holds.
pub fn stream_with(mut stream: impl Read, needles: &[&[u8]]) -> Vec<usize> {
    let overlap = needles.iter().map(|n| n.len()).max().unwrap_or(1).saturating_sub(1);
    let mut window = Vec::new();
    let mut chunk = vec![0u8; 1 << 20];
    let mut search = Search::new(needles);
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => {
                window.extend_from_slice(&chunk[..n]);
                search.look(&window);
                let cut = window.len().saturating_sub(overlap);
                window.drain(..cut);
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    search.found()
}

/// Numbers of the needles in a process's readable memory, through /proc/PID/mem.
pub fn memory_with(pid: i32, needles: &[&[u8]]) -> Vec<usize> {
    let maps =
        fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_else(|e| panic!("maps of {pid}: {e}"));
    let mut memory =
        fs::File::open(format!("/proc/{pid}/mem")).unwrap_or_else(|e| panic!("memory of {pid}: {e}"));
    let mut search = Search::new(needles);
    let mut looked = 0u64;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else { continue };
        let Some((from, to)) = range.split_once('-') else { continue };
        let (Ok(from), Ok(to)) = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16)) else {
            continue;
        };
        if !rights.starts_with('r') || line.ends_with("[vvar]") || line.ends_with("[vsyscall]") {
            continue;
        }
        // Page by page where a mapping cannot be read whole: memfd_secret refuses, its neighbours do not.
        let mut bytes = vec![0u8; (to - from) as usize];
        if memory.seek(SeekFrom::Start(from)).is_err() || memory.read_exact(&mut bytes).is_err() {
            bytes.fill(0);
            for (i, page) in bytes.chunks_mut(4096).enumerate() {
                if memory.seek(SeekFrom::Start(from + i as u64 * 4096)).is_ok() {
                    let _ = memory.read_exact(page);
                }
            }
        }
        looked += bytes.len() as u64;
        search.look(&bytes);
    }
    assert!(
        looked > 64 << 10,
        "only {looked} bytes of process {pid} could be read: the search proves nothing"
    );
    search.found()
}

/// Numbers of the needles in a core dump that gdb takes of a process, register notes included.
pub fn core_with(pid: i32, folder: &Path, needles: &[&[u8]]) -> Vec<usize> {
    core_after(pid, folder, &[], needles)
}

/// The same after some commands to gdb. Everything that may be dumped is, as by `gcore -a`.
pub fn core_after(pid: i32, folder: &Path, commands: &[String], needles: &[&[u8]]) -> Vec<usize> {
    let core = folder.join(format!("core.{pid}"));
    let mut gdb = shell::tool("gdb");
    gdb.args(["-nx", "-batch", "-ex", "set use-coredump-filter off", "-ex", "set dump-excluded-mappings on"]);
    gdb.arg("-p").arg(pid.to_string());
    commands.iter().for_each(|command| {
        gdb.args(["-ex", command]);
    });
    gdb.arg("-ex").arg(format!("generate-core-file {}", core.display()));
    let outcome = shell::run_within(&mut gdb, Duration::from_secs(120));
    let file = fs::File::open(&core)
        .unwrap_or_else(|e| panic!("gcore of {pid} made no core ({e}): {}", outcome.all()));
    let length = file.metadata().map_or(0, |m| m.len());
    assert!(length > 64 << 10, "the core of {pid} has {length} bytes: the search proves nothing");
    let found = stream_with(file, needles);
    fs::remove_file(core).expect("own file");
    found
}

/// Needles, found in one pass: where one may begin is looked up by its first two bytes.
struct Search<'a> {
    needles: &'a [&'a [u8]],
    begins: Vec<bool>,
    found: Vec<bool>,
}

impl<'a> Search<'a> {
    fn new(needles: &'a [&'a [u8]]) -> Self {
        let mut begins = vec![false; 1 << 16];
        for needle in needles {
            assert!(needle.len() >= 2, "a needle of {} bytes is everywhere", needle.len());
            begins[usize::from(u16::from_le_bytes([needle[0], needle[1]]))] = true;
        }
        Self { needles, begins, found: vec![false; needles.len()] }
    }

    fn look(&mut self, bytes: &[u8]) {
        for (at, pair) in bytes.windows(2).enumerate() {
            if self.begins[usize::from(u16::from_le_bytes([pair[0], pair[1]]))] {
                for (found, needle) in self.found.iter_mut().zip(self.needles) {
                    *found |= bytes[at..].starts_with(needle);
                }
            }
        }
    }

    fn found(self) -> Vec<usize> {
        (0..self.found.len()).filter(|&i| self.found[i]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_needle_across_two_chunks_is_found() {
        let mut bytes = vec![0u8; (1 << 20) + 40];
        bytes[(1 << 20) - 5..][..11].copy_from_slice(b"VMSEAL-NEED");
        assert_eq!(stream_with(&bytes[..], &[b"absent", b"VMSEAL-NEED"]), [1]);
    }
}
