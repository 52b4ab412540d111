//! The engine of `vmseal-disk` without its cipher, for the benchmark to compare with. It is not shipped: the program
//! that serves guests has no such mode, and this one takes no key.
//!
//! Arguments, for each disk: `nbd` or `vhost-user`, the socket to listen on, the file. It serves until it is ended.

use std::{error::Error, fs::OpenOptions, os::unix::net::UnixListener, process::ExitCode, sync::Arc, thread};

use vmseal_disk::{
    engine,
    export::Export,
    peer::PeerPolicy,
    store::FileStore,
    volume::{Layout, Volume},
};
use vmseal_model::{control::ExportKind, id::DiskId};

const UNIT: u64 = 512;
const PAYLOAD_OFFSET: u64 = 16 << 20;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut accepting = Vec::new();
    for (number, disk) in arguments.chunks(3).enumerate() {
        match serve(number as u8, disk) {
            Ok(thread) => accepting.push(thread),
            Err(error) => {
                eprintln!("bench-plain-server: {}: {error}", disk.join(" "));
                return ExitCode::FAILURE;
            }
        }
    }
    for thread in accepting {
        let _ = thread.join();
    }
    ExitCode::FAILURE
}

fn serve(number: u8, disk: &[String]) -> Result<thread::JoinHandle<()>, Box<dyn Error>> {
    let [kind, socket, file] = disk else { return Err("wants KIND SOCKET FILE".into()) };
    let kind = match kind.as_str() {
        "nbd" => ExportKind::Nbd,
        "vhost-user" => ExportKind::VhostUser,
        _ => return Err("is neither nbd nor vhost-user".into()),
    };
    let file = OpenOptions::new().read(true).write(true).open(file)?;
    let presented = file.metadata()?.len().saturating_sub(PAYLOAD_OFFSET);
    let mut store = FileStore::new(file, false)?;
    store.go_direct(UNIT);
    let layout = Layout {
        unit: UNIT,
        payload_offset: PAYLOAD_OFFSET,
        presented,
        grows: false,
        read_only: false,
        discard: true,
    };
    let volume = Volume::plain_for_bench(Box::new(store), layout)?;
    let export = Arc::new(Export::new(DiskId::from_bytes([number; 16]), "vda".into(), kind, volume));
    let listener = UnixListener::bind(socket)?;
    // SAFETY: takes nothing, cannot fail.
    let policy = PeerPolicy::Owner { uid: unsafe { libc::geteuid() } };
    Ok(thread::spawn(move || engine::accept_for(&listener, &export, &policy)))
}
