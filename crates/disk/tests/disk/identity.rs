//! What lies in the file is what dm-crypt would have put there, byte for byte.

use crate::{
    nbd_client::*,
    rig::{MIB, Rig, Spec, cipher, pattern},
};

#[test]
fn what_is_written_lies_in_the_file_as_xts_of_its_place() {
    for unit in [512, 4096] {
        for payload_offset in [16 * MIB, 0] {
            let detached_header = payload_offset == 0;
            let rig = Rig::with(Spec { unit, payload_offset, detached_header, ..Spec::fixed(4 * MIB) });
            let disk = rig.disk();
            let mut model = vec![0; 4 << 20];
            let mut client = Client::connect(&disk.socket).unwrap();
            for (i, (at, len)) in
                [(0, 4096), (8192, 512 << 10), (3 << 20, 1 << 20), (4096, 4096)].into_iter().enumerate()
            {
                let data = pattern(i as u64, len);
                client.write(at as u64, &data, 0).unwrap();
                model[at..at + len].copy_from_slice(&data);
            }
            assert_eq!(client.read(0, 4 << 20).unwrap(), model);
            cipher(&disk.payload, unit).encrypt(0, &mut model).unwrap();
            assert!(disk.stored() == model, "unit {unit}, payload at {payload_offset}");
        }
    }
}

#[test]
fn first_bytes_of_the_file_are_left_alone() {
    let rig = Rig::with(Spec::fixed(MIB));
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    client.write(0, &pattern(1, 1 << 20), FUA).unwrap();
    client.request(TRIM, 0, 0, 1 << 20).unwrap();
    client.request(WRITE_ZEROES, 0, 0, 1 << 20).unwrap();
    let file = std::fs::read(&rig.disk().file).unwrap();
    assert!(file[..16 << 20].iter().all(|byte| *byte == 0));
}

#[test]
fn zeros_are_written_encrypted_and_never_as_a_hole() {
    let rig = Rig::with(Spec::fixed(8 * MIB));
    let disk = rig.disk();
    let mut client = Client::connect(&disk.socket).unwrap();
    client.write(0, &pattern(1, 8 << 20), 0).unwrap();
    client.request(WRITE_ZEROES, 0, MIB, 2 << 20).unwrap();
    client.request(WRITE_ZEROES, NO_HOLE | FUA, 4 * MIB, 3 << 20).unwrap();
    assert_eq!(client.request(WRITE_ZEROES, FAST_ZERO, 0, 4096).unwrap_err().errno(), Some(ENOTSUP));
    assert_eq!(client.block_status(0, 8 << 20, 0).unwrap(), [(8 << 20, 0)]);
    let mut model = pattern(1, 8 << 20);
    model[1 << 20..3 << 20].fill(0);
    model[4 << 20..7 << 20].fill(0);
    assert!(disk.stored_plain() == model);
    assert!(client.read(0, 8 << 20).unwrap() == model);
}

#[test]
fn discard_makes_holes_where_the_policy_says_so_and_status_never_promises_zeros() {
    let rig = Rig::with(Spec::fixed(4 * MIB));
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    client.write(0, &pattern(1, 4 << 20), 0).unwrap();
    client.request(TRIM, FUA, MIB, 1 << 20).unwrap();
    let holes = client.block_status(0, 4 << 20, 0).unwrap();
    assert_eq!(holes, [(1 << 20, 0), (1 << 20, 1), (2 << 20, 0)]);
    assert_eq!(client.block_status(0, 4 << 20, REQ_ONE).unwrap(), [(1 << 20, 0)]);
    assert!(client.read(0, 1 << 20).unwrap() == pattern(1, 4 << 20)[..1 << 20]);
    client.write(MIB, &[7; 4096], 0).unwrap();
    assert_eq!(client.read(MIB, 4096).unwrap(), [7; 4096]);

    let rig = Rig::with(Spec { discard: false, ..Spec::fixed(4 * MIB) });
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    client.write(0, &pattern(1, 4 << 20), 0).unwrap();
    client.request(TRIM, 0, 0, 4 << 20).unwrap();
    assert!(client.read(0, 4 << 20).unwrap() == pattern(1, 4 << 20), "nothing happened");
}
