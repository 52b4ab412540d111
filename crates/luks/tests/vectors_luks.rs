//! Verdicts on published and made headers: what cryptsetup rejects we reject, what it repairs we accept, and what the
//! format allows but no encryption manager may open is refused.

use std::{
    env, fs,
    io::Cursor,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use vmseal_luks::{Verdict, inspect};

/// Sound in format, with right checksums, and to be refused all the same.
const REFUSED_BY_POLICY: &[&str] = &[
    "segment-encryption-null",
    "segment-encryption-ecb",
    "downgrade-to-plaintext",
    "keyslot-key-size-0",
    "segment-sector-size-8192",
    "segment-size-uint64-max-aligned",
    "config-unknown-requirement",
    "keyslot-kdf-unknown",
    "digest-type-unknown",
];

fn carried() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors")
}

fn unpacked(file: &Path) -> Vec<u8> {
    let output =
        Command::new("xz").arg("-dc").arg(file).output().expect("xz is installed (package xz-utils)");
    assert!(output.status.success(), "{}: {}", file.display(), String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn verdict(file: &Path) -> Verdict {
    inspect(&mut Cursor::new(unpacked(file)), None).expect("memory can be read")
}

fn rows(name: &str) -> Vec<Value> {
    let text = fs::read_to_string(carried().join(name)).expect("the table is carried");
    serde_json::from_str(&text).expect("the table is JSON")
}

#[test]
fn damaged_and_hostile_luks2_headers_get_their_verdict() {
    let (mut accepted, mut rejected, mut wrong) = (0, 0, Vec::new());
    for row in rows("luks2-bad.json") {
        let name = row["name"].as_str().expect("a row has a name");
        let got = verdict(&carried().join(row["file"].as_str().expect("a row has a file")));
        let want = row["oracle"] == "accept" && !REFUSED_BY_POLICY.contains(&name);
        if got.accepted() == want {
            if want { accepted += 1 } else { rejected += 1 }
        } else {
            wrong.push(format!("{name} ({}): {got}", row["note"]));
        }
        if want && row["repaired_on_disk"] == true {
            let description = got.description().expect("an accepted header is described");
            assert!(description.needs_repair, "{name}: the damaged copy went unnoticed");
        }
    }
    println!("luks2-bad: {accepted} accepted, {rejected} rejected, as expected");
    assert!(wrong.is_empty(), "wrong verdicts:\n{}", wrong.join("\n"));
    assert!(accepted >= 8 && rejected >= 30, "{accepted} accepted, {rejected} rejected: rows are missing");
}

#[test]
fn luks1_is_to_be_imported_whatever_else_is_wrong_with_it() {
    let mut seen = 0;
    for row in rows("luks1-bad.json") {
        let name = row["name"].as_str().expect("a row has a name");
        let got = verdict(&carried().join(row["file"].as_str().expect("a row has a file")));
        assert!(!got.accepted(), "{name}");
        if !name.starts_with("truncated") && name != "magic-bitflip" {
            assert_eq!(got.to_string(), "reject: LUKS1, import it", "{name}");
            seen += 1;
        }
    }
    println!("luks1-bad: {seen} to be imported");
    assert!(seen >= 15);
}

#[test]
fn headers_of_the_published_sets_get_their_verdict() {
    let Some(folder) = env::var_os("VMSEAL_VECTORS").map(PathBuf::from) else {
        println!("skipped: luks/good and luks/upstream, VMSEAL_VECTORS names no folder");
        return;
    };
    let good = verdict(&folder.join("luks/good/luks2-4096-argon2id.img.xz"));
    assert_eq!(good.to_string(), "accept");
    let luks1 = verdict(&folder.join("luks/good/luks1-qemu-xts256-plain64.img.xz"));
    assert_eq!(luks1.to_string(), "reject: LUKS1, import it");
    let mut evil = 0;
    for file in fs::read_dir(folder.join("luks/upstream")).expect("luks/upstream is there").flatten() {
        let name = file.file_name().to_string_lossy().into_owned();
        if name.starts_with("evil_hdr") {
            assert!(!verdict(&file.path()).accepted(), "{name}");
            evil += 1;
        }
    }
    println!("luks/upstream: {evil} evil headers rejected; its archives are not unpacked here");
    assert_eq!(evil, 5);
}
