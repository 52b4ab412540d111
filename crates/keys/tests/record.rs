//! What a key record promises: nothing opens that was changed or moved, and what may change does so by itself.

use proptest::prelude::*;
use vmseal_keys::{
    Dek, HomeKey, Kek, SecretBytes, SessionKey,
    record::{
        Freshness, Mismatch, NewDiskRecord, NewHomeRecord, WrapError, Wrapping, add_recipient,
        add_recipient_with, open_disk, open_disk_by_recovery, open_home, open_home_by_recovery,
        remove_recipient, restate, seal_disk, seal_disk_with, seal_home, verify_mac,
    },
};
use vmseal_model::{
    id::{DiskId, KekId, KeyUuid, ProviderId, RecordId, VmId},
    record::{HeaderKind, KeyRecord, RecipientKind, RecordState, UnitBytes, WrappedKek},
};

fn kek(number: u8) -> Kek {
    let mut bytes = *b"VMSEAL-TEST-SECRET-kek-number-00";
    bytes[31] = number;
    Kek::new(KekId::native(1, KeyUuid::from_bytes([number; 16])), SecretBytes::take_from(&mut bytes))
}

fn provider() -> ProviderId {
    "native".parse().unwrap()
}

fn new(record: u8) -> NewDiskRecord {
    NewDiskRecord {
        record: RecordId::from_bytes([record; 16]),
        vm: VmId::from_bytes([0xa1; 16]),
        disk: DiskId::from_bytes([0xd1; 16]),
        header: HeaderKind::Attached,
        unit: UnitBytes::B512,
        payload_offset: 16 << 20,
        created_ms: 1_767_225_600_000,
        state: RecordState { epoch: 1, stored_bytes: 1 << 30, presented_bytes: 1 << 30 },
    }
}

fn sealed(record: u8, dek: &Dek, kek: &Kek) -> KeyRecord {
    seal_disk(&new(record), dek, kek, RecipientKind::Native, &provider()).unwrap()
}

/// The record after its bytes were changed; `None` if they are no record any more.
fn edited(record: &KeyRecord, edit: impl FnOnce(&mut Vec<u8>)) -> Option<KeyRecord> {
    let mut bytes = record.encode();
    edit(&mut bytes);
    KeyRecord::decode(&bytes).ok()
}

#[test]
fn record_opens_under_its_own_kek_only() {
    let dek = Dek::generate().unwrap();
    let record = sealed(1, &dek, &kek(1));
    let opened = open_disk(&record, None, None, &kek(1), &provider()).unwrap();
    assert_eq!(opened.payload.payload(), dek.payload());
    assert!(matches!(
        open_disk(&record, None, None, &kek(2), &provider()),
        Err(WrapError::NotARecipient { .. })
    ));
    let impostor = Kek::new(kek(1).id().clone(), SecretBytes::random().unwrap());
    assert!(matches!(
        open_disk(&record, None, None, &impostor, &provider()),
        Err(WrapError::Integrity { .. })
    ));
    let other = "other".parse().unwrap();
    assert!(matches!(open_disk(&record, None, None, &kek(1), &other), Err(WrapError::NotARecipient { .. })));
}

#[test]
fn two_records_of_one_key_share_no_salt_nonce_or_ciphertext() {
    let dek = Dek::generate().unwrap();
    let (a, b) = (sealed(1, &dek, &kek(1)), sealed(1, &dek, &kek(1)));
    assert_eq!(a.head, b.head);
    assert_ne!(a.recipients[0].seal, b.recipients[0].seal);
    assert_ne!(a.recipients[0].wrapped_payload, b.recipients[0].wrapped_payload);
}

#[test]
fn record_with_any_bit_flipped_is_refused_by_every_recipient() {
    let dek = Dek::generate().unwrap();
    let one = sealed(1, &dek, &kek(1));
    let opened = open_disk(&one, None, None, &kek(1), &provider()).unwrap();
    let both = add_recipient(&one, &opened, &kek(2), RecipientKind::Kek, &"kmip".parse().unwrap()).unwrap();
    let bytes = both.encode();
    let (mut shapes, mut refused) = (0, 0);
    for bit in 0..bytes.len() * 8 {
        let Some(bad) = edited(&both, |bytes| bytes[bit / 8] ^= 1 << (bit % 8)) else {
            shapes += 1;
            continue;
        };
        assert!(open_disk(&bad, None, None, &kek(1), &provider()).is_err(), "bit {bit}");
        assert!(open_disk(&bad, None, None, &kek(2), &"kmip".parse().unwrap()).is_err(), "bit {bit}");
        assert!(!verify_mac(&bad, dek.payload()), "bit {bit}");
        refused += 1;
    }
    println!("{} bits: {shapes} no record any more, {refused} refused on opening", bytes.len() * 8);
    assert!(shapes > 0 && refused > bytes.len() * 4);
    assert!(open_disk(&both, None, None, &kek(1), &provider()).is_ok());
}

#[test]
fn record_moved_to_another_vm_or_disk_is_refused() {
    let dek = Dek::generate().unwrap();
    let record = sealed(1, &dek, &kek(1));
    let (vm, disk) = (VmId::from_bytes([0xa2; 16]), DiskId::from_bytes([0xd2; 16]));
    let open = |record: &KeyRecord, vm, disk| open_disk(record, vm, disk, &kek(1), &provider());
    assert!(open(&record, Some(record.head.vm), Some(record.head.disk())).is_ok());
    assert!(matches!(
        open(&record, Some(vm), None),
        Err(WrapError::OtherSubject { mismatch: Mismatch::Vm { .. }, .. })
    ));
    assert!(matches!(
        open(&record, None, Some(disk)),
        Err(WrapError::OtherSubject { mismatch: Mismatch::Disk { .. }, .. })
    ));
    // Edited to name the other VM or disk, it does not unwrap: the head is authenticated with the payload.
    let moved = edited(&record, |bytes| bytes[24..40].copy_from_slice(&vm.to_bytes())).unwrap();
    assert!(matches!(open(&moved, Some(vm), None), Err(WrapError::Integrity { .. })));
    let moved = edited(&record, |bytes| bytes[40..56].copy_from_slice(&disk.to_bytes())).unwrap();
    assert!(matches!(open(&moved, None, Some(disk)), Err(WrapError::Integrity { .. })));
}

#[test]
fn recipients_swapped_within_or_between_records_are_refused() {
    let dek = Dek::generate().unwrap();
    let one = sealed(1, &dek, &kek(1));
    let opened = open_disk(&one, None, None, &kek(1), &provider()).unwrap();
    let both = add_recipient(&one, &opened, &kek(2), RecipientKind::Native, &provider()).unwrap();

    let mut order = both.clone();
    order.recipients.swap(0, 1);
    let mut names = both.clone();
    let (a, b) = names.recipients.split_at_mut(1);
    std::mem::swap(&mut a[0].id, &mut b[0].id);
    let mut payloads = both.clone();
    let (a, b) = payloads.recipients.split_at_mut(1);
    std::mem::swap(&mut a[0].wrapped_payload, &mut b[0].wrapped_payload);
    // The same key under the same KEK, but of another record: a clone's record must not take it.
    let mut foreign = both.clone();
    foreign.recipients[0] = sealed(2, &dek, &kek(1)).recipients.remove(0);
    let mut fewer = both.clone();
    fewer.recipients.pop();
    for (defect, bad) in
        [("order", order), ("names", names), ("payloads", payloads), ("foreign", foreign), ("fewer", fewer)]
    {
        assert!(open_disk(&bad, None, None, &kek(1), &provider()).is_err(), "{defect}");
        assert!(open_disk(&bad, None, None, &kek(2), &provider()).is_err(), "{defect}");
        assert!(!verify_mac(&bad, dek.payload()), "{defect}");
    }
}

#[test]
fn adding_a_recipient_needs_a_key_that_opened_and_then_both_open() {
    let dek = Dek::generate().unwrap();
    let record = sealed(1, &dek, &kek(1));
    let opened = open_disk(&record, None, None, &kek(1), &provider()).unwrap();
    let both = add_recipient(&record, &opened, &kek(2), RecipientKind::Native, &provider()).unwrap();
    assert_eq!(both.head, record.head);
    assert_eq!(both.state, record.state);
    assert_eq!(both.recipients[0], record.recipients[0]);
    for kek in [kek(1), kek(2)] {
        let opened = open_disk(&both, None, None, &kek, &provider()).unwrap();
        assert_eq!(opened.payload.payload(), dek.payload());
        assert_eq!(&opened.under().kek, kek.id());
    }
    // What one record opened adds nothing to another.
    let stranger = sealed(2, &Dek::generate().unwrap(), &kek(1));
    assert!(matches!(
        add_recipient(&stranger, &opened, &kek(2), RecipientKind::Native, &provider()),
        Err(WrapError::Unverified { .. })
    ));
    assert!(matches!(
        add_recipient(&both, &opened, &kek(2), RecipientKind::Native, &provider()),
        Err(WrapError::AlreadyRecipient { .. })
    ));
    // An edited record is not blessed with a new MAC.
    let bad = edited(&record, |bytes| bytes[120] ^= 1).unwrap();
    assert!(matches!(
        add_recipient(&bad, &opened, &kek(2), RecipientKind::Native, &provider()),
        Err(WrapError::Unverified { .. })
    ));
}

#[test]
fn seventeenth_recipient_is_refused() {
    let dek = Dek::generate().unwrap();
    let mut record = sealed(1, &dek, &kek(1));
    let opened = open_disk(&record, None, None, &kek(1), &provider()).unwrap();
    for number in 2..=16 {
        record = add_recipient(&record, &opened, &kek(number), RecipientKind::Native, &provider()).unwrap();
    }
    assert!(KeyRecord::decode(&record.encode()).is_ok());
    assert!(open_disk(&record, None, None, &kek(16), &provider()).is_ok());
    assert!(matches!(
        add_recipient(&record, &opened, &kek(17), RecipientKind::Native, &provider()),
        Err(WrapError::TooManyRecipients { .. })
    ));
}

#[test]
fn record_never_grows_past_what_decodes() {
    let dek = Dek::generate().unwrap();
    let long = |number: u8| {
        let mut id = vec![number; KekId::MAX_LEN];
        id[0] = b'k';
        Kek::new(KekId::from_bytes(id).unwrap(), SecretBytes::random().unwrap())
    };
    let first = long(1);
    let mut record = sealed(1, &dek, &first);
    let opened = open_disk(&record, None, None, &first, &provider()).unwrap();
    for number in 2..=17 {
        match add_recipient(&record, &opened, &long(number), RecipientKind::Kek, &provider()) {
            Ok(longer) => record = longer,
            Err(WrapError::TooManyRecipients { .. }) => break,
            Err(error) => panic!("{error}"),
        }
        assert!(KeyRecord::decode(&record.encode()).is_ok(), "{number} recipients");
    }
    assert!(record.recipients.len() < 16, "16 KiB end before 16 recipients with ids of 1024 bytes");
}

#[test]
fn removed_recipient_opens_no_more_and_the_last_one_stays() {
    let dek = Dek::generate().unwrap();
    let record = sealed(1, &dek, &kek(1));
    let opened = open_disk(&record, None, None, &kek(1), &provider()).unwrap();
    let both = add_recipient(&record, &opened, &kek(2), RecipientKind::Native, &provider()).unwrap();
    let second = remove_recipient(&both, dek.payload(), &provider(), kek(1).id()).unwrap();
    assert!(open_disk(&second, None, None, &kek(2), &provider()).is_ok());
    assert!(matches!(
        open_disk(&second, None, None, &kek(1), &provider()),
        Err(WrapError::NotARecipient { .. })
    ));
    assert!(matches!(
        remove_recipient(&second, dek.payload(), &provider(), kek(2).id()),
        Err(WrapError::LastRecipient { .. })
    ));
    assert!(matches!(
        remove_recipient(&second, dek.payload(), &provider(), kek(1).id()),
        Err(WrapError::NotARecipient { .. })
    ));
}

#[test]
fn rotated_out_kek_opens_and_refuses_to_wrap() {
    let dek = Dek::generate().unwrap();
    let record = sealed(1, &dek, &kek(1));
    let old = kek(1).unwrap_only();
    let opened = open_disk(&record, None, None, &old, &provider()).unwrap();
    let refused = seal_disk(&new(2), &dek, &old, RecipientKind::Native, &provider());
    assert!(matches!(refused, Err(WrapError::UnwrapOnly { .. })));
    let refused = add_recipient(&record, &opened, &kek(2).unwrap_only(), RecipientKind::Native, &provider());
    assert!(matches!(refused, Err(WrapError::UnwrapOnly { .. })));
}

#[test]
fn kind_that_needs_more_than_a_kek_and_disk_without_header_are_refused() {
    let dek = Dek::generate().unwrap();
    for kind in [RecipientKind::Wrapped, RecipientKind::InKms, RecipientKind::Recovery] {
        let refused = seal_disk(&new(1), &dek, &kek(1), kind, &provider());
        assert!(matches!(refused, Err(WrapError::Unwritable { .. })), "{kind:?}");
    }
    let bad = NewDiskRecord { header: HeaderKind::None, ..new(1) };
    let refused = seal_disk(&bad, &dek, &kek(1), RecipientKind::Native, &provider());
    assert!(matches!(refused, Err(WrapError::Unwritable { .. })));
}

#[test]
fn wrapped_per_vm_kek_of_the_wrong_shape_is_refused() {
    let dek = Dek::generate().unwrap();
    let good =
        WrappedKek { wrapping_key: b"w".to_vec(), algorithm: 1, iv: vec![0; 12], wrapped: vec![0; 48] };
    let kwp = WrappedKek { algorithm: 2, iv: vec![], wrapped: vec![0; 40], ..good.clone() };
    let seal = |wrapped: &WrappedKek| {
        let wrapping = Wrapping::InKms { kek: &kek(1), wrapped: wrapped.clone() };
        seal_disk_with(&new(1), &dek, &wrapping, &provider(), Freshness::random().unwrap())
    };
    for wrapped in [&good, &kwp] {
        let record = seal(wrapped).unwrap();
        let record = KeyRecord::decode(&record.encode()).unwrap();
        assert_eq!(
            open_disk(&record, None, None, &kek(1), &provider()).unwrap().under().kind,
            RecipientKind::InKms
        );
    }
    for bad in [
        WrappedKek { algorithm: 3, ..good.clone() },
        WrappedKek { iv: vec![0; 16], ..good.clone() },
        WrappedKek { iv: vec![0; 300], ..good.clone() },
        WrappedKek { wrapped: vec![0; 32], ..good.clone() },
        WrappedKek { wrapped: vec![0; 70_000], ..good.clone() },
        WrappedKek { wrapping_key: vec![], ..good.clone() },
        WrappedKek { wrapping_key: vec![1; 70_000], ..good.clone() },
        WrappedKek { wrapped: vec![0; 48], ..kwp },
    ] {
        assert!(matches!(seal(&bad), Err(WrapError::Unwritable { .. })), "{bad:?}");
    }
}

#[test]
fn recovery_key_opens_disk_and_home_and_another_one_does_not() {
    let dek = Dek::generate().unwrap();
    let record = sealed(1, &dek, &kek(1));
    let opened = open_disk(&record, None, None, &kek(1), &provider()).unwrap();
    let private = SecretBytes::take_from(&mut { *b"VMSEAL-TEST-SECRET-recovery-key-" });
    let public = SessionKey::from_private(SecretBytes::take_from(&mut { *private.expose() })).public();
    let (escrow, id): (ProviderId, _) =
        ("escrow".parse().unwrap(), KekId::from_bytes(b"safe".to_vec()).unwrap());
    let wrapping = || Wrapping::Recovery { public: &public, id: id.clone() };
    let both = add_recipient_with(&record, &opened, &wrapping(), &escrow).unwrap();
    let both = KeyRecord::decode(&both.encode()).unwrap();
    let by = |private: &SecretBytes<32>| open_disk_by_recovery(&both, None, None, private, &id, &escrow);
    assert_eq!(by(&private).unwrap().payload.payload(), dek.payload());
    assert!(matches!(by(&SecretBytes::random().unwrap()), Err(WrapError::Integrity { .. })));
    // A KEK does not open what is sealed to a recovery key of the same name, nor the other way round.
    let impostor = Kek::new(id.clone(), SecretBytes::random().unwrap());
    assert!(matches!(open_disk(&both, None, None, &impostor, &escrow), Err(WrapError::NotARecipient { .. })));
    let refused = open_disk_by_recovery(&both, None, None, &private, kek(1).id(), &provider());
    assert!(matches!(refused, Err(WrapError::NotARecipient { .. })));

    let key = HomeKey::generate().unwrap();
    let new = NewHomeRecord {
        record: RecordId::from_bytes([9; 16]),
        vm: VmId::from_bytes([0xa1; 16]),
        created_ms: 0,
        state: RecordState::default(),
    };
    let home = seal_home(&new, &key, &wrapping(), &escrow, Freshness::random().unwrap()).unwrap();
    let opened = open_home_by_recovery(&home, Some(new.vm), &private, &id, &escrow).unwrap();
    assert_eq!(opened.payload.payload(), key.payload());
    let zero = Wrapping::Recovery { public: &[0; 32], id: id.clone() };
    let refused = seal_home(&new, &key, &zero, &escrow, Freshness::random().unwrap());
    assert!(matches!(refused, Err(WrapError::RecoveryKey)));
}

#[test]
fn home_record_does_not_open_as_a_disk_nor_a_disk_record_as_a_home() {
    let key = HomeKey::generate().unwrap();
    let new_home = NewHomeRecord {
        record: RecordId::from_bytes([9; 16]),
        vm: VmId::from_bytes([0xa1; 16]),
        created_ms: 0,
        state: RecordState::default(),
    };
    let fresh = Freshness::random().unwrap();
    let home = seal_home(&new_home, &key, &Wrapping::Native(&kek(1)), &provider(), fresh).unwrap();
    assert!(open_home(&home, None, &kek(1), &provider()).is_ok());
    assert!(matches!(
        open_disk(&home, None, None, &kek(1), &provider()),
        Err(WrapError::OtherSubject { mismatch: Mismatch::Role { .. }, .. })
    ));
    let disk = sealed(1, &Dek::generate().unwrap(), &kek(1));
    assert!(matches!(
        open_home(&disk, None, &kek(1), &provider()),
        Err(WrapError::OtherSubject { mismatch: Mismatch::Role { .. }, .. })
    ));
}

#[test]
fn errors_and_debug_texts_show_ids_and_no_key() {
    let dek = Dek::from_payload_slice(&b"VMSEAL-TEST-SECRET".repeat(6)[..96]).unwrap();
    let record = sealed(1, &dek, &kek(1));
    let opened = open_disk(&record, None, None, &kek(1), &provider()).unwrap();
    let impostor = Kek::new(kek(1).id().clone(), SecretBytes::random().unwrap());
    let error = open_disk(&record, None, None, &impostor, &provider()).unwrap_err();
    let text = format!("{opened:?} {dek:?} {:?} {impostor:?} {error:?} {error}", kek(1));
    assert!(
        text.contains(&record.head.record.to_string()) && text.contains(&kek(1).id().to_string()),
        "{text}"
    );
    let mark = "VMSEAL-TEST-SECRET";
    let hex: String = mark.bytes().map(|b| format!("{b:02x}")).collect();
    let list = format!("{:?}", &mark.as_bytes()[..6]);
    for shown in [mark, &hex, list.trim_matches(['[', ']'])] {
        assert!(!text.contains(shown), "{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn restated_record_keeps_its_head_and_recipients_and_opens(
        epoch in any::<u64>(), stored_bytes in any::<u64>(), presented_bytes in any::<u64>(),
    ) {
        let dek = Dek::generate().unwrap();
        let record = sealed(1, &dek, &kek(1));
        let state = RecordState { epoch, stored_bytes, presented_bytes };
        let changed = restate(&record, dek.payload(), state).unwrap();
        prop_assert_eq!(&changed.head, &record.head);
        prop_assert_eq!(&changed.recipients, &record.recipients);
        prop_assert_eq!(changed.state, state);
        let opened = open_disk(&changed, None, None, &kek(1), &provider()).unwrap();
        prop_assert_eq!(opened.state(), &state);
        // The state alone, or the MAC alone, of another version of the record is refused.
        if state != record.state {
            let mut mixed = record.clone();
            mixed.state = state;
            prop_assert!(open_disk(&mixed, None, None, &kek(1), &provider()).is_err());
            prop_assert!(restate(&mixed, dek.payload(), state).is_err());
        }
        prop_assert!(restate(&record, &[0; 96], state).is_err());
        prop_assert!(restate(&record, &dek.payload()[..95], state).is_err());
    }

    #[test]
    fn record_spliced_with_another_is_refused(at in 0usize..341, len in 1usize..200) {
        let dek = Dek::generate().unwrap();
        let (a, b) = (sealed(1, &dek, &kek(1)), sealed(1, &dek, &kek(1)));
        let (whole, other) = (a.encode(), b.encode());
        let end = (at + len).min(whole.len());
        let mut mixed = whole.clone();
        if at < end {
            mixed[at..end].copy_from_slice(&other[at..end]);
        }
        if let Ok(record) = KeyRecord::decode(&mixed) {
            let opened = open_disk(&record, None, None, &kek(1), &provider());
            prop_assert_eq!(opened.is_ok(), mixed == whole || mixed == other);
        }
    }
}
