//! Which VM is meant, on which host, and how it is shown.

use sqlx::SqliteConnection;
use vmseal_api::vm::{Locked, Vm};
use vmseal_model::{
    refusal::Code,
    state::{Coverage, VmState},
};

use crate::{
    refusal::{Refusal, shown},
    server::Server,
    store::{StoreError, disk, host, vm, vm::VmRow, word},
};

/// The one VM of this name, id or UUID.
pub(super) async fn one(db: &mut SqliteConnection, name: &str) -> Result<VmRow, Refusal> {
    let mut found = vm::find(db, name).await?;
    if found.len() > 1 {
        let line = |row: &VmRow| format!("{} on host {}, UUID {}", row.name, row.host_name, row.domain_uuid);
        return Err(Refusal::new(
            Code::Conflict,
            format!("{} VMs are called '{}'", found.len(), shown(name)),
        )
        .hint("name the one you mean by its UUID")
        .details(found.iter().map(line).collect()));
    }
    found.pop().ok_or_else(|| Refusal::not_found("VM", name))
}

/// Id and name of the host of this name, or of the only one.
pub(super) async fn host(server: &Server, name: Option<&str>) -> Result<(String, String), Refusal> {
    let mut db = server.store.read().await?;
    if let Some(name) = name {
        let row = host::find(&mut db, name).await?.ok_or_else(|| Refusal::not_found("host", name))?;
        return Ok((row.id, row.name));
    }
    let mut all = host::list(&mut db).await?;
    match (all.pop(), all.is_empty()) {
        (Some(only), true) => Ok((only.id, only.name)),
        (None, _) => Err(Refusal::new(Code::NotFound, "there is no host yet").hint("`vmseal host add`")),
        _ => Err(Refusal::bad_request("there are several hosts: say on which").hint("`--host NAME`")),
    }
}

/// A VM, as the API shows it.
pub(super) async fn to_api(server: &Server, db: &mut SqliteConnection, row: VmRow) -> Result<Vm, StoreError> {
    let disks = disk::of_vm(db, &row.host_id, &row.domain_uuid).await?;
    let reported: VmState = word("VM state", &row.state)?;
    let state = if server.sessions.is_connected(&row.host_id) { reported } else { VmState::Unknown };
    let locked = row.locked_key.map(|key| Locked {
        provider: row.locked_provider.unwrap_or_default(),
        key,
        since_ms: row.locked_since_ms,
        reason: row.locked_reason.unwrap_or_default(),
        wanted: row.locked_wanted != 0,
    });
    Ok(Vm {
        coverage: Coverage::of(disks.iter().filter(|d| d.encrypted).count(), disks.len()),
        id: row.vm_id,
        domain_uuid: row.domain_uuid,
        name: row.name,
        host: row.host_name,
        state,
        locked,
        disks,
        unprotected: serde_json::from_str(&row.unprotected)
            .map_err(|_| StoreError::row("list of unprotected things", &row.unprotected))?,
        transient: row.transient != 0,
        unknown_ids: row.unknown_ids != 0,
        task: row.task_id,
        seen_ms: row.seen_ms,
    })
}

/// What counts for its ETag: not when it was last heard of.
pub(super) fn for_tag(vm: &Vm) -> Vm {
    Vm { seen_ms: 0, ..vm.clone() }
}

/// The name in domain XML: a label for lists, before the host has read the XML properly.
pub(super) fn name_in(xml: &str) -> Option<String> {
    let (_, rest) = xml.split_once("<name>")?;
    let (name, _) = rest.split_once("</name>")?;
    let name: String = name.trim().chars().filter(|c| !c.is_control()).take(256).collect();
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_is_found_in_domain_xml_and_nowhere_else() {
        assert_eq!(name_in("<domain type='kvm'>\n  <name>web01</name>"), Some("web01".into()));
        assert_eq!(name_in("<domain><name> </name></domain>"), None);
        assert_eq!(name_in("<name>unfinished"), None);
        assert_eq!(name_in(""), None);
    }
}
