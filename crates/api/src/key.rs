//! KEKs, as far as anybody may see them: never their bytes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Whether a key can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum KeyState {
    /// Allocated to a task, not yet in a record.
    Reserved,
    /// In use.
    Active,
    /// Its provider is gone, or never had it.
    Missing,
}

impl KeyState {
    /// Its word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reserved => "reserved",
            Self::Active => "active",
            Self::Missing => "missing",
        }
    }
}

/// A key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Key {
    /// Its provider's name.
    pub provider: String,
    /// Its id: `<uuid>/g<generation>` for native ones.
    pub key: String,
    /// Whether it can be had.
    pub state: KeyState,
    /// The VM it belongs to, by name, once it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// The host it was last given to, by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// When it was allocated, or first asked for.
    pub created_ms: i64,
    /// When a host last got it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granted_ms: Option<i64>,
    /// Since when it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing_since_ms: Option<i64>,
}
