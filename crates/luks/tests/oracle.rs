//! cryptsetup as judge, both ways: it opens what we make, and we accept what it makes.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use vmseal_keys::Dek;
use vmseal_luks::{Geometry, HEADER_BYTES, Header, Repair, Verdict, VmsealToken, create, inspect, repair};
use vmseal_model::id::DiskId;

fn cryptsetup(args: &[&str]) -> Output {
    Command::new("cryptsetup")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .env("LC_ALL", "C")
        .args(args)
        .output()
        .expect("cryptsetup is installed (package cryptsetup-bin)")
}

fn folder(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("oracle-{name}"));
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).unwrap();
    path
}

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

fn key_file(folder: &Path) -> PathBuf {
    let path = folder.join("key");
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).unwrap();
    file.write_all(dek().data_key()).unwrap();
    path
}

#[test]
fn cryptsetup_opens_what_we_make() {
    let folder = folder("made");
    let key = key_file(&folder);
    let token = VmsealToken { records: vec![b"record one".to_vec(), vec![7; 900]] };
    for unit in [512, 4096] {
        let path = folder.join(format!("attached-{unit}"));
        volume(&path, Geometry::attached(unit), &token);
        let text = path.to_str().unwrap();
        let dump = cryptsetup(&["luksDump", text]);
        let said = String::from_utf8_lossy(&dump.stdout).into_owned();
        assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
        assert!(
            said.contains(&disk().to_string())
                && said.contains("vmseal")
                && said.contains("16777216 [bytes]"),
            "{said}"
        );
        let open = |key: &str| {
            let args = [
                "open",
                "--type",
                "luks2",
                "--test-passphrase",
                "--key-size",
                "512",
                "--volume-key-file",
                key,
                text,
            ];
            cryptsetup(&args)
        };
        let opened = open(key.to_str().unwrap());
        assert!(opened.status.success(), "{}", String::from_utf8_lossy(&opened.stderr));
        let wrong = folder.join(format!("wrong-{unit}"));
        fs::write(&wrong, [9u8; 64]).unwrap();
        assert!(!open(wrong.to_str().unwrap()).status.success(), "cryptsetup takes any key");
        let exported = cryptsetup(&["token", "export", "--token-id", "0", text]);
        assert!(String::from_utf8_lossy(&exported.stdout).contains("\"records\""), "{exported:?}");
    }
    let header = folder.join("detached.luks");
    volume(&header, Geometry::detached(512), &token);
    let data = folder.join("data");
    fs::write(&data, vec![0; 1 << 20]).unwrap();
    let opened = cryptsetup(&[
        "open",
        "--type",
        "luks2",
        "--test-passphrase",
        "--key-size",
        "512",
        "--volume-key-file",
        key.to_str().unwrap(),
        "--header",
        header.to_str().unwrap(),
        data.to_str().unwrap(),
    ]);
    assert!(opened.status.success(), "{}", String::from_utf8_lossy(&opened.stderr));
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn we_accept_what_cryptsetup_makes_and_keep_what_it_keeps() {
    let folder = folder("theirs");
    let path = folder.join("volume");
    fs::write(&path, vec![0; 32 << 20]).unwrap();
    let password = folder.join("password");
    fs::write(&password, "VMSEAL-TEST-SECRET-passphrase").unwrap();
    let (text, password) = (path.to_str().unwrap(), password.to_str().unwrap());
    let made = cryptsetup(&[
        "luksFormat",
        "--batch-mode",
        "--type",
        "luks2",
        "--cipher",
        "aes-xts-plain64",
        "--key-size",
        "512",
        "--pbkdf",
        "pbkdf2",
        "--pbkdf-force-iterations",
        "1000",
        "--key-file",
        password,
        text,
    ]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let mut file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    assert_eq!(inspect(&mut file, Some(false)).unwrap().to_string(), "accept");
    let header = Header::read(&file, false).unwrap();
    assert_eq!(header.token(), None);
    assert!(!header.digest_matches(&dek()), "a foreign key matches");
    // Our token goes in; their keyslot goes on working.
    let token = VmsealToken { records: vec![b"record".to_vec()] };
    Header::write_token(&file, false, &token).unwrap();
    assert_eq!(Header::read(&file, false).unwrap().token(), Some(token));
    let open = cryptsetup(&["open", "--test-passphrase", "--key-file", password, text]);
    assert!(open.status.success(), "{}", String::from_utf8_lossy(&open.stderr));
    // LUKS1 is another matter.
    let old = folder.join("old");
    fs::write(&old, vec![0; 8 << 20]).unwrap();
    let made = cryptsetup(&[
        "luksFormat",
        "--batch-mode",
        "--type",
        "luks1",
        "--pbkdf-force-iterations",
        "1000",
        "--key-file",
        password,
        old.to_str().unwrap(),
    ]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let verdict = inspect(&mut File::open(&old).unwrap(), None).unwrap();
    assert_eq!(verdict.to_string(), "reject: LUKS1, import it");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn genuine_unfinished_reencryption_is_accepted_as_such() {
    let folder = folder("reencrypt");
    let path = folder.join("volume");
    fs::write(&path, vec![0; 48 << 20]).unwrap();
    let password = folder.join("password");
    fs::write(&password, "VMSEAL-TEST-SECRET-passphrase").unwrap();
    let (text, password) = (path.to_str().unwrap(), password.to_str().unwrap());
    let cheap = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", password];
    let made = cryptsetup(
        &[
            &[
                "luksFormat",
                "--batch-mode",
                "--type",
                "luks2",
                "--cipher",
                "aes-xts-plain64",
                "--key-size",
                "512",
            ][..],
            &cheap,
            &[text],
        ]
        .concat(),
    );
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let begun = cryptsetup(
        &[&["reencrypt", "--batch-mode", "--init-only", "--force-offline-reencrypt"][..], &cheap, &[text]]
            .concat(),
    );
    assert!(begun.status.success(), "{}", String::from_utf8_lossy(&begun.stderr));
    let verdict = inspect(&mut File::open(&path).unwrap(), Some(false)).unwrap();
    assert_eq!(verdict.to_string(), "accept (reencryption unfinished, needs the key)");
    assert!(Header::read(&File::open(&path).unwrap(), false).is_err(), "half-way volumes are not served");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn either_copy_lost_is_repaired_from_the_other() {
    let folder = folder("repair");
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
    fs::remove_dir_all(folder).unwrap();
}
