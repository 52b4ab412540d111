//! The others: qemu-storage-daemon, tuned with io_uring, and nbdkit.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    error::{BenchError, Trying},
    image::{self, PASSPHRASE},
    place::{Medium, Scratch},
    process::Process,
};

/// A storage daemon that shows a raw and a LUKS file, each by NBD and by vhost-user-blk.
pub(crate) fn storage_daemon(
    raw: Option<&Path>,
    luks: Option<&Path>,
    passphrase: &Path,
    medium: Medium,
    sockets: &Scratch,
) -> Result<Process, BenchError> {
    let mut command = Command::new("qemu-storage-daemon");
    command.args(["--object", &format!("secret,id=s0,file={}", passphrase.display())]).args([
        "--nbd-server",
        &format!("addr.type=unix,addr.path={}", nbd_socket(sockets, medium).display()),
    ]);
    let cache = match medium {
        Medium::Memory => "cache.direct=off",
        Medium::Disk => "cache.direct=on",
    };
    for (name, file, format) in [("raw", raw, "driver=raw"), ("luks", luks, "driver=luks,key-secret=s0")] {
        let Some(file) = file else { continue };
        let below =
            format!("driver=file,node-name=f-{name},filename={},aio=io_uring,{cache}", file.display());
        command
            .args(["--blockdev", &below])
            .args(["--blockdev", &format!("{format},node-name={name},file=f-{name}")])
            .args(["--export", &format!("nbd,id=n-{name},node-name={name},name={name},writable=on")]);
        by_vhost_user(&mut command, name, &vhost_socket(sockets, medium, name));
    }
    Process::start(command, sockets.join(&format!("qemu-{medium}.log")))
}

/// A storage daemon that shows by vhost-user-blk what a server shows by NBD: what is between a guest and an NBD disk.
pub(crate) fn storage_daemon_on_nbd(
    server: &Path,
    export: &str,
    medium: Medium,
    sockets: &Scratch,
) -> Result<Process, BenchError> {
    let node =
        format!("driver=nbd,node-name=nbd,server.type=unix,server.path={},export={export}", server.display());
    let mut command = Command::new("qemu-storage-daemon");
    command.args(["--blockdev", &node]);
    by_vhost_user(&mut command, "nbd", &vhost_socket(sockets, medium, "nbd"));
    Process::start(command, sockets.join(&format!("qemu-nbd-{medium}.log")))
}

/// Where the storage daemon serves NBD.
pub(crate) fn nbd_socket(sockets: &Scratch, medium: Medium) -> PathBuf {
    sockets.join(&format!("qemu-{medium}-nbd.sock"))
}

/// Where it shows the node `name` by vhost-user.
pub(crate) fn vhost_socket(sockets: &Scratch, medium: Medium, name: &str) -> PathBuf {
    sockets.join(&format!("qemu-{medium}-vhost-{name}.sock"))
}

fn by_vhost_user(command: &mut Command, node: &str, socket: &Path) {
    let address = format!("addr.type=unix,addr.path={}", socket.display());
    let export = format!("vhost-user-blk,id=v-{node},node-name={node},writable=on,{address}");
    command.args(["--export", &export]);
}

/// nbdkit with its luks filter on a file; it has no way around the page cache.
pub(crate) fn nbdkit(
    luks: &Path,
    passphrase: &Path,
    medium: Medium,
    sockets: &Scratch,
) -> Result<(Process, PathBuf), BenchError> {
    let socket = sockets.join(&format!("nbdkit-{medium}.sock"));
    let mut command = Command::new("nbdkit");
    command
        .args(["--foreground", "--unix"])
        .arg(&socket)
        .args(["--filter=luks", "file"])
        .arg(luks)
        .arg(format!("passphrase=+{}", passphrase.display()));
    Ok((Process::start(command, sockets.join(&format!("nbdkit-{medium}.log")))?, socket))
}

/// Puts the passphrase where the peers read it.
pub(crate) fn passphrase(sockets: &Scratch) -> Result<PathBuf, BenchError> {
    let path = sockets.join("passphrase");
    fs::write(&path, PASSPHRASE).trying(|| format!("writing {}", path.display()))?;
    Ok(path)
}

/// A LUKS volume for one of them.
pub(crate) fn luks(volumes: &Scratch, name: &str, passphrase: &Path) -> Result<PathBuf, BenchError> {
    let path = volumes.join(name);
    image::create_luks(&path, passphrase)?;
    Ok(path)
}
