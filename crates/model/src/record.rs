//! The key record: byte layout, bounds and nothing else. Format: `docs/formats/key-record.md`.
//!
//! [`KeyRecord::decode`] checks shape only. A decoded record is *not* to be trusted: unwrap, key check and MAC are
//! in `vmseal-keys`, which turns a `KeyRecord` into an opened one.

use crate::id::{DiskId, KekId, ProviderId, RecordId, VmId};

/// Bytes of the head, which is authenticated by every recipient and by the MAC.
pub const HEAD_LEN: usize = 120;
/// Bytes of a MAC at the end of a record.
pub const MAC_LEN: usize = 32;
/// Most bytes of a record.
pub const MAX_RECORD_LEN: usize = 16_384;
/// Most recipients of a record.
pub const MAX_RECIPIENTS: usize = 16;
/// Bytes of an AES-256-GCM tag.
pub const TAG_LEN: usize = 16;
/// Payload of a disk record: DEK (64) ‖ slot secret (32).
pub const DISK_PAYLOAD_LEN: usize = 96;
/// Payload of a home record: the home key.
pub const HOME_PAYLOAD_LEN: usize = 32;

const MAGIC: [u8; 4] = *b"VMSR";
const VERSION: u16 = 1;

/// What a record's payload opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// A disk: DEK and slot secret.
    Disk = 1,
    /// A VM's home: everything that is not a disk.
    Home = 2,
}

/// Where the LUKS2 header of the volume is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum HeaderKind {
    /// No volume: a home record.
    None = 0,
    /// In the first 16 MiB of the volume itself.
    Attached = 1,
    /// In a file of its own.
    Detached = 2,
}

/// Bytes of one data unit of the cipher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum UnitBytes {
    /// 512-byte units; the default.
    B512 = 512,
    /// 4096-byte units, for 4Kn disks. The tweak still counts 512-byte sectors.
    B4096 = 4096,
}

impl UnitBytes {
    /// The size in bytes.
    pub const fn get(self) -> u32 {
        self as u16 as u32
    }

    /// The unit of this many bytes, if there is one.
    pub const fn from_bytes(bytes: u32) -> Option<Self> {
        match bytes {
            512 => Some(Self::B512),
            4096 => Some(Self::B4096),
            _ => None,
        }
    }
}

/// What the head says of a disk, or that it is a home.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// One disk, aes-xts-plain64.
    Disk {
        /// The disk, equal to its LUKS2 UUID.
        disk: DiskId,
        /// Where its header is.
        header: HeaderKind,
        /// Its data unit.
        unit: UnitBytes,
        /// Where its data begins, in bytes from the start of the volume.
        payload_offset: u64,
    },
    /// The VM's home.
    Home,
}

/// The head of a record: what never changes. 120 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordHead {
    /// This record.
    pub record: RecordId,
    /// The VM it belongs to.
    pub vm: VmId,
    /// What it opens.
    pub subject: Subject,
    /// Creation, milliseconds since 1970.
    pub created_ms: u64,
    /// HKDF of the payload; tells a wrong key from a right one.
    pub key_check: [u8; 32],
}

impl RecordHead {
    /// Role of the record.
    pub fn role(&self) -> Role {
        match self.subject {
            Subject::Disk { .. } => Role::Disk,
            Subject::Home => Role::Home,
        }
    }

    /// The disk id; zero for a home.
    pub fn disk(&self) -> DiskId {
        match self.subject {
            Subject::Disk { disk, .. } => disk,
            Subject::Home => DiskId::from_bytes([0; 16]),
        }
    }

    /// Bytes of the wrapped payload's plaintext.
    pub fn payload_len(&self) -> usize {
        match self.subject {
            Subject::Disk { .. } => DISK_PAYLOAD_LEN,
            Subject::Home => HOME_PAYLOAD_LEN,
        }
    }

    /// The 120 bytes.
    pub fn encode(&self) -> [u8; HEAD_LEN] {
        let mut out = [0u8; HEAD_LEN];
        out[0..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&VERSION.to_le_bytes());
        out[8..24].copy_from_slice(&self.record.to_bytes());
        out[24..40].copy_from_slice(&self.vm.to_bytes());
        out[40..56].copy_from_slice(&self.disk().to_bytes());
        out[56] = self.role() as u8;
        out[60..62].copy_from_slice(&(self.payload_len() as u16).to_le_bytes());
        match self.subject {
            Subject::Disk { header, unit, payload_offset, .. } => {
                out[57] = CIPHER_XTS;
                out[58] = header as u8;
                out[62..64].copy_from_slice(&(unit as u16).to_le_bytes());
                out[64..72].copy_from_slice(&payload_offset.to_le_bytes());
            }
            Subject::Home => out[57] = CIPHER_NONE,
        }
        out[80..88].copy_from_slice(&self.created_ms.to_le_bytes());
        out[88..120].copy_from_slice(&self.key_check);
        out
    }

    fn decode(b: &[u8; HEAD_LEN]) -> Result<Self, RecordError> {
        if b[0..4] != MAGIC {
            return Err(RecordError::Magic);
        }
        let version = u16::from_le_bytes([b[4], b[5]]);
        if version != VERSION {
            return Err(RecordError::Version { version });
        }
        if b[6..8] != [0; 2] || b[59] != 0 || b[72..80] != [0; 8] {
            return Err(RecordError::Field { field: "reserved bytes" });
        }
        let id = |at: usize| -> [u8; 16] { b[at..at + 16].try_into().expect("16 bytes") };
        let unit_bytes = u16::from_le_bytes([b[62], b[63]]);
        let payload_offset = u64::from_le_bytes(b[64..72].try_into().expect("8 bytes"));
        let subject = match (b[56], b[57]) {
            (1, CIPHER_XTS) => Subject::Disk {
                disk: DiskId::from_bytes(id(40)),
                header: match b[58] {
                    1 => HeaderKind::Attached,
                    2 => HeaderKind::Detached,
                    _ => return Err(RecordError::Field { field: "header kind" }),
                },
                unit: UnitBytes::from_bytes(unit_bytes.into())
                    .ok_or(RecordError::Field { field: "unit bytes" })?,
                payload_offset,
            },
            (2, CIPHER_NONE) => {
                if id(40) != [0; 16] || b[58] != 0 || unit_bytes != 0 || payload_offset != 0 {
                    return Err(RecordError::Field { field: "disk fields of a home record" });
                }
                Subject::Home
            }
            _ => return Err(RecordError::Field { field: "role and cipher" }),
        };
        let head = Self {
            record: RecordId::from_bytes(id(8)),
            vm: VmId::from_bytes(id(24)),
            subject,
            created_ms: u64::from_le_bytes(b[80..88].try_into().expect("8 bytes")),
            key_check: b[88..120].try_into().expect("32 bytes"),
        };
        if u16::from_le_bytes([b[60], b[61]]) as usize != head.payload_len() {
            return Err(RecordError::Field { field: "payload bytes" });
        }
        Ok(head)
    }
}

const CIPHER_XTS: u8 = 1;
const CIPHER_NONE: u8 = 2;

/// What changes without any KEK: under the MAC only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RecordState {
    /// Rises with every change; the highest verified epoch wins.
    pub epoch: u64,
    /// Bytes of plaintext the volume holds.
    pub stored_bytes: u64,
    /// Bytes of plaintext the volume presents; more than stored where an image that grows lies inside.
    pub presented_bytes: u64,
}

/// How a recipient's payload is wrapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RecipientKind {
    /// Under a KEK of a KMIP provider.
    Kek = 1,
    /// Under a KEK of the native provider.
    Native = 2,
    /// Under a per-VM KEK, itself wrapped; the broker unwraps it.
    Wrapped = 3,
    /// Under a per-VM KEK that the key server wraps and unwraps.
    InKms = 4,
    /// To an X25519 public key (HPKE).
    Recovery = 5,
}

impl RecipientKind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Kek,
            2 => Self::Native,
            3 => Self::Wrapped,
            4 => Self::InKms,
            5 => Self::Recovery,
            _ => return None,
        })
    }
}

/// Who a payload is wrapped for: what names a recipient, and is authenticated with the payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecipientId {
    /// How.
    pub kind: RecipientKind,
    /// Name of the key provider.
    pub provider: ProviderId,
    /// The KEK at that provider.
    pub kek: KekId,
}

impl RecipientId {
    /// The bytes as stored and as authenticated: kind ‖ provider id ‖ KEK id, each of the last two with its length.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![self.kind as u8];
        put_short(&mut out, self.provider.as_str().as_bytes());
        put_long(&mut out, self.kek.as_bytes());
        out
    }
}

/// The per-VM KEK of kinds 3 and 4, itself wrapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrappedKek {
    /// The wrapping key at the provider, opaque.
    pub wrapping_key: Vec<u8>,
    /// 1 AES-256-GCM, 2 AES-256-KWP.
    pub algorithm: u8,
    /// Initialisation vector; empty for KWP.
    pub iv: Vec<u8>,
    /// Ciphertext, with tag for GCM.
    pub wrapped: Vec<u8>,
}

/// What is particular to a recipient's kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecipientSeal {
    /// Kinds 1 to 4: AES-256-GCM under a key derived from the KEK.
    Gcm {
        /// Salt of the derivation.
        salt: [u8; 32],
        /// Nonce of the GCM.
        nonce: [u8; 12],
        /// The per-VM KEK, for kinds 3 and 4 only.
        wrapped_kek: Option<WrappedKek>,
    },
    /// Kind 5: HPKE's encapsulated key.
    Hpke {
        /// `enc`, 32 bytes.
        enc: [u8; 32],
    },
}

/// One recipient of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipient {
    /// Who.
    pub id: RecipientId,
    /// How it was sealed.
    pub seal: RecipientSeal,
    /// Ciphertext ‖ 16-byte tag.
    pub wrapped_payload: Vec<u8>,
}

/// A key record as it lies in metadata, tokens and stores.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRecord {
    /// What never changes.
    pub head: RecordHead,
    /// What changes without a KEK.
    pub state: RecordState,
    /// 1 to 16, in the order added, no two with the same (provider, KEK id).
    pub recipients: Vec<Recipient>,
    /// HMAC over everything before it.
    pub mac: [u8; MAC_LEN],
}

impl KeyRecord {
    /// Everything the MAC covers: all bytes but the MAC.
    pub fn encode_without_mac(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(512);
        out.extend_from_slice(&self.head.encode());
        out.extend_from_slice(&self.state.epoch.to_le_bytes());
        out.extend_from_slice(&self.state.stored_bytes.to_le_bytes());
        out.extend_from_slice(&self.state.presented_bytes.to_le_bytes());
        out.extend_from_slice(&(self.recipients.len() as u16).to_le_bytes());
        for recipient in &self.recipients {
            recipient.encode_into(&mut out);
        }
        out
    }

    /// The whole record.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.encode_without_mac();
        out.extend_from_slice(&self.mac);
        out
    }

    /// Reads a record: bounds and shape only, see the head of this module.
    ///
    /// # Errors
    ///
    /// [`RecordError`] names the first thing that is not as the format says. Nothing is allocated on a length's word.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        if bytes.len() > MAX_RECORD_LEN {
            return Err(RecordError::TooLong { bytes: bytes.len() });
        }
        let mut reader = Reader { rest: bytes };
        let head = RecordHead::decode(&reader.array()?)?;
        let state = RecordState {
            epoch: u64::from_le_bytes(reader.array()?),
            stored_bytes: u64::from_le_bytes(reader.array()?),
            presented_bytes: u64::from_le_bytes(reader.array()?),
        };
        let count = u16::from_le_bytes(reader.array()?) as usize;
        if !(1..=MAX_RECIPIENTS).contains(&count) {
            return Err(RecordError::Recipients { count });
        }
        let mut recipients: Vec<Recipient> = Vec::with_capacity(count);
        for _ in 0..count {
            let recipient = Recipient::decode(&mut reader, head.payload_len())?;
            let same = |r: &Recipient| r.id.provider == recipient.id.provider && r.id.kek == recipient.id.kek;
            if recipients.iter().any(same) {
                return Err(RecordError::Field { field: "recipient named twice" });
            }
            recipients.push(recipient);
        }
        let mac = reader.array()?;
        if !reader.rest.is_empty() {
            return Err(RecordError::Trailing { bytes: reader.rest.len() });
        }
        Ok(Self { head, state, recipients, mac })
    }
}

impl Recipient {
    fn encode_into(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.encode());
        match &self.seal {
            RecipientSeal::Gcm { salt, nonce, wrapped_kek } => {
                out.extend_from_slice(salt);
                out.extend_from_slice(nonce);
                put_long(out, &self.wrapped_payload);
                if let Some(kek) = wrapped_kek {
                    put_long(out, &kek.wrapping_key);
                    out.push(kek.algorithm);
                    put_short(out, &kek.iv);
                    put_long(out, &kek.wrapped);
                }
            }
            RecipientSeal::Hpke { enc } => {
                put_long(out, &self.wrapped_payload);
                out.extend_from_slice(enc);
            }
        }
    }

    fn decode(reader: &mut Reader<'_>, payload_len: usize) -> Result<Self, RecordError> {
        let [kind] = reader.array()?;
        let kind = RecipientKind::from_byte(kind).ok_or(RecordError::Field { field: "recipient kind" })?;
        let provider = std::str::from_utf8(reader.short()?)
            .ok()
            .and_then(|text| text.parse().ok())
            .ok_or(RecordError::Field { field: "provider id" })?;
        let kek = KekId::from_bytes(reader.long()?.to_vec()).ok_or(RecordError::Field { field: "KEK id" })?;
        let gcm = kind != RecipientKind::Recovery;
        let (salt, nonce) = if gcm { (reader.array()?, reader.array()?) } else { ([0; 32], [0; 12]) };
        let wrapped_payload = reader.long()?.to_vec();
        if wrapped_payload.len() != payload_len + TAG_LEN {
            return Err(RecordError::Field { field: "wrapped payload length" });
        }
        let seal = match kind {
            RecipientKind::Recovery => RecipientSeal::Hpke { enc: reader.array()? },
            RecipientKind::Kek | RecipientKind::Native => {
                RecipientSeal::Gcm { salt, nonce, wrapped_kek: None }
            }
            RecipientKind::Wrapped | RecipientKind::InKms => {
                let wrapping_key = reader.long()?.to_vec();
                let [algorithm] = reader.array()?;
                if !matches!(algorithm, 1 | 2) {
                    return Err(RecordError::Field { field: "wrapping algorithm" });
                }
                let iv = reader.short()?.to_vec();
                let wrapped = reader.long()?.to_vec();
                RecipientSeal::Gcm {
                    salt,
                    nonce,
                    wrapped_kek: Some(WrappedKek { wrapping_key, algorithm, iv, wrapped }),
                }
            }
        };
        Ok(Self { id: RecipientId { kind, provider, kek }, seal, wrapped_payload })
    }
}

/// Why bytes are not a key record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// It ends before a field does.
    #[error("key record ends early")]
    Truncated,
    /// Longer than any record may be.
    #[error("key record has {bytes} bytes, at most {MAX_RECORD_LEN} are allowed")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// Not a record at all.
    #[error("not a key record (no VMSR magic)")]
    Magic,
    /// A later format.
    #[error("key record has version {version}, this program reads version 1; use a newer vmseal")]
    Version {
        /// Its version.
        version: u16,
    },
    /// A field holds what the format does not allow.
    #[error("key record has a bad field: {field}")]
    Field {
        /// Which.
        field: &'static str,
    },
    /// Not 1 to 16 recipients.
    #[error("key record names {count} recipients, 1 to {MAX_RECIPIENTS} are allowed")]
    Recipients {
        /// How many.
        count: usize,
    },
    /// More bytes than the record has.
    #[error("{bytes} bytes follow the key record")]
    Trailing {
        /// How many.
        bytes: usize,
    },
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize) -> Result<&'a [u8], RecordError> {
        let (head, rest) = self.rest.split_at_checked(n).ok_or(RecordError::Truncated)?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], RecordError> {
        Ok(self.bytes(N)?.try_into().expect("N bytes were taken"))
    }

    fn short(&mut self) -> Result<&'a [u8], RecordError> {
        let [n] = self.array()?;
        self.bytes(n.into())
    }

    fn long(&mut self) -> Result<&'a [u8], RecordError> {
        let n = u16::from_le_bytes(self.array()?);
        self.bytes(n.into())
    }
}

fn put_short(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(u8::try_from(bytes.len()).expect("a field with a one-byte length was checked when made"));
    out.extend_from_slice(bytes);
}

fn put_long(out: &mut Vec<u8>, bytes: &[u8]) {
    let n = u16::try_from(bytes.len()).expect("a field with a two-byte length was checked when made");
    out.extend_from_slice(&n.to_le_bytes());
    out.extend_from_slice(bytes);
}
