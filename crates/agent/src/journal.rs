//! The journal of one task: `<state dir>/tasks/<task id>`, appended to, every entry flushed before the next step.
//! Format: `docs/formats/task-journal.md`.
//!
//! Entries in; after a crash, the entries that were answered for come out, in order. What an entry means is the
//! tasks' business. A torn last entry is cut off; damage before the end is an error, never a shorter history.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use vmseal_model::{id::TaskId, refusal::Code, task::TaskState};

/// `VMSEALTJ`, version, seven zero bytes.
const HEADER: [u8; 16] = *b"VMSEALTJ\x01\0\0\0\0\0\0\0";
/// Most bytes of one entry's JSON.
pub const MAX_ENTRY: usize = 16 << 20;
/// Most bytes of a journal that are read: progress of a 64 TiB copy and room to spare.
pub const MAX_JOURNAL: u64 = 256 << 20;
/// Length and checksum before each entry.
const PREFIX: usize = 8;

/// One thing that happened, or is about to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "entry", rename_all = "kebab-case")]
pub enum Entry {
    /// The first: what was asked.
    TaskBegun {
        /// The command.
        command: serde_json::Value,
    },
    /// A step is done, or something was found out that a later one needs.
    Step {
        /// The disk, or empty for the whole VM.
        target: String,
        /// Its word.
        step: String,
        /// What later steps need of it.
        data: serde_json::Value,
    },
    /// Everything before this byte is on the medium.
    Progress {
        /// The disk.
        target: String,
        /// The step that is at work.
        step: String,
        /// Bytes.
        durable: u64,
    },
    /// It goes back; from here on it never goes forward again.
    RollingBack {
        /// Why.
        outcome: Outcome,
    },
    /// The last: nothing more is done.
    Finished {
        /// How it ended.
        outcome: Outcome,
    },
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Succeeded, failed or cancelled.
    pub state: TaskState,
    /// For people.
    pub message: String,
    /// On failure.
    pub code: Option<Code>,
    /// What to do next.
    pub hint: String,
}

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// The file or its directory.
    #[error("cannot {action} the task journal {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is one already.
    #[error("there already is a task journal {}", path.display())]
    Exists {
        /// Which.
        path: PathBuf,
    },
    /// Not as it was written, and not by a crash.
    #[error(
        "the task journal {} is damaged at byte {at}; the task is not resumed, look at its VM's disks before deleting it",
        path.display()
    )]
    Damaged {
        /// Which.
        path: PathBuf,
        /// Where the first bad entry begins.
        at: u64,
    },
    /// A later format.
    #[error("the task journal {} was written by another version of vmseal", path.display())]
    Version {
        /// Which.
        path: PathBuf,
    },
    /// An entry failed to be flushed before; nothing more is written.
    #[error("the task journal {} failed before", path.display())]
    Broken {
        /// Which.
        path: PathBuf,
    },
}

/// A journal that is written.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    broken: bool,
}

impl Journal {
    /// A new one, durable with its header before this returns.
    ///
    /// # Errors
    ///
    /// [`JournalError::Exists`], [`JournalError::Io`].
    pub fn create(state_dir: &Path, task: TaskId) -> Result<Self, JournalError> {
        let dir = directory(state_dir);
        let path = dir.join(task.to_string());
        let io = |action| {
            let path = path.clone();
            move |source| JournalError::Io { action, path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(io("make"))?;
        let mut file = match File::options().write(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Err(JournalError::Exists { path }),
            Err(e) => return Err(io("make")(e)),
        };
        file.write_all(&HEADER).map_err(io("write"))?;
        file.sync_all().map_err(io("flush"))?;
        File::open(&dir).and_then(|d| d.sync_all()).map_err(io("flush"))?;
        Ok(Self { file, path, broken: false })
    }

    /// Opens one that is there: gives its entries, cuts off what a crash tore.
    ///
    /// # Errors
    ///
    /// [`JournalError`].
    pub fn recover(path: &Path) -> Result<(Self, Vec<Entry>), JournalError> {
        let io = |action| {
            let path = path.to_owned();
            move |source| JournalError::Io { action, path, source }
        };
        let bytes = read_all(path)?;
        let mut file = File::options().append(true).open(path).map_err(io("open"))?;
        let (entries, good) = match parse(&bytes) {
            Parsed::Good { entries, len } => (entries, len),
            Parsed::NoHeader => {
                // Torn before the header was flushed: nothing was answered for.
                file.set_len(0).map_err(io("cut"))?;
                file.write_all(&HEADER).map_err(io("write"))?;
                file.sync_all().map_err(io("flush"))?;
                return Ok((Self { file, path: path.to_owned(), broken: false }, Vec::new()));
            }
            Parsed::Damaged { at } => {
                return Err(JournalError::Damaged { path: path.to_owned(), at: at as u64 });
            }
            Parsed::OtherVersion => return Err(JournalError::Version { path: path.to_owned() }),
        };
        if good < bytes.len() {
            file.set_len(good as u64).map_err(io("cut"))?;
            file.sync_all().map_err(io("flush"))?;
        }
        Ok((Self { file, path: path.to_owned(), broken: false }, entries))
    }

    /// Reads one without touching it.
    ///
    /// # Errors
    ///
    /// [`JournalError`].
    pub fn read(path: &Path) -> Result<Vec<Entry>, JournalError> {
        match parse(&read_all(path)?) {
            Parsed::Good { entries, .. } => Ok(entries),
            Parsed::NoHeader => Ok(Vec::new()),
            Parsed::Damaged { at } => Err(JournalError::Damaged { path: path.to_owned(), at: at as u64 }),
            Parsed::OtherVersion => Err(JournalError::Version { path: path.to_owned() }),
        }
    }

    /// Journals there are, with their tasks.
    ///
    /// # Errors
    ///
    /// [`JournalError::Io`].
    pub fn list(state_dir: &Path) -> Result<Vec<(TaskId, PathBuf)>, JournalError> {
        let dir = directory(state_dir);
        let io = |source| JournalError::Io { action: "list", path: dir.clone(), source };
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(io(e)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(io)?.path();
            if let Some(task) = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse().ok()) {
                found.push((task, path));
            }
        }
        found.sort();
        Ok(found)
    }

    /// Appends an entry; it is on the medium when this returns.
    ///
    /// # Errors
    ///
    /// [`JournalError::Io`], and [`JournalError::Broken`] ever after: a flush that failed once is never trusted again.
    pub fn append(&mut self, entry: &Entry) -> Result<(), JournalError> {
        if self.broken {
            return Err(JournalError::Broken { path: self.path.clone() });
        }
        let bytes = encode(entry);
        let written = self.file.write_all(&bytes).and_then(|()| self.file.sync_data());
        written.map_err(|source| {
            self.broken = true;
            JournalError::Io { action: "write", path: self.path.clone(), source }
        })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The directory of all journals.
pub fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("tasks")
}

/// Data of the last step entry of that target and word.
pub fn step_data<T: DeserializeOwned>(entries: &[Entry], target: &str, step: &str) -> Option<T> {
    entries.iter().rev().find_map(|entry| match entry {
        Entry::Step { target: t, step: s, data } if t == target && s == step => {
            serde_json::from_value(data.clone()).ok()
        }
        _ => None,
    })
}

/// Whether that step is done.
pub fn is_done(entries: &[Entry], target: &str, step: &str) -> bool {
    entries.iter().any(|e| matches!(e, Entry::Step { target: t, step: s, .. } if t == target && s == step))
}

/// How far a step got.
pub fn durable(entries: &[Entry], target: &str, step: &str) -> u64 {
    let found = entries.iter().rev().find_map(|entry| match entry {
        Entry::Progress { target: t, step: s, durable } if t == target && s == step => Some(*durable),
        _ => None,
    });
    found.unwrap_or(0)
}

fn encode(entry: &Entry) -> Vec<u8> {
    let json = serde_json::to_vec(entry).expect("an entry has nothing that JSON cannot say");
    let mut bytes = Vec::with_capacity(json.len() + PREFIX);
    bytes.extend_from_slice(&(json.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&crc32c(&json).to_le_bytes());
    bytes.extend_from_slice(&json);
    bytes
}

fn read_all(path: &Path) -> Result<Vec<u8>, JournalError> {
    let io = |source| JournalError::Io { action: "read", path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).map_err(io)?.take(MAX_JOURNAL).read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
}

enum Parsed {
    Good { entries: Vec<Entry>, len: usize },
    NoHeader,
    Damaged { at: usize },
    OtherVersion,
}

fn parse(bytes: &[u8]) -> Parsed {
    let Some(header) = bytes.get(..HEADER.len()) else { return Parsed::NoHeader };
    if header != HEADER {
        // Torn: a piece of the header, and zeros where the rest never came.
        let whole = header.iter().zip(&HEADER).take_while(|(a, b)| a == b).count();
        return match () {
            () if bytes[whole..].iter().all(|b| *b == 0) => Parsed::NoHeader,
            () if header.starts_with(&HEADER[..8]) => Parsed::OtherVersion,
            () => Parsed::Damaged { at: 0 },
        };
    }
    let mut entries = Vec::new();
    let mut at = HEADER.len();
    while at < bytes.len() {
        match entry_at(bytes, at) {
            Some((entry, len)) => {
                entries.push(entry);
                at += len;
            }
            // Entries are flushed one by one, so a crash tears the last one only: nothing good can follow it.
            None if (at + 1..bytes.len()).any(|later| entry_at(bytes, later).is_some()) => {
                return Parsed::Damaged { at };
            }
            None => break,
        }
    }
    Parsed::Good { entries, len: at }
}

fn entry_at(bytes: &[u8], at: usize) -> Option<(Entry, usize)> {
    let rest = bytes.get(at..)?;
    let len = u32::from_le_bytes(rest.get(..4)?.try_into().ok()?) as usize;
    let sum = u32::from_le_bytes(rest.get(4..PREFIX)?.try_into().ok()?);
    if len == 0 || len > MAX_ENTRY {
        return None;
    }
    let json = rest.get(PREFIX..PREFIX + len)?;
    // The first byte is looked at before the sum: the search for a later entry would otherwise be quadratic.
    if json.first() != Some(&b'{') || crc32c(json) != sum {
        return None;
    }
    Some((serde_json::from_slice(json).ok()?, PREFIX + len))
}

/// CRC-32C (Castagnoli), reflected; RFC 3720 appendix B.4 has the vectors.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| crc >> 8 ^ CRC_TABLE[(crc as u8 ^ byte) as usize])
}

static CRC_TABLE: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
};

#[cfg(test)]
mod tests;
