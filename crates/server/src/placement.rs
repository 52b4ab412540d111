//! On which host a VM is: what decides who gets its keys and who may raise its floors.
//!
//! A VM id and a libvirt UUID are bound to each other and to a host when that host first reports both. Another host
//! that reports the pair gets it once the first no longer has the domain; until then it gets nothing. A pair that
//! contradicts a binding is nobody's before `vm adopt`.

use sqlx::SqliteConnection;

use crate::store::{StoreError, binding, binding::Binding, vm};

/// Where a VM is, as seen from one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// On this host.
    Here,
    /// Neither of its ids was ever seen.
    New,
    /// It was on that host, which no longer has it.
    Left {
        /// The host's id.
        from: String,
    },
    /// It is on that host.
    Elsewhere {
        /// The host's id.
        host: String,
    },
    /// Its ids belong to other VMs.
    Contradicted,
}

impl Placement {
    /// Whether this host may have it as things are.
    pub fn may_be_here(&self) -> bool {
        matches!(self, Self::Here | Self::New | Self::Left { .. })
    }
}

/// Where the VM with these ids is, as seen from `host_id`.
pub async fn of(
    db: &mut SqliteConnection,
    host_id: &str,
    vm_id: &str,
    domain_uuid: &str,
) -> Result<Placement, StoreError> {
    let bound = binding::touching(&mut *db, vm_id, domain_uuid).await?;
    Ok(match bound.as_slice() {
        [] => Placement::New,
        [one] if one.vm_id == vm_id && one.domain_uuid == domain_uuid => {
            if one.host_id == host_id {
                Placement::Here
            } else if vm::is_on(db, &one.host_id, domain_uuid).await? {
                Placement::Elsewhere { host: one.host_id.clone() }
            } else {
                Placement::Left { from: one.host_id.clone() }
            }
        }
        _ => Placement::Contradicted,
    })
}

/// Places the VM on this host, in place of whatever was bound.
pub async fn place(
    db: &mut SqliteConnection,
    host_id: &str,
    vm_id: &str,
    domain_uuid: &str,
    now_ms: i64,
) -> Result<(), StoreError> {
    let here =
        Binding { vm_id: vm_id.to_owned(), domain_uuid: domain_uuid.to_owned(), host_id: host_id.to_owned() };
    binding::put(db, &here, now_ms).await
}
