//! The way out without this product: the recipe of `docs/formats/key-record.md`, run with the stock openssl tool.

#[allow(dead_code, reason = "each target uses a part")]
mod fixture;

use std::process::{Command, Stdio};

use fixture::{array, bytes};
use vmseal_keys::{derive, key_check};
use vmseal_model::{
    id::{DiskId, VmId},
    record::{KeyRecord, RecipientSeal},
};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Output of openssl; `None` if there is no openssl on this machine.
fn openssl(args: &[&str], input: &[u8]) -> Option<Vec<u8>> {
    use std::io::Write;
    let child = Command::new("openssl")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => panic!("openssl: {error}"),
    };
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "openssl {}: {}", args[0], String::from_utf8_lossy(&output.stderr));
    Some(output.stdout)
}

fn kdf(len: &str, key: &[u8], salt: &[u8], info: &[u8]) -> Option<Vec<u8>> {
    let (key, salt, info) =
        (format!("hexkey:{}", hex(key)), format!("hexsalt:{}", hex(salt)), format!("hexinfo:{}", hex(info)));
    let mut args = vec!["kdf", "-binary", "-keylen", len, "-kdfopt", "digest:SHA512", "-kdfopt", &key];
    if salt != "hexsalt:" {
        args.extend(["-kdfopt", &salt]);
    }
    args.extend(["-kdfopt", &info, "HKDF"]);
    openssl(&args, b"")
}

#[test]
fn stock_openssl_gets_the_payload_of_every_written_record() {
    for case in fixture::cases() {
        let record = KeyRecord::decode(&bytes(&case, "record")).unwrap();
        let recipient = &record.recipients[0];
        let RecipientSeal::Gcm { salt, nonce, .. } = &recipient.seal else { panic!("kinds 1 to 4") };

        // Step 1: the wrap key.
        let info = derive::wrap_key_info(record.head.record);
        let Some(wrap_key) = kdf("32", &bytes(&case, "kek"), salt, &info) else {
            return println!("skipped: there is no openssl on this machine");
        };
        // Step 2: GCM without its tag is CTR that begins at 2.
        let iv = hex(nonce) + "00000002";
        let ciphertext = &recipient.wrapped_payload[..recipient.wrapped_payload.len() - 16];
        let args = ["enc", "-d", "-aes-256-ctr", "-nopad", "-K", &hex(&wrap_key), "-iv", &iv];
        let payload = openssl(&args, ciphertext).unwrap();
        assert_eq!(payload, bytes(&case, "payload"), "{}", case["name"]);

        // Step 3: the key check says that it is the right one.
        let (vm, disk) = (VmId::from_bytes(array(&case, "vm")), DiskId::from_bytes(array(&case, "disk")));
        let info = derive::info("key-check", &[&vm.to_bytes(), &disk.to_bytes()]);
        let check = kdf("32", &payload, &[], &info).unwrap();
        assert_eq!(check, record.head.key_check);
        assert_eq!(check, key_check(&payload, vm, disk));

        // Step 4: the MAC says that nothing else was changed.
        let info = derive::info("record-mac", &[&record.head.record.to_bytes()]);
        let mac_key = kdf("64", &payload, &[], &info).unwrap();
        let option = format!("hexkey:{}", hex(&mac_key));
        let covered = record.encode_without_mac();
        let args = ["mac", "-binary", "-digest", "SHA512", "-macopt", &option, "HMAC"];
        assert_eq!(openssl(&args, &covered).unwrap()[..32], record.mac, "{}", case["name"]);
    }
}
