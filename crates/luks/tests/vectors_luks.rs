//! Verdicts on published and made headers: what cryptsetup rejects we reject, what it repairs we accept, and what the
//! format allows but no encryption manager may open is refused.

mod tool;

use std::{
    env, fs,
    io::Cursor,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tool::{Scratch, available, command, text};
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
    let output = command("xz").arg("-dc").arg(file).output().expect("xz starts");
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
    if !available("xz", "xz-utils") {
        return;
    }
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
    if !available("xz", "xz-utils") {
        return;
    }
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
    if !available("xz", "xz-utils") {
        return;
    }
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
    assert_eq!(evil, 5);
    let upstream = |name: &str| verdict(&folder.join("luks/upstream").join(name)).to_string();
    assert_eq!(upstream("luks2_valid_hdr.img.xz"), "accept");
    assert_eq!(upstream("valid_header_file.xz"), "reject: LUKS1, import it");
    assert_eq!(
        upstream("luks2_invalid_cipher.img.xz"),
        "reject: segments.0.encryption is 'capi:xts(ecb(aes-generic))-plain64', accepted is only aes-xts-plain64"
    );
    println!("luks/upstream: {evil} evil headers rejected, valid and invalid ones as expected");
}

#[test]
fn archives_of_the_published_sets_get_their_verdict() {
    if !available("xz", "xz-utils") || !available("tar", "tar") {
        return;
    }
    let Some(folder) = env::var_os("VMSEAL_VECTORS").map(PathBuf::from) else {
        println!("skipped: the archives of luks/upstream, VMSEAL_VECTORS names no folder");
        return;
    };
    let scratch = Scratch::new("vectors-archives");
    let mut seen = 0;
    for archive in ["luks2_mda_images", "luks2_header_requirements", "luks1-images"] {
        let file = folder.join("luks/upstream").join(format!("{archive}.tar.xz"));
        let into = scratch.join(archive);
        fs::create_dir_all(&into).unwrap();
        let done = command("tar")
            .args(["--no-same-owner", "-C", text(&into), "-xJf", text(&file)])
            .status()
            .expect("tar starts");
        assert!(done.success(), "{}", file.display());
        for image in files_in(&into) {
            let name = image.file_name().unwrap().to_string_lossy().into_owned();
            // The LUKS1 archive has a text and a key file beside its images.
            if matches!(name.as_str(), "README" | "keyfile1") {
                continue;
            }
            let got = inspect(&mut fs::File::open(&image).unwrap(), None).unwrap().to_string();
            let want = match (archive, name.as_str()) {
                ("luks1-images", _) => "reject: LUKS1, import it",
                (_, "luks2_header_requirements") => {
                    "reject: config.requirements demands 'req0', which is not known here"
                }
                // All nine sizes of metadata, and the header whose requirements were taken out.
                _ => "accept",
            };
            assert_eq!(got, want, "{archive}: {name}");
            seen += 1;
        }
    }
    println!("luks/upstream: {seen} headers out of archives, as expected");
    assert_eq!(seen, 9 + 2 + 12, "headers in the archives");
}

fn files_in(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() { files.extend(files_in(&path)) } else { files.push(path) }
    }
    files
}
