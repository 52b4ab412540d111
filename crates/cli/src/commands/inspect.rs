//! `vmseal disk inspect`: what a LUKS header says, and whether it is accepted. No server, no key, nothing is written.

use std::{fs::File, path::PathBuf};

use clap::Args;
use serde_json::json;
use vmseal_luks::{Verdict, inspect};

use crate::{
    context::Context,
    error::{self, CliError},
    output::{self, Format},
};

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct InspectArgs {
    /// The volume, a file or a device
    file: Option<PathBuf>,
    /// A header in a file of its own
    #[arg(long, value_name = "FILE")]
    header: Option<PathBuf>,
}

pub(super) fn run(context: &Context, args: &InspectArgs) -> Result<u8, CliError> {
    let (path, detached) = match (&args.header, &args.file) {
        (Some(header), _) => (header, Some(true)),
        (None, Some(file)) => (file, Some(false)),
        (None, None) => return Err(CliError::usage("name a file")),
    };
    let mut file = File::open(path).map_err(|e| CliError::file("read", path, &e))?;
    let verdict = inspect(&mut file, detached).map_err(|e| CliError::file("read", path, &e))?;
    match context.output {
        Format::Json => output::json(&json!({
            "accepted": verdict.accepted(),
            "reencrypting": matches!(verdict, Verdict::AcceptReencrypting(_)),
            "verdict": verdict.to_string(),
            "header": verdict.description(),
        }))?,
        Format::Table => {
            let description = verdict.description().map(ToString::to_string).unwrap_or_default();
            output::data(&format!("{description}{verdict}"))?;
        }
    }
    Ok(if verdict.accepted() { 0 } else { error::REFUSED })
}
