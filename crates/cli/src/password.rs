//! Where passwords come from: the terminal, or a file or descriptor. Never the command line or the environment, which
//! every user of the machine can read.

use std::{fs::OpenOptions, io::IsTerminal, path::PathBuf, str::FromStr};

use vmseal_api::secret_text::SecretText;
use zeroize::Zeroizing;

use crate::{error::CliError, output, secret_file, text::printable};

const MAX_PASSWORD_BYTES: u64 = 4096;

/// `--password-file FILE|fd:N`.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct PasswordArgs {
    /// Take the password from the first line of FILE, or of open descriptor N, instead of asking
    #[arg(long, value_name = "FILE|fd:N")]
    password_file: Option<PasswordSource>,
}

/// A file or a descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PasswordSource {
    /// A file.
    File(PathBuf),
    /// A descriptor this process was started with.
    Descriptor(u32),
}

impl FromStr for PasswordSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("fd:") {
            Some(n) => {
                n.parse().map(Self::Descriptor).map_err(|_| format!("'{text}' is not fd:N, such as fd:3"))
            }
            None => Ok(Self::File(text.into())),
        }
    }
}

impl PasswordArgs {
    /// The password of something that exists.
    pub(crate) fn read(&self, what: &str) -> Result<SecretText, CliError> {
        match &self.password_file {
            Some(source) => source.read(),
            None => ask(what),
        }
    }

    /// A new password: asked twice.
    pub(crate) fn read_new(&self, what: &str) -> Result<SecretText, CliError> {
        if let Some(source) = &self.password_file {
            return source.read();
        }
        let first = ask(what)?;
        let second = ask(&format!("{what}, again"))?;
        if first.expose() != second.expose() {
            return Err(CliError::usage("the two passwords differ; nothing was done"));
        }
        Ok(first)
    }
}

impl PasswordSource {
    fn read(&self) -> Result<SecretText, CliError> {
        let path = match self {
            Self::File(path) => path.clone(),
            Self::Descriptor(fd) => PathBuf::from(format!("/dev/fd/{fd}")),
        };
        let terminal = OpenOptions::new().read(true).open(&path).is_ok_and(|file| file.is_terminal());
        if terminal {
            return Err(CliError::usage("a password from a terminal would be shown while typed")
                .hint("leave out --password-file to be asked for it"));
        }
        if matches!(self, Self::File(_)) && secret_file::readable_by_others(&path) {
            output::warn(&format!("others may read {}: chmod 600 it", path.display()));
        }
        let bytes = secret_file::read(&path, MAX_PASSWORD_BYTES)?;
        first_line(&bytes)
    }
}

fn first_line(bytes: &[u8]) -> Result<SecretText, CliError> {
    let line = bytes.split(|b| *b == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let text = std::str::from_utf8(line).map_err(|_| CliError::usage("the password is not UTF-8 text"))?;
    checked(text.to_owned())
}

fn ask(what: &str) -> Result<SecretText, CliError> {
    let answer = rpassword::prompt_password(format!("{}: ", printable(what))).map_err(|e| {
        CliError::usage(format!("no terminal to ask for the password: {e}"))
            .hint("give it with --password-file FILE or --password-file fd:N")
    })?;
    checked(answer)
}

fn checked(text: String) -> Result<SecretText, CliError> {
    let text = Zeroizing::new(text);
    if text.is_empty() {
        return Err(CliError::usage("the password is empty"));
    }
    Ok(SecretText::new(text.as_str().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_is_a_file_or_a_descriptor() {
        assert_eq!("fd:3".parse(), Ok(PasswordSource::Descriptor(3)));
        assert_eq!("./fd:3".parse(), Ok(PasswordSource::File("./fd:3".into())));
        assert!("fd:x".parse::<PasswordSource>().is_err());
        assert!("fd:-1".parse::<PasswordSource>().is_err());
    }

    #[test]
    fn password_is_the_first_line_without_its_end() {
        for (bytes, text) in [(&b"a b\n"[..], "a b"), (b"a", "a"), (b" a \r\nb\n", " a ")] {
            assert_eq!(first_line(bytes).unwrap().expose(), text);
        }
        for bad in [&b""[..], b"\n", b"\xff\n"] {
            assert_eq!(first_line(bad).unwrap_err().exit(), 2);
        }
    }

    #[test]
    fn password_is_in_no_debug_output() {
        let secret = first_line(b"VMSEAL-TEST-SECRET\n").unwrap();
        assert!(!format!("{secret:?}").contains("VMSEAL"));
    }
}
