//! The script is run for real, by bash, with stock openssl and cryptsetup.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use vmseal_keys::{Dek, NewDiskRecord, NewHomeRecord, SecretBytes, Wrapping, seal_disk, seal_home};
use vmseal_keys::{Freshness, HomeKey, Kdk};
use vmseal_model::{
    id::{DiskId, ProviderUuid, VmId},
    record::{RecordState, UnitBytes},
};

use super::*;
use crate::{
    backup::{export_at, verify_backup},
    fixture::{CHEAP, NOW_MS, PASSWORD, Scratch, provider, run},
    native::{Generation, NativeProvider},
    provider::KeyProvider,
};

const DEK: &[u8; 96] =
    b"VMSEAL-TEST-SECRET-data-key-0001VMSEAL-TEST-SECRET-tweak-key-002VMSEAL-TEST-SECRET-slot-secret-3";

const FILES: RunbookFiles<'_> = RunbookFiles {
    backup: "/nowhere/main.p12",
    volume: "/nowhere/web01.img.vmseal",
    header: None,
    mapping: "web01",
};

fn new_record(header: HeaderKind) -> NewDiskRecord {
    NewDiskRecord {
        record: RecordId::from_bytes(*b"record-id-16-byt"),
        vm: VmId::from_bytes(*b"vm-id-of-16-byte"),
        disk: DiskId::from_bytes(*b"disk-id-16-bytes"),
        header,
        unit: UnitBytes::B512,
        payload_offset: 16 << 20,
        created_ms: NOW_MS as u64,
        state: RecordState { epoch: 1, stored_bytes: 1 << 20, presented_bytes: 1 << 20 },
    }
}

fn dek() -> Dek {
    Dek::from_secret(SecretBytes::take_from(&mut { *DEK }))
}

/// The backup of twelve generations, and a record under a key of generation `generation`.
fn house(generation: u32, header: HeaderKind) -> (Vec<u8>, KeyRecord) {
    let mut provider = provider(generation);
    back_up(&mut provider);
    let kek = provider.new_kek().unwrap();
    assert_eq!(kek.id().as_native().unwrap().0, generation);
    for _ in generation..12 {
        provider.rotate(NOW_MS).unwrap();
        back_up(&mut provider);
    }
    let backup = export_at(&provider, PASSWORD, NOW_MS, CHEAP).unwrap();
    let record = seal_disk(&new_record(header), &dek(), &kek, RecipientKind::Native, provider.id()).unwrap();
    (backup, KeyRecord::decode(&record.encode()).unwrap())
}

fn back_up(provider: &mut NativeProvider) {
    let backup = export_at(provider, PASSWORD, NOW_MS, CHEAP).unwrap();
    let verified = verify_backup(&backup, PASSWORD, provider).unwrap();
    provider.mark_backed_up(&verified, NOW_MS).unwrap();
}

/// Runs the script with its key going to `<scratch>/out`.
fn run_script(scratch: &Scratch, runbook: &Runbook, backup: &[u8], password: &str) -> Output {
    let script = scratch.file("runbook.sh", runbook.to_string().as_bytes());
    let backup = scratch.file("main.p12", backup);
    let password = scratch.file("password", password.as_bytes());
    Command::new("bash")
        .arg(script)
        .env("BACKUP", backup)
        .env("OUT", scratch.path().join("out"))
        .env("PASSIN", format!("file:{}", password.display()))
        .output()
        .unwrap()
}

fn files_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn runbook_of_pkcs12_backup_gives_the_key_to_stock_tools() {
    for generation in [1, 2, 12] {
        let (backup, record) = house(generation, HeaderKind::Attached);
        let scratch = Scratch::new();
        let runbook = Runbook::new(&record, None, &FILES).unwrap();
        let out = run_script(&scratch, &runbook, &backup, PASSWORD);
        let (printed, errors) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{printed}{errors}");
        assert_eq!(fs::read(scratch.path().join("out/dek.bin")).unwrap(), DEK[..64]);
        assert_eq!(files_in(&scratch.path().join("out")), ["dek.bin"], "nothing else is left behind");
        assert!(!printed.contains("VMSEAL-TEST-SECRET") && !errors.contains("VMSEAL-TEST-SECRET"));
        assert!(
            printed.contains("cryptsetup open --type luks2 --key-size 512 --volume-key-file "),
            "{printed}"
        );
        assert!(printed.contains(" /nowhere/web01.img.vmseal web01\n"), "{printed}");
    }
}

#[test]
fn runbook_opens_a_luks2_volume_of_that_key_as_it_prints() {
    let (backup, record) = house(1, HeaderKind::Detached);
    let scratch = Scratch::new();
    let key = scratch.file("key", &DEK[..64]);
    let data = scratch.file("it's a volume", &vec![0; 1 << 20]);
    let header = scratch.file("header $HOME", &vec![0; 16 << 20]);
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let format = [
        "luksFormat",
        "--batch-mode",
        "--type",
        "luks2",
        "--pbkdf",
        "pbkdf2",
        "--pbkdf-force-iterations",
        "1000",
        "--key-size",
        "512",
        "--volume-key-file",
        &path(&key),
        "--key-file",
        "-",
        "--header",
        &path(&header),
        &path(&data),
    ]
    .map(str::to_owned);
    let formatted = run("cryptsetup", &format.each_ref().map(String::as_str), b"unused passphrase");
    assert!(formatted.status.success(), "{}", String::from_utf8_lossy(&formatted.stderr));

    let files = RunbookFiles { volume: &path(&data), header: Some(&path(&header)), ..FILES };
    let out = run_script(&scratch, &Runbook::new(&record, None, &files).unwrap(), &backup, PASSWORD);
    let printed = String::from_utf8_lossy(&out.stdout);
    let command =
        printed.lines().find(|line| line.starts_with("cryptsetup open ")).expect("the command is printed");
    let command = command.replacen("cryptsetup open ", "cryptsetup open --test-passphrase ", 1);
    let opened = run("bash", &["-c", &command], b"");
    assert!(opened.status.success(), "{command}: {}", String::from_utf8_lossy(&opened.stderr));

    fs::write(scratch.path().join("out/dek.bin"), [7; 64]).unwrap();
    assert!(!run("bash", &["-c", &command], b"").status.success(), "another key opens nothing");
}

#[test]
fn runbook_says_what_is_wrong_and_leaves_no_key() {
    let (backup, record) = house(12, HeaderKind::Attached);
    let stranger = NativeProvider::from_generations(
        "main".parse().unwrap(),
        ProviderUuid::from_bytes([9; 16]),
        vec![Generation::new(12, Kdk::generate().unwrap(), NOW_MS, None)],
    );
    let stranger = export_at(&stranger.unwrap(), PASSWORD, NOW_MS, CHEAP).unwrap();
    let older = export_at(&provider(11), PASSWORD, NOW_MS, CHEAP).unwrap();
    let runbook = Runbook::new(&record, None, &FILES).unwrap();
    for (backup, password, expected) in [
        (&backup, "VMSEAL-TEST-SECRET wrong", "wrong password, or damaged"),
        (&older, PASSWORD, "older than generation 12"),
        (&stranger, PASSWORD, "the backup is of another provider, or the record was changed"),
    ] {
        let scratch = Scratch::new();
        let out = run_script(&scratch, &runbook, backup, password);
        let errors = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{errors}");
        assert!(errors.contains(expected), "{errors}");
        assert!(files_in(&scratch.path().join("out")).is_empty());
    }
}

#[test]
fn runbook_is_refused_where_it_could_not_work() {
    let (_, record) = house(1, HeaderKind::Detached);
    assert!(matches!(Runbook::new(&record, None, &FILES), Err(RunbookError::HeaderNotNamed { .. })));
    let other = "other".parse().unwrap();
    let files = RunbookFiles { header: Some("/nowhere/h"), ..FILES };
    assert!(matches!(Runbook::new(&record, Some(&other), &files), Err(RunbookError::NoRecipient { .. })));

    let mut damaged = record;
    damaged.recipients[0].id.kek = KekId::from_bytes(b"17".to_vec()).unwrap();
    assert!(matches!(Runbook::new(&damaged, None, &files), Err(RunbookError::NotNative { .. })));

    let mut provider = provider(1);
    back_up(&mut provider);
    let new = NewHomeRecord {
        record: RecordId::from_bytes([1; 16]),
        vm: VmId::from_bytes([2; 16]),
        created_ms: 0,
        state: RecordState::default(),
    };
    let kek = provider.new_kek().unwrap();
    let wrapping = Wrapping::under(&kek, RecipientKind::Native).unwrap();
    let home = seal_home(
        &new,
        &HomeKey::generate().unwrap(),
        &wrapping,
        provider.id(),
        Freshness::random().unwrap(),
    );
    assert!(matches!(Runbook::new(&home.unwrap(), None, &FILES), Err(RunbookError::NotADisk { .. })));
}

#[test]
fn runbook_holds_no_secret_and_no_path_can_break_out_of_it() {
    let (_, record) = house(1, HeaderKind::Attached);
    let scratch = Scratch::new();
    let mark = scratch.path().join("broken-out");
    let evil = format!("'; touch {0}; $(touch {0}) `touch {0}` \"}}\n touch {0} #'", mark.display());
    let files = RunbookFiles { backup: &evil, volume: &evil, header: None, mapping: &evil };
    let text = Runbook::new(&record, None, &files).unwrap().to_string();
    assert!(!text.contains("VMSEAL-TEST-SECRET"));
    let script = scratch.file("runbook.sh", text.as_bytes());
    let out = Command::new("bash").arg(script).env("OUT", scratch.path().join("out")).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(!mark.exists());
    // The values reach the last lines only when all went well; those quote them again.
    let value = format!("x=${{x:-{}}}; printf %s \"$x\"", default_value(&evil));
    assert_eq!(run("bash", &["-c", &value], b"").stdout, evil.as_bytes());
}
