//! A volume in a test store: made with its header and its record, and read by other means than the disk process's.
//!
//! Its key never leaves the test: it protects stamps.

use std::sync::atomic::{AtomicU8, Ordering};

use vmseal_keys::{Dek, Kek, NewDiskRecord, SecretBytes, key_check, random_bytes, seal_disk};
use vmseal_luks::{Geometry, HEADER_BYTES, Verdict, VmsealToken, create, inspect};
use vmseal_model::{
    control::{DiskSetup, ExportKind},
    id::{DiskId, KekId, KeyUuid, RecordId, VmId},
    record::{HeaderKind, KeyRecord, RecipientKind, RecordState, UnitBytes},
};
use vmseal_xts::Cipher;

use crate::{image::Image, medium::Medium};

/// What a volume is to be.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Bytes of a data unit: 512 or 4096.
    pub unit: u32,
    /// Bytes the disk shows.
    pub presented: u64,
    /// Bytes of it that are stored at first; the file grows if these are fewer.
    pub stored: u64,
}

impl Shape {
    /// Everything is stored.
    pub fn fixed(unit: u32, presented: u64) -> Self {
        Self { unit, presented, stored: presented }
    }

    /// Nothing is stored at first.
    pub fn growing(unit: u32, presented: u64) -> Self {
        Self { unit, presented, stored: 0 }
    }
}

/// A volume.
pub struct Volume {
    /// Its VM.
    pub vm: VmId,
    /// Its disk.
    pub disk: DiskId,
    /// What it was made as.
    pub shape: Shape,
    /// Its key record.
    pub record: KeyRecord,
    /// DEK and slot secret.
    pub payload: [u8; 96],
    /// What was stored in clear at first, zeros up to the presented size.
    pub initial: Vec<u8>,
    /// Where it lies.
    pub medium: Medium,
}

impl Volume {
    /// A volume of `vm` that holds `initial`, as it lies on a medium after it was made.
    ///
    /// # Panics
    ///
    /// If it cannot be made: a defect of the test.
    pub fn make(vm: VmId, shape: Shape, initial: &[u8]) -> Self {
        // Without randomness of their own two disks of one test would have one id.
        let disk = DiskId::from_random(random_bytes().expect("randomness"));
        let dek = Dek::generate().expect("a key");
        let new = NewDiskRecord {
            record: RecordId::from_random(random_bytes().expect("randomness")),
            vm,
            disk,
            header: HeaderKind::Attached,
            unit: UnitBytes::from_bytes(shape.unit).expect("a unit that there is"),
            payload_offset: HEADER_BYTES,
            created_ms: 1,
            state: RecordState { epoch: 1, stored_bytes: shape.stored, presented_bytes: shape.presented },
        };
        let kek_id = KekId::native(1, KeyUuid::from_bytes([3; 16]));
        let kek = Kek::new(kek_id, SecretBytes::take_from(&mut [9; 32]));
        let provider = "main".parse().expect("a provider's name");
        let record = seal_disk(&new, &dek, &kek, RecipientKind::Native, &provider).expect("a record");
        let token = VmsealToken { records: vec![record.encode()] };
        let mut bytes = create(&dek, disk, &Geometry::attached(shape.unit), &token).expect("a header");
        let mut initial = initial.to_vec();
        initial.resize(shape.presented as usize, 0);
        let mut stored = initial[..shape.stored as usize].to_vec();
        let payload = *dek.payload();
        cipher(&payload, shape.unit).encrypt(0, &mut stored).expect("whole units");
        bytes.resize(HEADER_BYTES as usize, 0);
        bytes.extend(stored);
        Self { vm, disk, shape, record, payload, initial, medium: Medium::new(bytes) }
    }

    /// Its part of a setup; its key is in the slot with this number.
    pub fn setup(&self, slot: u32) -> DiskSetup {
        static LETTER: AtomicU8 = AtomicU8::new(0);
        let letter = char::from(b'a' + LETTER.fetch_add(1, Ordering::Relaxed) % 26);
        DiskSetup {
            disk: self.disk,
            target: format!("vd{letter}"),
            key_slot: slot,
            key_check: key_check(&self.payload, self.vm, self.disk)
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect(),
            unit_bytes: self.shape.unit,
            payload_offset: HEADER_BYTES,
            detached_header: false,
            presented_bytes: self.shape.presented,
            grows: self.shape.stored < self.shape.presented,
            read_only: false,
            discard: true,
            export: ExportKind::Nbd,
            serial: String::new(),
        }
    }

    /// What the disk shows of an image; what is not stored is zeros.
    ///
    /// # Panics
    ///
    /// If a whole number of units cannot be decrypted, which does not depend on the image.
    pub fn plain(&self, image: &Image) -> Vec<u8> {
        let mut bytes = image.range(HEADER_BYTES, self.shape.presented);
        bytes.truncate(bytes.len() - bytes.len() % self.shape.unit as usize);
        cipher(&self.payload, self.shape.unit).decrypt(0, &mut bytes).expect("whole units");
        bytes.resize(self.shape.presented as usize, 0);
        bytes
    }

    /// Whether the header of an image is accepted.
    ///
    /// # Panics
    ///
    /// If an image cannot be read, which is in memory.
    pub fn header_is_accepted(&self, image: &Image) -> bool {
        let verdict = inspect(&mut image.clone(), Some(false)).expect("memory can be read");
        matches!(verdict, Verdict::Accept(_))
    }

    /// Its key.
    ///
    /// # Panics
    ///
    /// Never: it has 96 bytes.
    pub fn dek(&self) -> Dek {
        Dek::from_payload_slice(&self.payload).expect("96 bytes")
    }
}

fn cipher(payload: &[u8; 96], unit: u32) -> Cipher {
    Cipher::new(payload[..64].try_into().expect("64 bytes"), unit as usize).expect("halves differ")
}
