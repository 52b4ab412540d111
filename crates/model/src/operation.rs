//! Every operation of the public API as a row: name, privilege, object, audit verb. An operation that has no row
//! cannot be served, and a row without an endpoint fails the server's tests.

use serde::{Deserialize, Serialize};

/// What a role may hold. The cryptographic ones carry vSphere's words after `Cryptographer.`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Privilege {
    /// Look at anything but secrets.
    Read,
    /// Cryptographer.Access: use an encrypted VM's disks.
    CryptoAccess,
    /// Cryptographer.EncryptNew.
    CryptoEncryptNew,
    /// Cryptographer.Encrypt.
    CryptoEncrypt,
    /// Cryptographer.Decrypt.
    CryptoDecrypt,
    /// Cryptographer.Migrate.
    CryptoMigrate,
    /// Cryptographer.Clone.
    CryptoClone,
    /// Cryptographer.AddDisk.
    CryptoAddDisk,
    /// Cryptographer.Recrypt.
    CryptoRecrypt,
    /// Cryptographer.ManageKeys.
    CryptoManageKeys,
    /// Cryptographer.ManageKeyServers.
    CryptoManageKeyServers,
    /// Cryptographer.ManageEncryptionPolicy.
    CryptoManageEncryptionPolicy,
    /// Cryptographer.RegisterVM.
    CryptoRegisterVm,
    /// Cryptographer.RegisterHost.
    CryptoRegisterHost,
    /// Cryptographer.ReadKeyServersInfo.
    CryptoReadKeyServersInfo,
    /// Start, stop, create VMs.
    VmOperate,
    /// Add and remove hosts.
    HostManage,
    /// Users, roles, grants.
    RoleManage,
    /// Read the audit.
    AuditRead,
}

/// On what an operation acts; names the object path that authorisation and audit use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ObjectKind {
    /// `/`
    Root,
    /// `/providers/<name>`
    Provider,
    /// `/hosts/<name>`
    Host,
    /// `/vms/<name>`
    Vm,
    /// `/tasks/<id>`
    Task,
}

/// One row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// `operationId` of the API.
    pub name: &'static str,
    /// What the caller's role must hold.
    pub privilege: Privilege,
    /// What it acts on.
    pub object: ObjectKind,
    /// Verb of the audit entry; empty for reads, which are not audited.
    pub audit: &'static str,
}

const fn row(name: &'static str, privilege: Privilege, object: ObjectKind, audit: &'static str) -> Operation {
    Operation { name, privilege, object, audit }
}

/// The table.
pub const OPERATIONS: &[Operation] = &[
    row("status", Privilege::Read, ObjectKind::Root, ""),
    row("doctor", Privilege::Read, ObjectKind::Root, ""),
    row("provider-list", Privilege::CryptoReadKeyServersInfo, ObjectKind::Root, ""),
    row("provider-show", Privilege::CryptoReadKeyServersInfo, ObjectKind::Provider, ""),
    row("provider-create", Privilege::CryptoManageKeyServers, ObjectKind::Root, "provider.create"),
    row("provider-export", Privilege::CryptoManageKeyServers, ObjectKind::Provider, "provider.export"),
    row(
        "provider-confirm-backup",
        Privilege::CryptoManageKeyServers,
        ObjectKind::Provider,
        "provider.backed-up",
    ),
    row("provider-import", Privilege::CryptoManageKeyServers, ObjectKind::Root, "provider.import"),
    row("provider-remove", Privilege::CryptoManageKeyServers, ObjectKind::Provider, "provider.remove"),
    row(
        "provider-set-default",
        Privilege::CryptoManageKeyServers,
        ObjectKind::Provider,
        "provider.set-default",
    ),
    row("host-list", Privilege::Read, ObjectKind::Root, ""),
    row("host-show", Privilege::Read, ObjectKind::Host, ""),
    row("host-join-token", Privilege::CryptoRegisterHost, ObjectKind::Root, "host.join-token"),
    row("host-remove", Privilege::HostManage, ObjectKind::Host, "host.remove"),
    row("vm-list", Privilege::Read, ObjectKind::Root, ""),
    row("vm-show", Privilege::Read, ObjectKind::Vm, ""),
    row("vm-create", Privilege::CryptoEncryptNew, ObjectKind::Root, "vm.create"),
    row("vm-encrypt", Privilege::CryptoEncrypt, ObjectKind::Vm, "vm.encrypt"),
    row("vm-decrypt", Privilege::CryptoDecrypt, ObjectKind::Vm, "vm.decrypt"),
    row("vm-repair", Privilege::VmOperate, ObjectKind::Vm, "vm.repair"),
    row("vm-adopt", Privilege::CryptoRegisterVm, ObjectKind::Vm, "vm.adopt"),
    row("disk-create", Privilege::CryptoEncryptNew, ObjectKind::Vm, "disk.create"),
    row("disk-set", Privilege::VmOperate, ObjectKind::Vm, "disk.set"),
    row("key-list", Privilege::CryptoReadKeyServersInfo, ObjectKind::Root, ""),
    row("task-list", Privilege::Read, ObjectKind::Root, ""),
    row("task-show", Privilege::Read, ObjectKind::Task, ""),
    row("task-cancel", Privilege::VmOperate, ObjectKind::Task, "task.cancel"),
    row("task-events", Privilege::Read, ObjectKind::Root, ""),
    row("audit-list", Privilege::AuditRead, ObjectKind::Root, ""),
    row("audit-verify", Privilege::AuditRead, ObjectKind::Root, ""),
    row("user-create", Privilege::RoleManage, ObjectKind::Root, "user.create"),
];

/// The row of this name.
pub fn find(name: &str) -> Option<&'static Operation> {
    OPERATIONS.iter().find(|o| o.name == name)
}

/// A role: a name and what it holds.
#[derive(Debug, Clone, Copy)]
pub struct Role {
    /// Its name as administrators know it.
    pub name: &'static str,
    /// Decides a privilege.
    pub holds: fn(Privilege) -> bool,
}

/// The built-in roles.
pub const ROLES: &[Role] = &[Role { name: "Administrator", holds: |_| true }];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_is_named_once() {
        for (i, a) in OPERATIONS.iter().enumerate() {
            assert!(OPERATIONS[i + 1..].iter().all(|b| a.name != b.name), "{}", a.name);
        }
    }

    #[test]
    fn audit_verb_stands_exactly_where_something_changes() {
        for o in OPERATIONS {
            let reads = matches!(
                o.name.rsplit('-').next(),
                Some("list" | "show" | "status" | "doctor" | "verify" | "events")
            );
            assert_eq!(o.audit.is_empty(), reads, "{}", o.name);
        }
    }
}
