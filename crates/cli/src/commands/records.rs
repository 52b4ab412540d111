//! The key records of a volume at hand: out of its LUKS2 header, or out of a file. No server.
//!
//! What comes out is unverified: [`super::recover`] verifies, the runbook's script does.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use clap::Args;
use vmseal_luks::{Header, LuksError};
use vmseal_model::{
    record::{KeyRecord, MAX_RECORD_LEN, Subject},
    refusal::Code,
};

use crate::{error::CliError, secret_file};

#[derive(Debug, Args)]
pub(super) struct VolumeArgs {
    /// The encrypted volume, a file or a device
    #[arg(long, value_name = "FILE")]
    pub(super) volume: PathBuf,
    /// Its header, if that is in a file of its own
    #[arg(long, value_name = "FILE")]
    pub(super) header: Option<PathBuf>,
    /// A key record, base64 as in the domain's metadata, if the header has lost its own
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
}

/// A header that was accepted, and the disk's records, highest epoch first. At least one.
pub(super) struct VolumeRecords {
    pub(super) header: Header,
    pub(super) records: Vec<KeyRecord>,
}

impl VolumeArgs {
    /// Where the header is.
    pub(super) fn header_path(&self) -> &Path {
        self.header.as_ref().unwrap_or(&self.volume)
    }

    /// Reads header and records.
    pub(super) fn read(&self) -> Result<VolumeRecords, CliError> {
        let path = self.header_path();
        let file = File::open(path).map_err(|e| CliError::file("read", path, &e))?;
        let header = Header::read(&file, self.header.is_some()).map_err(|e| match e {
            LuksError::Io { doing, source } => CliError::failed(format!("cannot {doing}: {source}")),
            other => CliError::coded(Code::Integrity, format!("{}: {other}", path.display()))
                .hint(format!("look at it with: vmseal disk inspect {}", path.display())),
        })?;
        let encoded = match &self.record {
            Some(path) => vec![decode_file(path)?],
            None => header.token().map(|token| token.records).unwrap_or_default(),
        };
        let of_this_disk = |record: &KeyRecord| matches!(record.head.subject, Subject::Disk { disk, .. } if disk == header.uuid());
        let mut records: Vec<KeyRecord> =
            encoded.iter().filter_map(|bytes| KeyRecord::decode(bytes).ok()).filter(of_this_disk).collect();
        records.sort_by_key(|record| std::cmp::Reverse(record.state.epoch));
        if records.is_empty() {
            let place = self.record.as_deref().unwrap_or(path).display().to_string();
            let error = format!("{place} holds no key record of disk {}", header.uuid());
            return Err(CliError::coded(Code::NotFound, error).hint(
                "take it from the domain's metadata (virsh dumpxml, element vmseal:record) and give it with --record FILE",
            ));
        }
        Ok(VolumeRecords { header, records })
    }
}

fn decode_file(path: &Path) -> Result<Vec<u8>, CliError> {
    let text = secret_file::read(path, 2 * MAX_RECORD_LEN as u64)?;
    let text: Vec<u8> = text.iter().copied().filter(|b| !b.is_ascii_whitespace()).collect();
    STANDARD.decode(text).map_err(|_| CliError::usage(format!("{} is not base64", path.display())))
}
