//! No bytes make the reader panic, and a header cut or torn anywhere is whole, repaired or refused.

use std::io::Cursor;

use proptest::prelude::*;
use vmseal_keys::Dek;
use vmseal_luks::{Geometry, Salts, VmsealToken, create_with, inspect};
use vmseal_model::id::DiskId;

fn header() -> Vec<u8> {
    let mut payload = [3u8; 96];
    payload[..32].fill(4);
    let dek = Dek::from_payload_slice(&payload).expect("96 bytes are a payload");
    let salts = Salts { copies: [[1; 64], [2; 64]], digest: [3; 32] };
    let token = VmsealToken { records: vec![vec![5; 300]] };
    let mut bytes =
        create_with(&dek, DiskId::from_bytes([6; 16]), &Geometry::attached(512), &token, &salts).unwrap();
    bytes.resize(17 << 20, 0);
    bytes
}

#[test]
fn truncated_header_never_panics() {
    let whole = header();
    for len in (0..200).chain((200..140_000).step_by(997)) {
        let _ = inspect(&mut Cursor::new(&whole[..len]), None).unwrap();
    }
    assert!(inspect(&mut Cursor::new(&whole[..]), Some(false)).unwrap().accepted());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_get_a_verdict(at in 0usize..131_072, bytes in proptest::collection::vec(any::<u8>(), 1..64)) {
        let mut damaged = header();
        // Within one copy of 64 KiB.
        let end = (at + bytes.len()).min((at / 65_536 + 1) * 65_536);
        damaged[at..end].copy_from_slice(&bytes[..end - at]);
        let verdict = inspect(&mut Cursor::new(damaged), Some(false)).unwrap();
        // One copy is always whole.
        prop_assert!(verdict.accepted(), "{}", verdict);
    }

    #[test]
    fn noise_behind_the_magic_is_refused(noise in proptest::collection::vec(any::<u8>(), 8192..9000)) {
        let mut bytes = b"LUKS\xba\xbe\x00\x02".to_vec();
        bytes.extend_from_slice(&noise);
        prop_assert!(!inspect(&mut Cursor::new(bytes), None).unwrap().accepted());
    }
}
