//! `disk inspect` on the published and hostile headers, with no server anywhere.

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use support::{Said, Scratch, vmseal};

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

fn vectors() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../luks/tests/vectors")
}

fn rows(table: &str) -> Vec<Value> {
    serde_json::from_slice(&fs::read(vectors().join(table)).unwrap()).unwrap()
}

fn inspect(scratch: &Scratch, row: &Value) -> Said {
    let packed = vectors().join(row["file"].as_str().unwrap());
    let unpacked =
        Command::new("xz").arg("-dc").arg(packed).output().expect("xz is installed (package xz-utils)");
    assert!(unpacked.status.success());
    let file = scratch.write("header.img", unpacked.stdout);
    vmseal(scratch, &["disk", "inspect", file.to_str().unwrap()])
}

#[test]
fn luks2_headers_are_accepted_or_rejected_by_last_line_and_exit_code() {
    let scratch = Scratch::new();
    let (mut accepted, mut rejected) = (0, 0);
    for row in rows("luks2-bad.json") {
        let name = row["name"].as_str().unwrap();
        let said = inspect(&scratch, &row);
        let last = said.stdout.lines().last().unwrap_or_default().to_owned();
        if row["oracle"] == "accept" && !REFUSED_BY_POLICY.contains(&name) {
            assert_eq!((said.exit, last.as_str()), (0, "accept"), "{name}: {said:?}");
            assert!(said.stdout.starts_with("LUKS2  uuid "), "{said:?}");
            accepted += 1;
        } else {
            assert_eq!(said.exit, 3, "{name}: {said:?}");
            assert!(last.starts_with("reject: ") && last.len() > "reject: ".len(), "{name}: {said:?}");
            rejected += 1;
        }
        assert!(said.stderr.is_empty(), "{name}: {said:?}");
    }
    assert!(accepted >= 8 && rejected >= 30, "{accepted} accepted, {rejected} rejected: rows are missing");
}

#[test]
fn luks1_is_to_be_imported() {
    let scratch = Scratch::new();
    let rows = rows("luks1-bad.json");
    let row = rows.iter().find(|row| row["name"] == "ok-headers-only").unwrap();
    let said = inspect(&scratch, row);
    assert_eq!((said.exit, said.stdout.as_str()), (3, "reject: LUKS1, import it\n"));
}

#[test]
fn file_that_cannot_be_read_is_1_and_one_that_is_no_volume_is_3() {
    let scratch = Scratch::new();
    let said = vmseal(&scratch, &["disk", "inspect", "/nonexistent"]);
    assert_eq!(said.exit, 1);
    assert!(said.stderr.starts_with("error: cannot read /nonexistent"), "{said:?}");
    let file = scratch.write("zero.img", vec![0; 1 << 20]);
    let said = vmseal(&scratch, &["disk", "inspect", "--header", file.to_str().unwrap()]);
    assert_eq!(said.exit, 3);
    assert!(said.stdout.starts_with("reject: not a LUKS volume"), "{said:?}");
    assert_eq!(vmseal(&scratch, &["disk", "inspect"]).exit, 2);
}
