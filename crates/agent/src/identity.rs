//! Who this host is to the server: its key, certificate, the server's CA and address, as files under `pki/` of the
//! state directory.
//!
//! Made by `join`, read by `session`. `host.json` is written last: without it the host has not joined.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use vmseal_model::id::HostId;

/// A host that has joined a server.
#[derive(Clone)]
pub struct HostIdentity {
    /// What `host.json` says.
    pub host: JoinedHost,
    /// The host's certificate, PEM.
    pub certificate_pem: String,
    /// Its private key, PEM.
    pub key_pem: String,
    /// The server's CA, PEM.
    pub ca_pem: String,
}

/// The host as `host.json` holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinedHost {
    /// The id the server gave.
    pub host: HostId,
    /// `host:port` of the server's gate for agents.
    pub server: String,
    /// SHA-256 of the CA certificate, as it stood in the join token.
    pub ca_sha256: String,
}

/// Why the identity cannot be read or kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// A file.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `host.json` is not as it was written.
    #[error("{} is damaged ({reason}); remove it and join again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl HostIdentity {
    /// The identity; none if the host has not joined.
    ///
    /// # Errors
    ///
    /// [`IdentityError`] if there is one and it cannot be read.
    pub fn load(state_dir: &Path) -> Result<Option<Self>, IdentityError> {
        let dir = pki_dir(state_dir);
        let Some(host) = JoinedHost::load(state_dir)? else { return Ok(None) };
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).map_err(|source| IdentityError::Io { action: "read", path, source })
        };
        Ok(Some(Self {
            host,
            certificate_pem: read("host.pem")?,
            key_pem: read("host.key")?,
            ca_pem: read("ca.pem")?,
        }))
    }

    /// Keeps the identity, durably.
    ///
    /// # Errors
    ///
    /// [`IdentityError::Io`]; the host has not joined then.
    pub fn save(&self, state_dir: &Path) -> Result<(), IdentityError> {
        let dir = pki_dir(state_dir);
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| IdentityError::Io { action, path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(io("make", &dir))?;
        let json = serde_json::to_string_pretty(&self.host).expect("strings always serialise");
        let files = [
            ("host.key", self.key_pem.as_str()),
            ("host.pem", &self.certificate_pem),
            ("ca.pem", &self.ca_pem),
            ("host.json", &json),
        ];
        for (name, text) in files {
            let (path, tmp) = (dir.join(name), dir.join(format!("{name}.tmp")));
            let _ = fs::remove_file(&tmp);
            let mut options = OpenOptions::new();
            let mut file =
                options.write(true).create_new(true).mode(0o600).open(&tmp).map_err(io("write", &tmp))?;
            file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io("write", &tmp))?;
            fs::rename(&tmp, &path).map_err(io("replace", &path))?;
        }
        File::open(&dir).and_then(|d| d.sync_all()).map_err(io("flush", &dir))
    }
}

impl std::fmt::Debug for HostIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostIdentity").field("host", &self.host).finish_non_exhaustive()
    }
}

impl JoinedHost {
    /// What `host.json` says; none if the host has not joined.
    ///
    /// # Errors
    ///
    /// [`IdentityError`] if it is there and cannot be read.
    pub fn load(state_dir: &Path) -> Result<Option<Self>, IdentityError> {
        let path = pki_dir(state_dir).join("host.json");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(IdentityError::Io { action: "read", path, source }),
        };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|e| IdentityError::Damaged { path, reason: e.to_string() })
    }
}

/// Where the files lie.
pub fn pki_dir(state_dir: &Path) -> PathBuf {
    state_dir.join("pki")
}

/// The host's name.
pub fn hostname() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").map(|s| s.trim().to_owned()).unwrap_or_default()
}

/// The id of this installation of the operating system; empty where there is none.
pub fn machine_id() -> String {
    fs::read_to_string("/etc/machine-id").map(|s| s.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::scratch::Scratch;

    fn identity() -> HostIdentity {
        HostIdentity {
            host: JoinedHost {
                host: HostId::from_bytes([1; 16]),
                server: "srv:7444".into(),
                ca_sha256: "ab".into(),
            },
            certificate_pem: "cert".into(),
            key_pem: "the key".into(),
            ca_pem: "ca".into(),
        }
    }

    #[test]
    fn identity_reads_back_and_only_root_reads_the_key() {
        let scratch = Scratch::new();
        assert!(HostIdentity::load(scratch.path()).unwrap().is_none());
        identity().save(scratch.path()).unwrap();
        let read = HostIdentity::load(scratch.path()).unwrap().unwrap();
        assert_eq!(read.host, identity().host);
        assert_eq!(read.key_pem, "the key");
        let mode = fs::metadata(pki_dir(scratch.path()).join("host.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        identity().save(scratch.path()).unwrap();
    }

    #[test]
    fn key_is_in_no_debug_output() {
        assert!(!format!("{:?}", identity()).contains("the key"));
    }

    #[test]
    fn damaged_file_is_named() {
        let scratch = Scratch::new();
        identity().save(scratch.path()).unwrap();
        fs::write(pki_dir(scratch.path()).join("host.json"), "{").unwrap();
        let error = HostIdentity::load(scratch.path()).unwrap_err().to_string();
        assert!(error.contains("host.json"), "{error}");
    }
}
