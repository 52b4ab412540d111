//! The real `vmseal-disk`, as the agent starts it, against the clients it will meet: QEMU's tools, libnbd, fio, and
//! ones that mean harm. One test binary, so that it links once.

mod crash;
mod fio;
mod footprint;
mod growth;
mod guest;
mod guest_fio;
mod handover;
mod hostile;
mod identity;
mod interop;
mod jobs;
mod latch;
mod lifecycle;
mod loop_device;
mod memory;
mod migration;
mod nbd_client;
mod nbd_tls;
mod nbd_tls_hostile;
mod peers;
mod qemu;
mod remote;
mod remote_fio;
mod resize;
mod rig;
#[expect(unreachable_pub, reason = "public where it comes from")]
#[path = "../../../../tests/e2e/src/round_keys.rs"]
mod round_keys;
mod sandbox;
#[expect(unreachable_pub, reason = "public where it comes from")]
#[path = "../../../../tests/store/src/seed.rs"]
mod seed;
mod tls_rig;
mod tools;
mod unprivileged;
mod upgrade;
mod vhost_crash;
mod vhost_driver;
mod vhost_hostile;
mod vhost_log;
mod vhost_user;
