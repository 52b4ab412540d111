//! The agent of one host: unwraps the keys of its VMs, starts the processes that serve their disks, and works for
//! the server.
//!
//! Blocking code on threads; only `session` and `join` know tokio. Binaries: `vmseal-agent`, and `vmseal-hook`,
//! which libvirt runs and which uses of this library only `peer`.

pub mod accounts;
pub mod adopt;
pub mod agent;
pub mod backend;
pub mod causes;
pub mod choice;
pub mod clock;
pub mod commands;
pub mod config;
pub mod control_frame;
pub mod doctor;
pub mod domain_xml;
pub mod failpoint;
pub(crate) mod fast_disk;
pub mod floors;
pub mod hook_server;
pub mod hooks;
pub mod identity;
pub mod inventory;
pub mod job;
pub mod join;
pub mod journal;
pub mod keyring;
pub mod libvirt;
pub mod lock;
pub mod metadata;
pub mod new_volume;
pub(crate) mod ours;
pub mod peer;
pub mod ports;
pub mod rbd;
pub(crate) mod rbd_disk;
pub mod reconcile;
pub mod repair;
#[cfg(test)]
pub(crate) mod scratch;
pub mod session;
pub(crate) mod shared_memory;
pub mod socket_dir;
pub mod spawn;
pub mod start;
pub mod store;
pub mod tasks;
pub mod ublk;
pub(crate) mod ublk_disk;
pub mod uplink;
pub mod volume;
pub mod wanted;
pub mod xml;
