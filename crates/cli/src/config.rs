//! What the command remembers between calls: `client.toml` (which server, and the CA it was accepted with) and the
//! session's token, in a file of its own with mode 0600. Both in `$XDG_CONFIG_HOME/vmseal`, else `~/.config/vmseal`.

use std::{env, fs, io::ErrorKind, os::unix::fs::DirBuilderExt, path::PathBuf};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use vmseal_api::secret_text::SecretText;

use crate::{error::CliError, secret_file};

const MAX_CONFIG_BYTES: u64 = 64 << 10;

/// `client.toml`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ClientConfig {
    /// The server's socket on this machine, if it is not the usual one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) socket: Option<PathBuf>,
    /// A server elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) remote: Option<Remote>,
}

/// A server elsewhere, as it was accepted by `vmseal login`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Remote {
    /// `https://host:port`.
    pub(crate) server: String,
    /// User name of the last login.
    pub(crate) user: String,
    /// Its CA certificate (DER, base64): the only one its certificate is checked against.
    pub(crate) ca: String,
}

impl Remote {
    /// The CA certificate, DER.
    pub(crate) fn ca_der(&self) -> Result<Vec<u8>, CliError> {
        STANDARD.decode(&self.ca).map_err(|_| {
            CliError::failed("the CA certificate in client.toml is damaged")
                .hint("sign in again: vmseal logout --forget-server, then vmseal login --server URL")
        })
    }
}

/// The directory with both files.
#[derive(Debug, Clone)]
pub(crate) struct ConfigDir(PathBuf);

impl ConfigDir {
    /// The caller's own.
    pub(crate) fn of_caller() -> Result<Self, CliError> {
        let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        absolute("XDG_CONFIG_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".config")))
            .map(|base| Self(base.join("vmseal")))
            .ok_or_else(|| CliError::usage("neither XDG_CONFIG_HOME nor HOME names a directory"))
    }

    /// What `client.toml` says; nothing if there is none.
    pub(crate) fn load(&self) -> Result<ClientConfig, CliError> {
        let path = self.config_path();
        let text = match fs::metadata(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(ClientConfig::default()),
            Err(e) => return Err(CliError::file("read", &path, &e)),
            Ok(_) => secret_file::read(&path, MAX_CONFIG_BYTES)?,
        };
        let text = String::from_utf8_lossy(&text);
        toml::from_str(&text).map_err(|e| CliError::usage(format!("{}: {}", path.display(), e.message())))
    }

    /// Writes `client.toml`.
    pub(crate) fn save(&self, config: &ClientConfig) -> Result<(), CliError> {
        self.make()?;
        let text = toml::to_string(config).expect("strings and paths become TOML");
        secret_file::replace(&self.config_path(), text.as_bytes())
    }

    /// The session's token, if there is one.
    pub(crate) fn token(&self) -> Result<Option<SecretText>, CliError> {
        let path = self.token_path();
        if !path.exists() {
            return Ok(None);
        }
        if secret_file::readable_by_others(&path) {
            return Err(CliError::usage(format!("others may read {}", path.display())).hint(format!(
                "sign in again, the token may be known: rm {0} && vmseal login",
                path.display()
            )));
        }
        let bytes = secret_file::read(&path, MAX_CONFIG_BYTES)?;
        let text = std::str::from_utf8(&bytes)
            .ok()
            .map(str::trim)
            .filter(|t| t.chars().all(|c| c.is_ascii_graphic()));
        match text {
            Some(token) if !token.is_empty() => Ok(Some(SecretText::new(token.to_owned()))),
            _ => {
                Err(CliError::failed(format!("{} holds no token", path.display()))
                    .hint("sign in: vmseal login"))
            }
        }
    }

    /// Keeps a token.
    pub(crate) fn save_token(&self, token: &SecretText) -> Result<(), CliError> {
        self.make()?;
        secret_file::replace(&self.token_path(), token.expose().as_bytes())
    }

    /// Forgets the token.
    pub(crate) fn forget_token(&self) -> Result<(), CliError> {
        let path = self.token_path();
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(CliError::file("remove", &path, &e)),
            _ => Ok(()),
        }
    }

    fn make(&self) -> Result<(), CliError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.0)
            .map_err(|e| CliError::file("create", &self.0, &e))
    }

    fn config_path(&self) -> PathBuf {
        self.0.join("client.toml")
    }

    fn token_path(&self) -> PathBuf {
        self.0.join("token")
    }

    /// The directory at `path`, for tests.
    #[cfg(test)]
    pub(crate) fn at(path: &std::path::Path) -> Self {
        Self(path.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn configuration_and_token_are_read_back_and_the_token_is_private() {
        let path = env::temp_dir().join(format!("vmseal-cli-config-{}", std::process::id()));
        let dir = ConfigDir::at(&path);
        assert_eq!(dir.load().unwrap(), ClientConfig::default());
        assert!(dir.token().unwrap().is_none());
        let config = ClientConfig {
            socket: None,
            remote: Some(Remote { server: "https://a:7443".into(), user: "eve".into(), ca: "AAAA".into() }),
        };
        dir.save(&config).unwrap();
        dir.save_token(&SecretText::new("VMSEAL-TEST-TOKEN".into())).unwrap();
        assert_eq!(dir.load().unwrap(), config);
        assert_eq!(dir.token().unwrap().unwrap().expose(), "VMSEAL-TEST-TOKEN");
        assert!(!fs::read_to_string(path.join("client.toml")).unwrap().contains("TOKEN"));

        fs::set_permissions(path.join("token"), fs::Permissions::from_mode(0o640)).unwrap();
        assert!(dir.token().unwrap_err().to_string().contains("others may read"));
        dir.forget_token().unwrap();
        dir.forget_token().unwrap();
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn word_that_is_not_known_in_the_configuration_is_named() {
        let path = env::temp_dir().join(format!("vmseal-cli-config-bad-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("client.toml"), "sokcet = \"/x\"\n").unwrap();
        let error = ConfigDir::at(&path).load().unwrap_err();
        assert!(error.to_string().contains("sokcet") && error.exit() == 2, "{error}");
        fs::remove_dir_all(path).unwrap();
    }
}
