//! A value that tells the right key from a wrong one without telling the key.

use vmseal_model::id::{DiskId, VmId};

use crate::derive;

/// The key check of a payload: HKDF-SHA-512 with empty salt and info `key-check`, VM id, disk id.
///
/// For a home the disk id is all zero. It stands in record heads and in control frames, and is no secret.
pub fn key_check(payload: &[u8], vm: VmId, disk: DiskId) -> [u8; 32] {
    let mut out = [0; 32];
    let info = derive::info("key-check", &[&vm.to_bytes(), &disk.to_bytes()]);
    derive::hkdf(payload, &[], &info, &mut out).expect("32 bytes are within what HKDF gives");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_check_depends_on_key_vm_and_disk() {
        let (vm, disk) = (VmId::from_bytes([1; 16]), DiskId::from_bytes([2; 16]));
        let check = key_check(b"VMSEAL-TEST-SECRET", vm, disk);
        assert_eq!(check, key_check(b"VMSEAL-TEST-SECRET", vm, disk));
        assert_ne!(check, key_check(b"VMSEAL-TEST-SECREU", vm, disk));
        assert_ne!(check, key_check(b"VMSEAL-TEST-SECRET", VmId::from_bytes([2; 16]), disk));
        assert_ne!(check, key_check(b"VMSEAL-TEST-SECRET", vm, DiskId::from_bytes([1; 16])));
    }
}
