//! Key providers: where KEKs come from.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::secret_text::SecretText;

/// What kind a provider is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ProviderKind {
    /// The server derives keys itself, from a key-derivation key (KDK).
    Native,
}

impl ProviderKind {
    /// Its word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
        }
    }
}

/// One KDK of a native provider.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Generation {
    /// From 1 on.
    pub number: u32,
    /// When it was made or imported.
    pub created_ms: i64,
    /// When a backup of it was verified; absent: never, no new key is taken from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backed_up_ms: Option<i64>,
}

/// A provider.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Provider {
    /// Its name; it stands in key records, so it never changes.
    pub name: String,
    /// Its id, which enters key derivation.
    pub uuid: String,
    /// Its kind.
    pub kind: ProviderKind,
    /// Whether new keys come from it when none is named.
    pub default: bool,
    /// Whether new keys may be taken from it: one of its generations has a verified backup.
    pub usable: bool,
    /// Its KDKs, oldest first.
    pub generations: Vec<Generation>,
    /// Keys taken from it.
    pub keys: u32,
    /// VMs whose disks need one of them, by name.
    pub vms: Vec<String>,
    /// When it was made or imported.
    pub created_ms: i64,
}

/// Asks for a new provider.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateProvider {
    /// 1 to 64 letters, digits, `.`, `_` or `-`, starting with a letter or digit; not `import`.
    pub name: String,
    /// Its kind.
    pub kind: ProviderKind,
    /// Make it the default. The first provider becomes it anyway.
    #[serde(default)]
    pub default: bool,
}

/// Asks for a backup.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportProvider {
    /// Protects the backup.
    pub password: SecretText,
}

/// A backup. It is not verified until it was sent back to `confirm-backup`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ProviderBackup {
    /// A name to keep it under.
    pub file_name: String,
    /// PKCS#12, base64 (RFC 4648 §4).
    pub p12: String,
}

/// Hands back a backup as it was read from where it is kept. The server opens it: only that makes the provider usable.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConfirmBackup {
    /// PKCS#12, base64.
    pub p12: String,
    /// Its password.
    pub password: SecretText,
}

/// Brings a provider back, or a generation it lacks.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportProvider {
    /// PKCS#12, base64.
    pub p12: String,
    /// Its password.
    pub password: SecretText,
    /// Say what would happen, change nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// What an import did, or would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImportedProvider {
    /// The provider in the backup.
    pub name: String,
    /// Its id.
    pub uuid: String,
    /// Whether it was not there before.
    pub new: bool,
    /// Generations that were not there before.
    pub generations_added: Vec<u32>,
    /// Keys of it that were missing and may be had again.
    pub keys_back: u32,
    /// VMs that need them, by name.
    pub vms: Vec<String>,
    /// Nothing was changed.
    pub dry_run: bool,
}

/// What went with a provider.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RemovedProvider {
    /// Its name.
    pub name: String,
    /// Keys that can no longer be had.
    pub keys_lost: u32,
    /// VMs that need them, by name: they go on running and will not start again.
    pub vms: Vec<String>,
}
