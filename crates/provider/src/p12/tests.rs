//! Files that anybody may have made: damaged, hostile, and honest files of other programs.

use std::{fs, path::PathBuf};

use der::{
    Any, AnyRef, Decode, Encode, Tag,
    asn1::{ObjectIdentifier, OctetStringRef},
};
use proptest::prelude::*;

use super::{
    asn1::{
        AlgorithmIdentifier, ContentInfo, DigestInfo, EncryptedData, MacData, Pbes2Params, Pbkdf2Params, Pfx,
    },
    *,
};
use crate::{
    backup::{dry_run, export_at, verify_backup},
    backup_error::BackupError,
    fixture::{CHEAP, NOW_MS, PASSWORD, Scratch, provider, run},
};

fn good() -> Vec<u8> {
    export_at(&provider(2), PASSWORD, NOW_MS, CHEAP).unwrap()
}

fn bag(name: &str) -> SecretBagRef<'_> {
    let local_key_id = [provider(1).uuid().to_bytes().as_slice(), &[1, 0, 0, 0]].concat();
    SecretBagRef { secret: b"VMSEAL-TEST-SECRET-of-32-bytes-0", friendly_name: name.to_owned(), local_key_id }
}

/// The numbers and salts of a file that its MAC does not cover before it is checked, replaced.
struct Forged {
    mac_iterations: u64,
    iterations: u64,
    prf: Option<ObjectIdentifier>,
    cipher: ObjectIdentifier,
    key_bytes: Option<u64>,
    safes: usize,
    trailing_zeros: usize,
}

const HONEST: Forged = Forged {
    mac_iterations: 100,
    iterations: 100,
    prf: Some(asn1::oid::HMAC_SHA_256),
    cipher: asn1::oid::AES_256_CBC,
    key_bytes: Some(32),
    safes: 1,
    trailing_zeros: 0,
};

impl Forged {
    /// A file of this shape; nothing in it would verify, which must not matter.
    fn file(&self) -> Vec<u8> {
        let any = |der: Vec<u8>| Any::from_der(&der).unwrap();
        let octets = |bytes: &'static [u8]| AnyRef::new(Tag::OctetString, bytes).unwrap();
        let pbkdf2 = any(Pbkdf2Params {
            salt: octets(&[1; 32]),
            iterations: self.iterations,
            key_bytes: self.key_bytes,
            prf: self.prf.map(|oid| AlgorithmIdentifier { oid, parameters: None }),
        }
        .to_der()
        .unwrap());
        let pbes2 = any(Pbes2Params {
            kdf: AlgorithmIdentifier { oid: asn1::oid::PBKDF2, parameters: Some((&pbkdf2).into()) },
            cipher: AlgorithmIdentifier { oid: self.cipher, parameters: Some(octets(&[2; 16])) },
        }
        .to_der()
        .unwrap());
        let data = any(EncryptedData {
            version: 0,
            content: asn1::EncryptedContentInfo {
                content_type: asn1::oid::DATA,
                algorithm: AlgorithmIdentifier { oid: asn1::oid::PBES2, parameters: Some((&pbes2).into()) },
                ciphertext: OctetStringRef::new(&[3; 64]).unwrap(),
            },
        }
        .to_der()
        .unwrap());
        let safe = || ContentInfo { content_type: asn1::oid::ENCRYPTED_DATA, content: (&data).into() };
        let mut auth_safe = (0..self.safes).map(|_| safe()).collect::<Vec<_>>().to_der().unwrap();
        auth_safe.extend(std::iter::repeat_n(0, self.trailing_zeros));
        let pfx = Pfx {
            version: 3,
            auth_safe: ContentInfo {
                content_type: asn1::oid::DATA,
                content: AnyRef::new(Tag::OctetString, &auth_safe).unwrap(),
            },
            mac_data: Some(MacData {
                mac: DigestInfo {
                    algorithm: AlgorithmIdentifier { oid: asn1::oid::SHA_256, parameters: None },
                    digest: OctetStringRef::new(&[4; 32]).unwrap(),
                },
                salt: OctetStringRef::new(&[5; 32]).unwrap(),
                iterations: self.mac_iterations,
            }),
        };
        pfx.to_der().unwrap()
    }

    fn refused(&self) -> BackupError {
        dry_run(&self.file(), PASSWORD).unwrap_err()
    }
}

#[test]
fn pkcs12_iterations_beyond_the_limit_are_refused_before_any_is_computed() {
    assert!(matches!(HONEST.refused(), BackupError::WrongPassword), "the shape itself is accepted");
    for (mac_iterations, iterations) in [
        (1 << 31, 100),
        (100, 1 << 31),
        (u64::MAX, u64::MAX),
        (100, u64::MAX),
        (5_000_001, 5_000_000),
        (1, 10_000_000),
    ] {
        let refused = Forged { mac_iterations, iterations, ..HONEST }.refused();
        assert!(
            matches!(refused, BackupError::TooManyIterations { .. }),
            "{mac_iterations} {iterations}: {refused}"
        );
    }
    for (mac_iterations, iterations) in [(0, 100), (100, 0)] {
        let refused = Forged { mac_iterations, iterations, ..HONEST }.refused();
        assert!(matches!(refused, BackupError::NotABackup { .. }), "{refused}");
    }
}

#[test]
fn pkcs12_other_algorithms_are_refused_by_name() {
    let sha1 = Forged { prf: None, ..HONEST }.refused();
    assert!(matches!(sha1, BackupError::Unsupported { what: "key derivation function", .. }), "{sha1}");
    let aes128 = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.1.2");
    let aes128 = Forged { cipher: aes128, ..HONEST }.refused().to_string();
    assert!(aes128.contains("2.16.840.1.101.3.4.1.2") && aes128.contains("AES-256-CBC"), "{aes128}");
    assert!(matches!(Forged { key_bytes: Some(16), ..HONEST }.refused(), BackupError::NotABackup { .. }));
    assert!(matches!(Forged { key_bytes: None, ..HONEST }.refused(), BackupError::WrongPassword));
}

#[test]
fn pkcs12_of_another_shape_is_refused() {
    for forged in
        [Forged { safes: 0, ..HONEST }, Forged { safes: 2, ..HONEST }, Forged { trailing_zeros: 9, ..HONEST }]
    {
        assert!(matches!(forged.refused(), BackupError::NotABackup { .. }));
    }
    let mut longer = good();
    longer.push(0);
    assert!(matches!(
        dry_run(&longer, PASSWORD),
        Err(BackupError::NotABackup { why: "bytes follow its end" })
    ));
    assert!(matches!(dry_run(b"-----BEGIN CERTIFICATE-----", PASSWORD), Err(BackupError::NotABackup { .. })));
}

#[test]
fn pkcs12_truncated_is_said_to_be_truncated() {
    let good = good();
    for kept in 0..good.len() {
        let refused = dry_run(&good[..kept], PASSWORD).unwrap_err();
        assert!(matches!(refused, BackupError::Truncated), "{kept} of {} bytes: {refused}", good.len());
    }
}

#[test]
fn pkcs12_too_large_or_nested_deep_is_refused_unread() {
    let large = vec![0x30; MAX_FILE_BYTES + 1];
    assert!(matches!(dry_run(&large, PASSWORD), Err(BackupError::TooLarge { .. })));
    // A sequence in a sequence, as often as a megabyte allows.
    let mut nested: Vec<u8> = Vec::new();
    while nested.len() < MAX_FILE_BYTES - 8 {
        let len = nested.len();
        let header = match len {
            0..=0x7f => vec![len as u8, 0x30],
            0x80..=0xff => vec![len as u8, 0x81, 0x30],
            0x100..=0xffff => vec![len as u8, (len >> 8) as u8, 0x82, 0x30],
            _ => vec![len as u8, (len >> 8) as u8, (len >> 16) as u8, 0x83, 0x30],
        };
        nested.extend(header);
    }
    nested.reverse();
    assert!(matches!(dry_run(&nested, PASSWORD), Err(BackupError::NotABackup { .. })));
}

#[test]
fn pkcs12_with_bags_that_are_no_backups_is_refused_after_the_right_password() {
    let line = |n, time: &str| format!("main generation {n} provider {} exported {time}", provider(1).uuid());
    let file = |bags: &[SecretBagRef<'_>]| write(bags, PASSWORD, CHEAP).unwrap();
    let name = line(1, "2026-11-24T10:00:00Z");
    assert!(dry_run(&file(&[bag(&name)]), PASSWORD).is_ok());
    let later = line(1, "2026-11-24T10:00:01Z");
    for bags in [
        vec![],
        vec![bag("my key")],
        vec![bag(&line(2, "2026-11-24T10:00:00Z"))],
        vec![bag(&line(1, "yesterday"))],
        vec![bag(&name), bag(&name)],
        vec![bag(&name), bag(&later)],
        (0..=MAX_BAGS).map(|_| bag(&name)).collect(),
    ] {
        let refused = dry_run(&file(&bags), PASSWORD).unwrap_err();
        assert!(matches!(refused, BackupError::NotABackup { .. }), "{refused}");
    }
}

#[test]
fn pkcs12_any_flipped_byte_is_refused_or_changes_nothing() {
    let (provider, good) = (provider(2), good());
    for at in 0..good.len() {
        for mask in [0x01, 0x80, 0xff] {
            let mut file = good.clone();
            file[at] ^= mask;
            if let Ok(verified) = verify_backup(&file, PASSWORD, &provider) {
                assert_eq!(verified.generations(), [1, 2], "byte {at} xor {mask:#x}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pkcs12_reader_survives_any_mutation(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..3), 1..6),
    ) {
        let (provider, mut file) = (provider(2), good());
        for (index, byte, edit) in edits {
            let at = index.index(file.len());
            match edit {
                0 => file[at] = byte,
                1 => file.insert(at, byte),
                _ => { file.remove(at); }
            }
        }
        if let Ok(verified) = verify_backup(&file, PASSWORD, &provider) {
            prop_assert_eq!(verified.generations(), [1, 2]);
        }
    }

    #[test]
    fn pkcs12_reader_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        prop_assert!(dry_run(&bytes, PASSWORD).is_err());
    }
}

/// A file of another program is named as that, or asks for another password; it is never opened.
fn assert_foreign(name: &str, file: &[u8], password: &str) {
    let refused = dry_run(file, password).unwrap_err();
    assert!(
        matches!(refused, BackupError::NotABackup { .. } | BackupError::Unsupported { .. }),
        "{name}: {refused}"
    );
    let text = refused.to_string();
    assert!(text.starts_with("not a vmseal backup: "), "{name}: {text}");
}

#[test]
fn pkcs12_files_with_certificates_by_stock_openssl_are_no_backups() {
    let scratch = Scratch::new();
    let path = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    let (key, cert) = (path("key.pem"), path("cert.pem"));
    let made = run(
        "openssl",
        &[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-subj",
            "/CN=x",
            "-keyout",
            &key,
            "-out",
            &cert,
        ],
        b"",
    );
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let common = ["pkcs12", "-export", "-in", &cert, "-passout", "stdin", "-out"];
    let aes = ["-certpbe", "AES-256-CBC", "-keypbe", "AES-256-CBC", "-macalg", "SHA256"];
    for (name, options) in [
        ("key and certificate", [["-inkey", key.as_str()].as_slice(), &aes].concat()),
        ("certificate only", [["-nokeys"].as_slice(), &aes].concat()),
        ("in clear", vec!["-nokeys", "-certpbe", "NONE"]),
        ("SHA-1 MAC", [["-nokeys"].as_slice(), &aes[..4], &["-macalg", "SHA1"]].concat()),
        ("no MAC", [["-nokeys", "-nomac"].as_slice(), &aes[..4]].concat()),
    ] {
        let out = path(&format!("{name}.p12"));
        let args = [common.as_slice(), &[&out], &options].concat();
        let made = run("openssl", &args, PASSWORD.as_bytes());
        assert!(made.status.success(), "{name}: {}", String::from_utf8_lossy(&made.stderr));
        assert_foreign(name, &fs::read(&out).unwrap(), PASSWORD);
    }
}

#[test]
fn pkcs12_vectors_of_others_are_no_backups() {
    // Not every checkout has them; openssl's own files above stand in for them.
    let Some(vectors) = std::env::var_os("VMSEAL_VECTORS").map(PathBuf::from) else { return };
    let mut files = 0;
    for entry in fs::read_dir(vectors.join("pkcs12")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "p12") {
            files += 1;
            for password in ["", "password", "cryptography"] {
                assert_foreign(&path.display().to_string(), &fs::read(&path).unwrap(), password);
            }
        }
    }
    assert!(files > 10, "{files} files");
}
