//! A store under the real `vmseal-disk` that logs every write and flush, fails and delays on demand, and from whose log
//! every legal crash is rebuilt; and a verifier that knows what may be read from a disk after whatever happened to it.
//!
//! How the parts fit together, and how to read a failure: `docs/design/testing.md`.

#![deny(unsafe_op_in_unsafe_fn)]

pub mod crash_states;
pub mod disk_process;
pub mod entry;
pub mod fault;
pub mod history;
pub mod image;
pub mod in_process;
pub mod medium;
pub mod mount;
pub mod nbd_client;
pub mod seed;
pub mod stamp;
pub mod verifier;
pub mod volume;
pub mod workload;
