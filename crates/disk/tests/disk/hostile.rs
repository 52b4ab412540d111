//! Clients that break the protocol. Each gets an error or is dropped, and the next one is served as if nothing was.

use std::{io::Write, path::Path, thread};

use crate::{
    nbd_client::*,
    rig::{MIB, Rig, Spec, pattern},
};

/// The same worker still serves, and its data is as it was.
fn still_serves(rig: &Rig, worker: i32) {
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    client.write(0, &pattern(9, 4096), 0).unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), pattern(9, 4096));
    drop(client);
    assert_eq!(rig.status().worker_pid, worker, "{}", rig.log());
}

fn rig() -> (Rig, i32) {
    let rig = Rig::with(Spec::fixed(64 * MIB));
    let worker = rig.status().worker_pid;
    (rig, worker)
}

#[test]
fn wrong_magics_close_the_connection() {
    let (rig, worker) = rig();
    let socket = &rig.disk().socket;
    let mut stream = greet(socket).unwrap();
    stream.write_all(b"IHAVEOPX\0\0\0\x07\0\0\0\0").unwrap();
    assert!(closed(&stream), "option magic");
    let mut client = Client::connect(socket).unwrap();
    client.stream.write_all(&[0xff; 28]).unwrap();
    assert!(client.is_closed(), "request magic");
    let mut client = Client::connect(socket).unwrap();
    client.stream.write_all(&[0; 4096]).unwrap();
    assert!(client.is_closed(), "zeros");
    still_serves(&rig, worker);
}

#[test]
fn unknown_client_flags_close_the_connection() {
    let (rig, worker) = rig();
    let mut stream = std::os::unix::net::UnixStream::connect(&rig.disk().socket).unwrap();
    stream.write_all(&0xffff_ffffu32.to_be_bytes()).unwrap();
    let mut all = Vec::new();
    std::io::Read::read_to_end(&mut stream, &mut all).unwrap();
    assert_eq!(all.len(), 18, "only the greeting");
    still_serves(&rig, worker);
}

#[test]
fn option_bombs_are_cut_off() {
    let (rig, worker) = rig();
    let socket = &rig.disk().socket;
    let mut stream = greet(socket).unwrap();
    stream.write_all(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff").unwrap();
    assert!(closed(&stream), "a length of 4 GiB");
    let stream = greet(socket).unwrap();
    let mut replies = 0;
    while send_option(&stream, 3, &[]).is_ok() && option_reply(&stream, 3).is_ok() {
        let _ = option_reply(&stream, 3);
        replies += 1;
        assert!(replies < 1000, "options without end");
    }
    assert!(replies > 10);
    still_serves(&rig, worker);
}

#[test]
fn malformed_and_unknown_options_are_answered_with_errors() {
    let (rig, worker) = rig();
    let stream = greet(&rig.disk().socket).unwrap();
    let refused = |option: u32, content: &[u8]| {
        send_option(&stream, option, content).unwrap();
        let (reply, _) = option_reply(&stream, option).unwrap();
        assert!(reply & 1 << 31 != 0, "option {option} got {reply}");
        reply & 0xffff
    };
    assert_eq!(refused(5, &[]), 1, "TLS");
    assert_eq!(refused(11, &[]), 1, "extended headers");
    assert_eq!(refused(0xdead_beef, &[1; 100]), 1, "unknown");
    assert_eq!(refused(3, &[1]), 3, "LIST with content");
    assert_eq!(refused(8, &[1]), 3, "STRUCTURED_REPLY with content");
    assert_eq!(refused(10, b"\0\0\0\0\0\0\0\0"), 3, "a context before structured replies");
    assert_eq!(refused(7, &[0; 5]), 3, "GO cut short");
    assert_eq!(refused(7, b"\xff\xff\xff\xff\0\0"), 3, "GO with a long name");
    assert_eq!(refused(6, b"\0\0\0\x04none\0\0"), 6, "INFO about another export");
    send_option(&stream, 8, &[]).unwrap();
    assert_eq!(option_reply(&stream, 8).unwrap().0, 1);
    assert_eq!(refused(10, b"\0\0\0\0\xff\xff\xff\xff"), 3, "a count that cannot be");
    send_option(&stream, 2, &[]).unwrap();
    assert_eq!(option_reply(&stream, 2).unwrap().0, 1);
    assert!(closed(&stream), "ABORT");
    let stream = greet(&rig.disk().socket).unwrap();
    send_option(&stream, 1, b"none").unwrap();
    assert!(closed(&stream), "EXPORT_NAME of another export has no answer");
    still_serves(&rig, worker);
}

#[test]
fn requests_that_cannot_be_carried_out_get_their_error_and_the_connection_lives() {
    let (rig, worker) = rig();
    for connect in [Client::connect, Client::connect_simple as fn(&Path) -> _] {
        let mut client = connect(&rig.disk().socket).unwrap();
        let end = client.size;
        let errno = |result: Result<Vec<u8>, Fault>| result.unwrap_err().errno();
        assert_eq!(errno(client.read(1, 512)), Some(EINVAL));
        assert_eq!(errno(client.read(0, 511)), Some(EINVAL));
        assert_eq!(errno(client.read(0, 0)), Some(EINVAL));
        assert_eq!(errno(client.read(end, 512)), Some(EINVAL));
        assert_eq!(errno(client.read(u64::MAX - 511, 512)), Some(EINVAL));
        assert_eq!(errno(client.read(0, (32 << 20) + 512)), Some(EOVERFLOW));
        assert_eq!(client.write(end, &[0; 512], 0).unwrap_err().errno(), Some(ENOSPC));
        assert_eq!(client.write(1, &[0; 512], 0).unwrap_err().errno(), Some(EINVAL));
        assert_eq!(client.write(0, &[0; 100], 0).unwrap_err().errno(), Some(EINVAL));
        assert_eq!(client.write(0, &[0; 512], 0x8000).unwrap_err().errno(), Some(EINVAL));
        for (kind, flags, offset, length, expected) in [
            (CACHE, 0, 0, 512, EINVAL),
            (99, 0, 0, 512, EINVAL),
            (TRIM, 0, end, 512, EINVAL),
            (TRIM, 0, 0, 0xffff_fe00, EINVAL),
            (WRITE_ZEROES, 0, end - 512, 1024, ENOSPC),
            (WRITE_ZEROES, FAST_ZERO, 0, 512, ENOTSUP),
            (BLOCK_STATUS, DF, 0, 512, EINVAL),
            (FLUSH, 0, 512, 512, EINVAL),
        ] {
            let got = client.request(kind, flags, offset, length).unwrap_err().errno();
            assert_eq!(got, Some(expected), "command {kind}, flags {flags}, {length} bytes at {offset}");
        }
        client.write(end - 512, &[5; 512], FUA).unwrap();
        assert_eq!(client.read(end - 512, 512).unwrap(), [5; 512]);
        assert_eq!(client.read(0, 32 << 20).unwrap().len(), 32 << 20);
    }
    still_serves(&rig, worker);
}

#[test]
fn payload_longer_than_allowed_closes_the_connection() {
    let (rig, worker) = rig();
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    client.send(WRITE, 0, 0, (32 << 20) + 512).unwrap();
    assert!(client.is_closed());
    still_serves(&rig, worker);
}

#[test]
fn read_only_disk_refuses_everything_that_changes_it() {
    let rig = Rig::with(Spec { read_only: true, ..Spec::fixed(MIB) });
    let before = rig.disk().stored();
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    assert_eq!(client.flags & (1 << 1 | 1 << 5 | 1 << 6), 1 << 1, "READ_ONLY, no TRIM, no WRITE_ZEROES");
    assert_eq!(client.write(0, &[0; 4096], 0).unwrap_err().errno(), Some(EPERM));
    assert_eq!(client.request(TRIM, 0, 0, 4096).unwrap_err().errno(), Some(EPERM));
    assert_eq!(client.request(WRITE_ZEROES, 0, 0, 4096).unwrap_err().errno(), Some(EPERM));
    client.flush().unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [0; 4096]);
    assert!(rig.disk().stored() == before);
}

#[test]
fn clients_that_vanish_anywhere_leave_nothing_behind() {
    let (rig, worker) = rig();
    let socket = &rig.disk().socket;
    drop(std::os::unix::net::UnixStream::connect(socket).unwrap());
    drop(greet(socket).unwrap());
    let mut stream = greet(socket).unwrap();
    stream.write_all(b"IHAVEOPT\0\0").unwrap();
    drop(stream);
    let mut client = Client::connect(socket).unwrap();
    client.stream.write_all(&[0x25, 0x60]).unwrap();
    drop(client);
    let mut client = Client::connect(socket).unwrap();
    client.send(WRITE, 0, 0, 1 << 20).unwrap();
    client.stream.write_all(&[1; 1000]).unwrap();
    drop(client);
    let mut client = Client::connect(socket).unwrap();
    for _ in 0..8 {
        client.send(READ, 0, 0, 32 << 20).unwrap();
    }
    drop(client);
    still_serves(&rig, worker);
}

#[test]
fn handshake_that_is_nonsense_never_ends_the_worker() {
    let (rig, worker) = rig();
    let threads: Vec<_> = (0..2)
        .map(|thread| {
            let socket = rig.disk().socket.clone();
            thread::spawn(move || {
                for round in 0..60u64 {
                    let mut bytes = pattern(round * 7 + thread + 1, 300);
                    if round % 3 != 0 {
                        bytes[..8].copy_from_slice(b"IHAVEOPT");
                        bytes[8..16].copy_from_slice(&[
                            0,
                            0,
                            0,
                            (round % 12) as u8,
                            0,
                            0,
                            0,
                            (round % 40) as u8,
                        ]);
                    }
                    if let Ok(mut stream) = greet(&socket) {
                        let _ = stream.write_all(&bytes);
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    still_serves(&rig, worker);
}
