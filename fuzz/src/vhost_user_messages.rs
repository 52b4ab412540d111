//! A vhost-user front end: messages with bodies and descriptors of the input's making, to a device with queues.

use std::{
    io::Read,
    net::Shutdown,
    os::{fd::AsRawFd, unix::net::UnixStream},
    thread,
};

use vmseal_disk::vhost_user::{
    self,
    fuzzing::message::{MAX_BODY, frame},
};
use vmseal_model::control::ExportKind;

use crate::{
    disk::{self, event, memory_file, send_with},
    input::Input,
};

/// Bytes of the guest's memory: one file, always the same descriptor.
const MEMORY: u64 = 64 << 10;
/// Most messages of one input.
const MOST: usize = 64;
/// Where the front end sees the memory.
const USER: u64 = 0x10_0000;

/// Talks. Each message: its number, whether it wants an answer, how many descriptors of which kind, its body.
///
/// The first byte chooses the disk, and whether the messages of a front end that starts a queue go before.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let choice = input.u8();
    let (Ok(memory), Ok(kick), Ok(call)) = (memory_file(MEMORY), event(), event()) else { return };
    let export = disk::export(ExportKind::VhostUser, choice);
    let (front, back) = UnixStream::pair().expect("sockets");
    thread::scope(|scope| {
        let mut reader = front.try_clone().expect("a descriptor");
        scope.spawn(move || {
            let _ = reader.read_to_end(&mut Vec::new());
        });
        let server = scope.spawn(move || {
            if let Err(error) = vhost_user::serve(&back, &export) {
                assert!(!error.to_string().is_empty());
            }
            let _ = back.shutdown(Shutdown::Both);
        });
        let descriptors = [memory.as_raw_fd(), kick.as_raw_fd(), call.as_raw_fd()];
        let open = choice & 0x40 == 0 || start_queue(&front, descriptors);
        for _ in 0..MOST {
            if !open || input.is_empty() {
                break;
            }
            let (code, form, len) = (u32::from(input.u8() % 48), input.u8(), input.u8());
            let body = input.take(usize::from(len).min(MAX_BODY));
            let count = usize::from(form >> 4) % 4;
            let fds = vec![descriptors[usize::from(form & 3) % 3]; count];
            if !send_with(&front, &frame(code, u32::from(form & 8), body), &fds) {
                break;
            }
        }
        let _ = front.shutdown(Shutdown::Write);
        assert!(server.join().is_ok(), "the device panicked");
    });
}

/// Features, memory, and a running first queue, as a front end begins.
fn start_queue(front: &UnixStream, [memory, kick, call]: [i32; 3]) -> bool {
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
    let state = |index: u32, number: u32| [index.to_ne_bytes(), number.to_ne_bytes()].concat();
    let table = words(&[1, 0, MEMORY, USER, 0]);
    let rings = words(&[0, USER, USER + 4096, USER + 2048, 0]);
    let messages: [(u32, Vec<u8>, Option<i32>); 9] = [
        (3, vec![], None),
        (2, words(&[1 << 32 | 1 << 30]), None),
        (5, table, Some(memory)),
        (8, state(0, 64), None),
        (10, state(0, 0), None),
        (9, rings, None),
        (13, words(&[0]), Some(call)),
        (12, words(&[0]), Some(kick)),
        (18, state(0, 1), None),
    ];
    messages.iter().all(|(code, body, fd)| send_with(front, &frame(*code, 0, body), fd.as_slice()))
}
