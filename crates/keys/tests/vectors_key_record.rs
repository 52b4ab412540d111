//! Key records of format version 1 as they were written once: they open, and come out again byte for byte.
//!
//! The file was made by an independent implementation of `docs/formats/key-record.md`.

#[allow(dead_code, reason = "each target uses a part")]
mod fixture;

use fixture::{array, bytes, number};
use serde_json::Value;
use vmseal_keys::{
    Kdk, SecretBytes, derive, gcm, key_check, native,
    record::{
        Freshness, NewDiskRecord, NewHomeRecord, Wrapping, open_disk, open_disk_by_recovery, open_home,
        seal_disk_with, seal_home, verify_mac,
    },
    wrap,
};
use vmseal_model::{
    id::{DiskId, KekId, KeyUuid, ProviderUuid, RecordId, VmId},
    record::{HeaderKind, KeyRecord, RecordState, UnitBytes, WrappedKek},
};

fn vm(case: &Value) -> VmId {
    VmId::from_bytes(array(case, "vm"))
}

fn disk(case: &Value) -> DiskId {
    DiskId::from_bytes(array(case, "disk"))
}

#[test]
fn written_records_open_with_their_keys() {
    for case in fixture::cases() {
        let record = KeyRecord::decode(&bytes(&case, "record")).unwrap();
        let (kek, provider) = (fixture::kek(&case), fixture::provider(&case));
        let payload = bytes(&case, "payload");
        if case["role"] == "disk" {
            let opened = open_disk(&record, Some(vm(&case)), Some(disk(&case)), &kek, &provider).unwrap();
            assert_eq!(opened.payload.payload()[..], payload[..], "{}", case["name"]);
            assert_eq!(opened.state().epoch, number(&case, "epoch"));
        } else {
            let opened = open_home(&record, Some(vm(&case)), &kek, &provider).unwrap();
            assert_eq!(opened.payload.payload()[..], payload[..], "{}", case["name"]);
        }
        assert!(verify_mac(&record, &payload));
        assert_eq!(key_check(&payload, vm(&case), disk(&case)), array(&case, "key_check"));
        assert_eq!(record.encode(), bytes(&case, "record"));
    }
}

#[test]
fn written_records_come_out_again_byte_for_byte() {
    for case in fixture::cases() {
        let kek = fixture::kek(&case);
        let wrapping = match number(&case, "kind") {
            1 => Wrapping::Kek(&kek),
            2 => Wrapping::Native(&kek),
            3 => {
                let wrapped = &case["wrapped_kek"];
                Wrapping::Wrapped {
                    kek: &kek,
                    wrapped: WrappedKek {
                        wrapping_key: bytes(wrapped, "wrapping_key_id"),
                        algorithm: number(wrapped, "algorithm") as u8,
                        iv: bytes(wrapped, "iv"),
                        wrapped: bytes(wrapped, "wrapped"),
                    },
                }
            }
            kind => panic!("kind {kind}"),
        };
        let fresh = Freshness { salt: array(&case, "salt"), nonce: array(&case, "nonce") };
        let state = RecordState {
            epoch: number(&case, "epoch"),
            stored_bytes: number(&case, "stored_bytes"),
            presented_bytes: number(&case, "presented_bytes"),
        };
        let (record, created_ms) =
            (RecordId::from_bytes(array(&case, "record_id")), number(&case, "created_ms"));
        let sealed = if case["role"] == "disk" {
            let new = NewDiskRecord {
                record,
                vm: vm(&case),
                disk: disk(&case),
                header: if case["header"] == "attached" {
                    HeaderKind::Attached
                } else {
                    HeaderKind::Detached
                },
                unit: UnitBytes::from_bytes(number(&case, "unit") as u32).unwrap(),
                payload_offset: number(&case, "payload_offset"),
                created_ms,
                state,
            };
            seal_disk_with(&new, &fixture::dek(&case), &wrapping, &fixture::provider(&case), fresh).unwrap()
        } else {
            let new = NewHomeRecord { record, vm: vm(&case), created_ms, state };
            seal_home(&new, &fixture::home_key(&case), &wrapping, &fixture::provider(&case), fresh).unwrap()
        };
        assert_eq!(sealed.encode(), bytes(&case, "record"), "{}", case["name"]);
    }
}

#[test]
fn derived_values_are_the_written_ones() {
    for case in fixture::cases() {
        let record = RecordId::from_bytes(array(&case, "record_id"));
        let key: SecretBytes<32> =
            derive::derive_key(&bytes(&case, "kek"), &bytes(&case, "salt"), &derive::wrap_key_info(record))
                .unwrap();
        assert_eq!(key.expose(), &array(&case, "wrap_key"));
    }
    let native = &fixture::read()["native_kek"];
    let kdk = Kdk::new(SecretBytes::take_from(&mut array(native, "kdk")));
    let (provider, key) = (
        ProviderUuid::from_bytes(array(native, "provider_uuid")),
        KeyUuid::from_bytes(array(native, "key_uuid")),
    );
    assert_eq!(native::kek_info(key), bytes(native, "info"));
    let kek = native::native_kek(&kdk, provider, number(native, "generation") as u32, key);
    assert_eq!(kek.expose(), &array(native, "kek"));
    assert_eq!(kek.id().as_bytes(), bytes(&fixture::cases()[0], "kek_id"));
}

#[test]
fn wrapped_per_vm_kek_opens_under_its_wrapping_key() {
    let cases = fixture::cases();
    let case = cases.iter().find(|case| case["kind"] == 3).unwrap();
    let wrapped = &case["wrapped_kek"];
    let kek = fixture::kek(case);
    let aad = wrap::kek_associated_data(vm(case), &fixture::provider(case), kek.id());
    assert_eq!(aad, bytes(wrapped, "aad"));
    let sealed = bytes(wrapped, "wrapped");
    let (ciphertext, tag) = sealed.split_at(32);
    let mut out = [0; 32];
    gcm::open_into(&array(wrapped, "wrapping_key"), &bytes(wrapped, "iv"), &aad, ciphertext, tag, &mut out)
        .unwrap();
    assert_eq!(&out, kek.expose());
}

#[test]
fn record_with_a_recovery_recipient_opens_with_the_private_key_and_with_the_kek() {
    let recovery = &fixture::read()["recovery"];
    let record = KeyRecord::decode(&bytes(recovery, "record")).unwrap();
    let private = SecretBytes::take_from(&mut array(recovery, "private"));
    let id = KekId::from_bytes(bytes(recovery, "kek_id")).unwrap();
    let opened =
        open_disk_by_recovery(&record, None, None, &private, &id, &fixture::provider(recovery)).unwrap();
    assert_eq!(opened.payload.payload()[..], bytes(recovery, "payload")[..]);
    assert_eq!(wrap::associated_data(&record.head, opened.under()), bytes(recovery, "aad"));
    let case = &fixture::cases()[0];
    let opened = open_disk(&record, None, None, &fixture::kek(case), &fixture::provider(case)).unwrap();
    assert_eq!(opened.payload.payload()[..], bytes(recovery, "payload")[..]);
}
