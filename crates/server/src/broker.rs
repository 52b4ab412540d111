//! The key broker: decides whether a host gets a KEK, and gives it. The only file of the server that handles one.
//!
//! In goes a host's request; out goes a grant, HPKE-sealed to that host's session, or a refusal with its reason. Every
//! one of either is in the audit before it leaves. A host gets the keys of VMs placed on it, and those allocated for
//! its running tasks; asking for another's raises an alarm.

use vmseal_api::agent::{
    KEY_GRANT_INFO,
    v1::{KeyGrant, KeyRefused, KeyRequest, to_agent},
};
use vmseal_keys::{GrantError, Kek, seal_to};
use vmseal_model::{
    id::{DomainUuid, HostId, KekId, ProviderId, TaskId, VmId},
    refusal::Code,
};
use vmseal_provider::NativeError;

use crate::{
    audit::{DONE, Entry},
    gate::Host,
    placement::{self, Placement},
    refusal::causes,
    server::Server,
    store::{
        StoreError, Write, host, key,
        key::{KeyRow, column},
        task, vm,
    },
};

/// A request whose fields read.
struct Asked {
    provider: ProviderId,
    kek: KekId,
    domain: DomainUuid,
    vm: Option<VmId>,
    task: Option<TaskId>,
}

/// Why a key is not given.
struct No {
    code: Code,
    message: String,
    since_ms: i64,
    /// Somebody asked for what is another's.
    alarm: bool,
}

impl No {
    fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), since_ms: 0, alarm: false }
    }

    fn alarm(message: impl Into<String>) -> Self {
        Self { alarm: true, ..Self::new(Code::Forbidden, message) }
    }
}

impl From<StoreError> for No {
    fn from(error: StoreError) -> Self {
        tracing::error!(error = causes(&error), "database, while a key was asked for");
        Self::new(Code::Failed, error.to_string())
    }
}

/// Answers a host's request for a key.
pub(crate) async fn answer(
    server: &Server,
    host: &Host,
    session_key: &[u8; 32],
    request: KeyRequest,
) -> to_agent::Body {
    let decided = decide(server, host, session_key, &request).await;
    match decided {
        Ok((enc, sealed_kek)) => to_agent::Body::KeyGrant(KeyGrant {
            request_id: request.request_id,
            provider: request.provider,
            kek_id: request.kek_id,
            enc,
            sealed_kek,
        }),
        Err(no) => to_agent::Body::KeyRefused(KeyRefused {
            request_id: request.request_id,
            provider: request.provider,
            kek_id: request.kek_id,
            code: no.code.as_str().to_owned(),
            message: no.message,
            since_ms: no.since_ms,
        }),
    }
}

async fn decide(
    server: &Server,
    host: &Host,
    session_key: &[u8; 32],
    request: &KeyRequest,
) -> Result<(Vec<u8>, Vec<u8>), No> {
    let asked = read(request)?;
    let mut write = server.store.write().await?;
    let now_ms = write.now_ms;
    let granted = match authorise(&mut write, host, &asked).await {
        Ok(row) => grant(server, host, session_key, &asked, row, &mut write).await,
        Err(no) => Err(no),
    };
    let who = host.who();
    let object = format!("/providers/{}", asked.provider);
    let for_whom = match asked.vm {
        Some(vm) => format!("key {} for VM {vm}, domain {}", asked.kek, asked.domain),
        None => format!("key {} for domain {}", asked.kek, asked.domain),
    };
    let entry = Entry { who: &who, verb: "key.grant", object: &object, outcome: DONE, detail: &for_whom };
    match &granted {
        Ok(_) => write.audit(&entry).await?,
        Err(no) => {
            let detail = format!("{for_whom}: {}", no.message);
            let verb = if no.alarm { "alarm.key-request" } else { "key.refuse" };
            if no.alarm {
                tracing::warn!(host = host.name, detail, "a host asked for a key that is not its own");
            }
            write.audit(&Entry { verb, outcome: no.code.as_str(), detail: &detail, ..entry }).await?;
        }
    }
    tracing::debug!(host = host.name, key = %asked.kek, granted = granted.is_ok(), at = now_ms, "key asked for");
    // Refusals are written down too. Only what is durable is given.
    write.commit().await?;
    granted
}

fn read(request: &KeyRequest) -> Result<Asked, No> {
    let bad = |what: &str| No::new(Code::BadRequest, format!("the {what} of a key request does not read"));
    let optional = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    Ok(Asked {
        provider: request.provider.parse().map_err(|_| bad("provider"))?,
        kek: KekId::from_bytes(request.kek_id.clone()).ok_or_else(|| bad("key id"))?,
        domain: request.domain_uuid.parse().map_err(|_| bad("domain UUID"))?,
        vm: optional(&request.vm_id).map(|t| t.parse()).transpose().map_err(|_| bad("VM id"))?,
        task: optional(&request.task_id).map(|t| t.parse()).transpose().map_err(|_| bad("task id"))?,
    })
}

/// The key's row as it will be if it is given. Places the VM on the host where that is due.
async fn authorise(write: &mut Write, host: &Host, asked: &Asked) -> Result<KeyRow, No> {
    // Its session may be from before it was removed.
    if host::name_of(write, &host.id.to_string()).await?.is_none() {
        return Err(No::new(Code::Forbidden, format!("host {} was removed", host.name)));
    }
    let (provider, kek_id) = (asked.provider.as_str(), column(&asked.kek));
    let known = key::get(write, provider, &kek_id).await?;
    if let (Some(task_id), Some(row)) = (asked.task, &known)
        && row.task_id.as_deref() == Some(task_id.to_string().as_str())
    {
        return for_task(write, host, task_id, row).await;
    }
    let vm = match asked.vm {
        Some(vm) => Some(vm.to_string()),
        None => own_key_of_task(write, host, asked, known.as_ref()).await?,
    };
    let Some(vm) = vm else {
        return Err(No::alarm(format!(
            "host {} may not have key {}: it is not that of one of its tasks",
            host.name, asked.kek
        )));
    };
    let domain = asked.domain.to_string();
    place(write, host, &vm, &domain).await?;
    let Some(row) = known else {
        // The first to ask binds it: the database was lost, or the provider came from elsewhere.
        return Ok(KeyRow {
            provider: provider.to_owned(),
            kek_id,
            vm_id: Some(vm),
            domain_uuid: Some(domain),
            created_ms: write.now_ms,
            ..KeyRow::default()
        });
    };
    let reserved_here = row.vm_id.is_none()
        && row.host_id.as_deref().is_none_or(|id| id == host.id.to_string())
        && row.domain_uuid.as_deref().is_none_or(|d| d == domain);
    if row.vm_id.as_deref() != Some(&vm) && !reserved_here {
        return Err(No::alarm(format!("key {} belongs to another VM than {vm}", asked.kek)));
    }
    Ok(KeyRow { vm_id: Some(vm), domain_uuid: Some(domain), ..row })
}

/// The VM of a key that a running task on that VM asks for, without saying which VM it is.
async fn own_key_of_task(
    write: &mut Write,
    host: &Host,
    asked: &Asked,
    known: Option<&KeyRow>,
) -> Result<Option<String>, No> {
    let (Some(id), Some(row)) = (asked.task, known) else { return Ok(None) };
    let task = task::get(write, &id.to_string()).await?;
    let on_it = task.is_some_and(|t| {
        t.host_id == host.id.to_string()
            && t.finished_ms.is_none()
            && t.domain_uuid.as_deref() == Some(asked.domain.to_string().as_str())
    });
    Ok(row.vm_id.clone().filter(|_| on_it))
}

async fn for_task(write: &mut Write, host: &Host, id: TaskId, row: &KeyRow) -> Result<KeyRow, No> {
    let task = task::get(write, &id.to_string()).await?;
    let runs_here = task.is_some_and(|t| t.host_id == host.id.to_string() && t.finished_ms.is_none());
    if !runs_here {
        return Err(No::alarm(format!("task {id} does not run on host {}", host.name)));
    }
    Ok(row.clone())
}

async fn place(write: &mut Write, host: &Host, vm: &str, domain: &str) -> Result<(), No> {
    let host_id = host.id.to_string();
    match placement::of(write, &host_id, vm, domain).await? {
        Placement::Here => Ok(()),
        Placement::New | Placement::Left { .. } if vm::is_on(write, &host_id, domain).await? => {
            let now_ms = write.now_ms;
            Ok(placement::place(write, &host_id, vm, domain, now_ms).await?)
        }
        Placement::New | Placement::Left { .. } => Err(No::new(
            Code::UnknownVm,
            format!("host {} has not reported domain {domain} yet: try again", host.name),
        )),
        Placement::Elsewhere { host: other } => {
            let other = host::name_of(write, &other).await?.unwrap_or(other);
            Err(No::alarm(format!("VM {vm} is on host {other}, not on {}", host.name)))
        }
        Placement::Contradicted => Err(No::new(
            Code::UnknownVm,
            format!(
                "VM {vm} and domain {domain} are not known to belong together: if this VM is a copy or was given a \
                 new UUID, run `vmseal vm adopt`"
            ),
        )),
    }
}

async fn grant(
    server: &Server,
    host: &Host,
    session_key: &[u8; 32],
    asked: &Asked,
    row: KeyRow,
    write: &mut Write,
) -> Result<(Vec<u8>, Vec<u8>), No> {
    let now_ms = write.now_ms;
    let provider = server.providers.get(asked.provider.as_str());
    // A provider made anew under an old name has other keys under the same ids.
    let same = |uuid: String| row.provider_uuid.as_ref().is_none_or(|known| *known == uuid);
    let kek = match &provider {
        Some(provider) if same(provider.uuid().to_string()) => {
            provider.derive(&asked.kek).map_err(|e| match e {
                NativeError::NoSuchGeneration { generation, .. } => {
                    format!("the provider lacks generation {generation}")
                }
                other => causes(&other),
            })
        }
        Some(_) => Err("another provider has this name now".to_owned()),
        None => Err(match server.providers.broken().get(asked.provider.as_str()) {
            Some(why) => format!("the provider's own keys do not open: {why}"),
            None => "there is no provider of this name; `vmseal provider import` brings it back".to_owned(),
        }),
    };
    let kek: Kek = match kek {
        Ok(kek) => kek,
        Err(why) => {
            let since_ms = row.missing_since_ms.unwrap_or(now_ms);
            key::put(write, &KeyRow { missing_since_ms: Some(since_ms), ..row }).await?;
            let message = format!("key {} of provider {} is missing: {why}", asked.kek, asked.provider);
            return Err(No { since_ms, ..No::new(Code::KeyMissing, message) });
        }
    };
    let aad = associated_data(host.id, &asked.provider, &asked.kek);
    let sealed = seal_to(session_key, KEY_GRANT_INFO, &aad, kek.expose()).map_err(|error: GrantError| {
        No::new(
            Code::Failed,
            format!("the key could not be sealed to the host's session: {}", causes(&error)),
        )
    })?;
    key::put(
        write,
        &KeyRow {
            provider_uuid: provider.map(|p| p.uuid().to_string()),
            host_id: Some(host.id.to_string()),
            granted_ms: Some(now_ms),
            missing_since_ms: None,
            ..row
        },
    )
    .await?;
    Ok(sealed)
}

/// Host id ‖ length of the provider's name (1 byte) ‖ name ‖ key id.
fn associated_data(host: HostId, provider: &ProviderId, kek: &KekId) -> Vec<u8> {
    let mut aad = host.to_bytes().to_vec();
    // A name has at most 64 bytes.
    aad.push(u8::try_from(provider.as_str().len()).unwrap_or(u8::MAX));
    aad.extend_from_slice(provider.as_str().as_bytes());
    aad.extend_from_slice(kek.as_bytes());
    aad
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn associated_data_is_laid_out_as_the_protocol_says() {
        let kek = KekId::from_bytes(b"key".to_vec()).unwrap();
        let aad = associated_data(HostId::from_bytes([7; 16]), &"main".parse().unwrap(), &kek);
        assert_eq!(aad, [&[7; 16][..], &[4], b"main", b"key"].concat());
    }
}
