//! `vmseal key recover`: a volume's key from the provider's backup, for stock cryptsetup. No server, no network.
//!
//! The record is unwrapped, its key check and MAC verified, and the key proved against the header's digest, before a
//! byte is written: to a new 0600 file, or to a descriptor that is no terminal.

use std::{
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::json;
use vmseal_keys::{Dek, Opened, open_disk};
use vmseal_luks::Header;
use vmseal_model::{
    record::{KeyRecord, RecipientKind, Subject},
    refusal::Code,
};
use vmseal_provider::NativeProvider;

use super::{
    provider::MAX_BACKUP_BYTES,
    records::{VolumeArgs, VolumeRecords},
};
use crate::{
    context::Context,
    error::CliError,
    output::{self, Format},
    password::PasswordArgs,
    secret_file,
};

#[derive(Debug, Args)]
pub(super) struct RecoverArgs {
    #[command(flatten)]
    volume: VolumeArgs,
    /// The provider's backup (PKCS#12)
    #[arg(long, value_name = "P12")]
    backup: PathBuf,
    #[command(flatten)]
    password: PasswordArgs,
    #[command(flatten)]
    to: Destination,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Destination {
    /// File to write the key to; it must not exist
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Open descriptor to write the key to
    #[arg(long, value_name = "N")]
    out_fd: Option<u32>,
}

pub(super) fn run(context: &Context, args: &RecoverArgs) -> Result<u8, CliError> {
    let volume = args.volume.read()?;
    // The way out is checked before the password is asked for.
    let mut descriptor = args.to.out_fd.map(secret_file::open_output_descriptor).transpose()?;
    let backup = secret_file::read(&args.backup, MAX_BACKUP_BYTES)?;
    let password = args.password.read(&format!("Password of {}", args.backup.display()))?;
    let provider = vmseal_provider::import(&backup, password.expose())
        .map_err(|e| CliError::coded(Code::Integrity, format!("{}: {e}", args.backup.display())))?;
    let opened = open_any(&volume, &provider)?;
    prove(&volume.header, &opened)?;

    let key_file = match (&args.to.out, &mut descriptor) {
        (Some(path), _) => {
            secret_file::write_new(path, opened.payload.data_key())?;
            path.clone()
        }
        (None, Some(file)) => {
            let written = file.write_all(opened.payload.data_key()).and_then(|()| match file.sync_all() {
                // A pipe has nothing to make durable.
                Err(e) if e.kind() == ErrorKind::InvalidInput => Ok(()),
                other => other,
            });
            written.map_err(|e| CliError::failed(format!("cannot write the key to the descriptor: {e}")))?;
            PathBuf::from("KEYFILE")
        }
        (None, None) => return Err(CliError::usage("name --out FILE or --out-fd N")),
    };
    tell(context, args, &opened, &key_file)?;
    Ok(0)
}

/// The newest record that opens. A record that does not is named: it was damaged, edited or moved.
fn open_any(volume: &VolumeRecords, provider: &NativeProvider) -> Result<Opened<Dek>, CliError> {
    let mut reason = None;
    for record in &volume.records {
        match open(record, volume, provider) {
            Ok(opened) => return Ok(opened),
            Err(e) => {
                if record != &volume.records[volume.records.len() - 1] {
                    output::warn(&format!("{e}; trying an older copy"));
                }
                reason.get_or_insert(e);
            }
        }
    }
    Err(reason.unwrap_or_else(|| CliError::failed("there is no key record")))
}

fn open(
    record: &KeyRecord,
    volume: &VolumeRecords,
    provider: &NativeProvider,
) -> Result<Opened<Dek>, CliError> {
    let native = record.recipients.iter().filter(|r| r.id.kind == RecipientKind::Native);
    let ours = native.filter(|r| r.id.provider == *provider.id());
    let mut reason = None;
    for recipient in ours {
        let kek = match provider.derive(&recipient.id.kek) {
            Ok(kek) => kek,
            Err(e) => {
                reason.get_or_insert_with(|| CliError::coded(Code::KeyMissing, e.to_string()));
                continue;
            }
        };
        match open_disk(record, None, Some(volume.header.uuid()), &kek, provider.id()) {
            Ok(opened) => return Ok(opened),
            Err(e) => {
                reason.get_or_insert_with(|| {
                    CliError::coded(Code::Integrity, e.to_string()).hint(
                        "the record was damaged or edited, or the backup is of another provider of that name",
                    )
                });
            }
        }
    }
    Err(reason.unwrap_or_else(|| {
        let mut names: Vec<&str> = record.recipients.iter().map(|r| r.id.provider.as_str()).collect();
        names.dedup();
        let message = format!(
            "the backup is of provider {}, the disk's key is under: {}",
            provider.id(),
            names.join(", ")
        );
        CliError::coded(Code::KeyMissing, message).hint("use the backup of that provider")
    }))
}

/// The header is the thing that cryptsetup will go by: it must say what the verified record says.
fn prove(header: &Header, opened: &Opened<Dek>) -> Result<(), CliError> {
    if !header.digest_matches(&opened.payload) {
        return Err(CliError::coded(
            Code::Integrity,
            "the key is right for the record, but the volume's header is of another key",
        )
        .hint("the header was replaced; restore the volume's header from a copy"));
    }
    let Subject::Disk { unit, payload_offset, .. } = opened.head().subject else {
        return Err(CliError::coded(Code::Integrity, "the record is of no disk"));
    };
    if header.unit_bytes() != unit.get() || header.payload_offset() != payload_offset {
        return Err(CliError::coded(
            Code::Integrity,
            format!(
                "the header says units of {} bytes and data at {}, the record {} and {payload_offset}",
                header.unit_bytes(),
                header.payload_offset(),
                unit.get()
            ),
        )
        .hint("the header was edited; restore it from a copy"));
    }
    Ok(())
}

fn tell(
    context: &Context,
    args: &RecoverArgs,
    opened: &Opened<Dek>,
    key_file: &Path,
) -> Result<(), CliError> {
    let command = open_command(&args.volume, key_file);
    let under = opened.under();
    // A key on standard output must stay alone there.
    let to_stdout = args.to.out_fd == Some(1);
    match context.output {
        Format::Json if !to_stdout => output::json(&json!({
            "vm": opened.head().vm, "epoch": opened.state().epoch, "provider": under.provider,
            "key": under.kek.to_string(), "key_file": args.to.out, "command": command,
        })),
        Format::Table if !to_stdout => {
            output::note(&format!("key {} of {} opens it; open the volume with:", under.kek, under.provider));
            output::data(&command)?;
            output::note("then destroy the key file: shred -u FILE");
            Ok(())
        }
        _ => {
            output::note(&command);
            Ok(())
        }
    }
}

fn open_command(volume: &VolumeArgs, key_file: &Path) -> String {
    let header = match &volume.header {
        Some(path) => format!(" --header {}", quoted(path)),
        None => String::new(),
    };
    format!(
        "cryptsetup open --type luks2 --key-size 512 --volume-key-file {}{header} {} vmseal-recovered",
        quoted(key_file),
        quoted(&volume.volume)
    )
}

/// A path as a word of the shell.
fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-' | '+' | ':' | ',' | '@');
    if !text.is_empty() && !text.starts_with('-') && text.chars().all(plain) {
        return text.into_owned();
    }
    let dashed = if text.starts_with('-') { format!("./{text}") } else { text.into_owned() };
    format!("'{}'", dashed.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_is_one_word_of_the_shell() {
        for (path, word) in [
            ("/x/web01.img.vmseal", "/x/web01.img.vmseal"),
            ("a b", "'a b'"),
            ("it's", r"'it'\''s'"),
            ("-rf", "'./-rf'"),
            ("$(x)", "'$(x)'"),
        ] {
            assert_eq!(quoted(Path::new(path)), word);
        }
    }
}
