//! Which copy of a disk's key record is used: candidates from wherever one lies in, the newest that verifies out.
//!
//! A copy's word counts for nothing until its MAC verified: the epoch only orders the tries. No I/O; where keys come
//! from is the caller's closure. Metadata in particular is no authority, since libvirt itself brings old metadata back.

use std::{fmt, sync::Arc};

use vmseal_keys::{Dek, Kek, open_disk};
use vmseal_model::{
    id::{DiskId, KekId, ProviderId, VmId},
    record::{KeyRecord, RecipientKind},
    refusal::Code,
};

use crate::{causes::causes, ports::KeyMissing, tasks::Refusal};

/// Where a copy lay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The domain's `<metadata>`.
    Metadata,
    /// The LUKS2 header of the volume.
    Token,
    /// This agent's store.
    Store,
    /// The server.
    Server,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Metadata => "the domain's metadata",
            Self::Token => "the LUKS2 header",
            Self::Store => "the agent's store",
            Self::Server => "the server",
        })
    }
}

/// One copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Where it lay.
    pub origin: Origin,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// The copy that is used.
pub struct Chosen {
    /// The record, verified.
    pub record: KeyRecord,
    /// Its key.
    pub dek: Dek,
    /// Copies that say something else: older, of another disk, or damaged.
    pub stale: Vec<Origin>,
}

/// Why one copy does not open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unopened {
    /// None of its KEKs can be had now.
    Missing(KeyMissing),
    /// It does not verify, or is for nobody here; in words.
    Refused(String),
}

/// Why no copy is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoChoice {
    /// One might do, but its key is missing.
    Missing(KeyMissing),
    /// None will do.
    Refused(Refusal),
}

/// Tries the copies, the newest first; never one below `floor`.
///
/// # Errors
///
/// [`NoChoice::Missing`] if a copy that is new enough could not be tried for want of a key; else
/// [`NoChoice::Refused`], which says whether copies are missing, damaged or too old.
pub fn choose(
    vm: VmId,
    disk: DiskId,
    candidates: &[Candidate],
    floor: u64,
    mut open: impl FnMut(&KeyRecord) -> Result<Dek, Unopened>,
) -> Result<Chosen, NoChoice> {
    let mut unreadable = Vec::new();
    let mut copies: Vec<(KeyRecord, &Candidate)> = Vec::new();
    for candidate in candidates {
        match readable(vm, disk, &candidate.bytes) {
            Ok(record) => copies.push((record, candidate)),
            Err(reason) => unreadable.push(format!("{}: {reason}", candidate.origin)),
        }
    }
    // Stable: of equal ones the first named is tried, and the others are not tried again.
    copies.sort_by_key(|(record, _)| std::cmp::Reverse(record.state.epoch));
    copies.dedup_by(|(_, later), (_, kept)| later.bytes == kept.bytes);

    let newest = copies.first().map(|(record, _)| record.state.epoch);
    let (mut missing, mut untried, mut refused) = (None, Vec::new(), unreadable);
    for (record, candidate) in copies.into_iter().take_while(|(record, _)| record.state.epoch >= floor) {
        match open(&record) {
            Ok(dek) => {
                // A copy whose key is missing may be right.
                let differs =
                    |other: &&Candidate| other.bytes != candidate.bytes && !untried.contains(&other.bytes);
                let stale = candidates.iter().filter(differs).map(|other| other.origin).collect();
                return Ok(Chosen { record, dek, stale });
            }
            Err(Unopened::Missing(why)) => {
                untried.push(candidate.bytes.clone());
                missing = missing.or(Some(why));
            }
            Err(Unopened::Refused(reason)) => refused.push(format!("{}: {reason}", candidate.origin)),
        }
    }
    if let Some(missing) = missing {
        return Err(NoChoice::Missing(missing));
    }
    Err(NoChoice::Refused(match newest {
        None if candidates.is_empty() => {
            Refusal::new(Code::Integrity, format!("no copy of the key record of disk {disk} is to be found"))
                .hint("connect the host to the server, or restore the volume's LUKS2 header from a backup")
        }
        Some(newest) if refused.is_empty() || newest < floor => Refusal::new(
            Code::EpochTooOld,
            format!(
                "every copy of the key record of disk {disk} is older than one seen before: the newest has epoch \
                 {newest}, below {floor} none is accepted"
            ),
        )
        .hint("the volume or its definition was rolled back; put back the newer one, or restore through vmseal"),
        _ => Refusal::new(
            Code::Integrity,
            format!("no copy of the key record of disk {disk} verifies ({})", refused.join("; ")),
        )
        .hint("connect the host to the server, which may have a good copy"),
    }))
}

/// Opens one record with whichever of its KEKs can be had; `kek` is asked for each that this version can use.
///
/// # Errors
///
/// [`Unopened::Missing`] if one that was not to be had might open it.
pub fn open_record(
    vm: VmId,
    disk: DiskId,
    record: &KeyRecord,
    mut kek: impl FnMut(&ProviderId, &KekId) -> Result<Arc<Kek>, KeyMissing>,
) -> Result<Dek, Unopened> {
    let usable = |kind| matches!(kind, RecipientKind::Kek | RecipientKind::Native);
    let (mut missing, mut refused) = (None, None);
    for id in record.recipients.iter().map(|r| &r.id).filter(|id| usable(id.kind)) {
        match kek(&id.provider, &id.kek) {
            Ok(kek) => match open_disk(record, Some(vm), Some(disk), &kek, &id.provider) {
                Ok(opened) => return Ok(opened.payload),
                Err(error) => refused = Some(causes(&error)),
            },
            Err(why) => missing = missing.or(Some(why)),
        }
    }
    // A KEK that opens nothing here says that the record is bad, whatever the others might say.
    match (refused, missing) {
        (Some(reason), _) => Err(Unopened::Refused(reason)),
        (None, Some(missing)) => Err(Unopened::Missing(missing)),
        (None, None) => {
            Err(Unopened::Refused("it names no key provider that this version can ask".to_owned()))
        }
    }
}

/// A copy that is a record of this disk of this VM.
fn readable(vm: VmId, disk: DiskId, bytes: &[u8]) -> Result<KeyRecord, String> {
    let record = KeyRecord::decode(bytes).map_err(|e| e.to_string())?;
    if record.head.vm != vm {
        return Err(format!("it belongs to VM {}", record.head.vm));
    }
    if record.head.disk() != disk {
        return Err(format!("it belongs to disk {}", record.head.disk()));
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;
    use vmseal_keys::{NewDiskRecord, SecretBytes, add_recipient, open_disk, restate, seal_disk};
    use vmseal_model::{
        id::RecordId,
        record::{HeaderKind, RecordState, UnitBytes},
    };

    use super::*;

    const VM: VmId = VmId::from_bytes([1; 16]);
    const DISK: DiskId = DiskId::from_bytes([2; 16]);

    struct Keys {
        dek: Dek,
        kek: Arc<Kek>,
        provider: ProviderId,
        /// Epochs tried, in order.
        tried: RefCell<Vec<u64>>,
    }

    impl Keys {
        fn new() -> Self {
            Self {
                dek: Dek::generate().unwrap(),
                kek: Arc::new(Kek::new(
                    KekId::from_bytes(b"17".to_vec()).unwrap(),
                    SecretBytes::random().unwrap(),
                )),
                provider: "main".parse().unwrap(),
                tried: RefCell::default(),
            }
        }

        fn record(&self, vm: VmId, disk: DiskId, epoch: u64) -> KeyRecord {
            let new = NewDiskRecord {
                record: RecordId::from_bytes([3; 16]),
                vm,
                disk,
                header: HeaderKind::Attached,
                unit: UnitBytes::B512,
                payload_offset: 16 << 20,
                created_ms: 1,
                state: RecordState { epoch, stored_bytes: 512, presented_bytes: 512 },
            };
            seal_disk(&new, &self.dek, &self.kek, RecipientKind::Kek, &self.provider).unwrap()
        }

        fn open(&self, record: &KeyRecord) -> Result<Dek, Unopened> {
            self.tried.borrow_mut().push(record.state.epoch);
            open_record(VM, DISK, record, |provider, kek| {
                assert_eq!((provider, kek), (&self.provider, self.kek.id()));
                Ok(Arc::clone(&self.kek))
            })
        }

        fn choose(&self, candidates: &[Candidate], floor: u64) -> Result<Chosen, NoChoice> {
            choose(VM, DISK, candidates, floor, |record| self.open(record))
        }
    }

    fn from(origin: Origin, record: &KeyRecord) -> Candidate {
        Candidate { origin, bytes: record.encode() }
    }

    fn refusal(result: Result<Chosen, NoChoice>) -> Refusal {
        match result {
            Err(NoChoice::Refused(refusal)) => refusal,
            Err(NoChoice::Missing(missing)) => panic!("{missing}"),
            Ok(chosen) => panic!("epoch {} was taken", chosen.record.state.epoch),
        }
    }

    #[test]
    fn newest_copy_that_verifies_is_used_and_the_others_are_stale() {
        let keys = Keys::new();
        let old = keys.record(VM, DISK, 3);
        let state = RecordState { epoch: 4, ..old.state };
        let new = restate(&old, keys.dek.payload(), state).unwrap();
        let copies = [from(Origin::Metadata, &old), from(Origin::Token, &new), from(Origin::Store, &new)];
        let chosen = keys.choose(&copies, 4).unwrap();
        assert_eq!((chosen.record.state.epoch, chosen.stale), (4, vec![Origin::Metadata]));
        assert_eq!(*keys.tried.borrow(), [4], "equal copies are tried once");
    }

    #[test]
    fn copy_that_claims_a_high_epoch_and_does_not_verify_is_passed_over() {
        let keys = Keys::new();
        let good = keys.record(VM, DISK, 3);
        let mut forged = good.clone();
        forged.state.epoch = 900;
        let copies = [from(Origin::Metadata, &forged), from(Origin::Store, &good)];
        let chosen = keys.choose(&copies, 3).unwrap();
        assert_eq!((chosen.record.state.epoch, chosen.stale), (3, vec![Origin::Metadata]));
        assert_eq!(refusal(keys.choose(&copies[..1], 3)).code, Code::Integrity);
    }

    #[test]
    fn old_epoch_is_refused_as_such_without_asking_for_a_key() {
        let keys = Keys::new();
        let refused = refusal(keys.choose(&[from(Origin::Metadata, &keys.record(VM, DISK, 3))], 4));
        assert_eq!(refused.code, Code::EpochTooOld);
        assert!(refused.message.contains("epoch 3") && refused.message.contains("below 4"), "{refused:?}");
        assert!(keys.tried.borrow().is_empty());
    }

    #[test]
    fn record_of_another_disk_or_vm_is_refused_by_name() {
        let keys = Keys::new();
        let other = DiskId::from_bytes([9; 16]);
        let swapped = refusal(keys.choose(&[from(Origin::Metadata, &keys.record(VM, other, 3))], 0));
        assert_eq!(swapped.code, Code::Integrity);
        assert!(swapped.message.contains(&other.to_string()), "{swapped:?}");
        let moved = keys.record(VmId::from_bytes([9; 16]), DISK, 3);
        assert_eq!(refusal(keys.choose(&[from(Origin::Token, &moved)], 0)).code, Code::Integrity);
        // A head edited to fit does not verify.
        let mut edited = keys.record(VM, other, 3);
        edited.head = keys.record(VM, DISK, 3).head;
        edited.head.record = RecordId::from_bytes([4; 16]);
        assert_eq!(refusal(keys.choose(&[from(Origin::Token, &edited)], 0)).code, Code::Integrity);
    }

    #[test]
    fn nothing_at_all_is_said_to_be_missing() {
        let refused = refusal(Keys::new().choose(&[], 0));
        assert!(
            refused.message.contains("no copy") && refused.message.contains("to be found"),
            "{refused:?}"
        );
    }

    #[test]
    fn missing_key_is_told_unless_an_older_copy_is_good_enough() {
        let keys = Keys::new();
        let (new, old) = (keys.record(VM, DISK, 5), keys.record(VM, DISK, 4));
        let missing = missing(&"gone".parse().unwrap(), &KekId::from_bytes(b"18".to_vec()).unwrap());
        let open = |record: &KeyRecord| match record.state.epoch {
            5 => Err(Unopened::Missing(missing.clone())),
            _ => keys.open(record),
        };
        let copies = [from(Origin::Token, &new), from(Origin::Store, &old)];
        assert_eq!(choose(VM, DISK, &copies, 4, open).unwrap().record.state.epoch, 4);
        assert_eq!(choose(VM, DISK, &copies, 5, open).err(), Some(NoChoice::Missing(missing.clone())));
    }

    fn missing(provider: &ProviderId, kek: &KekId) -> KeyMissing {
        KeyMissing {
            provider: provider.clone(),
            kek: kek.clone(),
            reason: "destroyed".into(),
            code: Code::KeyMissing,
            since_ms: 1,
        }
    }

    #[test]
    fn any_kek_that_can_be_had_opens_and_one_that_does_not_verify_decides() {
        let keys = Keys::new();
        let record = keys.record(VM, DISK, 3);
        let opened = open_disk(&record, Some(VM), Some(DISK), &keys.kek, &keys.provider).unwrap();
        let other = Kek::new(KekId::from_bytes(b"18".to_vec()).unwrap(), SecretBytes::random().unwrap());
        let spare: ProviderId = "spare".parse().unwrap();
        let record = add_recipient(&record, &opened, &other, RecipientKind::Kek, &spare).unwrap();
        let other = Arc::new(other);
        let with = |first: Option<&Arc<Kek>>, second: Option<&Arc<Kek>>| {
            open_record(VM, DISK, &record, |provider, kek| {
                let had = if *provider == spare { second } else { first };
                had.cloned().ok_or_else(|| missing(provider, kek))
            })
        };
        assert!(with(None, Some(&other)).is_ok_and(|dek| dek.payload() == keys.dek.payload()));
        assert!(with(Some(&keys.kek), None).is_ok());
        assert_eq!(with(None, None).err(), Some(Unopened::Missing(missing(&keys.provider, keys.kek.id()))));
        let wrong = Arc::new(Kek::new(keys.kek.id().clone(), SecretBytes::random().unwrap()));
        assert!(matches!(with(Some(&wrong), None).err(), Some(Unopened::Refused(_))));
        assert!(with(Some(&wrong), Some(&other)).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn what_is_used_verifies_is_the_highest_and_not_below_the_floor(
            copies in proptest::collection::vec((1u64..6, any::<bool>()), 0..6),
            floor in 0u64..6,
        ) {
            let keys = Keys::new();
            let candidates: Vec<Candidate> = copies
                .iter()
                .map(|(epoch, good)| {
                    let mut record = keys.record(VM, DISK, *epoch);
                    if !good {
                        record.mac[0] ^= 1;
                    }
                    from(Origin::Token, &record)
                })
                .collect();
            let best = copies.iter().filter(|(epoch, good)| *good && *epoch >= floor).map(|(epoch, _)| *epoch).max();
            match keys.choose(&candidates, floor) {
                Ok(chosen) => prop_assert_eq!(Some(chosen.record.state.epoch), best),
                Err(_) => prop_assert_eq!(None, best),
            }
        }
    }
}
