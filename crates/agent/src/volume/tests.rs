use std::{os::unix::fs::FileExt, process::Command};

use vmseal_keys::{NewDiskRecord, random_bytes, restate, seal_disk};
use vmseal_luks::{HEADER_BYTES, OWNER_BLOCK_OFFSET, OWNER_COPY_OFFSET, OwnerState};
use vmseal_model::{
    id::{KekId, KeyUuid, RecordId},
    record::{RecipientKind, RecordState, UnitBytes},
};

use super::*;
use crate::{
    causes::causes,
    new_volume::{Ownership, create_exclusive, fill},
    scratch::Scratch,
};

const STORED: u64 = 1 << 20;

struct Made {
    scratch: Scratch,
    path: PathBuf,
    record: KeyRecord,
    dek: Dek,
}

fn kek() -> vmseal_keys::Kek {
    let id = KekId::native(1, KeyUuid::from_bytes([3; 16]));
    vmseal_keys::Kek::new(id, vmseal_keys::SecretBytes::take_from(&mut [9; 32]))
}

fn record_of(vm: u8, dek: &Dek, stored: u64, presented: u64) -> KeyRecord {
    let new = NewDiskRecord {
        record: RecordId::from_random(random_bytes().unwrap()),
        vm: VmId::from_bytes([vm; 16]),
        disk: DiskId::from_random(random_bytes().unwrap()),
        header: HeaderKind::Attached,
        unit: UnitBytes::B512,
        payload_offset: HEADER_BYTES,
        created_ms: 1,
        state: RecordState { epoch: 1, stored_bytes: stored, presented_bytes: presented },
    };
    seal_disk(&new, dek, &kek(), RecipientKind::Native, &"main".parse().unwrap()).unwrap()
}

fn made_with(stored: u64, presented: u64) -> Made {
    let scratch = Scratch::new();
    let path = scratch.path().join("x.img.vmseal");
    let dek = Dek::generate().unwrap();
    let record = record_of(1, &dek, stored, presented);
    let file = create_exclusive(&path, Ownership::default()).unwrap();
    fill(&file, &dek, &record).unwrap();
    Made { scratch, path, record, dek }
}

fn made() -> Made {
    made_with(STORED, STORED)
}

impl Made {
    fn open(&self) -> Result<OpenVolume, VolumeError> {
        open_locked(&self.path, None, &self.record, &self.dek, "vda", 2, false)
    }

    fn file(&self) -> File {
        File::options().read(true).write(true).open(&self.path).unwrap()
    }
}

#[test]
fn new_volume_opens_with_its_record_and_key() {
    let made = made();
    let open = made.open().unwrap();
    assert_eq!(open.stored_bytes, STORED);
    assert_eq!(
        open.setup,
        DiskSetup {
            disk: made.record.head.disk(),
            target: "vda".into(),
            key_slot: 2,
            key_check: hex(&made.record.head.key_check),
            unit_bytes: 512,
            payload_offset: HEADER_BYTES,
            detached_header: false,
            presented_bytes: STORED,
            grows: false,
            read_only: false,
            discard: true,
            export: ExportKind::default(),
            serial: String::new(),
        }
    );
    assert_eq!(std::fs::metadata(&made.path).unwrap().len(), HEADER_BYTES + STORED);
    assert_eq!(token_record(&made.path, None, made.record.head.disk()), Some(made.record.encode()));
    assert_eq!(token_record(&made.path, None, DiskId::from_bytes([7; 16])), None);
}

#[test]
fn stock_cryptsetup_reads_the_header() {
    let made = made();
    let dump =
        Command::new("cryptsetup").arg("luksDump").arg(&made.path).output().expect("cryptsetup is installed");
    let text = String::from_utf8_lossy(&dump.stdout);
    assert!(dump.status.success(), "{dump:?}");
    assert!(
        text.contains(&made.record.head.disk().to_string()) && text.contains("aes-xts-plain64"),
        "{text}"
    );
}

#[test]
fn second_opening_is_refused_until_the_first_is_gone() {
    let made = made();
    let first = made.open().unwrap();
    let error = made.open().unwrap_err();
    assert_eq!(error.code(), Code::VolumeInUse);
    let text = crate::causes::causes(&error);
    assert!(text.contains("in use by another process") && text.contains("x.img.vmseal"), "{text}");
    drop(first);
    made.open().unwrap();
}

#[test]
fn qemu_img_refuses_an_open_volume() {
    let made = made();
    let read = || {
        let copy = made.scratch.path().join("copy");
        let convert = ["convert", "-f", "raw", "-O", "raw"];
        Command::new("qemu-img")
            .args(convert)
            .arg(&made.path)
            .arg(copy)
            .output()
            .expect("qemu-img is installed")
    };
    let open = made.open().unwrap();
    let refused = read();
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("lock"), "{refused:?}");
    drop(open);
    assert!(read().status.success());
}

#[test]
fn truncated_volume_is_refused_and_a_longer_one_is_not() {
    let made = made();
    made.file().set_len(HEADER_BYTES + STORED - 512).unwrap();
    let error = made.open().unwrap_err();
    assert!(
        matches!(error, VolumeError::Truncated { stored, expected: STORED, .. } if stored == STORED - 512)
    );
    made.file().set_len(HEADER_BYTES - 1).unwrap();
    assert_eq!(made.open().unwrap_err().code(), Code::Integrity);
    made.file().set_len(HEADER_BYTES + STORED + 700).unwrap();
    assert_eq!(made.open().unwrap().stored_bytes, STORED);
}

#[test]
fn growing_volume_may_be_longer_than_its_record_and_never_shorter() {
    let made = made_with(STORED, 8 * STORED);
    assert!(made.open().unwrap().setup.grows);
    made.file().set_len(HEADER_BYTES + 3 * STORED + 100).unwrap();
    assert_eq!(made.open().unwrap().stored_bytes, 3 * STORED);
    made.file().set_len(HEADER_BYTES + STORED - 1).unwrap();
    assert!(matches!(made.open(), Err(VolumeError::Truncated { .. })));
}

#[test]
fn record_or_key_of_another_disk_is_refused() {
    let (a, b) = (made(), made());
    let open =
        |path: &Path, record: &KeyRecord, dek: &Dek| open_locked(path, None, record, dek, "vda", 0, false);
    // The other disk's record and key together: the header has another id.
    assert!(matches!(
        open(&a.path, &b.record, &b.dek),
        Err(VolumeError::Mismatch { what: "the disk id", .. })
    ));
    // The right record with another key, and a record that claims this disk for another key or VM.
    assert!(matches!(open(&a.path, &a.record, &b.dek), Err(VolumeError::WrongKey { .. })));
    let mut claims = b.record.clone();
    claims.head.subject = a.record.head.subject;
    for dek in [&a.dek, &b.dek] {
        assert!(matches!(open(&a.path, &claims, dek), Err(VolumeError::WrongKey { .. })));
    }
    let mut other_vm = a.record.clone();
    other_vm.head.vm = VmId::from_bytes([0xee; 16]);
    assert!(matches!(open(&a.path, &other_vm, &a.dek), Err(VolumeError::WrongKey { .. })));
    a.open().unwrap();
}

#[test]
fn volume_made_with_a_key_known_to_somebody_else_is_refused() {
    let (made, known) = (made(), Dek::generate().unwrap());
    // The attacker knows the ids, which are no secret, and puts a volume of his own in the place.
    std::fs::remove_file(&made.path).unwrap();
    let file = create_exclusive(&made.path, Ownership::default()).unwrap();
    fill(&file, &known, &made.record).unwrap();
    assert!(matches!(made.open(), Err(VolumeError::WrongKey { .. })));
}

#[test]
fn header_decides_nothing() {
    type Change = fn(&mut vmseal_model::record::Subject);
    let cases: [(Change, &str); 2] = [
        (|s| *s = with(s, UnitBytes::B4096, HEADER_BYTES), "data units"),
        (|s| *s = with(s, UnitBytes::B512, 32 << 20), "its data"),
    ];
    for (change, expected) in cases {
        let mut made = made();
        change(&mut made.record.head.subject);
        let text = made.open().unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }
    fn with(subject: &Subject, unit: UnitBytes, payload_offset: u64) -> Subject {
        let Subject::Disk { disk, header, .. } = *subject else { panic!("a disk") };
        Subject::Disk { disk, header, unit, payload_offset }
    }
    let mut detached = made();
    let Subject::Disk { header, .. } = &mut detached.record.head.subject else { panic!("a disk") };
    *header = HeaderKind::Detached;
    assert!(matches!(detached.open(), Err(VolumeError::OtherKind { .. })));
}

/// Changes text of both copies of a header and makes their checksums right again.
fn edit_header(made: &Made, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let file = made.file();
    for at in [0u64, 64 << 10] {
        let mut copy = vec![0; 64 << 10];
        file.read_exact_at(&mut copy, at).unwrap();
        let found: Vec<_> =
            (0..copy.len() - from.len()).filter(|i| copy[*i..].starts_with(from.as_bytes())).collect();
        assert!(!found.is_empty(), "{from}");
        found.iter().for_each(|i| copy[*i..i + to.len()].copy_from_slice(to.as_bytes()));
        // Checksum: SHA-256 at 0x1c0 of binary header, with the field zero, and JSON area.
        copy[0x1c0..0x200].fill(0);
        let sum = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &copy);
        copy[0x1c0..0x1e0].copy_from_slice(sum.as_ref());
        file.write_all_at(&copy, at).unwrap();
    }
}

#[test]
fn null_cipher_is_refused_although_the_checksums_are_right() {
    for (cipher, accepted) in
        [("aes-xts-plain64", true), ("cipher_null-ecb", false), ("aes-cbc-plain64", false)]
    {
        let made = made();
        edit_header(&made, "aes-xts-plain64", cipher);
        match made.open() {
            Ok(_) => assert!(accepted, "{cipher}"),
            Err(error) => {
                assert!(!accepted, "{error:?}");
                assert!(
                    matches!(error, VolumeError::Header { source: LuksError::Refused(_), .. }),
                    "{error:?}"
                );
                assert_eq!(error.code(), Code::Integrity);
            }
        }
    }
}

#[test]
fn damaged_copy_is_repaired_from_the_other_and_two_are_refused() {
    let made = made();
    made.file().write_all_at(&[0xff; 512], 4096).unwrap();
    open_locked(&made.path, None, &made.record, &made.dek, "vda", 0, true).unwrap();
    assert!(Header::read(&made.file(), false).unwrap().needs_repair(), "reading repairs nothing");
    made.open().unwrap();
    assert!(!Header::read(&made.file(), false).unwrap().needs_repair());
    made.file().write_all_at(&[0xff; 512], 4096).unwrap();
    made.file().write_all_at(&[0xff; 512], (64 << 10) + 4096).unwrap();
    assert!(matches!(made.open(), Err(VolumeError::Header { .. })));
}

#[test]
fn what_is_no_regular_file_is_refused() {
    let made = made();
    let link = made.scratch.path().join("link");
    std::os::unix::fs::symlink(&made.path, &link).unwrap();
    let open = |path: &Path| open_locked(path, None, &made.record, &made.dek, "vda", 0, false).unwrap_err();
    for path in [link.as_path(), made.scratch.path(), Path::new("/dev/null")] {
        assert!(matches!(open(path), VolumeError::NotRegular { .. }), "{}", path.display());
    }
    assert_eq!(open(&made.scratch.path().join("missing")).code(), Code::NotFound);
}

#[test]
fn newer_record_takes_the_place_of_the_old_one_in_the_header() {
    let made = made();
    let state = RecordState { epoch: 2, ..made.record.state };
    let newer = restate(&made.record, made.dek.payload(), state).unwrap();
    let disk = made.record.head.disk();
    write_token_record(&made.path, None, disk, &newer.encode()).unwrap();
    assert_eq!(token_record(&made.path, None, disk), Some(newer.encode()));
    // A record of something else that is in the token stays.
    let foreign = record_of(1, &made.dek, 0, 0).encode();
    let both = VmsealToken { records: vec![newer.encode(), foreign.clone()] };
    Header::write_token(&made.file(), false, &both).unwrap();
    write_token_record(&made.path, None, disk, &made.record.encode()).unwrap();
    let kept = Header::read(&made.file(), false).unwrap().token().unwrap().records;
    assert_eq!(kept, [made.record.encode(), foreign]);
    let wrong = write_token_record(&made.path, None, DiskId::from_bytes([1; 16]), &newer.encode());
    assert!(matches!(wrong, Err(VolumeError::Mismatch { .. })));
}

#[test]
fn owner_block_counts_who_held_it() {
    let made = made();
    let host = HostId::from_bytes([5; 16]);
    let mut open = made.open().unwrap();
    let says =
        |open: &OpenVolume| open.owner().map(|block| (block.state, block.generation, block.host)).unwrap();
    assert_eq!(open.owner().unwrap(), OwnerBlock::NEVER_HELD);
    open.hold(Some(host)).unwrap();
    assert_eq!(says(&open), (OwnerState::Held, 1, host));
    open.release().unwrap();
    assert_eq!(says(&open), (OwnerState::Free, 2, host));
    // A host without an id writes nothing.
    open.hold(None).unwrap();
    assert_eq!(says(&open), (OwnerState::Free, 2, host));
    // One copy is enough, and the next write makes two of it.
    open.data.write_all_at(&[1; 64], OWNER_BLOCK_OFFSET).unwrap();
    open.hold(Some(host)).unwrap();
    assert_eq!(says(&open), (OwnerState::Held, 3, host));
    open.data.write_all_at(&[1; 64], OWNER_COPY_OFFSET).unwrap();
    assert_eq!(says(&open), (OwnerState::Held, 3, host));
}

#[test]
fn volume_is_not_started_while_it_is_on_its_way_to_another_host_or_may_be() {
    let made = made();
    let [here, there, third] = [5, 6, 7].map(|byte| HostId::from_bytes([byte; 16]));
    let mut open = made.open().unwrap();
    OwnerBlock::NEVER_HELD.taken_by(there).handed_over(there, third).write(&open.data).unwrap();
    for host in [Some(here), None] {
        let error = open.hold(host).unwrap_err();
        assert_eq!(error.code(), Code::VolumeInUse);
        let text = causes(&error);
        assert!(text.contains("another host") && text.contains(&third.to_string()), "{text}");
    }
    // Its receiver may, and who gave it away; and whoever has the lock of one that ended.
    for host in [third, there, here] {
        open.hold(Some(host)).unwrap();
    }
    for place in [OWNER_BLOCK_OFFSET, OWNER_COPY_OFFSET] {
        open.data.write_all_at(&[1; 64], place).unwrap();
    }
    let error = open.hold(Some(here)).unwrap_err();
    assert_eq!(error.code(), Code::Integrity);
    assert!(error.to_string().contains("vm repair"), "{error}");
    assert!(open.release().is_err());
}

#[test]
fn running_guest_goes_on_only_if_no_other_host_had_its_volume_since() {
    let made = made();
    let [here, there] = [5, 6].map(|byte| Some(HostId::from_bytes([byte; 16])));
    let mut open = made.open().unwrap();
    open.hold(here).unwrap();
    open.hold_again(here).unwrap();
    // The lock was free for a while, and that host shut the VM down in order.
    open.hold(there).unwrap();
    open.release().unwrap();
    let before = open.owner().unwrap();
    let error = open.hold_again(here).unwrap_err();
    assert_eq!(error.code(), Code::Conflict);
    assert!(causes(&error).contains("virsh destroy"), "{}", causes(&error));
    assert_eq!(open.owner().unwrap(), before);
    open.hold(here).unwrap();
}

#[test]
fn read_only_opening_shares_with_readers_and_keeps_writers_out() {
    let made = made();
    let read = || open_locked(&made.path, None, &made.record, &made.dek, "vda", 0, true);
    let first = read().unwrap();
    assert!(first.setup.read_only && !first.setup.discard);
    let second = read().unwrap();
    assert_eq!(made.open().unwrap_err().code(), Code::VolumeInUse);
    drop((first, second));
    let writer = made.open().unwrap();
    assert_eq!(read().unwrap_err().code(), Code::VolumeInUse);
    drop(writer);
}

#[test]
fn owner_block_is_written_although_the_data_is_open_for_direct_io() {
    let made = made();
    let mut open = made.open().unwrap();
    // As a worker does it with the description it was handed.
    // SAFETY: F_SETFL on a descriptor that is open; it has no other flags that could be lost.
    let set = unsafe { libc::fcntl(open.data.as_raw_fd(), libc::F_SETFL, libc::O_DIRECT) };
    if set != 0 {
        // Not every file system has it.
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EINVAL));
    }
    open.hold(Some(HostId::from_bytes([7; 16]))).unwrap();
    assert_eq!(open.owner().unwrap().generation, 1);
    open.release().unwrap();
    assert_eq!(OwnerBlock::read(&made.file()).unwrap(), open.owner().unwrap());
    // The lock was not lost by closing the other description.
    assert!(matches!(made.open().unwrap_err(), VolumeError::Locked { .. }));
}
