//! What the cipher promises beyond its vectors: units are independent, and what it cannot do it refuses unchanged.

use proptest::prelude::*;
use vmseal_xts::{Cipher, XtsError};

fn key() -> [u8; 64] {
    let mut key = [0; 64];
    key[..32].copy_from_slice(b"VMSEAL-TEST-SECRET-xts-data-key-");
    key[32..].copy_from_slice(b"VMSEAL-TEST-SECRET-xts-tweak-key");
    key
}

#[test]
fn key_with_equal_halves_is_refused() {
    let mut key = key();
    let (data, tweak) = key.split_at_mut(32);
    tweak.copy_from_slice(data);
    assert!(matches!(Cipher::new(&key, 512), Err(XtsError::EqualHalves)));
    key[63] ^= 1;
    assert!(Cipher::new(&key, 512).is_ok());
}

#[test]
fn unit_that_is_neither_512_nor_4096_is_refused() {
    for unit in [0, 1, 16, 511, 1024, 2048, 8192] {
        assert!(matches!(Cipher::new(&key(), unit), Err(XtsError::Unit { bytes }) if bytes == unit));
    }
}

#[test]
fn part_of_a_unit_is_refused_and_nothing_changes() {
    for unit in [512, 4096] {
        let cipher = Cipher::new(&key(), unit).unwrap();
        for bytes in [1, 15, 16, unit - 1, unit + 16, 3 * unit - 1] {
            let mut data = vec![7; bytes];
            assert!(matches!(cipher.encrypt(0, &mut data), Err(XtsError::Length { .. })));
            assert!(matches!(cipher.decrypt(0, &mut data), Err(XtsError::Length { .. })));
            assert!(data.iter().all(|b| *b == 7));
        }
        assert!(cipher.encrypt(0, &mut []).is_ok());
    }
}

#[test]
fn sector_numbers_past_the_end_are_refused_and_nothing_changes() {
    let cipher = Cipher::new(&key(), 512).unwrap();
    let mut data = vec![7; 1024];
    assert!(matches!(cipher.encrypt(u64::MAX, &mut data), Err(XtsError::Sector { .. })));
    assert!(matches!(cipher.decrypt(u64::MAX, &mut data), Err(XtsError::Sector { .. })));
    assert!(data.iter().all(|b| *b == 7));
    // The very last sectors there are.
    cipher.encrypt(u64::MAX - 1, &mut data).unwrap();
    cipher.decrypt(u64::MAX - 1, &mut data).unwrap();
    assert!(data.iter().all(|b| *b == 7));
    let large = Cipher::new(&key(), 4096).unwrap();
    let mut data = vec![7; 8192];
    assert!(matches!(large.encrypt(u64::MAX - 7, &mut data), Err(XtsError::Sector { .. })));
    large.encrypt(u64::MAX - 7, &mut data[..4096]).unwrap();
}

#[test]
fn sector_where_no_unit_begins_is_refused() {
    let cipher = Cipher::new(&key(), 4096).unwrap();
    for sector in [1, 4, 7, 9] {
        assert!(matches!(cipher.encrypt(sector, &mut [0; 4096]), Err(XtsError::Sector { .. })));
    }
}

#[test]
fn copy_between_different_lengths_is_refused() {
    let cipher = Cipher::new(&key(), 512).unwrap();
    let mut dst = [7; 512];
    assert!(matches!(
        cipher.encrypt_copy(0, &[0; 1024], &mut dst),
        Err(XtsError::Copy { src: 1024, dst: 512 })
    ));
    assert!(matches!(cipher.decrypt_copy(0, &[0; 1024], &mut dst), Err(XtsError::Copy { .. })));
    assert_eq!(dst, [7; 512]);
}

#[test]
fn cipher_works_after_a_move_to_another_thread_and_says_nothing_of_its_key() {
    let cipher = Cipher::new(&key(), 512).unwrap();
    let text = format!("{cipher:?} {:?}", Cipher::new(&[0; 64], 512).unwrap_err());
    assert!(!text.contains("VMSEAL-TEST-SECRET"), "{text}");
    let mut data = [1; 512];
    cipher.encrypt(9, &mut data).unwrap();
    let moved = std::thread::spawn(move || {
        let mut back = data;
        cipher.decrypt(9, &mut back).map(|()| back)
    });
    assert_eq!(moved.join().unwrap().unwrap(), [1; 512]);
}

#[test]
fn one_bit_of_the_key_changes_every_block() {
    let mut plain = [0; 512];
    Cipher::new(&key(), 512).unwrap().encrypt(0, &mut plain).unwrap();
    for bit in [0, 255, 256, 511] {
        let mut key = key();
        key[bit / 8] ^= 1 << (bit % 8);
        let mut other = [0; 512];
        Cipher::new(&key, 512).unwrap().encrypt(0, &mut other).unwrap();
        assert!(plain.chunks(16).zip(other.chunks(16)).all(|(a, b)| a != b), "bit {bit}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_was_encrypted_decrypts_in_place_and_by_copy(
        large in any::<bool>(), units in 1usize..9, first in 0u64..1 << 60, seed in any::<u8>(),
    ) {
        let unit = if large { 4096 } else { 512 };
        let first = first * (unit as u64 / 512);
        let cipher = Cipher::new(&key(), unit).unwrap();
        let plain: Vec<u8> = (0..units * unit).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect();
        let mut sealed = plain.clone();
        cipher.encrypt(first, &mut sealed).unwrap();
        prop_assert!(sealed != plain);
        let mut copied = vec![0; plain.len()];
        cipher.encrypt_copy(first, &plain, &mut copied).unwrap();
        prop_assert_eq!(&copied, &sealed);
        cipher.decrypt_copy(first, &sealed, &mut copied).unwrap();
        prop_assert_eq!(&copied, &plain);
        cipher.decrypt(first, &mut sealed).unwrap();
        prop_assert_eq!(&sealed, &plain);
    }

    #[test]
    fn every_unit_is_as_if_it_were_alone(large in any::<bool>(), units in 2usize..7, first in 0u64..1 << 40) {
        let unit = if large { 4096 } else { 512 };
        let step = unit as u64 / 512;
        let first = first * step;
        let cipher = Cipher::new(&key(), unit).unwrap();
        let plain: Vec<u8> = (0..units * unit).map(|i| i as u8).collect();
        let mut together = plain.clone();
        cipher.encrypt(first, &mut together).unwrap();
        for n in 0..units {
            let mut alone = plain[n * unit..(n + 1) * unit].to_vec();
            cipher.encrypt(first + n as u64 * step, &mut alone).unwrap();
            prop_assert_eq!(&together[n * unit..(n + 1) * unit], &alone[..]);
        }
        // The same plaintext under the next number is another ciphertext.
        let (mut here, mut next) = (vec![0; unit], vec![0; unit]);
        cipher.encrypt(first, &mut here).unwrap();
        cipher.encrypt(first + step, &mut next).unwrap();
        prop_assert!(here.chunks(16).zip(next.chunks(16)).all(|(a, b)| a != b));
    }
}
