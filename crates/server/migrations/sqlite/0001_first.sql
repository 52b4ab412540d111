-- Ids are UUID texts, times milliseconds since 1970, flags 0 or 1, key ids hexadecimal digits.

CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

CREATE TABLE hosts (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    machine_id TEXT NOT NULL,
    -- SHA-256 of the one certificate it may come with.
    certificate_sha256 TEXT NOT NULL UNIQUE,
    certificate_expires_ms BIGINT NOT NULL,
    joined_ms BIGINT NOT NULL,
    seen_ms BIGINT,
    version TEXT NOT NULL DEFAULT '',
    libvirt_uri TEXT NOT NULL DEFAULT '',
    secret_memory TEXT NOT NULL DEFAULT '',
    -- JSON list of {code, message, hint}.
    warnings TEXT NOT NULL DEFAULT '[]'
);

-- A secret is here as its SHA-256 only.
CREATE TABLE join_tokens (
    secret_sha256 TEXT PRIMARY KEY,
    by_whom TEXT NOT NULL,
    created_ms BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,
    used_ms BIGINT,
    host_id TEXT
);

-- What each host last reported.
CREATE TABLE vms (
    host_id TEXT NOT NULL REFERENCES hosts (id) ON DELETE CASCADE,
    domain_uuid TEXT NOT NULL,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    vm_id TEXT,
    unknown_ids BIGINT NOT NULL DEFAULT 0,
    transient BIGINT NOT NULL DEFAULT 0,
    -- JSON list of lines.
    unprotected TEXT NOT NULL DEFAULT '[]',
    locked_provider TEXT,
    locked_key TEXT,
    locked_since_ms BIGINT,
    locked_reason TEXT,
    locked_wanted BIGINT NOT NULL DEFAULT 0,
    seen_ms BIGINT NOT NULL,
    PRIMARY KEY (host_id, domain_uuid)
);
CREATE INDEX vms_by_name ON vms (name, host_id, domain_uuid);

CREATE TABLE disks (
    host_id TEXT NOT NULL,
    domain_uuid TEXT NOT NULL,
    target TEXT NOT NULL,
    source TEXT NOT NULL,
    format TEXT NOT NULL,
    encrypted BIGINT NOT NULL,
    disk_id TEXT,
    epoch BIGINT,
    epoch_unverified BIGINT NOT NULL,
    stored_bytes BIGINT NOT NULL,
    presented_bytes BIGINT NOT NULL,
    class TEXT NOT NULL,
    header TEXT,
    PRIMARY KEY (host_id, domain_uuid, target),
    FOREIGN KEY (host_id, domain_uuid) REFERENCES vms (host_id, domain_uuid) ON DELETE CASCADE
);

-- The recipients of the disks' key records.
CREATE TABLE disk_keys (
    host_id TEXT NOT NULL,
    domain_uuid TEXT NOT NULL,
    target TEXT NOT NULL,
    provider TEXT NOT NULL,
    kek_id TEXT NOT NULL,
    PRIMARY KEY (host_id, domain_uuid, target, provider, kek_id),
    FOREIGN KEY (host_id, domain_uuid, target) REFERENCES disks (host_id, domain_uuid, target) ON DELETE CASCADE
);
CREATE INDEX disk_keys_by_key ON disk_keys (provider, kek_id);

-- Which VM id belongs to which libvirt UUID, and on which host the VM is placed.
CREATE TABLE bindings (
    vm_id TEXT PRIMARY KEY,
    domain_uuid TEXT NOT NULL UNIQUE,
    host_id TEXT NOT NULL,
    bound_ms BIGINT NOT NULL
);

-- Lowest epoch a disk's record may have: the highest seen, with that record.
CREATE TABLE floors (
    disk_id TEXT PRIMARY KEY,
    vm_id TEXT NOT NULL,
    epoch BIGINT NOT NULL,
    record BLOB NOT NULL,
    seen_ms BIGINT NOT NULL
);

CREATE TABLE providers (
    name TEXT PRIMARY KEY,
    uuid TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    is_default BIGINT NOT NULL DEFAULT 0,
    created_ms BIGINT NOT NULL
);

CREATE TABLE generations (
    provider TEXT NOT NULL REFERENCES providers (name) ON DELETE CASCADE,
    number BIGINT NOT NULL,
    -- The KDK under the root key.
    sealed_kdk BLOB NOT NULL,
    created_ms BIGINT NOT NULL,
    backed_up_ms BIGINT,
    PRIMARY KEY (provider, number)
);

-- KEKs by id, never their bytes. A row outlives its provider: it says since when the key is missing.
CREATE TABLE keys (
    provider TEXT NOT NULL,
    kek_id TEXT NOT NULL,
    -- Which provider of that name; NULL if it was never there.
    provider_uuid TEXT,
    vm_id TEXT,
    domain_uuid TEXT,
    host_id TEXT,
    task_id TEXT,
    created_ms BIGINT NOT NULL,
    granted_ms BIGINT,
    missing_since_ms BIGINT,
    PRIMARY KEY (provider, kek_id)
);
CREATE INDEX keys_by_vm ON keys (vm_id);

CREATE TABLE tasks (
    id TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    host_id TEXT NOT NULL,
    host_name TEXT NOT NULL,
    domain_uuid TEXT,
    vm_name TEXT NOT NULL,
    step TEXT NOT NULL DEFAULT '',
    done_bytes BIGINT NOT NULL DEFAULT 0,
    total_bytes BIGINT NOT NULL DEFAULT 0,
    message TEXT NOT NULL DEFAULT '',
    code TEXT NOT NULL DEFAULT '',
    hint TEXT NOT NULL DEFAULT '',
    -- Id of the command that asks for its end.
    cancel_id TEXT,
    by_whom TEXT NOT NULL,
    created_ms BIGINT NOT NULL,
    updated_ms BIGINT NOT NULL,
    finished_ms BIGINT,
    deadline_ms BIGINT NOT NULL,
    -- The command's message of the agent protocol, without id and token.
    command BLOB NOT NULL
);
CREATE INDEX tasks_by_time ON tasks (created_ms, id);
CREATE INDEX tasks_unfinished ON tasks (host_id) WHERE finished_ms IS NULL;

CREATE TABLE audit (
    seq BIGINT PRIMARY KEY,
    at_ms BIGINT NOT NULL,
    who TEXT NOT NULL,
    verb TEXT NOT NULL,
    object TEXT NOT NULL,
    outcome TEXT NOT NULL,
    detail TEXT NOT NULL,
    hash TEXT NOT NULL,
    seal TEXT NOT NULL
);
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit
BEGIN
    SELECT RAISE(ABORT, 'the audit is only appended to');
END;
CREATE TRIGGER audit_is_not_deleted BEFORE DELETE ON audit
BEGIN
    SELECT RAISE(ABORT, 'the audit is only appended to');
END;

CREATE TABLE users (
    name TEXT PRIMARY KEY,
    password_hash TEXT NOT NULL,
    created_ms BIGINT NOT NULL
);

-- A role on an object path and all below it.
CREATE TABLE grants (
    user_name TEXT NOT NULL REFERENCES users (name) ON DELETE CASCADE,
    role TEXT NOT NULL,
    path TEXT NOT NULL,
    PRIMARY KEY (user_name, role, path)
);

CREATE TABLE sessions (
    token_sha256 TEXT PRIMARY KEY,
    user_name TEXT NOT NULL REFERENCES users (name) ON DELETE CASCADE,
    created_ms BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL
);

-- Answers to give again. Sealed, since an answer may hold a secret.
CREATE TABLE idempotency (
    who TEXT NOT NULL,
    request_key TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    status BIGINT NOT NULL,
    sealed_body BLOB NOT NULL,
    created_ms BIGINT NOT NULL,
    PRIMARY KEY (who, request_key)
);
