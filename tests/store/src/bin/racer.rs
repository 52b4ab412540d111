//! One of two that want a volume: opens and locks it as the agent does, says whether it has it, and writes. For tests.
//!
//! Arguments: volume, file of its record, file of its key, own number. Orders come on stdin, a line each; answers go to
//! stdout.

use std::{
    io::{self, BufRead, Write},
    os::unix::fs::FileExt,
    path::Path,
    process::ExitCode,
};

use vmseal_agent::{lock::LockError, volume};
use vmseal_keys::Dek;
use vmseal_luks::HEADER_BYTES;
use vmseal_model::{id::HostId, record::KeyRecord};
use vmseal_test_store::stamp::{BLOCK, stamped};

/// Blocks that are written at each order.
const BLOCKS: u64 = 4;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("failed: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, record, key, number] = &arguments[..] else { return Err("four arguments".into()) };
    let record = KeyRecord::decode(&std::fs::read(record)?)?;
    let dek = Dek::from_payload_slice(&std::fs::read(key)?).ok_or("a key of 96 bytes")?;
    let number: u8 = number.parse()?;
    say("ready");
    order("go")?;
    let mut open = match volume::open_locked(Path::new(path), None, &record, &dek, "vda", 0, false) {
        Ok(open) => open,
        Err(volume::VolumeError::Locked { lock: LockError::InUse { .. }, .. }) => {
            say("refused");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    say("held");
    open.hold(Some(HostId::from_bytes([number; 16])))?;
    for _ in 0..2 {
        order("write")?;
        for block in 0..BLOCKS {
            let data = stamped(block, 1, u64::from(number));
            open.data.write_all_at(&data, HEADER_BYTES + block * BLOCK)?;
        }
        open.data.sync_data()?;
        say("wrote");
    }
    open.release()?;
    drop(open);
    say("released");
    Ok(())
}

fn say(word: &str) {
    println!("{word}");
    let _ = io::stdout().flush();
}

fn order(expected: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    if line.trim_end() == expected {
        Ok(())
    } else {
        Err(format!("order {line:?} instead of {expected}").into())
    }
}
