use super::*;
use crate::scratch::Scratch;

const DOMAIN: DomainUuid = DomainUuid::from_bytes([1; 16]);
const VM: VmId = VmId::from_bytes([2; 16]);

fn disk(n: u8, epoch: u64) -> StoredDisk {
    StoredDisk {
        target: format!("vd{}", char::from(b'a' + n)),
        disk: DiskId::from_bytes([n; 16]),
        source: format!("/x/{n}.img.vmseal"),
        header: None,
        format: InnerFormat::Raw,
        class: DiskClass::Compatible,
        record: vec![n; 300],
        epoch,
        epoch_unverified: false,
        retired: false,
    }
}

fn file_of(scratch: &Scratch) -> PathBuf {
    scratch.path().join("records").join(format!("{VM}.json"))
}

#[test]
fn what_was_put_is_there_after_opening_again() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    store.put_disk(VM, DOMAIN, disk(1, 1)).unwrap();
    store.put_disk(VM, DOMAIN, disk(2, 7)).unwrap();
    store.retire_disk(VM, disk(1, 1).disk).unwrap();

    let again = Store::open(scratch.path()).unwrap();
    assert!(again.damaged().is_empty());
    assert_eq!(again.vms(), store.vms());
    assert_eq!(again.vm_of_domain(DOMAIN), Some(VM));
    assert_eq!(again.domain_of_vm(VM), Some(DOMAIN));
    let (owner, first) = again.disk(DiskId::from_bytes([1; 16])).unwrap();
    assert_eq!((owner, first.retired, first.record), (VM, true, vec![1; 300]));
    assert_eq!(again.disk(DiskId::from_bytes([2; 16])).unwrap().1, disk(2, 7));
}

#[test]
fn epoch_never_goes_down() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    store.put_disk(VM, DOMAIN, disk(1, 5)).unwrap();
    assert!(matches!(
        store.put_disk(VM, DOMAIN, disk(1, 4)),
        Err(StoreError::EpochTooOld { have: 5, given: 4, .. })
    ));
    store.put_disk(VM, DOMAIN, disk(1, 6)).unwrap();
    assert_eq!(store.disk(disk(1, 0).disk).unwrap().1.epoch, 6);
}

#[test]
fn one_uuid_is_one_vm_and_one_disk_has_one_owner() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    store.put_disk(VM, DOMAIN, disk(1, 1)).unwrap();
    let other = VmId::from_bytes([9; 16]);
    assert!(matches!(store.bind(other, DOMAIN), Err(StoreError::OtherDomain { owner: VM, .. })));
    let elsewhere = DomainUuid::from_bytes([8; 16]);
    assert!(matches!(
        store.put_disk(other, elsewhere, disk(1, 1)),
        Err(StoreError::OtherVm { owner: VM, .. })
    ));
    // Adopting: the VM moves to another UUID.
    store.bind(VM, elsewhere).unwrap();
    assert_eq!(store.vm_of_domain(DOMAIN), None);
    store.bind(other, DOMAIN).unwrap();
}

#[test]
fn any_flipped_byte_is_found_and_the_file_is_named() {
    let scratch = Scratch::new();
    Store::open(scratch.path()).unwrap().put_disk(VM, DOMAIN, disk(1, 1)).unwrap();
    let path = file_of(&scratch);
    let good = fs::read(&path).unwrap();
    for at in (0..good.len()).filter(|at| !good[*at].is_ascii_whitespace()) {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&path, &bad).unwrap();
        let store = Store::open(scratch.path()).unwrap();
        assert_eq!(store.vms(), [], "byte {at} flipped");
        let text = store.damaged()[0].to_string();
        assert!(text.contains(path.to_str().unwrap()) && text.contains("LUKS2 headers"), "{text}");
    }
}

#[test]
fn damaged_file_harms_no_other_vm_and_is_put_aside_not_overwritten() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    store.put_disk(VM, DOMAIN, disk(1, 1)).unwrap();
    let other = VmId::from_bytes([9; 16]);
    store.put_disk(other, DomainUuid::from_bytes([8; 16]), disk(2, 1)).unwrap();
    fs::write(file_of(&scratch), "{").unwrap();

    let store = Store::open(scratch.path()).unwrap();
    assert_eq!(store.vms().len(), 1);
    store.put_disk(VM, DOMAIN, disk(3, 1)).unwrap();
    let aside = scratch.path().join("records").join(format!("{VM}.json.damaged"));
    assert_eq!(fs::read_to_string(aside).unwrap(), "{");
    assert_eq!(Store::open(scratch.path()).unwrap().vms().len(), 2);
}

#[test]
fn half_a_write_is_as_if_it_had_not_begun() {
    let scratch = Scratch::new();
    Store::open(scratch.path()).unwrap().put_disk(VM, DOMAIN, disk(1, 1)).unwrap();
    let tmp = scratch.path().join("records").join(format!("{VM}.tmp"));
    fs::write(&tmp, "{\"version\":1,").unwrap();
    let store = Store::open(scratch.path()).unwrap();
    assert_eq!(store.vm(VM).unwrap().disks, [disk(1, 1)]);
    assert!(store.damaged().is_empty() && !tmp.exists());
}

#[test]
fn write_that_fails_leaves_the_store_as_it_was() {
    let scratch = Scratch::new();
    let store = Store::open(scratch.path()).unwrap();
    store.put_disk(VM, DOMAIN, disk(1, 1)).unwrap();
    // A directory of the temporary file's name: opening it for writing fails, also for root.
    fs::create_dir(scratch.path().join("records").join(format!("{VM}.tmp"))).unwrap();
    assert!(matches!(store.put_disk(VM, DOMAIN, disk(1, 2)), Err(StoreError::Io { action: "write", .. })));
    assert_eq!(store.disk(disk(1, 0).disk).unwrap().1.epoch, 1);
}

#[test]
fn file_is_for_root_alone() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new();
    Store::open(scratch.path()).unwrap().put_disk(VM, DOMAIN, disk(1, 1)).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&file_of(&scratch)), 0o600);
    assert_eq!(mode(&scratch.path().join("records")), 0o700);
}
