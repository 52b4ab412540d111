//! LUKS2 headers: made, read, judged, repaired, rewritten. No libcryptsetup.
//!
//! In go a file (or anything that reads and seeks), a disk key where one is proved or stored, and key records as opaque
//! bytes; out come a verdict, a [`Header`] that passed every check, or bytes to write. It encrypts no data, takes no
//! lock and decides nothing about keys: what a disk must look like is in its key record, and the caller compares.
//!
//! Format: `docs/formats/volume.md`, and the LUKS2 On-Disk Format Specification 1.1.1 (Brož, 2022).
//!
//! | module | what |
//! |---|---|
//! | [`binary_header`], `json`, `fields` | bytes and JSON, strictly |
//! | [`metadata`], `layout` | what the JSON says, and whether it is consistent |
//! | `policy`, `reencrypt` | what the format allows and we refuse |
//! | `copies`, `rewrite` | two copies: which one counts, how both are replaced |
//! | [`create`], [`header`], [`inspect`](mod@inspect), [`describe`] | what callers use |
//! | [`digest`], [`keyslot`], `af` | proof of a key; keyslots for stock tools |
//! | [`token`], [`owner`] | our token, our owner block |

mod af;
pub mod binary_header;
mod copies;
pub mod create;
pub mod describe;
pub mod digest;
mod error;
mod fields;
pub mod header;
pub mod inspect;
mod json;
pub mod keyslot;
mod layout;
pub mod metadata;
pub mod owner;
mod policy;
mod reencrypt;
mod rewrite;
mod source;
pub mod token;

pub use create::{Geometry, Salts, create, create_with};
pub use describe::Description;
pub use error::{Defect, LuksError};
pub use header::Header;
pub use inspect::{Verdict, inspect};
pub use metadata::Metadata;
pub use owner::{ClaimError, OwnerBlock, OwnerError, OwnerState};
pub use rewrite::{Copy, Repair, repair};
pub use source::HeaderFile;
pub use token::VmsealToken;

/// Bytes before the payload of a volume with an attached header, and the length of a detached header's file.
pub const HEADER_BYTES: u64 = 16 << 20;
/// Where the owner block is, in the file that holds the header. With a detached header nothing is ever written at this
/// place of the data, which is the guest's there; only the lock's byte range is the same in both files.
pub const OWNER_BLOCK_OFFSET: u64 = 15 << 20;
/// Where its second copy is. Nothing stood there before there were two, and in volumes made then zeros do.
pub const OWNER_COPY_OFFSET: u64 = OWNER_BLOCK_OFFSET + (64 << 10);
/// Where QEMU says by read locks on single bytes what it does with a file (`RAW_LOCK_PERM_BASE` in its
/// `block/file-posix.c`), and what it does not let others do (`RAW_LOCK_SHARED_BASE`).
pub const QEMU_LOCK_BYTES: [u64; 2] = [100, 200];
/// Bytes of the owner block.
pub const OWNER_BLOCK_LEN: usize = 4096;
/// Bytes of one copy of the metadata in headers made here: binary header (4 KiB) and JSON area (60 KiB).
pub const METADATA_BYTES: u64 = 64 << 10;
/// Bytes of the keyslots area in headers made here. It ends at 14 MiB + 128 KiB, below the owner block.
pub const KEYSLOTS_BYTES: u64 = 14 << 20;
