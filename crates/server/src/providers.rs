//! Key providers as the server runs them: held open in memory, stored sealed, used only after a verified backup.
//!
//! In go names, passwords and backups; out come answers of the API. Keys themselves are the broker's business. Work
//! that takes long on purpose (a backup's key derivation) is done before the database is held.

mod lifecycle;

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use sqlx::SqliteConnection;
use vmseal_api::provider::{Generation, Provider, ProviderKind};
use vmseal_model::{
    id::{KekId, ProviderId},
    refusal::Code,
};
use vmseal_provider::{BackupError, NativeError, NativeProvider, RootKey, StoreError as KdkError};

use crate::{
    digest::unhex,
    refusal::{Refusal, causes, shown},
    server::Server,
    store::{Store, StoreError, count, key, provider, provider::ProviderRow},
};
pub(crate) use lifecycle::{confirm_backup, create, export, import, remove, set_default};

/// The providers whose keys could be opened, by name.
#[derive(Default)]
pub struct Providers {
    open: RwLock<BTreeMap<String, Arc<NativeProvider>>>,
    broken: RwLock<BTreeMap<String, String>>,
}

impl Providers {
    /// Opens all. One that does not open is left out and found by the doctor: the others go on.
    pub async fn load(store: &Store, root: &RootKey) -> Result<Self, StoreError> {
        let all = Self::default();
        let mut db = store.read().await?;
        for row in provider::list(&mut db).await? {
            match open(&mut db, &row, root).await? {
                Ok(provider) => all.put(provider),
                Err(error) => {
                    let why = causes(&error);
                    tracing::error!(provider = row.name, error = why, "a provider's keys do not open");
                    all.broken.write().unwrap_or_else(PoisonError::into_inner).insert(row.name, why);
                }
            }
        }
        Ok(all)
    }

    /// One.
    pub fn get(&self, name: &str) -> Option<Arc<NativeProvider>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Those that do not open, and why.
    pub fn broken(&self) -> BTreeMap<String, String> {
        self.broken.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn put(&self, provider: NativeProvider) {
        let name = provider.id().as_str().to_owned();
        self.broken.write().unwrap_or_else(PoisonError::into_inner).remove(&name);
        self.open.write().unwrap_or_else(PoisonError::into_inner).insert(name, Arc::new(provider));
    }

    fn remove(&self, name: &str) {
        self.broken.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        self.open.write().unwrap_or_else(PoisonError::into_inner).remove(name);
    }
}

/// A provider from its rows.
async fn open(
    db: &mut SqliteConnection,
    row: &ProviderRow,
    root: &RootKey,
) -> Result<Result<NativeProvider, KdkError>, StoreError> {
    let id: ProviderId = row.name.parse().map_err(|_| StoreError::row("provider name", &row.name))?;
    let uuid = row.uuid.parse().map_err(|_| StoreError::row("provider uuid", &row.uuid))?;
    let generations = provider::generations(db, &row.name).await?;
    Ok(NativeProvider::open_from_store(id, uuid, &generations, root))
}

/// The provider that a new key is to come from.
pub(crate) async fn choose(
    server: &Server,
    db: &mut SqliteConnection,
    wanted: Option<&str>,
) -> Result<Arc<NativeProvider>, Refusal> {
    let name = match wanted {
        Some(name) => name.to_owned(),
        None => provider::default_name(db).await?.ok_or_else(|| {
            Refusal::new(Code::NoProvider, "there is no default key provider to take a key from")
                .hint("make one: `vmseal provider create --native main`, then `vmseal provider export main`")
        })?,
    };
    server.providers.get(&name).ok_or_else(|| match server.providers.broken().get(&name) {
        Some(why) => Refusal::new(Code::Integrity, format!("the keys of provider {name} do not open: {why}"))
            .hint(format!("`vmseal provider import` its backup after `vmseal provider remove {name}`")),
        None => Refusal::new(Code::NoProvider, format!("there is no key provider '{}'", shown(&name)))
            .hint("`vmseal provider list` shows those there are"),
    })
}

/// Keys of a provider that belong to a VM and are not missing.
pub(crate) async fn keys_of_vm(
    db: &mut SqliteConnection,
    provider: &str,
    vm_id: &str,
) -> Result<Vec<KekId>, StoreError> {
    let found: Vec<String> = sqlx::query_scalar(
        "SELECT kek_id FROM keys WHERE provider = $1 AND vm_id = $2 AND missing_since_ms IS NULL \
         ORDER BY created_ms DESC",
    )
    .bind(provider)
    .bind(vm_id)
    .fetch_all(db)
    .await?;
    Ok(found.iter().filter_map(|kek| unhex(kek).and_then(KekId::from_bytes)).collect())
}

/// One, as the API shows it.
pub(crate) async fn show(
    server: &Server,
    db: &mut SqliteConnection,
    name: &str,
) -> Result<Provider, Refusal> {
    let row = provider::get(db, name).await?.ok_or_else(|| Refusal::not_found("provider", name))?;
    Ok(to_api(server, db, row).await?)
}

/// All, as the API shows them.
pub(crate) async fn list(server: &Server, db: &mut SqliteConnection) -> Result<Vec<Provider>, Refusal> {
    let mut all = Vec::new();
    for row in provider::list(db).await? {
        all.push(to_api(server, db, row).await?);
    }
    Ok(all)
}

async fn to_api(
    server: &Server,
    db: &mut SqliteConnection,
    row: ProviderRow,
) -> Result<Provider, StoreError> {
    let generations = provider::generations(db, &row.name).await?;
    let usable = server.providers.get(&row.name).is_some_and(|p| p.current().is_some());
    Ok(Provider {
        uuid: row.uuid,
        kind: ProviderKind::Native,
        default: row.is_default != 0,
        usable,
        generations: generations
            .into_iter()
            .map(|g| Generation {
                number: g.number,
                created_ms: g.created_ms,
                backed_up_ms: g.backed_up_at_ms,
            })
            .collect(),
        keys: count(key::count_of(db, &row.name).await?),
        vms: key::vms_in_need(db, &row.name).await?,
        created_ms: row.created_ms,
        name: row.name,
    })
}

/// A provider's refusal, in the API's words.
pub(crate) fn refused(error: NativeError) -> Refusal {
    let code = match &error {
        NativeError::NotBackedUp { .. } | NativeError::BackupDue { .. } => Code::ProviderNotBackedUp,
        NativeError::NotNative { .. } | NativeError::NoSuchGeneration { .. } => Code::KeyMissing,
        NativeError::OtherProvider { .. } | NativeError::OtherKey { .. } => Code::Conflict,
        _ => Code::Failed,
    };
    let refusal = Refusal::new(code, causes(&error));
    match error {
        NativeError::NotBackedUp { provider } => {
            refusal.hint(format!("run `vmseal provider export {provider}` and keep the file"))
        }
        _ => refusal,
    }
}

/// Why a backup was not made or taken, in the API's words.
fn backup_refused(error: &BackupError) -> Refusal {
    let code = match error {
        BackupError::PasswordEmpty
        | BackupError::PasswordTooShort { .. }
        | BackupError::PasswordControlCharacter => Code::BadRequest,
        BackupError::OtherProvider { .. }
        | BackupError::OtherKey { .. }
        | BackupError::UnknownGeneration { .. } => Code::Conflict,
        BackupError::Time { .. } | BackupError::Memory(_) | BackupError::Library(_) => Code::Failed,
        _ => Code::Integrity,
    };
    let refusal = Refusal::new(code, causes(error));
    // What the client sent is wrong, not the server.
    if code == Code::Integrity {
        refusal.status(axum::http::StatusCode::UNPROCESSABLE_ENTITY)
    } else {
        refusal
    }
}

/// A KDK that was not sealed or opened, in the API's words.
fn kdk_refused(error: &KdkError) -> Refusal {
    Refusal::new(Code::Integrity, causes(error))
}
