//! Types of the public HTTP API and of the agent protocol. Types and nothing else.
//!
//! One file a noun; what goes over the wire is JSON with snake_case fields, ids are UUID texts, times are
//! milliseconds since 1970, sizes are bytes. The document made from these is `openapi/v1.json`.

pub mod agent;
pub mod audit;
pub mod disk;
pub mod host;
pub mod join;
pub mod key;
pub mod login;
pub mod page;
pub mod paths;
pub mod problem;
pub mod provider;
pub mod secret_text;
pub mod status;
pub mod task;
pub mod vm;
