//! The tree of nouns and verbs. One file a noun: its arguments, and what it does with them.

mod audit;
mod completions;
mod disk;
mod doctor;
mod host;
mod inspect;
mod key;
mod login;
mod provider;
mod records;
mod recover;
mod role;
mod runbook;
mod status;
mod task;
mod vm;
mod vm_text;

use clap::{Parser, Subcommand};

use crate::{context::Context, error::CliError};

/// Encrypts the virtual machines of QEMU/KVM hosts
#[derive(Debug, Parser)]
#[command(
    name = "vmseal",
    version,
    max_term_width = 100,
    arg_required_else_help = true,
    subcommand_required = true,
    disable_help_subcommand = true,
    after_help = "Exit codes: 0 ok, 1 failed, 2 usage, 3 refused, 4 locked (a key is missing), 5 unreachable.\n\
                  Example:\n  vmseal vm encrypt web01 && virsh start web01"
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    context: Context,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the installation at a glance
    #[command(after_help = "Example:\n  vmseal status --output json")]
    Status,
    /// List what an administrator should look at; exit code 1 if there is anything
    #[command(after_help = "Example:\n  vmseal doctor")]
    Doctor,
    /// Sign in at a server elsewhere; on the server's own machine root needs no login
    #[command(after_help = "Example:\n  vmseal login --server https://kms.example.org --user alice")]
    Login(login::LoginArgs),
    /// Sign out
    #[command(after_help = "Example:\n  vmseal logout")]
    Logout(login::LogoutArgs),
    /// Key providers: where keys come from, and their backups
    #[command(subcommand)]
    Provider(provider::ProviderCommand),
    /// Hosts that run an agent
    #[command(subcommand)]
    Host(host::HostCommand),
    /// Virtual machines: encrypt, decrypt, create, repair
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// Disks: create an encrypted one, show it, change its class, inspect a header
    #[command(subcommand)]
    Disk(disk::DiskCommand),
    /// Keys: who uses which, and recovery without a server
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// Long operations
    #[command(subcommand)]
    Task(task::TaskCommand),
    /// What was done, asked and refused
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// Users and what they may do
    #[command(subcommand)]
    Role(role::RoleCommand),
    /// Print the completion script of a shell
    #[command(after_help = "Example:\n  vmseal completions bash > /etc/bash_completion.d/vmseal")]
    Completions(completions::CompletionsArgs),
}

impl Cli {
    /// Does it. Gives the exit code.
    pub(crate) fn run(self) -> Result<u8, CliError> {
        let context = &self.context;
        match self.command {
            Command::Status => status::run(context),
            Command::Doctor => doctor::run(context),
            Command::Login(args) => login::login(context, &args),
            Command::Logout(args) => login::logout(context, &args),
            Command::Provider(command) => provider::run(context, &command),
            Command::Host(command) => host::run(context, &command),
            Command::Vm(command) => vm::run(context, &command),
            Command::Disk(command) => disk::run(context, &command),
            Command::Key(command) => key::run(context, &command),
            Command::Task(command) => task::run(context, &command),
            Command::Audit(command) => audit::run(context, &command),
            Command::Role(command) => role::run(context, &command),
            Command::Completions(args) => completions::run(&args),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn tree_of_commands_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_of_every_command_fits_a_screen_and_has_an_example() {
        fn walk(command: &clap::Command, path: &str) {
            let words = path.split(' ').chain(["--help"]);
            let help = Cli::command().try_get_matches_from(words).unwrap_err().to_string();
            let lines = help.lines().count();
            assert!(lines <= 36, "{path}: {lines} lines\n{help}");
            if command.has_subcommands() {
                command.get_subcommands().for_each(|c| walk(c, &format!("{path} {}", c.get_name())));
            } else {
                assert!(help.contains(&format!("Example:\n  {path}")), "{path}\n{help}");
            }
        }
        walk(&Cli::command(), "vmseal");
    }

    #[test]
    fn no_option_takes_a_secret_on_the_command_line() {
        fn walk(command: &clap::Command) {
            for arg in command.get_arguments() {
                let name = arg.get_id().as_str();
                let secret = ["password", "token", "secret"].iter().any(|word| name.contains(word));
                assert!(!secret || name == "password_file", "{} --{name}", command.get_name());
            }
            command.get_subcommands().for_each(walk);
        }
        walk(&Cli::command());
    }
}
