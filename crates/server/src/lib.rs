//! `vmseal-server`: inventory, authorisation, tasks, audit, and the broker that gives KEKs to hosts.
//!
//! In go the public API (HTTPS and a local socket) and the agents' streams; out come commands, key grants and one
//! database that is not needed to get a key back: inventory is rebuilt from the hosts, native keys from their backups.
//!
//! | module | what |
//! |---|---|
//! | [`config`], [`server`] | how it starts and what it holds |
//! | [`store`], [`audit`] | the database and its chain |
//! | [`http`], [`authz`], [`login`] | the API, who may do what, who is who |
//! | [`gate`], [`placement`], [`broker`] | agents, which host a VM belongs to, who gets which key |
//! | [`providers`], [`tasks`], [`doctor`] | what the operations do |
//! | [`ca`], [`tls`], [`sealing`] | certificates, and what is sealed under the root key |

pub mod audit;
pub mod authz;
pub mod broker;
pub mod ca;
pub mod clock;
pub mod config;
pub mod digest;
pub mod doctor;
pub mod gate;
pub mod http;
pub mod login;
pub mod placement;
pub mod providers;
pub mod refusal;
pub mod sealing;
pub mod server;
mod shutdown;
pub mod store;
pub mod tasks;
pub mod tls;
