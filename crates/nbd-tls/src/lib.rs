//! NBD over TLS in front of a disk process, which has neither a network nor certificates.
//!
//! In: TCP connections on a listening socket that was handed over. Out: connections to one export's unix socket, one
//! for each client that proved who it is. Nothing of a client reaches the disk process before its certificate was
//! checked; from then on bytes go to and fro unread. There is no key of a disk in here, and there never will be: this is
//! the process that faces the network. `docs/design/nbd-tls.md`.
//!
//! | module | what |
//! |---|---|
//! | [`options`] | the command line |
//! | [`identity`] | certificate, private key, authority |
//! | [`clients`] | which client may use the export |
//! | [`subject`] | the common name in a certificate |
//! | [`confine`] | own user, no privilege, no file |
//! | [`seccomp`] | the system calls that are left |
//! | [`serve`] | connections, and how many |
//! | [`greeting`] | NBD as far as STARTTLS |
//! | [`deadline`] | a socket that must be done in time |
//! | [`relay`] | one client's bytes |
//! | [`log`] | lines for the administrator |

#![deny(unsafe_op_in_unsafe_fn)]

pub mod clients;
pub mod confine;
pub mod deadline;
pub mod greeting;
pub mod identity;
pub mod log;
pub mod options;
pub mod relay;
pub mod seccomp;
pub mod serve;
pub mod subject;
