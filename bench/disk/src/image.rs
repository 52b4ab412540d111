//! Files that volumes lie in, written out in full: neither a hole nor an unwritten extent makes anything faster or slower.

use std::{
    fs::{File, OpenOptions},
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::Path,
    process::{Command, Stdio},
};

use crate::{
    error::{BenchError, Trying},
    sample::Random,
};

/// Bytes every export shows.
pub(crate) const DISK_BYTES: u64 = 512 << 20;
/// Where data begins in our volumes.
pub(crate) const PAYLOAD_OFFSET: u64 = 16 << 20;
/// Passphrase of the peers' volumes.
pub(crate) const PASSPHRASE: &str = "only a benchmark";
const CHUNK: u64 = 1 << 20;

/// A file with `before` bytes in front of the data.
pub(crate) fn create(path: &Path, before: u64) -> Result<File, BenchError> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    let file = file.trying(|| format!("creating {}", path.display()))?;
    let end = before + DISK_BYTES;
    fill(&file, before, end).trying(|| format!("writing {}", path.display()))?;
    Ok(file)
}

/// A LUKS1 volume of QEMU's making, AES-256-XTS with plain64, as our own.
pub(crate) fn create_luks(path: &Path, passphrase: &Path) -> Result<(), BenchError> {
    let cipher = "key-secret=s0,cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64,iter-time=10";
    let output = Command::new("qemu-img")
        .args(["create", "-q", "-f", "luks", "-o", cipher, "--object"])
        .arg(format!("secret,id=s0,file={}", passphrase.display()))
        .arg(path)
        .arg(DISK_BYTES.to_string())
        .stdin(Stdio::null())
        .output();
    let output =
        output.map_err(|error| BenchError::Program { program: "qemu-img".into(), why: error.to_string() })?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(BenchError::Program { program: "qemu-img".into(), why });
    }
    let before = luks_payload_offset(path)?;
    create(path, before).map(drop)
}

/// Where the data of a LUKS1 volume begins: what is in front of it is no data.
pub(crate) fn luks_payload_offset(path: &Path) -> Result<u64, BenchError> {
    let mut sectors = [0; 4];
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut sectors, 104));
    read.trying(|| format!("reading the header of {}", path.display()))?;
    Ok(u64::from(u32::from_be_bytes(sectors)) * 512)
}

/// Any bytes: what is measured does not depend on them. Then out of the page cache.
fn fill(file: &File, mut at: u64, end: u64) -> std::io::Result<()> {
    let mut random = Random::new(at);
    let chunk: Vec<u8> = (0..CHUNK / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    file.set_len(end)?;
    while at < end {
        let piece = (end - at).min(CHUNK) as usize;
        file.write_all_at(&chunk[..piece], at)?;
        at += piece as u64;
    }
    file.sync_all()?;
    // SAFETY: advice on an open descriptor.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    Ok(())
}
