//! Keeps the ciphertext of one volume on a Ceph RBD image, for a disk process that has no network.
//!
//! In: requests over a unix socket, data in memory that is shared with the disk process. Out: requests to the cluster.
//! It never has a key and never sees plaintext, so this is the process that may speak to the network. It holds the
//! image's exclusive lock as long as it lives. Messages: `docs/formats/store-helper.md`.
//!
//! | module | what |
//! |---|---|
//! | [`library`] | librbd and librados, loaded when needed |
//! | [`cluster`] | a connection to a cluster and a pool |
//! | [`image`] | one image under its exclusive lock |
//! | [`channel`] | one socket and its memory |
//! | [`serve`] | the helper's life |
//! | [`manage`] | an image looked at, made, renamed, removed |

#![deny(unsafe_op_in_unsafe_fn)]

pub mod channel;
pub mod cluster;
pub mod image;
pub mod library;
pub mod manage;
pub mod serve;

use std::{
    fmt,
    io::{self, Write},
};

/// Writes one line for the administrator to standard error.
pub fn line(text: fmt::Arguments<'_>) {
    // A log that cannot be written is no reason to stop serving a disk.
    let _ = io::stderr().write_all(format!("vmseal-rbd[{}] {text}\n", std::process::id()).as_bytes());
}
