//! Users and their sessions.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::secret_text::SecretText;

/// Asks for a session.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Login {
    /// User name.
    pub name: String,
    /// Password.
    pub password: SecretText,
}

/// A session. The token goes into `Authorization: Bearer …`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Session {
    /// Opaque; the server keeps only its hash.
    pub token: SecretText,
    /// When it ends.
    pub expires_ms: i64,
    /// User name.
    pub name: String,
    /// The user's roles.
    pub roles: Vec<String>,
}

/// Asks for a new user.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateUser {
    /// 1 to 64 letters, digits, `.`, `_`, `-` or `@`, starting with a letter or digit.
    pub name: String,
    /// At least 12 characters.
    pub password: SecretText,
    /// A role's name; absent: none, the user may do nothing yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
}

/// A user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct User {
    /// Name.
    pub name: String,
    /// Roles.
    pub roles: Vec<String>,
}
