//! After keys were made, wrapped, opened, derived and sent, none of their bytes lies outside secret memory.
//!
//! One test in a program of its own: it reads the whole process.

mod memory_scan;

use memory_scan::{Needles, scan};
use vmseal_keys::{
    Dek, HomeKey, Kdk, Kek, Protection, SecretBytes, SessionKey, derive, key_check, native_kek, protection,
    record::{
        Freshness, NewDiskRecord, NewHomeRecord, Wrapping, add_recipient, add_recipient_with, open_disk,
        open_disk_by_recovery, open_home, restate, seal_disk, seal_home,
    },
    seal_to,
};
use vmseal_model::{
    id::{DiskId, KekId, KeyUuid, ProviderId, ProviderUuid, RecordId, VmId},
    record::{HeaderKind, RecipientKind, RecipientSeal, RecordState, UnitBytes},
};

#[test]
fn key_bytes_lie_in_secret_memory_only() {
    if protection() != Protection::MemfdSecret {
        return println!(
            "skipped: this kernel gives no memfd_secret, so secret memory cannot be told from the rest"
        );
    }
    let (vm, disk) = (VmId::from_bytes([1; 16]), DiskId::from_bytes([2; 16]));
    let provider: ProviderId = "native".parse().unwrap();
    let kdk = Kdk::generate().unwrap();
    let kek = native_kek(&kdk, ProviderUuid::from_bytes([3; 16]), 1, KeyUuid::from_bytes([4; 16]));
    let other = Kek::new(KekId::from_bytes(b"17".to_vec()).unwrap(), SecretBytes::random().unwrap());
    let dek = Dek::generate().unwrap();
    let home = HomeKey::generate().unwrap();
    let recovery = SecretBytes::<32>::random().unwrap();

    let new = NewDiskRecord {
        record: RecordId::from_bytes([5; 16]),
        vm,
        disk,
        header: HeaderKind::Attached,
        unit: UnitBytes::B512,
        payload_offset: 16 << 20,
        created_ms: 0,
        state: RecordState::default(),
    };
    let record = seal_disk(&new, &dek, &kek, RecipientKind::Native, &provider).unwrap();
    let opened = open_disk(&record, None, None, &kek, &provider).unwrap();
    let record = add_recipient(&record, &opened, &other, RecipientKind::Kek, &provider).unwrap();
    let mut for_public = SecretBytes::<32>::zeroed();
    for_public.expose_mut().copy_from_slice(recovery.expose());
    let public = SessionKey::from_private(for_public).public();
    let id = KekId::from_bytes(b"safe".to_vec()).unwrap();
    let wrapping = Wrapping::Recovery { public: &public, id: id.clone() };
    let record = add_recipient_with(&record, &opened, &wrapping, &provider).unwrap();
    let record = restate(&record, dek.payload(), RecordState { epoch: 2, ..RecordState::default() }).unwrap();
    let again = open_disk(&record, None, None, &other, &provider).unwrap();
    let recovered = open_disk_by_recovery(&record, None, None, &recovery, &id, &provider).unwrap();
    assert_eq!(
        key_check(again.payload.payload(), vm, disk),
        key_check(recovered.payload.payload(), vm, disk)
    );

    let new = NewHomeRecord {
        record: RecordId::from_bytes([6; 16]),
        vm,
        created_ms: 0,
        state: RecordState::default(),
    };
    let fresh = Freshness::random().unwrap();
    let home_record = seal_home(&new, &home, &Wrapping::Native(&kek), &provider, fresh).unwrap();
    let opened_home = open_home(&home_record, None, &kek, &provider).unwrap();

    let session = SessionKey::generate().unwrap();
    let (enc, sealed) = seal_to(&session.public(), b"info", b"aad", kek.expose()).unwrap();
    let granted = session.open(b"info", b"aad", &enc, &sealed).unwrap();

    // Keys that only ever exist for a moment count as well.
    let RecipientSeal::Gcm { salt, .. } = &record.recipients[0].seal else { panic!("a KEK's recipient") };
    let wrap_key: SecretBytes<32> =
        derive::derive_key(kek.expose(), salt, &derive::wrap_key_info(record.head.record)).unwrap();
    let mac_key: SecretBytes<64> = derive::derive_key(
        dek.payload(),
        &[],
        &derive::info("record-mac", &[&record.head.record.to_bytes()]),
    )
    .unwrap();

    let mut needles = Needles::new();
    for secret in [
        kdk.expose().as_slice(),
        kek.expose(),
        other.expose(),
        dek.payload(),
        home.payload(),
        recovery.expose(),
        granted.expose(),
        opened_home.payload.payload(),
        wrap_key.expose(),
        mac_key.expose(),
    ] {
        needles.add(secret);
    }
    let (found, read) = scan(&needles);
    assert!(found.is_empty(), "{} copies of key bytes:\n{}", found.len(), found.join("\n"));
    assert!(read > 100_000, "only {read} bytes were read");

    // The scan does find what lies in ordinary memory.
    let copy = std::hint::black_box(Box::new(*dek.payload()));
    let (found, _) = scan(&needles);
    assert!(found.len() >= 12, "a copy was made and not found");
    drop(copy);
}
