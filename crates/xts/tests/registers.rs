//! What vector registers hold when a call of the cipher returns: a core dump of the process has them.

#![cfg(target_arch = "x86_64")]

mod round_keys;

use std::arch::asm;

use vmseal_xts::{Cipher, Kernel};

/// 32 registers of 64 bytes.
#[repr(C, align(64))]
struct Registers([u64; 256]);

/// Calls `work` and returns the registers as they are when it returns.
fn registers_after(work: unsafe extern "sysv64" fn(*mut Work), data: &mut Work) -> Registers {
    let mut registers = Registers([0; 256]);
    let to = registers.0.as_mut_ptr();
    // SAFETY: the function gets what it takes; r12 and r13 it keeps, all else that may change is declared; the stores stay within the array,
    // which has room for the widest that are there.
    unsafe {
        if is_x86_feature_detected!("avx512f") {
            asm!(
                "call r12",
                ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
                "vmovdqu64 [r13 + 64*\\n], zmm\\n",
                ".endr",
                "vzeroupper",
                in("r12") work,
                in("r13") to,
                in("rdi") data,
                clobber_abi("sysv64"),
            );
        } else if is_x86_feature_detected!("avx") {
            asm!(
                "call r12",
                ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                "vmovdqu [r13 + 64*\\n], ymm\\n",
                ".endr",
                "vzeroupper",
                in("r12") work,
                in("r13") to,
                in("rdi") data,
                clobber_abi("sysv64"),
            );
        } else {
            asm!(
                "call r12",
                ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                "movdqu [r13 + 64*\\n], xmm\\n",
                ".endr",
                in("r12") work,
                in("r13") to,
                in("rdi") data,
                clobber_abi("sysv64"),
            );
        }
    }
    registers
}

struct Work {
    key: [u8; 64],
    unit: usize,
    kernel: Kernel,
    cipher: Option<Cipher>,
    data: Vec<u8>,
    copy: Vec<u8>,
}

unsafe extern "sysv64" fn set_up(work: *mut Work) {
    // SAFETY: the caller's, which nobody else has.
    let work = unsafe { &mut *work };
    work.cipher = Some(Cipher::with_kernel(&work.key, work.unit, work.kernel).unwrap());
}

unsafe extern "sysv64" fn encrypt(work: *mut Work) {
    // SAFETY: as above.
    let work = unsafe { &mut *work };
    work.cipher.as_ref().unwrap().encrypt(64, &mut work.data).unwrap();
}

unsafe extern "sysv64" fn decrypt_copy(work: *mut Work) {
    // SAFETY: as above.
    let work = unsafe { &mut *work };
    work.cipher.as_ref().unwrap().decrypt_copy(64, &work.data, &mut work.copy).unwrap();
}

unsafe extern "sysv64" fn keep_the_key(work: *mut Work) {
    // SAFETY: as above; SSE2 is part of x86-64, and the register is declared.
    unsafe { asm!("movdqu xmm5, [{key}]", key = in(reg) (*work).key.as_ptr(), out("xmm5") _) };
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()))
}

#[test]
fn registers_hold_neither_keys_nor_text_after_any_call() {
    let cases = [(512, 512), (512, 6 * 512), (4096, 4096), (512, 128 << 10), (4096, 128 << 10)];
    let mut number = 0u8;
    for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
        for (unit, bytes) in cases {
            // Another key each time: what this test itself leaves on the stack is of the last one.
            number += 1;
            let mut work = Work {
                key: std::array::from_fn(|i| (i as u8).wrapping_mul(73) ^ number),
                unit,
                kernel,
                cipher: None,
                data: (0..bytes).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect(),
                copy: vec![0; bytes],
            };
            let calls: [(&str, unsafe extern "sysv64" fn(*mut Work)); 4] = [
                ("set up", set_up),
                ("encryption", encrypt),
                ("decryption", decrypt_copy),
                ("a look at the key", keep_the_key),
            ];
            let after = calls.map(|(step, call)| (step, registers_after(call, &mut work)));
            let mut secret: Vec<u64> =
                words(&work.key).chain(words(&work.data)).chain(words(&work.copy)).collect();
            round_keys::for_each_schedule(&work.key, |schedule| secret.extend(words(schedule)));
            secret.sort_unstable();
            for (step, registers) in after {
                let held = registers.0.iter().filter(|word| secret.binary_search(word).is_ok()).count();
                // The last one shows that the test finds what is there.
                let expected = if step == "a look at the key" { 2 } else { 0 };
                assert_eq!(
                    held, expected,
                    "{kernel}, {bytes} bytes of {unit}-byte units: words after {step}"
                );
            }
        }
    }
}
