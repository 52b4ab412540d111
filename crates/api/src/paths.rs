//! Where the endpoints are. `{…}` is filled by [`fill`]. The comment names the operation (`operationId`) of each method.

/// GET `status`.
pub const STATUS: &str = "/v1/status";
/// GET `doctor`.
pub const DOCTOR: &str = "/v1/doctor";
/// POST `login`, DELETE `logout`. The only ones without a row in the operation table: they act on nothing but the caller.
pub const LOGIN: &str = "/v1/login";
/// GET `provider-list`, POST `provider-create`.
pub const PROVIDERS: &str = "/v1/providers";
/// GET `provider-show`, DELETE `provider-remove` (`?danger_lose_keys=true`).
pub const PROVIDER: &str = "/v1/providers/{name}";
/// POST `provider-export`.
pub const PROVIDER_EXPORT: &str = "/v1/providers/{name}/export";
/// POST `provider-confirm-backup`.
pub const PROVIDER_CONFIRM_BACKUP: &str = "/v1/providers/{name}/confirm-backup";
/// POST `provider-set-default`.
pub const PROVIDER_DEFAULT: &str = "/v1/providers/{name}/default";
/// POST `provider-import`. No provider can have this name.
pub const PROVIDER_IMPORT: &str = "/v1/providers/import";
/// GET `host-list`.
pub const HOSTS: &str = "/v1/hosts";
/// POST `host-join-token`. No host can have this name.
pub const JOIN_TOKENS: &str = "/v1/hosts/join-tokens";
/// GET `host-show`, DELETE `host-remove`. By name or id.
pub const HOST: &str = "/v1/hosts/{name}";
/// GET `vm-list` (`?limit=&cursor=`), POST `vm-create`.
pub const VMS: &str = "/v1/vms";
/// GET `vm-show`. By name, VM id or libvirt UUID, here and below.
pub const VM: &str = "/v1/vms/{name}";
/// POST `vm-encrypt`.
pub const VM_ENCRYPT: &str = "/v1/vms/{name}/encrypt";
/// POST `vm-decrypt`.
pub const VM_DECRYPT: &str = "/v1/vms/{name}/decrypt";
/// POST `vm-repair`.
pub const VM_REPAIR: &str = "/v1/vms/{name}/repair";
/// POST `vm-adopt`.
pub const VM_ADOPT: &str = "/v1/vms/{name}/adopt";
/// POST `disk-create`.
pub const VM_DISKS: &str = "/v1/vms/{name}/disks";
/// POST `disk-set`.
pub const VM_DISK_SET: &str = "/v1/vms/{name}/disks/set";
/// GET `key-list`.
pub const KEYS: &str = "/v1/keys";
/// GET `task-list` (`?limit=&cursor=`).
pub const TASKS: &str = "/v1/tasks";
/// GET `task-show`.
pub const TASK: &str = "/v1/tasks/{id}";
/// POST `task-cancel`.
pub const TASK_CANCEL: &str = "/v1/tasks/{id}/cancel";
/// GET `task-events`: server-sent events named `task`, the data of each a [`crate::task::Task`].
pub const EVENTS: &str = "/v1/events";
/// GET `audit-list` (`?limit=&after=`).
pub const AUDIT: &str = "/v1/audit";
/// GET `audit-verify`.
pub const AUDIT_VERIFY: &str = "/v1/audit/verify";
/// POST `user-create`.
pub const USERS: &str = "/v1/users";

/// Header by which a POST may be sent again without being done again; kept for 24 hours.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// File name of the administrators' socket in the run directory.
pub const API_SOCKET: &str = "api.sock";
/// Port of the HTTPS API.
pub const API_PORT: u16 = 7443;
/// Port of the agents' gate.
pub const AGENT_PORT: u16 = 7444;

/// A path with its one `{…}` replaced by `value`, percent-encoded.
pub fn fill(path: &str, value: &str) -> String {
    let mut out = String::with_capacity(path.len() + value.len());
    let (before, rest) = path.split_once('{').unwrap_or((path, ""));
    out.push_str(before);
    if let Some((_, after)) = rest.split_once('}') {
        encode(value, &mut out);
        out.push_str(after);
    }
    out
}

/// `path?name=value`, percent-encoded; may be applied again.
pub fn with_query(path: &str, name: &str, value: &str) -> String {
    let mut out = String::from(path);
    out.push(if path.contains('?') { '&' } else { '?' });
    encode(name, &mut out);
    out.push('=');
    encode(value, &mut out);
    out
}

fn encode(text: &str, out: &mut String) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push(char::from(HEX[usize::from(byte >> 4)]));
            out.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_with_slash_and_space_stays_one_segment() {
        assert_eq!(fill(VM_ENCRYPT, "a/b c"), "/v1/vms/a%2Fb%20c/encrypt");
        assert_eq!(fill(STATUS, "ignored"), STATUS);
        assert_eq!(
            with_query(&with_query(VMS, "limit", "5"), "cursor", "a&b"),
            "/v1/vms?limit=5&cursor=a%26b"
        );
    }
}
