//! The way out without this product: the recipe of `docs/formats/key-record.md`, run with the stock openssl tool.

#[allow(dead_code, reason = "each target uses a part")]
mod fixture;

use std::process::{Command, Stdio};

use fixture::{array, bytes};
use serde_json::Value;
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

/// The shell block of the document.
fn published_recipe() -> String {
    let text = include_str!("../../../docs/formats/key-record.md");
    let (_, rest) = text.split_once("```sh\n").expect("the document has a shell block");
    rest.split_once("```").expect("the block ends").0.to_owned()
}

fn run(script: &str) -> Option<std::process::Output> {
    let there = |tool: &str| Command::new(tool).arg("--version").output().is_ok();
    // openssl 3 says its version by `version`, and answers `--version` with an error: it is there all the same.
    if !there("openssl") || !there("basenc") {
        return None;
    }
    Some(Command::new("sh").arg("-c").arg(script).stdin(Stdio::null()).output().expect("there is a shell"))
}

#[test]
fn published_recipe_runs_as_printed() {
    let recipe = published_recipe();
    let cases = fixture::cases();
    for case in cases.iter().filter(|case| case["kind"] != 3) {
        let (first, printed) =
            (&cases[0], |case: &Value, field: &str| case[field].as_str().unwrap().to_owned());
        let unbroken = recipe.replace("\\\n", "");
        assert!(
            unbroken.contains(&format!("RECORD={}\n", printed(first, "record"))),
            "the vector is the fixture's"
        );
        let script = unbroken
            .replace(&printed(first, "record"), &printed(case, "record"))
            .replace(&printed(first, "kek"), &printed(case, "kek"));
        let Some(output) = run(&script) else { return println!("skipped: openssl or basenc is missing") };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(
            String::from_utf8_lossy(&output.stdout).trim(),
            printed(case, "payload"),
            "{}",
            case["name"]
        );
    }
    let output = run(&recipe).unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), cases[0]["payload"].as_str().unwrap());
}

#[test]
fn published_recipe_says_when_the_kek_is_wrong_or_the_record_was_changed() {
    let (recipe, case) = (published_recipe().replace("\\\n", ""), &fixture::cases()[0]);
    let (record, kek) = (case["record"].as_str().unwrap(), case["kek"].as_str().unwrap());
    // Byte 120 is the lowest of the epoch.
    let changed = format!("{}02{}", &record[..240], &record[242..]);
    for (script, complaint) in [
        (recipe.replace(kek, &"ab".repeat(32)), "wrong KEK"),
        (recipe.replace(record, &changed), "was changed"),
    ] {
        let Some(output) = run(&script) else { return println!("skipped: openssl or basenc is missing") };
        assert!(!output.status.success() && output.stdout.is_empty());
        assert!(String::from_utf8_lossy(&output.stderr).contains(complaint));
    }
}

#[test]
fn published_test_vector_is_the_fixture() {
    let text = include_str!("../../../docs/formats/key-record.md");
    let block = text.split_once("## Test vector").expect("a section").1.split("```").nth(1).expect("a block");
    let digits: String = block.lines().filter_map(|line| line.get(18..)).collect();
    let case = &fixture::cases()[0];
    for field in ["kek", "payload", "wrap_key", "key_check", "mac_key", "record"] {
        assert!(digits.contains(case[field].as_str().unwrap()), "{field}");
    }
}
