//! `vmseal completions`: made from the same tree as the commands.

use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::{Shell, generate};

use super::Cli;
use crate::{error::CliError, output};

#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell
    shell: Shells,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shells {
    Bash,
    Zsh,
    Fish,
}

pub(super) fn run(args: &CompletionsArgs) -> Result<u8, CliError> {
    let shell = match args.shell {
        Shells::Bash => Shell::Bash,
        Shells::Zsh => Shell::Zsh,
        Shells::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    generate(shell, &mut Cli::command(), "vmseal", &mut script);
    output::data(String::from_utf8_lossy(&script).trim_end())?;
    Ok(0)
}
