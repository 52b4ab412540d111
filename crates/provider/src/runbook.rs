//! The stock-tools runbook: a shell script that gets a disk's key back with openssl and opens the disk with cryptsetup.
//!
//! In goes a key record as it was decoded, out comes text with every public value filled in: nothing in it is secret,
//! it can be printed on the day the VM is encrypted and put beside the backup. It asks for the backup's password when
//! it runs. It holds for records with a recipient of the native provider.
//!
//! The steps are those of `docs/formats/key-record.md` and `docs/formats/native-backup.md`, so a reader of the two can
//! check the script by hand.

use std::fmt::{self, Write};

use vmseal_keys::{
    derive::{info, wrap_key_info},
    native::kek_info,
};
use vmseal_model::{
    id::{DiskId, KekId, KeyUuid, ProviderId, RecordId},
    record::{HeaderKind, KeyRecord, Recipient, RecipientKind, RecipientSeal, RecordHead, Subject},
};

/// Where things are on the machine that the script will run on.
#[derive(Debug, Clone, Copy)]
pub struct RunbookFiles<'a> {
    /// The provider's backup, `.p12`.
    pub backup: &'a str,
    /// The encrypted volume: a file or a device.
    pub volume: &'a str,
    /// Its detached header, where it has one.
    pub header: Option<&'a str>,
    /// The name that the opened disk gets under `/dev/mapper`.
    pub mapping: &'a str,
}

/// A script for bash, as `Display`.
#[derive(Debug, Clone)]
pub struct Runbook {
    text: String,
}

impl Runbook {
    /// The runbook for a disk: of its first recipient of the native kind, of `provider` if one is named.
    ///
    /// The record is not verified here; the script checks the key against the record and cryptsetup checks it
    /// against the volume.
    ///
    /// # Errors
    ///
    /// [`RunbookError`] if the record is no disk's, or has no such recipient.
    pub fn new(
        record: &KeyRecord,
        provider: Option<&ProviderId>,
        files: &RunbookFiles<'_>,
    ) -> Result<Self, RunbookError> {
        let about = record.head.record;
        let Subject::Disk { disk, header, .. } = record.head.subject else {
            return Err(RunbookError::NotADisk { record: about });
        };
        let header = match (header, files.header) {
            (HeaderKind::Detached, None) => return Err(RunbookError::HeaderNotNamed { record: about }),
            (HeaderKind::Detached, path) => path,
            (HeaderKind::Attached | HeaderKind::None, _) => None,
        };
        let native = |recipient: &&Recipient| {
            recipient.id.kind == RecipientKind::Native
                && provider.is_none_or(|id| *id == recipient.id.provider)
        };
        let recipient = record.recipients.iter().find(native).ok_or_else(|| RunbookError::NoRecipient {
            record: about,
            provider: provider.map_or_else(|| "the native kind".to_owned(), ToString::to_string),
        })?;
        let wrapped = Wrapped::of(recipient).ok_or_else(|| RunbookError::NotNative {
            record: about,
            provider: recipient.id.provider.clone(),
            kek: recipient.id.kek.clone(),
        })?;
        let files = RunbookFiles { header, ..*files };
        let mut text = String::new();
        write_script(&mut text, &record.head, disk, &wrapped, &files).expect("a String takes any text");
        Ok(Self { text })
    }
}

impl fmt::Display for Runbook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What a native recipient says.
struct Wrapped<'a> {
    provider: &'a ProviderId,
    generation: u32,
    key: KeyUuid,
    salt: &'a [u8; 32],
    nonce: &'a [u8; 12],
    ciphertext: &'a [u8],
}

impl<'a> Wrapped<'a> {
    fn of(recipient: &'a Recipient) -> Option<Self> {
        let (generation, key) = recipient.id.kek.as_native()?;
        let RecipientSeal::Gcm { salt, nonce, wrapped_kek: None } = &recipient.seal else {
            return None;
        };
        let (ciphertext, _tag) =
            recipient.wrapped_payload.split_last_chunk::<{ vmseal_model::record::TAG_LEN }>()?;
        Some(Self { provider: &recipient.id.provider, generation, key, salt, nonce, ciphertext })
    }
}

fn write_script(
    out: &mut String,
    head: &RecordHead,
    disk: DiskId,
    wrapped: &Wrapped<'_>,
    files: &RunbookFiles<'_>,
) -> fmt::Result {
    let Wrapped { provider, generation, key, salt, nonce, ciphertext } = wrapped;
    let (record, vm) = (head.record, head.vm);
    let check_info = info("key-check", &[&vm.to_bytes(), &disk.to_bytes()]);
    let header = match files.header {
        Some(path) => format!("HEADER=${{HEADER:-{}}}\n", default_value(path)),
        None => String::new(),
    };
    let header_option = if files.header.is_some() { " --header $(printf %q \"$HEADER\")" } else { "" };
    write!(
        out,
        r#"#!/bin/bash
# Opens disk {disk}
#    of VM {vm}
# with its key wrapped under {provider}, generation {generation}, key {key} (key record {record}).
#
# Needed: the backup of {provider} and its password, openssl 3.0 or later, cryptsetup, coreutils. No vmseal.
# Run it with bash as root on a machine without network that nobody else uses: openssl is given keys as arguments,
# and other users of a machine see the arguments of every process.
# Nothing in this text is secret.
set -euo pipefail
umask 077
BACKUP=${{BACKUP:-{backup}}}
VOLUME=${{VOLUME:-{volume}}}
{header}MAPPING=${{MAPPING:-{mapping}}}
# Where the key goes: a directory in memory, made here.
OUT=${{OUT:-/dev/shm/vmseal-{disk}}}
mkdir -- "$OUT"
trap 'rm -f -- "$OUT"/payload.bin "$OUT"/wrapped.bin' EXIT

fail() {{ echo "runbook: $1" >&2; exit 1; }}
# hkdf KEY SALT INFO: 32 bytes of HKDF-SHA-512, all as hex.
hkdf() {{
  openssl kdf -keylen 32 -kdfopt digest:SHA512 -kdfopt "hexkey:$1" ${{2:+-kdfopt "hexsalt:$2"}} \
    -kdfopt "hexinfo:$3" HKDF | tr -d ':\n' | tr A-F a-f
}}

echo '1. The key-derivation key (KDK), generation {generation}, from the backup.'
# Asks for the password; PASSIN=file:/some/file gives it otherwise.
BAGS=$(openssl pkcs12 -in "$BACKUP" -nodes ${{PASSIN:+-passin "$PASSIN"}} 2>/dev/null) ||
  fail 'openssl cannot open the backup: wrong password, or damaged'
BAG=$(printf '%s\n' "$BAGS" | grep -F -A 1 'friendlyName: {provider} generation {generation} provider ') ||
  fail 'this is not a backup of {provider}, or it is older than generation {generation}'
PROVIDER=$(printf '%s\n' "$BAG" | sed -n 's/.* provider \([0-9a-f-]*\) exported .*/\1/p' | tr -d -)
KDK=$(printf '%s\n' "$BAG" | tail -n 1 | tr -d ' ')

echo '2. The key-encryption key (KEK): HKDF of the KDK, the provider id as salt.'
KEK=$(hkdf "$KDK" "$PROVIDER" {kek_info})

echo '3. The wrap key: HKDF of the KEK.'
WRAP=$(hkdf "$KEK" {salt} \
  {wrap_info})

echo '4. The payload: AES-256-GCM is AES-256-CTR from block 2 on; its tag is replaced by the key check below.'
printf '{ciphertext}' >"$OUT"/wrapped.bin
openssl enc -aes-256-ctr -d -K "$WRAP" -iv {nonce}00000002 -in "$OUT"/wrapped.bin -out "$OUT"/payload.bin
CHECK=$(hkdf "$(od -An -v -tx1 "$OUT"/payload.bin | tr -d ' \n')" '' \
  {check_info})
[ "$CHECK" = {key_check} ] ||
  fail 'the key does not fit the record: the backup is of another provider, or the record was changed'
head -c 64 "$OUT"/payload.bin >"$OUT"/dek.bin

echo "5. The disk's key is in $OUT/dek.bin. Open the disk with it, then destroy it:"
echo "cryptsetup open --type luks2 --key-size 512 --volume-key-file $(printf %q "$OUT/dek.bin"){header_option} $(printf %q "$VOLUME") $(printf %q "$MAPPING")"
echo "qemu-img info /dev/mapper/$(printf %q "$MAPPING")    # says whether raw or qcow2 is inside"
echo "shred -u $(printf %q "$OUT/dek.bin")"
"#,
        backup = default_value(files.backup),
        volume = default_value(files.volume),
        mapping = default_value(files.mapping),
        kek_info = hex(&kek_info(*key)),
        salt = hex(*salt),
        wrap_info = hex(&wrap_key_info(record)),
        ciphertext = escapes(ciphertext),
        nonce = hex(*nonce),
        check_info = hex(&check_info),
        key_check = hex(&head.key_check),
    )
}

/// A text as the default in `${NAME:-…}` that does not stand in double quotes: in single quotes, whatever is in it.
fn default_value(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes for the format argument of printf.
fn escapes(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect()
}

/// Why there is no runbook for a record.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunbookError {
    /// A home's record opens no volume.
    #[error("key record {record} is of a VM's home, not of a disk: cryptsetup has nothing to open")]
    NotADisk {
        /// The record.
        record: RecordId,
    },
    /// The volume alone does not open.
    #[error("the LUKS2 header of key record {record}'s disk is in a file of its own: name it with --header")]
    HeaderNotNamed {
        /// The record.
        record: RecordId,
    },
    /// Nothing a backup of a native provider could open.
    #[error(
        "key record {record} has no recipient of {provider}; the runbook is for keys of a native provider"
    )]
    NoRecipient {
        /// The record.
        record: RecordId,
        /// What was looked for.
        provider: String,
    },
    /// A recipient that calls itself native and is not.
    #[error(
        "the recipient of {provider} in key record {record} is damaged: {kek} is no native key id, or more is wrapped"
    )]
    NotNative {
        /// The record.
        record: RecordId,
        /// The provider.
        provider: ProviderId,
        /// The id.
        kek: KekId,
    },
}

#[cfg(test)]
mod tests;
