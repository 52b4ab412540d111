//! Before anything is measured: an export keeps what it is given, and what lies under it is what it should be.

use std::{fs::File, os::unix::fs::FileExt, path::PathBuf};

use vmseal_xts::Cipher;

use crate::{
    error::{BenchError, Trying},
    image::PAYLOAD_OFFSET,
    ours::UNIT,
    sample::{Client, Random},
    stand::Stall,
};

/// Where and how much is written.
const OFFSET: u64 = 64 << 20;
const BYTES: usize = 8 << 20;

/// How the data of an export lies in its file.
pub(crate) enum Stored {
    /// As it was written.
    Clear {
        file: PathBuf,
        /// Where it begins.
        at: u64,
    },
    /// Under this key, as dm-crypt would have it.
    Encrypted { file: PathBuf, key: Box<[u8; 64]> },
    /// In a LUKS volume of somebody else's: not as it was written.
    Luks {
        file: PathBuf,
        /// Where it begins.
        at: u64,
    },
}

/// Writes a pattern, reads it back in pieces of another size, looks into the file.
///
/// # Errors
///
/// [`BenchError::Cheats`] if anything is not as it should be.
pub(crate) fn verify(stall: &mut Stall, seed: u64) -> Result<(), BenchError> {
    let export = stall.export.to_string();
    let cheats = |what: &str| BenchError::Cheats { export: export.clone(), what: what.to_owned() };
    let mut random = Random::new(seed);
    let pattern: Vec<u8> = (0..BYTES / 8).flat_map(|_| random.next().to_le_bytes()).collect();

    let client = &mut *stall.client;
    let mut done = Vec::new();
    for (at, piece) in (OFFSET..).step_by(1 << 20).zip(pattern.chunks(1 << 20)) {
        client.fill(0, piece);
        client.submit(0, true, at, piece.len());
        finish(client, &mut done, 1)?;
    }
    client.submit_flush(0);
    finish(client, &mut done, 1)?;
    let (bytes, depth) = (4096, 32);
    let mut read = vec![0; bytes];
    for (at, group) in (OFFSET..).step_by(bytes * depth).zip(pattern.chunks(bytes * depth)) {
        for slot in 0..depth {
            client.fill(slot * bytes, &[0xee; 4096]);
            client.submit(slot, false, at + (slot * bytes) as u64, bytes);
        }
        finish(client, &mut done, depth)?;
        for (slot, expected) in group.chunks(bytes).enumerate() {
            client.take(slot * bytes, &mut read);
            if read != expected {
                return Err(cheats("it reads other bytes than were written"));
            }
        }
    }

    let (file, at) = match &stall.stored {
        Stored::Clear { file, at } | Stored::Luks { file, at } => (file, *at),
        Stored::Encrypted { file, .. } => (file, PAYLOAD_OFFSET),
    };
    let mut stored = vec![0; BYTES];
    let found = File::open(file).and_then(|file| file.read_exact_at(&mut stored, at + OFFSET));
    found.trying(|| format!("reading {}", file.display()))?;
    let in_clear = stored.chunks(UNIT).zip(pattern.chunks(UNIT)).any(|(stored, written)| stored == written);
    match &stall.stored {
        Stored::Clear { .. } if stored != pattern => Err(cheats("its file does not hold what was written")),
        Stored::Clear { .. } => Ok(()),
        Stored::Luks { .. } | Stored::Encrypted { .. } if in_clear => {
            Err(cheats("its file is not encrypted"))
        }
        Stored::Luks { .. } => Ok(()),
        Stored::Encrypted { key, .. } => {
            let cipher = Cipher::new(key, UNIT).map_err(|error| BenchError::peer("cipher", error))?;
            let decrypted = cipher.decrypt(OFFSET / 512, &mut stored);
            decrypted.map_err(|error| BenchError::peer("cipher", error))?;
            if stored == pattern { Ok(()) } else { Err(cheats("its file holds other bytes under its key")) }
        }
    }
}

/// Sends what was made ready and waits for this many answers.
fn finish(client: &mut dyn Client, done: &mut Vec<usize>, wanted: usize) -> Result<(), BenchError> {
    client.send()?;
    done.clear();
    let mut answered = 0;
    while answered < wanted {
        client.wait(done)?;
        answered += done.len();
        done.clear();
    }
    Ok(())
}
