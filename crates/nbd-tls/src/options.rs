//! The command line. Paths, names and numbers only: a key is never among them.

use std::{ffi::OsString, path::PathBuf, time::Duration};

/// What is printed after a wrong command line.
pub const USAGE: &str = "\
usage: vmseal-nbd-tls --export SOCKET --certificate PEM --key PEM|fd:N --client-ca PEM [--allow NAME]...
                      [--user USER] [--listen-fd N] [--connections N] [--handshakes N] [--handshake-seconds N]

Serves the NBD export at the unix socket SOCKET over TLS 1.3 on the listening TCP socket that is descriptor N (3, as
systemd passes it), to clients with a certificate of the authority in --client-ca. With --allow only to those of them
that have NAME as a DNS name or as their common name. The key's file must be readable to nobody but its owner. As root
it becomes USER once it has read it, and refuses to go on as root.
  --connections        most clients at a time (16, as many as one disk takes)
  --handshakes         most connections at a time whose certificate is not checked yet (32)
  --handshake-seconds  how long that may take (10)
Exit codes: 1 cannot serve, 2 wrong usage.
";

/// Where the private key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// A file, which only its owner may read.
    File(PathBuf),
    /// An open descriptor, read to its end.
    Descriptor(i32),
}

/// A command line that was understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The export's unix socket.
    pub export: PathBuf,
    /// Our certificate, with those between it and its authority.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: KeySource,
    /// Authorities of clients.
    pub client_ca: PathBuf,
    /// Names of clients that may connect; none: every one.
    pub allow: Vec<String>,
    /// Who to become.
    pub user: Option<String>,
    /// The listening socket.
    pub listen_fd: i32,
    /// Most clients at a time.
    pub connections: usize,
    /// Most handshakes at a time.
    pub handshakes: usize,
    /// How long a handshake may take.
    pub handshake: Duration,
}

impl Options {
    /// Reads the words after the program's name.
    ///
    /// # Errors
    ///
    /// [`OptionsError`], naming the option.
    pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Self, OptionsError> {
        let (mut export, mut certificate, mut key, mut client_ca) = (None, None, None, None);
        let mut rest = Self {
            export: PathBuf::new(),
            certificate: PathBuf::new(),
            key: KeySource::Descriptor(-1),
            client_ca: PathBuf::new(),
            allow: Vec::new(),
            user: None,
            listen_fd: 3,
            connections: 16,
            handshakes: 32,
            handshake: Duration::from_secs(10),
        };
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let Some(name) = word.to_str().map(str::to_owned) else {
                return Err(OptionsError::Unknown(word.to_string_lossy().into_owned()));
            };
            let mut value = || words.next().ok_or_else(|| OptionsError::NoValue(name.clone()));
            match name.as_str() {
                "--export" => export = Some(PathBuf::from(value()?)),
                "--certificate" => certificate = Some(PathBuf::from(value()?)),
                "--client-ca" => client_ca = Some(PathBuf::from(value()?)),
                "--key" => key = Some(key_source(&name, value()?)?),
                "--allow" => rest.allow.push(text(&name, value()?)?),
                "--user" => rest.user = Some(text(&name, value()?)?),
                "--listen-fd" => rest.listen_fd = number(&name, value()?, 3..=1 << 20)? as i32,
                "--connections" => rest.connections = number(&name, value()?, 1..=1024)? as usize,
                "--handshakes" => rest.handshakes = number(&name, value()?, 1..=1024)? as usize,
                "--handshake-seconds" => {
                    rest.handshake = Duration::from_secs(number(&name, value()?, 1..=600)?);
                }
                _ => return Err(OptionsError::Unknown(name)),
            }
        }
        let missing = |name: &str| OptionsError::Missing(name.to_owned());
        Ok(Self {
            export: export.ok_or_else(|| missing("--export"))?,
            certificate: certificate.ok_or_else(|| missing("--certificate"))?,
            key: key.ok_or_else(|| missing("--key"))?,
            client_ca: client_ca.ok_or_else(|| missing("--client-ca"))?,
            ..rest
        })
    }
}

fn key_source(name: &str, value: OsString) -> Result<KeySource, OptionsError> {
    match value.to_str().and_then(|text| text.strip_prefix("fd:")) {
        Some(number_text) => {
            Ok(KeySource::Descriptor(number(name, number_text.to_owned().into(), 3..=1 << 20)? as i32))
        }
        None => Ok(KeySource::File(value.into())),
    }
}

fn text(name: &str, value: OsString) -> Result<String, OptionsError> {
    value.into_string().ok().filter(|text| !text.is_empty()).ok_or_else(|| OptionsError::Bad(name.to_owned()))
}

fn number(name: &str, value: OsString, range: std::ops::RangeInclusive<u64>) -> Result<u64, OptionsError> {
    let bad = || OptionsError::Bad(name.to_owned());
    value.to_str().and_then(|text| text.parse().ok()).filter(|n| range.contains(n)).ok_or_else(bad)
}

/// Why a command line was not understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// No such option.
    #[error("there is no option {0:?}")]
    Unknown(String),
    /// Nothing after it.
    #[error("{0} needs a value")]
    NoValue(String),
    /// Not a number, out of range, empty.
    #[error("the value of {0} makes no sense")]
    Bad(String),
    /// It must be there.
    #[error("{0} is missing")]
    Missing(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &[&str] =
        &["--export", "/s", "--certificate", "/c", "--key", "fd:5", "--client-ca", "/a", "--allow", "hv1"];

    fn parse(words: &[&str]) -> Result<Options, OptionsError> {
        Options::parse(words.iter().map(OsString::from))
    }

    #[test]
    fn least_and_all_options_are_understood() {
        let options = parse(LEAST).unwrap();
        assert_eq!((options.listen_fd, options.connections, options.key), (3, 16, KeySource::Descriptor(5)));
        let more =
            [LEAST, &["--allow", "b", "--key", "/k", "--handshake-seconds", "2", "--user", "u"]].concat();
        let options = parse(&more).unwrap();
        assert_eq!(options.allow, ["hv1", "b"]);
        assert_eq!((options.key, options.handshake), (KeySource::File("/k".into()), Duration::from_secs(2)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(parse(&LEAST[2..]), Err(OptionsError::Missing("--export".into())));
        assert_eq!(parse(&["--export"]), Err(OptionsError::NoValue("--export".into())));
        assert_eq!(parse(&["--key-text", "x"]), Err(OptionsError::Unknown("--key-text".into())));
        for bad in [["--connections", "0"], ["--listen-fd", "2"], ["--key", "fd:x"], ["--allow", ""]] {
            assert_eq!(parse(&bad), Err(OptionsError::Bad(bad[0].into())));
        }
    }
}
