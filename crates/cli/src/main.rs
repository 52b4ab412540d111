//! The `vmseal` command: `vmseal NOUN VERB`. In go arguments and answers to prompts, out come data on stdout, words on
//! stderr and an exit code. It decides nothing: the server does; only `disk inspect` and `key` work without one.

mod class;
mod client;
mod commands;
mod config;
mod context;
mod error;
mod follow;
mod list;
mod output;
mod password;
mod pin;
mod progress;
mod rate;
mod secret_file;
mod server_url;
mod size;
mod style;
mod text;
mod when;

use std::process::ExitCode;

use clap::Parser;

use crate::{commands::Cli, error::CliError};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = prepare().and_then(|()| cli.run());
    ExitCode::from(outcome.unwrap_or_else(|error| {
        error.report();
        error.exit()
    }))
}

fn prepare() -> Result<(), CliError> {
    vmseal_keys::harden_process()
        .map_err(|e| CliError::failed(format!("cannot keep this process out of core dumps: {e}")))?;
    // An error means that a provider is installed already, and there is only this one in the program.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    Ok(())
}
