//! The agent protocol, generated from `proto/agent/v1.proto`; described in `docs/formats/agent-protocol.md`.

/// Version 1.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("vmseal.agent.v1");
}

/// Version both sides speak.
pub const PROTOCOL: u32 = 1;
/// HPKE info of a key grant.
pub const KEY_GRANT_INFO: &[u8] = b"vmseal/v1/key-grant";
