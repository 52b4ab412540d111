//! Fuzz targets: for each thing that reads bytes from outside, a function that takes any bytes and must not panic.
//!
//! Most targets put their bytes into a frame that passes the outer checks (a magic, a checksum, an agreed handshake), so
//! that what lies behind is reached. Besides not panicking they hold what is read against what was written.
//! `make fuzz-NAME` runs one with libFuzzer; the tests feed all of them with the corpus. See `docs/design/testing.md`.

pub mod disk;
pub mod disk_frames;
pub mod input;
pub mod key_record;
pub mod luks_header;
pub mod nbd_handshake;
pub mod nbd_transmission;
pub mod owner_block;
pub mod vhost_user_messages;
pub mod vhost_user_rings;

/// A target: its name, which is its folder in the corpus, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("disk_frames", disk_frames::run),
    ("key_record", key_record::run),
    ("luks_header", luks_header::run),
    ("nbd_handshake", nbd_handshake::run),
    ("nbd_transmission", nbd_transmission::run),
    ("owner_block", owner_block::run),
    ("vhost_user_messages", vhost_user_messages::run),
    ("vhost_user_rings", vhost_user_rings::run),
];
