//! What every room of the house agrees on: ids, key records, operations, states and the frames between processes.
//!
//! Pure: no I/O, no clock, no randomness of its own. Bytes come in as arguments and go out as values.

pub mod class;
pub mod control;
pub mod hook;
pub mod id;
pub mod metadata;
pub mod operation;
pub mod record;
pub mod refusal;
pub mod state;
pub mod store_helper;
pub mod task;
pub mod ublk;
