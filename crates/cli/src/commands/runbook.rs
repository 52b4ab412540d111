//! `vmseal key runbook`: how to get a volume's data back without vmseal, with the values of this volume filled in.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use vmseal_model::{
    id::ProviderId,
    record::{KeyRecord, RecipientKind},
    refusal::Code,
};
use vmseal_provider::runbook::{Runbook, RunbookFiles};

use super::records::VolumeArgs;
use crate::{
    context::Context,
    error::CliError,
    output::{self, Format},
};

#[derive(Debug, Args)]
pub(super) struct RunbookArgs {
    #[command(flatten)]
    volume: VolumeArgs,
    /// Where the provider's backup will be [default: PROVIDER.p12]
    #[arg(long, value_name = "P12")]
    backup: Option<PathBuf>,
    /// The provider, if the disk's key is under more than one
    #[arg(long, value_name = "NAME")]
    provider: Option<ProviderId>,
    /// Name the opened disk gets under /dev/mapper
    #[arg(long, value_name = "NAME", default_value = "vmseal-recovered")]
    mapping: String,
}

pub(super) fn run(context: &Context, args: &RunbookArgs) -> Result<u8, CliError> {
    let volume = args.volume.read()?;
    let record = &volume.records[0];
    let backup = match &args.backup {
        Some(path) => text(path)?.to_owned(),
        None => format!("{}.p12", provider_of(record, args.provider.as_ref())),
    };
    let files = RunbookFiles {
        backup: &backup,
        volume: text(&args.volume.volume)?,
        header: args.volume.header.as_deref().map(text).transpose()?,
        mapping: &args.mapping,
    };
    let runbook = Runbook::new(record, args.provider.as_ref(), &files)
        .map_err(|e| CliError::coded(Code::KeyMissing, e.to_string()))?;
    match context.output {
        Format::Json => output::json(&json!({ "script": runbook.to_string() }))?,
        Format::Table => output::data(runbook.to_string().trim_end())?,
    }
    Ok(0)
}

fn provider_of<'a>(record: &'a KeyRecord, asked: Option<&'a ProviderId>) -> &'a str {
    let native = record.recipients.iter().find(|r| r.id.kind == RecipientKind::Native);
    asked.or(native.map(|r| &r.id.provider)).map_or("backup", ProviderId::as_str)
}

fn text(path: &Path) -> Result<&str, CliError> {
    path.to_str().ok_or_else(|| {
        CliError::usage(format!("{} is not UTF-8 text and cannot stand in a script", path.display()))
    })
}
