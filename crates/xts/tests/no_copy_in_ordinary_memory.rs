//! Neither the key nor any of its round keys lies outside the cipher's own page, whatever kernel is at work.
//!
//! One test in a program of its own: it reads the whole process, the stack below the last call too.

#[path = "../../keys/tests/memory_scan/mod.rs"]
mod memory_scan;
mod round_keys;

use memory_scan::{Needles, scan};
use vmseal_xts::{Cipher, Kernel, Protection};
use zeroize::Zeroize;

#[test]
fn key_and_round_keys_lie_in_secret_memory_only() {
    // The key exists in the clear only while it is used: from inverted bytes, in a buffer that is zeroed.
    let inverted: Vec<u8> = (0..64u8).map(|i| !(i.wrapping_mul(151) ^ 0x5a).wrapping_add(i >> 2)).collect();
    let mut key = Box::new([0u8; 64]);
    let restore = |key: &mut [u8; 64]| key.iter_mut().zip(&inverted).for_each(|(to, from)| *to = !from);
    restore(&mut key);
    let mut needles = Needles::new();
    needles.add(&key[..]);
    round_keys::for_each_schedule(&key, |schedule| needles.add(schedule));
    key.zeroize();

    for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
        for unit in [512, 4096] {
            restore(&mut key);
            let cipher = Cipher::with_kernel(&key, unit, kernel).unwrap();
            key.zeroize();
            if cipher.protection() != Protection::MemfdSecret {
                return println!(
                    "skipped: this kernel gives no memfd_secret, so the page cannot be told from the rest"
                );
            }
            let mut data = vec![0u8; 128 << 10];
            let mut copy = vec![0u8; data.len()];
            for bytes in [unit, 4096, data.len()] {
                cipher.encrypt(0, &mut data[..bytes]).unwrap();
                cipher.decrypt_copy(0, &data[..bytes], &mut copy[..bytes]).unwrap();
                cipher.decrypt(0, &mut data[..bytes]).unwrap();
            }
            assert!(data.iter().chain(&copy).all(|b| *b == 0));
            let (found, read) = scan(&needles);
            assert!(found.is_empty(), "{kernel}: {} copies of key bytes:\n{}", found.len(), found.join("\n"));
            assert!(read > 100_000, "only {read} bytes were read");
        }
    }

    // The scan does find what lies in ordinary memory: a key, and one round key in the middle of a schedule.
    restore(&mut key);
    let mut copy = Vec::new();
    round_keys::for_each_schedule(&key, |schedule| {
        if copy.is_empty() {
            copy = schedule[7 * 16..8 * 16].to_vec();
        }
    });
    key.zeroize();
    let copy = std::hint::black_box(copy);
    assert!(scan(&needles).0.len() >= 2, "a copy was made and not found");
    drop(copy);
}
