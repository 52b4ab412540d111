//! cryptsetup as judge, both ways: it opens what we make, and we accept what it makes.

mod tool;

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde_json::Value;
use tool::{Scratch, available, cryptsetup, cryptsetup_does, luks_format, text};
use vmseal_keys::Dek;
use vmseal_luks::{Geometry, HEADER_BYTES, Header, Repair, Verdict, VmsealToken, create, inspect, repair};
use vmseal_model::id::DiskId;

fn disk() -> DiskId {
    DiskId::from_random(*b"VMSEAL-TEST-DISK")
}

fn dek() -> Dek {
    let mut payload = [0u8; 96];
    payload[..19].copy_from_slice(b"VMSEAL-TEST-SECRET-");
    payload[32..51].copy_from_slice(b"VMSEAL-TEST-SECRET+");
    Dek::from_payload_slice(&payload).expect("96 bytes are a payload")
}

fn volume(path: &Path, geometry: Geometry, token: &VmsealToken) -> File {
    let header = create(&dek(), disk(), &geometry, token).unwrap();
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
    file.write_all_at(&header, 0).unwrap();
    file.set_len(HEADER_BYTES + if geometry.payload_offset == 0 { 0 } else { 1 << 20 }).unwrap();
    file
}

fn key_file(folder: &Scratch) -> PathBuf {
    let path = folder.join("key");
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).unwrap();
    file.write_all(dek().data_key()).unwrap();
    path
}

/// Whether cryptsetup opens a volume with this volume key.
fn opens(key: &Path, more: &[&str], volume: &Path) -> bool {
    let args = ["open", "--type", "luks2", "--test-passphrase", "--key-size", "512", "--volume-key-file"];
    cryptsetup(&[&args[..], &[text(key)], more, &[text(volume)]].concat()).status.success()
}

#[test]
fn cryptsetup_opens_what_we_make() {
    if !available("cryptsetup", "cryptsetup-bin") {
        return;
    }
    let folder = Scratch::new("oracle-made");
    let key = key_file(&folder);
    let wrong = folder.file("wrong", &[9; 64]);
    let token = VmsealToken { records: vec![b"record one".to_vec(), vec![7; 900]] };
    for unit in [512, 4096] {
        let path = folder.join(&format!("attached-{unit}"));
        volume(&path, Geometry::attached(unit), &token);
        let dump = cryptsetup_does(&["luksDump", text(&path)]);
        for part in [
            &disk().to_string(),
            "vmseal",
            "16777216 [bytes]",
            "65536 [bytes]",
            "14680064 [bytes]",
            "aes-xts-plain64",
            &format!("sector: {unit} [bytes]"),
        ] {
            assert!(dump.contains(part), "{part} is not in:\n{dump}");
        }
        assert!(opens(&key, &[], &path), "units of {unit}");
        assert!(!opens(&wrong, &[], &path), "cryptsetup takes any key");
        let exported = cryptsetup_does(&["token", "export", "--token-id", "0", text(&path)]);
        let exported: Value = serde_json::from_str(&exported).unwrap();
        let expected = serde_json::json!({"type": "vmseal", "keyslots": [], "version": 1,
            "records": ["cmVjb3JkIG9uZQ==", base64_of(&[7; 900])]});
        assert_eq!(exported, expected);
    }
    let header = folder.join("detached.luks");
    volume(&header, Geometry::detached(4096), &token);
    let data = folder.sparse("data", 1 << 20);
    assert!(opens(&key, &["--header", text(&header)], &data));
    assert!(!opens(&wrong, &["--header", text(&header)], &data), "cryptsetup takes any key");
}

fn base64_of(bytes: &[u8]) -> String {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    STANDARD.encode(bytes)
}

#[test]
fn token_written_by_us_is_read_by_cryptsetup_and_its_own_tokens_stay() {
    if !available("cryptsetup", "cryptsetup-bin") {
        return;
    }
    let folder = Scratch::new("oracle-token");
    let key = key_file(&folder);
    for (name, geometry) in [("attached", Geometry::attached(512)), ("detached", Geometry::detached(512))] {
        let detached = geometry.payload_offset == 0;
        let path = folder.join(name);
        let file = volume(&path, geometry, &VmsealToken { records: vec![b"old".to_vec()] });
        let foreign = folder.file("foreign", br#"{"type":"somebody-else","keyslots":[],"x":1}"#);
        cryptsetup_does(&["token", "import", "--json-file", text(&foreign), text(&path)]);
        let token = VmsealToken { records: vec![b"new".to_vec()] };
        Header::write_token(&file, detached, &token).unwrap();
        assert_eq!(Header::read(&file, detached).unwrap().token(), Some(token));
        let ours = cryptsetup_does(&["token", "export", "--token-id", "0", text(&path)]);
        let ours: Value = serde_json::from_str(&ours).unwrap();
        assert_eq!(ours["records"], serde_json::json!(["bmV3"]));
        let theirs = cryptsetup_does(&["token", "export", "--token-id", "1", text(&path)]);
        let theirs: Value = serde_json::from_str(&theirs).unwrap();
        assert_eq!(theirs, serde_json::json!({"type": "somebody-else", "keyslots": [], "x": 1}));
        let data = folder.sparse(&format!("{name}-data"), 1 << 20);
        let opened =
            if detached { opens(&key, &["--header", text(&path)], &data) } else { opens(&key, &[], &path) };
        assert!(opened, "{name}");
    }
}

#[test]
fn we_accept_what_cryptsetup_makes_and_keep_what_it_keeps() {
    if !available("cryptsetup", "cryptsetup-bin") {
        return;
    }
    let folder = Scratch::new("oracle-theirs");
    let path = folder.sparse("volume", 32 << 20);
    let password = folder.file("password", b"VMSEAL-TEST-SECRET-passphrase");
    luks_format(&path, &password, &[]);
    let mut file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    assert_eq!(inspect(&mut file, Some(false)).unwrap().to_string(), "accept");
    let header = Header::read(&file, false).unwrap();
    assert_eq!(header.token(), None);
    assert!(!header.digest_matches(&dek()), "a foreign key matches");
    // Our token goes in; their keyslot goes on working.
    let token = VmsealToken { records: vec![b"record".to_vec()] };
    Header::write_token(&file, false, &token).unwrap();
    assert_eq!(Header::read(&file, false).unwrap().token(), Some(token));
    cryptsetup_does(&["open", "--test-passphrase", "--key-file", text(&password), text(&path)]);
}

#[test]
fn luks1_is_to_be_imported() {
    if !available("cryptsetup", "cryptsetup-bin") {
        return;
    }
    let folder = Scratch::new("oracle-luks1");
    let password = folder.file("password", b"VMSEAL-TEST-SECRET-passphrase");
    let old = folder.sparse("old", 8 << 20);
    let first = ["luksFormat", "--batch-mode", "--type", "luks1", "--pbkdf-force-iterations", "1000"];
    cryptsetup_does(&[&first[..], &["--key-file", text(&password), text(&old)]].concat());
    let verdict = inspect(&mut File::open(&old).unwrap(), None).unwrap();
    assert_eq!(verdict.to_string(), "reject: LUKS1, import it");
}

#[test]
fn either_copy_lost_is_repaired_from_the_other() {
    let folder = Scratch::new("oracle-repair");
    let token = VmsealToken { records: vec![b"record".to_vec()] };
    for (name, from, to) in
        [("primary", 0u64, 512usize), ("primary-json", 4096, 100), ("secondary", 65_536, 4096)]
    {
        let path = folder.join(name);
        let mut file = volume(&path, Geometry::attached(512), &token);
        file.write_all_at(&vec![0xa5; to], from).unwrap();
        assert!(
            matches!(inspect(&mut file, Some(false)).unwrap(), Verdict::Accept(d) if d.needs_repair),
            "{name}"
        );
        assert!(matches!(repair(&file, false).unwrap(), Repair::From(_)), "{name}");
        assert!(matches!(repair(&file, false).unwrap(), Repair::Nothing), "{name}");
        let header = Header::read(&file, false).unwrap();
        assert_eq!((header.token(), header.uuid()), (Some(token.clone()), disk()), "{name}");
        assert!(header.digest_matches(&dek()), "{name}");
    }
}
