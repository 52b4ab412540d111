//! `vmseal role`: users and what they may do.

use clap::{Args, Subcommand};
use vmseal_api::{login::CreateUser, paths};

use crate::{context::Context, error::CliError, password::PasswordArgs};

#[derive(Debug, Subcommand)]
pub(super) enum RoleCommand {
    /// Add a user who may sign in from elsewhere
    #[command(after_help = "Example:\n  vmseal role add-user alice --role Administrator")]
    AddUser(AddUserArgs),
}

#[derive(Debug, Args)]
pub(super) struct AddUserArgs {
    /// Name of the user
    name: String,
    /// Role of the user; without one the user may do nothing yet
    #[arg(long, value_name = "ROLE")]
    role: Option<String>,
    #[command(flatten)]
    password: PasswordArgs,
}

pub(super) fn run(context: &Context, command: &RoleCommand) -> Result<u8, CliError> {
    let RoleCommand::AddUser(args) = command;
    let client = context.client()?;
    let password = args.password.read_new(&format!("Password of {}", args.name))?;
    let user = CreateUser { name: args.name.clone(), password, role: args.role.clone() };
    let answer = client.post(paths::USERS, &user)?;
    context.done(&answer, &format!("user {} may sign in with: vmseal login --server URL", args.name))?;
    Ok(0)
}
