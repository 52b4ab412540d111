//! The agent's configuration: `/etc/vmseal/agent.toml` in, paths and names out. Creates nothing, resolves no user.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use vmseal_model::id::{DiskId, DomainUuid};

/// Where the configuration lies unless `--config` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/vmseal/agent.toml";

/// What the agent is told about its host. Every key has a default, so the file may be empty or missing.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AgentConfig {
    /// Records, tasks and the host's certificate.
    pub state_dir: PathBuf,
    /// Sockets; gone after a reboot.
    pub run_dir: PathBuf,
    /// How to reach libvirtd.
    pub libvirt_uri: String,
    /// Where libvirtd keeps its pid files of QEMU.
    pub libvirt_run_dir: PathBuf,
    /// The program that serves disks. Unset: beside this program, else [`AgentConfig::INSTALLED_DISK_BINARY`].
    pub disk_binary: Option<PathBuf>,
    /// The program that makes block devices of disks, and runs as root. Unset: beside this program, else
    /// [`AgentConfig::INSTALLED_UBLK_BINARY`].
    pub ublk_binary: Option<PathBuf>,
    /// The user that disk processes run as.
    pub disk_user: String,
    /// The group QEMU runs with: it may connect to the disks' sockets.
    pub qemu_group: String,
    /// The program that keeps volumes on Ceph RBD. Unset: beside this program, else
    /// [`AgentConfig::INSTALLED_RBD_BINARY`].
    pub rbd_binary: Option<PathBuf>,
    /// The user that program runs as: it reads the keyring.
    pub rbd_user: String,
    /// Ceph's configuration. Unset: where Ceph looks for it.
    pub ceph_conf: Option<PathBuf>,
    /// The keyring with the key of the Ceph user. Unset: where the configuration says.
    pub ceph_keyring: Option<PathBuf>,
    /// The Ceph user without `client.`, whatever a definition says. Unset: the definition's, else `admin`.
    pub ceph_user: Option<String>,
    /// Logs of the disk processes.
    pub log_dir: PathBuf,
    /// Where libvirtd looks for qemu hooks; only looked at, to warn of a missing one.
    pub hook_dir: PathBuf,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/vmseal/agent".into(),
            run_dir: "/run/vmseal".into(),
            libvirt_uri: "qemu:///system".into(),
            libvirt_run_dir: "/run/libvirt/qemu".into(),
            disk_binary: None,
            ublk_binary: None,
            disk_user: "vmseal-disk".into(),
            qemu_group: "libvirt-qemu".into(),
            rbd_binary: None,
            rbd_user: "vmseal-rbd".into(),
            ceph_conf: None,
            ceph_keyring: None,
            ceph_user: None,
            log_dir: "/var/log/vmseal".into(),
            hook_dir: "/etc/libvirt/hooks/qemu.d".into(),
        }
    }
}

impl AgentConfig {
    /// Where the packages put the disk program.
    pub const INSTALLED_DISK_BINARY: &'static str = "/usr/libexec/vmseal/vmseal-disk";
    /// Where the packages put the program that makes block devices.
    pub const INSTALLED_UBLK_BINARY: &'static str = "/usr/libexec/vmseal/vmseal-ublk";
    /// Where block devices of disks have their names.
    pub const UBLK_DIR: &'static str = "/dev/vmseal";

    /// Where the packages put the helper for Ceph RBD.
    pub const INSTALLED_RBD_BINARY: &'static str = "/usr/libexec/vmseal/vmseal-rbd";

    /// Reads `path`. Only [`DEFAULT_PATH`] may be missing: that is the default configuration.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] names the file and the key that is not understood.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, path),
            Err(e) if e.kind() == io::ErrorKind::NotFound && path == Path::new(DEFAULT_PATH) => {
                Ok(Self::default())
            }
            Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
        }
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|e| ConfigError::Parse {
            path: path.to_owned(),
            reason: e.to_string().trim().to_owned(),
        })?;
        let named = [
            ("state_dir", &config.state_dir),
            ("run_dir", &config.run_dir),
            ("libvirt_run_dir", &config.libvirt_run_dir),
            ("log_dir", &config.log_dir),
            ("hook_dir", &config.hook_dir),
        ];
        let optional = [
            ("disk_binary", &config.disk_binary),
            ("ublk_binary", &config.ublk_binary),
            ("rbd_binary", &config.rbd_binary),
            ("ceph_conf", &config.ceph_conf),
            ("ceph_keyring", &config.ceph_keyring),
        ];
        let optional = optional.into_iter().filter_map(|(key, path)| Some((key, path.as_ref()?)));
        let relative =
            named.into_iter().chain(optional).find(|(_, dir)| !dir.is_absolute()).map(|(key, _)| key);
        relative.map_or(Ok(config), |key| Err(ConfigError::Relative { path: path.to_owned(), key }))
    }

    /// The socket libvirt's hook talks to.
    pub fn agent_socket(&self) -> PathBuf {
        self.run_dir.join("agent.sock")
    }

    /// Directory of one VM's sockets; the same on every host.
    pub fn vm_dir(&self, domain: DomainUuid) -> PathBuf {
        self.run_dir.join(format!("{VM_DIR_PREFIX}{domain}"))
    }

    /// The socket QEMU finds a disk on.
    pub fn disk_socket(&self, domain: DomainUuid, target: &str) -> PathBuf {
        self.vm_dir(domain).join(format!("{target}.sock"))
    }

    /// The socket on which only the warden of a disk's block device may connect.
    pub fn ublk_socket(&self, domain: DomainUuid, target: &str) -> PathBuf {
        self.vm_dir(domain).join(format!("{target}.ublk.sock"))
    }

    /// The block device of a disk; the same on every host.
    pub fn ublk_device(disk: DiskId) -> String {
        format!("{}/{disk}", Self::UBLK_DIR)
    }

    /// The program that makes block devices.
    pub fn ublk_program(&self) -> PathBuf {
        program(self.ublk_binary.as_ref(), "vmseal-ublk", Self::INSTALLED_UBLK_BINARY)
    }

    /// The socket the agent finds a VM's disk process on.
    pub fn control_socket(&self, domain: DomainUuid) -> PathBuf {
        self.vm_dir(domain).join("control.sock")
    }

    /// The disk program to run.
    pub fn disk_program(&self) -> PathBuf {
        program(self.disk_binary.as_ref(), "vmseal-disk", Self::INSTALLED_DISK_BINARY)
    }

    /// The helper for Ceph RBD to run.
    pub fn rbd_program(&self) -> PathBuf {
        program(self.rbd_binary.as_ref(), "vmseal-rbd", Self::INSTALLED_RBD_BINARY)
    }
}

/// What was said, else the one beside this program, else where packages put it.
fn program(said: Option<&PathBuf>, name: &str, installed: &str) -> PathBuf {
    let beside = || {
        let beside = std::env::current_exe().ok()?.with_file_name(name);
        beside.exists().then_some(beside)
    };
    said.cloned().or_else(beside).unwrap_or_else(|| installed.into())
}

/// Begins the name of every VM's directory in the run directory.
pub const VM_DIR_PREFIX: &str = "libvirt-";

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not TOML, or has a key this version does not know.
    #[error("{} is not understood: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The parser's words, with line and key.
        reason: String,
    },
    /// A directory must not depend on where the agent is started.
    #[error("{}: {key} must be an absolute path", path.display())]
    Relative {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<AgentConfig, ConfigError> {
        AgentConfig::parse(text, Path::new("agent.toml"))
    }

    #[test]
    fn empty_file_is_the_default() {
        assert_eq!(parse("").unwrap(), AgentConfig::default());
    }

    #[test]
    fn unknown_key_is_named() {
        let text = parse("run_dir = \"/r\"\nlibvirt_url = \"x\"").unwrap_err().to_string();
        assert!(text.contains("libvirt_url"), "{text}");
        assert!(text.contains("agent.toml"), "{text}");
    }

    #[test]
    fn relative_directory_is_refused_by_its_key() {
        let text = parse("state_dir = \"var\"").unwrap_err().to_string();
        assert!(text.contains("state_dir"), "{text}");
        assert!(parse("disk_binary = \"vmseal-disk\"").is_err());
        assert!(parse("ublk_binary = \"vmseal-ublk\"").is_err());
    }

    #[test]
    fn missing_file_is_an_error_unless_it_is_the_default_one() {
        assert!(matches!(
            AgentConfig::load(Path::new("/nonexistent/agent.toml")),
            Err(ConfigError::Read { .. })
        ));
    }

    #[test]
    fn sockets_of_a_vm_lie_in_its_own_directory() {
        let domain: DomainUuid = "00112233-4455-6677-8899-aabbccddeeff".parse().unwrap();
        let config = AgentConfig::default();
        let dir = "/run/vmseal/libvirt-00112233-4455-6677-8899-aabbccddeeff";
        assert_eq!(config.disk_socket(domain, "vda"), Path::new(dir).join("vda.sock"));
        assert_eq!(config.control_socket(domain), Path::new(dir).join("control.sock"));
        assert_eq!(config.ublk_socket(domain, "vda"), Path::new(dir).join("vda.ublk.sock"));
    }
}
