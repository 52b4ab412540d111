//! Neither the key nor its expanded round keys lie outside the cipher's own page.
//!
//! One test in a program of its own: it reads the whole process.

#[path = "../../keys/tests/memory_scan/mod.rs"]
mod memory_scan;

use memory_scan::{Needles, scan};
use vmseal_xts::Cipher;
use zeroize::Zeroize;

/// Whether this kernel has `memfd_secret`; without it the page is readable and the scan would find the key in it.
fn kernel_hides_memory() -> bool {
    // SAFETY: no pointers; the descriptor, if any, is closed below.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    // SAFETY: the descriptor was just made.
    fd >= 0 && unsafe { libc::close(fd as i32) } == 0
}

#[test]
fn key_and_round_keys_lie_in_secret_memory_only() {
    if !kernel_hides_memory() {
        return println!(
            "skipped: this kernel gives no memfd_secret, so secret memory cannot be told from the rest"
        );
    }
    // The key exists in the clear only while the cipher is made: from inverted bytes, in a buffer that is zeroed.
    let inverted: Vec<u8> = (0..64u8).map(|i| !(i.wrapping_mul(151) ^ 0x5a).wrapping_add(i >> 2)).collect();
    let mut key = Box::new([0u8; 64]);
    key.iter_mut().zip(&inverted).for_each(|(to, from)| *to = !from);
    let mut needles = Needles::new();
    needles.add(&key[..]);
    // Every schedule begins (encryption) or ends (decryption, equivalent inverse cipher) with the key itself (FIPS 197
    // §5.2, §5.3.5), so a schedule outside the page is found by these words too.
    let cipher = Cipher::new(&key, 512).unwrap();
    key.zeroize();
    let mut data = vec![0u8; 4096];
    cipher.encrypt(0, &mut data).unwrap();
    cipher.decrypt(0, &mut data).unwrap();
    assert!(data.iter().all(|b| *b == 0));

    let (found, read) = scan(&needles);
    assert!(found.is_empty(), "{} copies of key bytes:\n{}", found.len(), found.join("\n"));
    assert!(read > 100_000, "only {read} bytes were read");

    // The scan does find what lies in ordinary memory.
    key.iter_mut().zip(&inverted).for_each(|(to, from)| *to = !from);
    let copy = std::hint::black_box(key);
    assert!(scan(&needles).0.len() >= 8, "a copy was made and not found");
    drop(copy);
    drop(cipher);
}
