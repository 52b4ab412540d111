//! Keys: secret memory, derivation, wrapping, and the cryptography of key records.
//!
//! In go ids, records as `vmseal-model` decoded them, and KEKs; out come verified payloads in secret memory, and
//! records. No files, no network, no clock. Nothing here prints, logs or stores a key. Formats:
//! `docs/formats/key-record.md`.
//!
//! | module | what |
//! |---|---|
//! | [`secret`], [`share`] | memory that keys live in, within a process and between two |
//! | [`dek`], [`home_key`], [`kek`] | the keys as types |
//! | [`mod@derive`], [`mod@key_check`], [`gcm`] | primitives as this product uses them |
//! | [`wrap`], [`record`] | recipients and whole records |
//! | [`native`] | KEKs of the native provider |
//! | [`grant`] | KEKs on their way to an agent |

mod arena;
pub mod dek;
pub mod derive;
pub mod gcm;
pub mod grant;
pub mod harden;
pub mod home_key;
mod hpke_x25519;
pub mod kek;
pub mod key_check;
mod mapping;
pub mod native;
pub mod random;
mod recipient;
pub mod record;
mod scrub;
pub mod secret;
pub mod share;
pub mod wrap;

pub use dek::Dek;
pub use grant::{GrantError, SessionKey, seal_to};
pub use harden::harden_process;
pub use home_key::HomeKey;
pub use kek::Kek;
pub use key_check::key_check;
pub use native::{Kdk, native_kek};
pub use random::random_bytes;
pub use record::{
    NewDiskRecord, NewHomeRecord, Opened, WrapError, add_recipient, open_disk, open_home, remove_recipient,
    restate, seal_disk, seal_disk_with, seal_home, verify_mac,
};
pub use secret::{Protection, SecretBytes, SecretError, protection};
pub use share::SecretShare;
pub use wrap::{Freshness, Wrapping};
