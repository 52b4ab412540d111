//! Which generation gives keys, and when.

use super::*;
use crate::{
    backup::{export_at, import, verify_backup},
    fixture::{CHEAP, NOW_MS, PASSWORD, hex, kdk_bytes, provider},
};

fn back_up(provider: &mut NativeProvider) -> Vec<u32> {
    let file = export_at(provider, PASSWORD, NOW_MS, CHEAP).unwrap();
    let verified = verify_backup(&file, PASSWORD, provider).unwrap();
    provider.mark_backed_up(&verified, NOW_MS + 5).unwrap()
}

fn states(provider: &NativeProvider) -> Vec<&'static str> {
    provider.generations().iter().map(|g| provider.state_of(g).as_str()).collect()
}

#[test]
fn provider_gives_no_key_before_its_first_verified_pkcs12_backup() {
    let mut provider = NativeProvider::create("main".parse().unwrap(), NOW_MS).unwrap();
    let refused = provider.new_kek().unwrap_err().to_string();
    assert!(refused.contains("main") && refused.contains("vmseal provider export main"), "{refused}");
    assert_eq!(provider.status().health, Health::NotBackedUp);
    assert_eq!(provider.status().detail, refused);
    assert!(!provider.status().health.gives_new_keys());

    assert_eq!(back_up(&mut provider), [1]);
    assert_eq!(provider.status().health, Health::Usable);
    let kek = provider.new_kek().unwrap();
    assert_eq!(kek.id().as_native().unwrap().0, 1);
    assert!(!kek.is_unwrap_only());
    assert_ne!(provider.new_kek().unwrap().id(), kek.id());
}

#[test]
fn interrupted_export_never_counts_as_pkcs12_backup() {
    let mut provider = provider(1);
    let file = export_at(&provider, PASSWORD, NOW_MS, CHEAP).unwrap();
    assert_eq!(provider.status().health, Health::NotBackedUp, "an export alone marks nothing");
    for kept in 0..file.len() {
        assert!(verify_backup(&file[..kept], PASSWORD, &provider).is_err(), "{kept} of {} bytes", file.len());
    }
    assert!(verify_backup(&file, "VMSEAL-TEST-SECRET mistyped", &provider).is_err());
    assert_eq!(provider.status().health, Health::NotBackedUp);
    assert_eq!(back_up(&mut provider), [1]);
}

#[test]
fn rotated_provider_goes_on_with_the_old_generation_until_the_new_one_is_backed_up() {
    let mut provider = provider(1);
    back_up(&mut provider);
    let old = provider.new_kek().unwrap();
    assert_eq!(provider.rotate(NOW_MS).unwrap(), 2);
    assert_eq!(states(&provider), ["current", "awaiting-backup"]);
    assert_eq!(provider.status().health, Health::UsableBackupDue);
    assert_eq!(provider.new_kek_id().unwrap().as_native().unwrap().0, 1);
    assert!(matches!(provider.rotate(NOW_MS), Err(NativeError::BackupDue { generation: 2, .. })));

    assert_eq!(back_up(&mut provider), [2]);
    assert_eq!(states(&provider), ["superseded", "current"]);
    assert_eq!(provider.generations()[0].backed_up_at_ms(), Some(NOW_MS + 5));
    assert_eq!(provider.new_kek_id().unwrap().as_native().unwrap().0, 2);
    let again = provider.get_kek(old.id()).unwrap();
    assert_eq!(again.expose(), old.expose());
    assert!(again.is_unwrap_only(), "a superseded generation opens what it wrapped and wraps nothing");
    assert_ne!(provider.generations()[0].kdk().expose(), provider.generations()[1].kdk().expose());
}

#[test]
fn backup_made_before_a_rotation_does_not_cover_the_new_generation() {
    let mut provider = provider(1);
    let file = export_at(&provider, PASSWORD, NOW_MS, CHEAP).unwrap();
    let verified = verify_backup(&file, PASSWORD, &provider).unwrap();
    provider.mark_backed_up(&verified, NOW_MS).unwrap();
    provider.rotate(NOW_MS).unwrap();
    let verified = verify_backup(&file, PASSWORD, &provider).unwrap();
    assert_eq!(verified.generations(), [1]);
    assert_eq!(provider.mark_backed_up(&verified, NOW_MS).unwrap(), [0u32; 0]);
    assert_eq!(states(&provider), ["current", "awaiting-backup"]);
}

#[test]
fn key_that_is_not_this_providers_is_refused_by_name() {
    let mut provider = provider(1);
    back_up(&mut provider);
    let foreign = KekId::from_bytes(b"17".to_vec()).unwrap();
    assert!(matches!(provider.get_kek(&foreign), Err(ProviderError::Native(NativeError::NotNative { .. }))));
    let lost = KekId::native(4, KeyUuid::from_bytes([4; 16]));
    let refused = provider.get_kek(&lost).unwrap_err();
    assert!(matches!(refused, ProviderError::Native(NativeError::NoSuchGeneration { generation: 4, .. })));
    assert!(refused.to_string().contains(&lost.to_string()), "{refused}");
}

#[test]
fn mark_of_another_providers_backup_is_refused() {
    let mut ours = NativeProvider::create("main".parse().unwrap(), NOW_MS).unwrap();
    let theirs = provider(1);
    let file = export_at(&theirs, PASSWORD, NOW_MS, CHEAP).unwrap();
    let verified = verify_backup(&file, PASSWORD, &theirs).unwrap();
    assert!(matches!(ours.mark_backed_up(&verified, NOW_MS), Err(NativeError::OtherProvider { .. })));
    assert_eq!(ours.status().health, Health::NotBackedUp);
}

#[test]
fn import_into_a_provider_brings_back_what_is_missing() {
    let file = export_at(&provider(3), PASSWORD, NOW_MS, CHEAP).unwrap();
    let mut stale = provider(1);
    assert_eq!(stale.adopt_missing(import(&file, PASSWORD).unwrap()).unwrap(), [2, 3]);
    assert_eq!(states(&stale), ["superseded", "superseded", "current"]);
    for generation in stale.generations() {
        assert_eq!(*generation.kdk().expose(), kdk_bytes(generation.number()));
    }
    assert_eq!(stale.adopt_missing(import(&file, PASSWORD).unwrap()).unwrap(), [0u32; 0]);

    let mut other = NativeProvider::create("main".parse().unwrap(), NOW_MS).unwrap();
    assert!(matches!(
        other.adopt_missing(import(&file, PASSWORD).unwrap()),
        Err(NativeError::OtherProvider { .. })
    ));
    let forged = vec![Generation::new(1, Kdk::generate().unwrap(), NOW_MS, None)];
    let mut forged = NativeProvider::from_generations("main".parse().unwrap(), stale.uuid(), forged).unwrap();
    let refused = forged.adopt_missing(import(&file, PASSWORD).unwrap());
    assert!(matches!(refused, Err(NativeError::OtherKey { generation: 1, .. })));
    assert_eq!(states(&forged), ["awaiting-backup"], "nothing was changed");
}

#[test]
fn debug_shows_no_key() {
    let text = format!("{:?}", provider(2));
    assert!(!text.contains("VMSEAL") && !text.contains("86, 77"), "{text}");
}

#[test]
fn kek_is_the_one_that_openssl_derives_in_the_format_document() {
    let document = include_str!("../../../../docs/formats/native-backup.md");
    let value = |row: &str| {
        let line = document
            .lines()
            .find(|line| line.starts_with(&format!("| {row} |")))
            .expect("a row of the table");
        line.split('`').nth(1).expect("a value").to_owned()
    };
    let provider = provider(1);
    assert_eq!(value("KDK"), hex(provider.generations()[0].kdk().expose()));
    assert_eq!(value("provider uuid"), hex(&provider.uuid().to_bytes()));
    let key: KeyUuid = value("key uuid").parse().unwrap();
    let kek = provider.derive(&KekId::native(1, key)).unwrap();
    assert_eq!(value("KEK"), hex(kek.expose()));
    assert!(kek.is_unwrap_only(), "nothing is wrapped under a generation without a backup");
}
