//! What ends a command early: one line that says what failed, perhaps a hint, and the exit code.
//!
//! The exit codes are the contract with scripts: 0 ok, 1 failed, 2 usage, 3 refused, 4 locked, 5 unreachable.

use std::{fmt, io, path::Path};

use vmseal_model::refusal::Code;

use crate::{style, text::printable};

/// Exit code of a command that failed for a reason its message names.
pub(crate) const FAILED: u8 = 1;
/// Exit code of a command that was called wrongly.
pub(crate) const USAGE: u8 = 2;
/// Exit code of a command that was refused; nothing changed.
pub(crate) const REFUSED: u8 = 3;
/// Exit code after Ctrl-C, as shells count it: the task goes on, only the command ended.
pub(crate) const INTERRUPTED: u8 = 130;

/// Why a command ended early. Holds no secret.
#[derive(Debug)]
pub(crate) struct CliError {
    message: String,
    hint: Option<String>,
    details: Vec<String>,
    code: Option<Code>,
    exit: u8,
}

impl CliError {
    /// Something failed.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, details: Vec::new(), code: None, exit: FAILED }
    }

    /// The command was called wrongly.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, details: Vec::new(), code: None, exit: USAGE }
    }

    /// Refused, or failed, for a reason that has a code.
    pub(crate) fn coded(code: Code, message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
            details: Vec::new(),
            code: Some(code),
            exit: code.exit_code(),
        }
    }

    /// A file could not be used.
    pub(crate) fn file(action: &str, path: &Path, cause: &io::Error) -> Self {
        Self::failed(format!("cannot {action} {}: {cause}", path.display()))
    }

    /// The same with the exit code of an answer whose own code this program does not know.
    pub(crate) fn with_exit(mut self, exit: u8) -> Self {
        self.exit = exit;
        self
    }

    /// The same with a next step.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        let hint = hint.into();
        self.hint = (!hint.is_empty()).then_some(hint);
        self
    }

    /// The same with what the message counts, one each.
    pub(crate) fn details(mut self, details: Vec<String>) -> Self {
        self.details = details;
        self
    }

    /// The stable code, if the reason has one.
    pub(crate) fn code(&self) -> Option<Code> {
        self.code
    }

    /// What the process ends with.
    pub(crate) fn exit(&self) -> u8 {
        self.exit
    }

    /// Writes `error:` and `hint:` to stderr.
    pub(crate) fn report(&self) {
        let color = style::on_stderr();
        eprintln!("{} {self}", style::error("error:", color));
        for detail in &self.details {
            eprintln!("  {}", printable(detail));
        }
        if let Some(hint) = &self.hint {
            eprintln!("{} {}", style::hint("hint:", color), printable(hint));
        }
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(&self.message))?;
        match self.code {
            Some(code) if code != Code::Failed => write!(f, " [{}]", code.as_str()),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for CliError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_the_contract() {
        for (code, exit) in [
            (Code::Failed, 1),
            (Code::BadRequest, 2),
            (Code::VmRunning, 3),
            (Code::Integrity, 3),
            (Code::KeyMissing, 4),
            (Code::HostUnreachable, 5),
            (Code::ServerUnreachable, 5),
        ] {
            assert_eq!(CliError::coded(code, "x").exit(), exit, "{code:?}");
        }
        assert_eq!(CliError::failed("x").exit(), 1);
        assert_eq!(CliError::usage("x").exit(), 2);
    }

    #[test]
    fn message_of_a_peer_cannot_drive_the_terminal() {
        let error = CliError::coded(Code::VmRunning, "VM a\u{1b}[2Jb\nfake line runs");
        assert_eq!(error.to_string(), "VM a\\u{1b}[2Jb\\nfake line runs [vm-running]");
    }
}
