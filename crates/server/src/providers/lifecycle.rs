//! What is done to providers: made, backed up, brought back, removed.

use std::sync::Arc;

use axum::http::StatusCode;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use sqlx::SqliteConnection;
use vmseal_api::{
    agent::v1::{KeysAvailable, to_agent},
    provider::{
        ConfirmBackup, CreateProvider, ExportProvider, ImportProvider, ImportedProvider, ProviderBackup,
        ProviderKind, RemovedProvider,
    },
};
use vmseal_model::{
    id::{KekId, ProviderId},
    refusal::Code,
};
use vmseal_provider::{BackupError, NativeProvider, verify_backup};

use super::{backup_refused, kdk_refused, open, refused, show};
use crate::{
    authz::{Change, Permit},
    digest::unhex,
    http::{answer::Answer, call::Call},
    refusal::Refusal,
    server::Server,
    store::{StoreError, count, key, provider, provider::ProviderRow},
};

/// A name that is a word of the API's paths.
const RESERVED: &str = "import";

/// Makes a provider.
pub(crate) async fn create(server: &Server, permit: &Permit, new: CreateProvider) -> Result<Answer, Refusal> {
    let ProviderKind::Native = new.kind;
    let id: ProviderId = new.name.parse().map_err(|e| Refusal::bad_request(format!("{e}")))?;
    if id.as_str() == RESERVED {
        return Err(Refusal::bad_request("a provider cannot be called 'import'"));
    }
    let mut change = permit.begin().await?;
    if provider::get(&mut change, id.as_str()).await?.is_some() {
        return Err(Refusal::new(Code::Exists, format!("there already is a provider {id}")));
    }
    name_is_free(&mut change, id.as_str(), None).await?;
    let made = NativeProvider::create(id, change.now_ms()).map_err(refused)?;
    insert(server, &mut change, &made).await?;
    if new.default {
        provider::set_default(&mut change, made.id().as_str()).await?;
    }
    change.on(format!("/providers/{}", made.id()));
    let shown = show(server, &mut change, made.id().as_str()).await?;
    let answer = change.commit(StatusCode::CREATED, &shown, &format!("native, {}", made.uuid())).await?;
    server.providers.put(made);
    Ok(answer)
}

/// Refuses a name under which keys of another provider are known: its keys would be taken for theirs.
async fn name_is_free(db: &mut SqliteConnection, name: &str, uuid: Option<&str>) -> Result<(), Refusal> {
    // Hosts told of keys whose provider was never here: only its backup can be it.
    if uuid.is_none() && key::count_of(db, name).await? > 0 {
        return Err(Refusal::new(
            Code::Exists,
            format!("keys of a lost provider {name} are known, and records name it"),
        )
        .hint("import that provider's backup, or choose another name"));
    }
    match key::provider_uuid(db, name).await? {
        Some(known) if Some(known.as_str()) != uuid => Err(Refusal::new(
            Code::Exists,
            format!("keys of a lost provider {name} ({known}) are still known, and records name it"),
        )
        .hint("import that provider's backup, or choose another name")),
        _ => Ok(()),
    }
}

/// Stores a provider that was not there; the first one becomes the default.
async fn insert(server: &Server, change: &mut Change<'_>, new: &NativeProvider) -> Result<(), Refusal> {
    let first = provider::default_name(change).await?.is_none();
    let row = ProviderRow {
        name: new.id().as_str().to_owned(),
        uuid: new.uuid().to_string(),
        kind: ProviderKind::Native.as_str().to_owned(),
        is_default: i64::from(first),
        created_ms: change.now_ms(),
    };
    provider::insert(change, &row).await?;
    let sealed = new.seal_for_store(&server.root).map_err(|e| kdk_refused(&e))?;
    Ok(provider::put_generations(change, &row.name, &sealed).await?)
}

/// Gives a backup. It counts for nothing before it came back.
pub(crate) async fn export(
    server: &Server,
    permit: &Permit,
    name: &str,
    asked: ExportProvider,
) -> Result<Answer, Refusal> {
    let provider = running(server, name)?;
    let now_ms = server.clock.now_ms();
    let p12 = slowly(move || vmseal_provider::export(&provider, asked.password.expose(), now_ms)).await?;
    let backup =
        ProviderBackup { file_name: format!("vmseal-provider-{name}.p12"), p12: STANDARD.encode(p12) };
    permit.begin().await?.commit(StatusCode::OK, &backup, "").await
}

/// Takes a backup as it was read back, opens it, and lets the provider be used if it is good.
pub(crate) async fn confirm_backup(
    server: &Server,
    permit: &Permit,
    call: &Call,
    name: &str,
    backup: ConfirmBackup,
) -> Result<Answer, Refusal> {
    let provider = running(server, name)?;
    let file = decode(&backup.p12)?;
    let verified = slowly(move || verify_backup(&file, backup.password.expose(), &provider)).await?;
    let mut change = permit.begin().await?;
    let now_ms = change.now_ms();
    call.if_match(&show(server, &mut change, name).await?)?;
    let mut provider = reopen(server, &mut change, name).await?;
    let marked = provider.mark_backed_up(&verified, now_ms).map_err(refused)?;
    let sealed = provider.seal_for_store(&server.root).map_err(|e| kdk_refused(&e))?;
    provider::put_generations(&mut change, name, &sealed).await?;
    let mut shown = show(server, &mut change, name).await?;
    shown.usable = provider.current().is_some();
    let detail = format!("generations {:?}, newly {marked:?}", verified.generations());
    let answer = change.commit(StatusCode::OK, &shown, &detail).await?;
    server.providers.put(provider);
    Ok(answer)
}

/// Brings a provider back, or generations it lacks.
pub(crate) async fn import(
    server: &Server,
    permit: &Permit,
    asked: ImportProvider,
) -> Result<Answer, Refusal> {
    let ImportProvider { p12, password, dry_run } = asked;
    let file = decode(&p12)?;
    let imported = slowly(move || vmseal_provider::import(&file, password.expose())).await?;
    let name = imported.id().as_str().to_owned();
    let mut change = permit.begin().await?;
    change.on(format!("/providers/{name}"));
    let (provider, mut report) = take(server, &mut change, imported).await?;
    report.dry_run = dry_run;
    if dry_run {
        // What was tried is undone; that it was asked is told.
        drop(change);
        let mut change = permit.begin().await?;
        change.on(format!("/providers/{name}"));
        return change.commit(StatusCode::OK, &report, "dry run").await;
    }
    let detail = format!("generations added {:?}, keys back {}", report.generations_added, report.keys_back);
    let answer = change.commit(StatusCode::OK, &report, &detail).await?;
    server.providers.put(provider);
    server.sessions.send_all(&to_agent::Body::KeysAvailable(KeysAvailable { provider: name }));
    Ok(answer)
}

async fn take(
    server: &Server,
    change: &mut Change<'_>,
    imported: NativeProvider,
) -> Result<(NativeProvider, ImportedProvider), Refusal> {
    let (name, uuid) = (imported.id().as_str().to_owned(), imported.uuid().to_string());
    let there = provider::get(change, &name).await?;
    let new = there.is_none();
    let (provider, generations_added) = match there {
        Some(row) if row.uuid != uuid => {
            return Err(Refusal::new(
                Code::Exists,
                format!("provider {name} is {}; the backup is of another one of that name, {uuid}", row.uuid),
            )
            .hint("a name cannot belong to two providers: records name their provider by it"));
        }
        Some(_) => {
            let mut provider = reopen(server, change, &name).await?;
            let added = provider.adopt_missing(imported).map_err(refused)?;
            let sealed = provider.seal_for_store(&server.root).map_err(|e| kdk_refused(&e))?;
            provider::put_generations(change, &name, &sealed).await?;
            (provider, added)
        }
        None => {
            name_is_free(change, &name, Some(&uuid)).await?;
            insert(server, change, &imported).await?;
            let added = imported.generations().iter().map(vmseal_provider::Generation::number).collect();
            (imported, added)
        }
    };
    let keys_back = keys_back(change, &provider).await?;
    let vms = key::vms_in_need(change, &name).await?;
    let report = ImportedProvider { name, uuid, new, generations_added, keys_back, vms, dry_run: false };
    Ok((provider, report))
}

/// Notes which missing keys may be had again.
async fn keys_back(change: &mut Change<'_>, provider: &NativeProvider) -> Result<u32, StoreError> {
    let (name, uuid) = (provider.id().as_str(), provider.uuid().to_string());
    let mut back = 0;
    for kek_id in key::missing(change, name).await? {
        let generation = unhex(&kek_id).and_then(KekId::from_bytes).and_then(|kek| kek.as_native());
        if generation.is_some_and(|(number, _)| provider.generation(number).is_some()) {
            key::is_back(change, name, &kek_id, &uuid).await?;
            back += 1;
        }
    }
    Ok(count(back))
}

/// Removes a provider; one whose keys are in use only if the caller says that they may be lost.
pub(crate) async fn remove(
    server: &Server,
    permit: &Permit,
    call: &Call,
    name: &str,
    danger_lose_keys: bool,
) -> Result<Answer, Refusal> {
    let mut change = permit.begin().await?;
    call.if_match(&show(server, &mut change, name).await?)?;
    let used = key::in_use(&mut change, name).await?.len();
    let vms = key::vms_in_need(&mut change, name).await?;
    if used > 0 && !danger_lose_keys {
        return Err(Refusal::new(
            Code::ProviderInUse,
            format!("{used} keys of provider {name} are in use; without it these VMs never start again"),
        )
        .hint("decrypt them first, or lose them: `--danger-lose-keys`; a backup brings the keys back")
        .details(vms));
    }
    let now_ms = change.now_ms();
    key::all_missing(&mut change, name, now_ms).await?;
    provider::remove(&mut change, name).await?;
    let keys_lost = u32::try_from(used).unwrap_or(u32::MAX);
    let removed = RemovedProvider { name: name.to_owned(), keys_lost, vms };
    let detail = format!("keys in use {used}, VMs {:?}", removed.vms);
    let answer = change.commit(StatusCode::OK, &removed, &detail).await?;
    server.providers.remove(name);
    server.store.forget_deleted().await?;
    Ok(answer)
}

/// Makes a provider the default.
pub(crate) async fn set_default(
    server: &Server,
    permit: &Permit,
    call: &Call,
    name: &str,
) -> Result<Answer, Refusal> {
    let mut change = permit.begin().await?;
    call.if_match(&show(server, &mut change, name).await?)?;
    provider::set_default(&mut change, name).await?;
    let shown = show(server, &mut change, name).await?;
    change.commit(StatusCode::OK, &shown, "").await
}

fn running(server: &Server, name: &str) -> Result<Arc<NativeProvider>, Refusal> {
    server.providers.get(name).ok_or_else(|| match server.providers.broken().get(name) {
        Some(why) => Refusal::new(Code::Integrity, format!("the keys of provider {name} do not open: {why}")),
        None => Refusal::not_found("provider", name),
    })
}

/// The provider from its rows: what is changed is what is stored.
async fn reopen(server: &Server, change: &mut Change<'_>, name: &str) -> Result<NativeProvider, Refusal> {
    let row = provider::get(change, name).await?.ok_or_else(|| Refusal::not_found("provider", name))?;
    open(change, &row, &server.root).await?.map_err(|e| kdk_refused(&e))
}

fn decode(p12: &str) -> Result<Vec<u8>, Refusal> {
    STANDARD.decode(p12.trim()).map_err(|_| Refusal::bad_request("'p12' is not base64"))
}

/// Does on a thread of its own what takes a second.
async fn slowly<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BackupError> + Send + 'static,
) -> Result<T, Refusal> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|e| backup_refused(&e)),
        Err(_) => Err(Refusal::new(Code::Failed, "the backup could not be processed")),
    }
}
