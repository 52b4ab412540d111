//! The agent of one host: unwraps the keys of its VMs, starts the processes that serve their disks, and works for
//! the server.
//!
//! Blocking code on threads; only `session` and `join` know tokio. Binaries: `vmseal-agent`, and `vmseal-hook`,
//! which libvirt runs and which uses nothing of this library but the frames of `vmseal-model`.

pub mod accounts;
pub mod backend;
pub mod causes;
pub mod choice;
pub mod clock;
pub mod config;
pub mod control_frame;
pub mod domain_xml;
pub mod failpoint;
pub mod floors;
pub mod identity;
pub mod job;
pub mod join;
pub mod journal;
pub mod keyring;
pub mod libvirt;
pub mod lock;
pub mod metadata;
pub mod new_volume;
pub mod ports;
#[cfg(test)]
pub(crate) mod scratch;
pub mod session;
pub mod socket_dir;
pub mod spawn;
pub mod start;
pub mod store;
pub mod tasks;
pub mod uplink;
pub mod volume;
pub mod xml;
