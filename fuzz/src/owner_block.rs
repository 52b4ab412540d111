//! An owner block's bytes, as they are and with a checksum that is right.

use aws_lc_rs::digest::{SHA256, digest};
use vmseal_luks::{OWNER_BLOCK_LEN, OwnerBlock};

/// Decodes.
///
/// # Panics
///
/// If a block that was read is written otherwise.
pub fn run(data: &[u8]) {
    let mut block = [0; OWNER_BLOCK_LEN];
    let given = data.len().min(OWNER_BLOCK_LEN);
    block[..given].copy_from_slice(&data[..given]);
    check(&block);
    let sum = digest(&SHA256, &block[..OWNER_BLOCK_LEN - 32]);
    block[OWNER_BLOCK_LEN - 32..].copy_from_slice(sum.as_ref());
    check(&block);
}

fn check(block: &[u8; OWNER_BLOCK_LEN]) {
    match OwnerBlock::decode(block) {
        Ok(read) if block.iter().any(|byte| *byte != 0) => assert_eq!(&read.encode(), block),
        Ok(read) => assert_eq!(read, OwnerBlock::NEVER_HELD),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
