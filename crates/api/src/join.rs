//! The join token: the one line an administrator carries from the server to a new host.
//!
//! `vmseal1.` and base64url (no padding) of JSON `{address, ca_sha256, secret}`. The agent takes the CA certificate
//! out of the chain of a TLS handshake with `address` and trusts it if its SHA-256 is `ca_sha256`; then it sends the
//! secret with a certificate request. Encoding and decoding base64 is the caller's; here is what lies inside.

use serde::{Deserialize, Serialize};

use crate::secret_text::SecretText;

/// What every token of this version starts with.
pub const JOIN_TOKEN_PREFIX: &str = "vmseal1.";
/// DNS name that every server certificate carries beside its addresses: agents ask for it, however they dial.
pub const SERVER_NAME: &str = "vmseal-server";

/// The inside of a token.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JoinClaims {
    /// `host:port` of the agents' gate.
    pub address: String,
    /// SHA-256 of the CA certificate (DER), 64 hexadecimal digits.
    pub ca_sha256: String,
    /// Buys one certificate.
    pub secret: SecretText,
}
