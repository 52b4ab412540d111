//! The configuration file, `/etc/vmseal/server.toml`. Every field has a default; an unknown one is an error.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// What the server is told.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Database, CA and root key; made with mode 0700 if missing.
    pub state_dir: PathBuf,
    /// Where `api.sock` is.
    pub run_dir: PathBuf,
    /// HTTPS API.
    pub https_listen: SocketAddr,
    /// Agents' gate.
    pub agent_listen: SocketAddr,
    /// Name or address by which hosts reach this server; the machine's host name if empty.
    pub public_address: String,
    /// The root key; `root.key` in `state_dir` if empty.
    pub root_key_file: PathBuf,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/vmseal/server".into(),
            run_dir: "/run/vmseal".into(),
            https_listen: SocketAddr::from(([0, 0, 0, 0], vmseal_api::paths::API_PORT)),
            agent_listen: SocketAddr::from(([0, 0, 0, 0], vmseal_api::paths::AGENT_PORT)),
            public_address: String::new(),
            root_key_file: PathBuf::new(),
        }
    }
}

impl ServerConfig {
    /// Reads a file. A file that is not there is an error, unless it is the default one.
    pub fn read(path: &Path, default: bool) -> Result<Self, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text)
                .map_err(|source| ConfigError::Syntax { path: path.to_owned(), source: Box::new(source) }),
            Err(e) if default && e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::File { path: path.to_owned(), source }),
        }
    }

    fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// [`ServerConfig::public_address`], or the machine's host name.
    pub fn public_host(&self) -> String {
        if !self.public_address.is_empty() {
            return self.public_address.clone();
        }
        match std::fs::read_to_string("/proc/sys/kernel/hostname") {
            Ok(name) if !name.trim().is_empty() => name.trim().to_owned(),
            _ => "localhost".into(),
        }
    }

    /// Where the root key is.
    pub fn root_key_path(&self) -> PathBuf {
        if !self.root_key_file.as_os_str().is_empty() {
            return self.root_key_file.clone();
        }
        self.state_dir.join("root.key")
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not to be read.
    #[error("configuration {path} cannot be read")]
    File {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not understood.
    #[error("configuration {path} is wrong")]
    Syntax {
        /// Where.
        path: PathBuf,
        /// What and in which line.
        source: Box<toml::de::Error>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_file_is_the_default_and_a_misspelt_field_an_error() {
        let config = ServerConfig::parse("").unwrap();
        assert_eq!(config.https_listen.port(), 7443);
        assert_eq!(config.agent_listen.port(), 7444);
        assert_eq!(config.root_key_path(), Path::new("/var/lib/vmseal/server/root.key"));
        assert!(ServerConfig::parse("state_dri = '/x'").is_err());
        assert!(ServerConfig::parse("https_listen = 'nowhere'").is_err());
    }

    #[test]
    fn missing_file_is_an_error_only_if_it_was_named() {
        let path = Path::new("/nonexistent/vmseal/server.toml");
        assert!(ServerConfig::read(path, true).is_ok());
        let error = ServerConfig::read(path, false).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/vmseal/server.toml"));
    }
}
