//! Data back without a server: a real volume, a real backup, and stock cryptsetup as judge.

mod support;

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use support::{Said, Scratch, at_terminal, vmseal, vmseal_with_fd3};
use vmseal_keys::{Dek, NewDiskRecord, seal_disk};
use vmseal_luks::{Geometry, HEADER_BYTES, Header, VmsealToken, create};
use vmseal_model::{
    id::{DiskId, RecordId, VmId},
    record::{HeaderKind, KeyRecord, RecordState, UnitBytes},
};
use vmseal_provider::{KeyProvider, NativeProvider, export, verify_backup};

const PASSWORD: &str = "VMSEAL-TEST-PASSWORD";

/// A provider, its backup, and a volume whose key is wrapped under it.
struct House {
    scratch: Scratch,
    provider: NativeProvider,
    dek: Dek,
    volume: PathBuf,
    header: Option<PathBuf>,
    record: KeyRecord,
}

impl House {
    fn new(kind: HeaderKind) -> Self {
        let scratch = Scratch::new();
        let provider = backed_up(&scratch, "main", "main.p12");
        let dek = Dek::generate().unwrap();
        let disk = DiskId::from_random(*b"VMSEAL-TEST-DISK");
        let geometry = match kind {
            HeaderKind::Detached => Geometry::detached(512),
            _ => Geometry::attached(512),
        };
        let record = seal(&provider, &dek, disk, kind, geometry.payload_offset, 7);
        let token = VmsealToken { records: vec![record.encode()] };
        let bytes = create(&dek, disk, &geometry, &token).unwrap();
        let volume = scratch.path("web01.img.vmseal");
        let header = (kind == HeaderKind::Detached).then(|| scratch.path("web01.luks"));
        let file = |path: &Path, length| {
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
            file.set_len(length).unwrap();
            file
        };
        match &header {
            Some(path) => {
                file(path, HEADER_BYTES).write_all_at(&bytes, 0).unwrap();
                file(&volume, 1 << 20);
            }
            None => file(&volume, HEADER_BYTES + (1 << 20)).write_all_at(&bytes, 0).unwrap(),
        }
        scratch.write("password", format!("{PASSWORD}\n"));
        Self { scratch, provider, dek, volume, header, record }
    }

    fn args<'a>(&'a self, more: &[&'a str]) -> Vec<String> {
        let mut args = vec!["key", "recover", "--volume", self.volume.to_str().unwrap()];
        if let Some(header) = &self.header {
            args.extend(["--header", header.to_str().unwrap()]);
        }
        args.extend(more);
        let mut args: Vec<String> = args.into_iter().map(str::to_owned).collect();
        for (option, file) in [("--password-file", "password"), ("--backup", "main.p12")] {
            if !args.iter().any(|arg| arg == option) {
                args.extend([option.to_owned(), self.scratch.path(file).to_str().unwrap().to_owned()]);
            }
        }
        args
    }

    fn recover(&self, more: &[&str]) -> Said {
        let args = self.args(more);
        vmseal(&self.scratch, &args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Asserts a refusal that names `word` and leaves no file.
    fn refused(&self, more: &[&str], exit: i32, word: &str) {
        let out = self.scratch.path("refused.key");
        let said = self.recover(&[more, &["--out", out.to_str().unwrap()]].concat());
        assert_eq!(said.exit, exit, "{said:?}");
        assert!(said.stderr.contains(word), "'{word}' is not in {said:?}");
        assert!(!out.exists(), "a key was written");
    }

    fn write_token(&self, records: Vec<Vec<u8>>) {
        let path = self.header.as_ref().unwrap_or(&self.volume);
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        Header::write_token(&file, self.header.is_some(), &VmsealToken { records }).unwrap();
    }
}

fn backed_up(scratch: &Scratch, name: &str, file: &str) -> NativeProvider {
    let mut provider = NativeProvider::create(name.parse().unwrap(), 1_795_510_212_000).unwrap();
    let backup = export(&provider, PASSWORD, 1_795_510_212_000).unwrap();
    let verified = verify_backup(&backup, PASSWORD, &provider).unwrap();
    provider.mark_backed_up(&verified, 1_795_510_212_000).unwrap();
    scratch.write(file, backup);
    provider
}

fn seal(
    provider: &NativeProvider,
    dek: &Dek,
    disk: DiskId,
    header: HeaderKind,
    payload_offset: u64,
    epoch: u64,
) -> KeyRecord {
    let new = NewDiskRecord {
        record: RecordId::from_random([3; 16]),
        vm: VmId::from_random([1; 16]),
        disk,
        header,
        unit: UnitBytes::B512,
        payload_offset,
        created_ms: 1_795_510_212_000,
        state: RecordState { epoch, stored_bytes: 1 << 20, presented_bytes: 1 << 20 },
    };
    let kek = provider.new_kek().unwrap();
    seal_disk(&new, dek, &kek, provider.kind().recipient_kind(), provider.id()).unwrap()
}

fn cryptsetup(key: &Path, house: &House) -> Output {
    let mut command = Command::new("cryptsetup");
    command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    command
        .args(["open", "--test-passphrase", "--type", "luks2", "--key-size", "512", "--volume-key-file"])
        .arg(key);
    if let Some(header) = &house.header {
        command.arg("--header").arg(header);
    }
    command.arg(&house.volume).output().expect("cryptsetup is installed (package cryptsetup-bin)")
}

#[test]
fn recovered_key_opens_the_volume_with_stock_cryptsetup() {
    for kind in [HeaderKind::Attached, HeaderKind::Detached] {
        let house = House::new(kind);
        let key = house.scratch.path("vda.key");
        let said = house.recover(&["--out", key.to_str().unwrap()]);
        assert_eq!(said.exit, 0, "{said:?}");
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read(&key).unwrap(), house.dek.data_key());
        assert!(
            said.stdout.starts_with("cryptsetup open --type luks2 --key-size 512 --volume-key-file "),
            "{said:?}"
        );
        assert_eq!(said.stdout.contains("--header"), kind == HeaderKind::Detached);
        let opened = cryptsetup(&key, &house);
        assert!(opened.status.success(), "{}", String::from_utf8_lossy(&opened.stderr));

        // Never over a file that is there.
        let said = house.recover(&["--out", key.to_str().unwrap()]);
        assert_eq!(said.exit, 1, "{said:?}");
        assert_eq!(fs::read(&key).unwrap(), house.dek.data_key());
        fs::write(&key, [9; 64]).unwrap();
        assert!(!cryptsetup(&key, &house).status.success(), "cryptsetup takes any key");
    }
}

#[test]
fn key_goes_to_a_descriptor_and_to_nothing_else() {
    let house = House::new(HeaderKind::Attached);
    let out = house.scratch.path("fd.key");
    let args = house.args(&["--out-fd", "3"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let said = vmseal_with_fd3(&house.scratch, &format!("3>{}", out.display()), &args);
    assert_eq!(said.exit, 0, "{said:?}");
    assert_eq!(fs::read(&out).unwrap(), house.dek.data_key());
    // Through a pipe, on standard output, alone there.
    let piped = house.scratch.path("pipe.key");
    let args = house.args(&["--out-fd", "1"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let said = vmseal_with_fd3(&house.scratch, &format!("| cat >{}", piped.display()), &args);
    assert!(said.stderr.contains("cryptsetup open"), "{said:?}");
    assert_eq!(fs::read(&piped).unwrap(), house.dek.data_key());
    // A descriptor that is not open.
    let said = house.recover(&["--out-fd", "77"]);
    assert_eq!(said.exit, 2, "{said:?}");
    // One destination, no more and no less.
    assert_eq!(house.recover(&[]).exit, 2);
    assert_eq!(house.recover(&["--out-fd", "3", "--out", "/x"]).exit, 2);
}

#[test]
fn key_is_not_shown_on_a_terminal() {
    let house = House::new(HeaderKind::Attached);
    let args = house.args(&["--out-fd", "1"]);
    let said = at_terminal(&house.scratch, &args.iter().map(String::as_str).collect::<Vec<_>>(), "");
    assert_eq!(said.exit, 2, "{said:?}");
    assert!(said.stdout.contains("descriptor 1 is a terminal; a key is never written to one"), "{said:?}");
}

#[test]
fn what_does_not_verify_gives_no_key_and_names_the_reason() {
    let house = House::new(HeaderKind::Attached);

    let wrong = house.scratch.write("wrong", "not the password\n");
    house.refused(&["--password-file", wrong.to_str().unwrap()], 3, "main.p12: ");
    let cut = fs::read(house.scratch.path("main.p12")).unwrap();
    let cut = house.scratch.write("cut.p12", &cut[..cut.len() - 10]);
    house.refused(&["--backup", cut.to_str().unwrap()], 3, "truncated copy");

    backed_up(&house.scratch, "other", "other.p12");
    let other = house.scratch.path("other.p12");
    house.refused(
        &["--backup", other.to_str().unwrap()],
        4,
        "the backup is of provider other, the disk's key is under: main",
    );
    backed_up(&house.scratch, "main", "namesake.p12");
    let namesake = house.scratch.path("namesake.p12");
    house.refused(&["--backup", namesake.to_str().unwrap()], 3, "another provider of that name");

    // Any edit of the record; then none at all; then another disk's.
    let mut edited = house.record.clone();
    edited.state.epoch += 1;
    house.write_token(vec![edited.encode()]);
    house.refused(&[], 3, "[integrity]");
    house.write_token(Vec::new());
    house.refused(&[], 3, "holds no key record");
    let disk = DiskId::from_random(*b"VMSEAL-OTHERDISK");
    let moved = seal(&house.provider, &house.dek, disk, HeaderKind::Attached, HEADER_BYTES, 1);
    house.write_token(vec![moved.encode()]);
    house.refused(&[], 3, "holds no key record");
}

#[test]
fn header_of_another_key_is_found_out() {
    let house = House::new(HeaderKind::Attached);
    let disk = DiskId::from_random(*b"VMSEAL-TEST-DISK");
    let token = VmsealToken { records: vec![house.record.encode()] };
    let foreign = create(&Dek::generate().unwrap(), disk, &Geometry::attached(512), &token).unwrap();
    let file = OpenOptions::new().write(true).open(&house.volume).unwrap();
    file.write_all_at(&foreign, 0).unwrap();
    house.refused(&[], 3, "header is of another key");
    // The right key, data said to begin elsewhere.
    let geometry = Geometry { unit_bytes: 512, payload_offset: HEADER_BYTES + 4096 };
    let shifted = create(&house.dek, disk, &geometry, &token).unwrap();
    file.write_all_at(&shifted, 0).unwrap();
    house.refused(&[], 3, "the header says units of 512 bytes and data at 16781312");
}

#[test]
fn record_out_of_the_metadata_helps_where_the_header_lost_its_own() {
    let house = House::new(HeaderKind::Attached);
    house.write_token(Vec::new());
    let text = STANDARD.encode(house.record.encode());
    let (first, second) = text.split_at(76);
    let record = house.scratch.write("record", format!("  {first}\n  {second}\n"));
    let key = house.scratch.path("vda.key");
    let said = house.recover(&["--record", record.to_str().unwrap(), "--out", key.to_str().unwrap()]);
    assert_eq!(said.exit, 0, "{said:?}");
    assert_eq!(fs::read(&key).unwrap(), house.dek.data_key());
}

#[test]
fn runbook_runs_and_gives_the_same_key() {
    let house = House::new(HeaderKind::Attached);
    let backup = house.scratch.path("main.p12");
    let args =
        ["key", "runbook", "--volume", house.volume.to_str().unwrap(), "--backup", backup.to_str().unwrap()];
    let said = vmseal(&house.scratch, &args);
    assert_eq!((said.exit, said.stderr.as_str()), (0, ""), "{said:?}");
    let script = house.scratch.write("runbook.sh", &said.stdout);
    let out = house.scratch.path("out");
    let run = Command::new("bash")
        .arg(&script)
        .env("OUT", &out)
        .env("PASSIN", format!("file:{}", house.scratch.path("password").display()))
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    assert_eq!(fs::read(out.join("dek.bin")).unwrap(), house.dek.data_key());
    assert!(cryptsetup(&out.join("dek.bin"), &house).status.success());
}

#[test]
fn newest_record_that_verifies_is_taken() {
    let house = House::new(HeaderKind::Attached);
    let mut newer = house.record.clone();
    newer.state.epoch += 1;
    house.write_token(vec![house.record.encode(), newer.encode(), b"garbage".to_vec()]);
    let key = house.scratch.path("vda.key");
    let said = house.recover(&["--out", key.to_str().unwrap(), "--output", "json"]);
    assert_eq!(said.exit, 0, "{said:?}");
    assert_eq!(said.json()["epoch"], 7);
    assert!(said.stderr.contains("trying an older copy"), "{said:?}");
}
