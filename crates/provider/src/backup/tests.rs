//! Round trips, what is refused, and stock openssl as the other reader.

use super::*;
use crate::{
    fixture::{CHEAP, NOW_MS, PASSWORD, Scratch, hex, kdk_bytes, provider, run},
    provider::KeyProvider,
};
use vmseal_model::id::{KekId, KeyUuid};

/// What `openssl pkcs12 -nodes` prints of a file, or `None` if it refuses.
fn openssl_prints(file: &[u8], password: &str) -> Option<String> {
    openssl(file, password, &["-nodes"])
}

fn openssl(file: &[u8], password: &str, options: &[&str]) -> Option<String> {
    let scratch = Scratch::new();
    let path = scratch.file("backup.p12", file);
    let args = [&["pkcs12", "-in", path.to_str().unwrap(), "-passin", "stdin"], options].concat();
    let out = run("openssl", &args, password.as_bytes());
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    out.status.success().then_some(text)
}

/// The secrets in openssl's print, as plain hex.
fn printed_secrets(text: &str) -> Vec<String> {
    let secret = |line: &&str| line.len() == 95 && line.chars().all(|c| c.is_ascii_hexdigit() || c == ' ');
    let lines = text.lines().map(str::trim).filter(secret);
    lines.map(|line| line.replace(' ', "").to_lowercase()).collect()
}

#[test]
fn pkcs12_backup_gives_its_keys_to_stock_openssl_at_full_cost() {
    let provider = provider(2);
    let file = export(&provider, PASSWORD, NOW_MS).unwrap();
    let text = openssl_prints(&file, PASSWORD).expect("openssl opens the backup");
    assert_eq!(printed_secrets(&text), [hex(&kdk_bytes(1)), hex(&kdk_bytes(2))], "{text}");
    for n in [1, 2] {
        let uuid = "1b4e28ba-2fa1-41d2-883f-0016d3cca427";
        let name = format!("friendlyName: main generation {n} provider {uuid} exported 2026-11-24T10:00:00Z");
        assert!(text.contains(&name), "{text}");
        let id = format!("localKeyID: 1B 4E 28 BA 2F A1 41 D2 88 3F 00 16 D3 CC A4 27 0{n} 00 00 00");
        assert!(text.contains(&id), "{text}");
    }
    let info = openssl(&file, PASSWORD, &["-info", "-noout"]).unwrap();
    assert!(info.contains("MAC: sha256, Iteration 1200000"), "{info}");
    assert!(info.contains("MAC length: 32, salt length: 32"), "{info}");
    assert!(info.contains("PBES2, PBKDF2, AES-256-CBC, Iteration 600000, PRF hmacWithSHA256"), "{info}");
    assert_eq!(import(&file, PASSWORD).unwrap().generations().len(), 2);
}

#[test]
fn pkcs12_backup_refuses_the_wrong_password_here_and_in_openssl() {
    let file = export_at(&provider(1), PASSWORD, NOW_MS, CHEAP).unwrap();
    for wrong in ["VMSEAL-TEST-SECRET passwore", "VMSEAL-TEST-SECRET passwor", "x", ""] {
        assert!(matches!(dry_run(&file, wrong), Err(BackupError::WrongPassword)), "{wrong}");
        assert_eq!(openssl_prints(&file, wrong), None, "{wrong}");
    }
}

#[test]
fn pkcs12_password_of_any_script_is_the_same_password_to_openssl() {
    for password in
        ["Prüfung-Ωmega", "пароль длинный", "schlüssel 🔑 lang", "密码密码密码密码", "a b\"c'd$e\\f"]
    {
        let file = export_at(&provider(1), password, NOW_MS, CHEAP).unwrap();
        let text = openssl_prints(&file, password).unwrap_or_else(|| panic!("openssl refuses {password}"));
        assert_eq!(printed_secrets(&text), [hex(&kdk_bytes(1))]);
        assert!(import(&file, password).is_ok());
    }
}

#[test]
fn pkcs12_export_refuses_a_password_that_protects_nothing() {
    let refused = |password| export_at(&provider(1), password, NOW_MS, CHEAP).unwrap_err();
    assert!(matches!(refused(""), BackupError::PasswordEmpty));
    assert!(matches!(refused("1234567"), BackupError::PasswordTooShort { characters: 7 }));
    assert!(
        matches!(refused("ÄÖÜäöüß"), BackupError::PasswordTooShort { characters: 7 }),
        "characters, not bytes"
    );
    assert!(refused("1234567").to_string().contains("at least 8"));
    assert!(matches!(refused("12345678\n"), BackupError::PasswordControlCharacter));
    assert!(export_at(&provider(1), "ÄÖÜäöüß1", NOW_MS, CHEAP).is_ok());
}

#[test]
fn pkcs12_import_derives_the_very_keys_that_were_exported() {
    let provider = provider(3);
    let file = export_at(&provider, PASSWORD, NOW_MS + 999, CHEAP).unwrap();
    let back = import(&file, PASSWORD).unwrap();
    assert_eq!((back.id(), back.uuid()), (provider.id(), provider.uuid()));
    for generation in 1..=3 {
        let id = KekId::native(generation, KeyUuid::from_bytes([generation as u8; 16]));
        assert_eq!(back.derive(&id).unwrap().expose(), provider.derive(&id).unwrap().expose());
    }
    assert_eq!(back.current().map(|g| (g.number(), g.backed_up_at_ms())), Some((3, Some(NOW_MS))));
    assert!(back.new_kek().is_ok(), "what was just imported has a backup");
}

#[test]
fn pkcs12_dry_run_says_what_is_inside() {
    let file = export_at(&provider(3), PASSWORD, NOW_MS + 1, CHEAP).unwrap();
    let summary = dry_run(&file, PASSWORD).unwrap();
    assert_eq!(summary.provider.as_str(), "main");
    assert_eq!(summary.uuid, provider(1).uuid());
    assert_eq!(summary.generations, [1, 2, 3]);
    assert_eq!(summary.exported_ms, NOW_MS);
}

#[test]
fn pkcs12_backup_of_another_key_or_provider_verifies_nothing() {
    let ours = provider(2);
    let with = |name: &str, uuid, generations: Vec<(u32, Kdk)>| {
        let all = generations.into_iter().map(|(n, kdk)| Generation::new(n, kdk, NOW_MS, None)).collect();
        let provider = NativeProvider::from_generations(name.parse().unwrap(), uuid, all).unwrap();
        verify_backup(&export_at(&provider, PASSWORD, NOW_MS, CHEAP).unwrap(), PASSWORD, &ours)
    };
    let kdk = |n| Kdk::new(vmseal_keys::SecretBytes::take_from(&mut kdk_bytes(n)));
    let other = ProviderUuid::from_bytes([9; 16]);
    assert!(with("main", ours.uuid(), vec![(1, kdk(1)), (2, kdk(2))]).is_ok());
    let swapped = with("main", ours.uuid(), vec![(1, kdk(2)), (2, kdk(1))]);
    assert!(matches!(swapped, Err(BackupError::OtherKey { generation: 1, .. })));
    let last_differs = with("main", ours.uuid(), vec![(1, kdk(1)), (2, kdk(3))]);
    assert!(matches!(last_differs, Err(BackupError::OtherKey { generation: 2, .. })));
    let more = with("main", ours.uuid(), vec![(1, kdk(1)), (3, kdk(3))]);
    assert!(matches!(more, Err(BackupError::UnknownGeneration { generation: 3, .. })));
    assert!(matches!(with("main", other, vec![(1, kdk(1))]), Err(BackupError::OtherProvider { .. })));
    assert!(matches!(with("side", ours.uuid(), vec![(1, kdk(1))]), Err(BackupError::OtherProvider { .. })));
}

#[test]
fn pkcs12_file_shows_no_key_and_errors_show_no_password() {
    let file = export_at(&provider(2), PASSWORD, NOW_MS, CHEAP).unwrap();
    assert!(!file.windows(18).any(|window| window == b"VMSEAL-TEST-SECRET"));
    assert!(!file.windows(8).any(|window| window == b"\0m\0a\0i\0n"), "not even the provider's name");
    let error = dry_run(&file, "VMSEAL-TEST-SECRET wrong").unwrap_err();
    assert!(!format!("{error} {error:?}").contains("VMSEAL-TEST"));
}

#[test]
fn pkcs12_time_that_cannot_be_written_is_refused() {
    for ms in [-1, i64::MAX] {
        assert!(matches!(export_at(&provider(1), PASSWORD, ms, CHEAP), Err(BackupError::Time { .. })));
    }
}
