//! The whole house on one machine: a private libvirtd, server, agent, disks and real guests. What the end-to-end
//! tests and the demo stand on; no test is in here.

pub mod ceph;
pub mod console;
pub mod domain;
pub mod house;
mod interrupt;
pub mod lab;
pub mod libvirtd;
mod orphans;
mod round_keys;
pub mod scan;
pub mod shell;
pub mod writer;

/// How often a test does its thing: `small` in `make test`, `full` in `make soak-NAME`, which sets `VMSEAL_SOAK`.
pub fn rounds(small: usize, full: usize) -> usize {
    if std::env::var_os("VMSEAL_SOAK").is_some() { full } else { small }
}
