//! An NBD client's options, and whatever it says afterwards.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    thread,
};

use vmseal_disk::nbd;
use vmseal_model::control::ExportKind;

use crate::{disk, input::Input};

/// Most bytes a client says: more is only more of the same.
const MOST: usize = 64 << 10;

/// Talks. The first byte chooses the disk and whether options get their magic and length from here.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let choice = input.u8();
    let mut says = 3u32.to_be_bytes().to_vec();
    if choice & 0x80 == 0 {
        while !input.is_empty() && says.len() < MOST {
            let (option, len) = (u32::from(input.u8() % 16), usize::from(input.u8()));
            let content = input.take(len);
            says.extend(b"IHAVEOPT");
            says.extend(option.to_be_bytes());
            says.extend((content.len() as u32).to_be_bytes());
            says.extend(content);
        }
    } else {
        says.extend(input.all());
    }
    talk(choice, &says);
}

/// Says all of it to a new server; gives what comes back until it ends.
pub(crate) fn talk(choice: u8, says: &[u8]) -> Vec<u8> {
    let export = disk::export(ExportKind::Nbd, choice);
    let (mut client, server) = UnixStream::pair().expect("sockets");
    let says = &says[..says.len().min(4 * MOST)];
    thread::scope(|scope| {
        let mut reader = client.try_clone().expect("a descriptor");
        let hears = scope.spawn(move || {
            let mut heard = Vec::new();
            let _ = reader.read_to_end(&mut heard);
            heard
        });
        scope.spawn(move || {
            // A server that has heard enough closes.
            let _ = client.write_all(says);
            let _ = client.shutdown(Shutdown::Write);
        });
        if let Err(error) = nbd::serve(&server, &export) {
            assert!(!error.to_string().is_empty());
        }
        let _ = server.shutdown(Shutdown::Both);
        drop(server);
        hears.join().expect("the reader does not panic")
    })
}
