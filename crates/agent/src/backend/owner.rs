//! Owner blocks of volumes whose process has ended: given back, or written anew where they say nothing.
//!
//! A plan in, blocks written. Information for other hosts, never a lock: who is refused the lock writes nothing.

use std::{fs::File, io, sync::Mutex};

use vmseal_luks::{HeaderFile, OwnerBlock, OwnerState};
use vmseal_model::id::HostId;

use super::lock as held;
use crate::{
    causes::causes,
    config::AgentConfig,
    lock::{Claim, LockError, claim, claim_header, claim_soon},
    rbd::{Location, Served, Tool},
    start::plan::{Plan, PlannedDisk},
    volume::open_regular,
};

/// Writes into the blocks of this host's volumes that nobody holds them any more. What fails is let be.
pub(super) fn release(plan: &Plan, host: Option<HostId>) {
    for disk in plan.disks.iter().filter(|disk| !disk.read_only) {
        if Location::of_path(&disk.source).is_none()
            && let Ok(file) = lock_file(disk, claim)
        {
            give_back(&file, host);
        }
    }
}

/// Gives images back, their locks with them; with a plan, their blocks say so.
pub(super) fn release_images(images: &Mutex<Vec<Served>>, plan: Option<&Plan>, host: Option<HostId>) {
    for mut image in held(images).drain(..) {
        let at = image.location().to_string();
        let writes = |plan: &Plan| plan.disks.iter().any(|disk| !disk.read_only && *disk.source == *at);
        if plan.is_some_and(writes)
            && let Ok(channel) = image.channel()
        {
            give_back(&channel, host);
        }
        image.end();
    }
}

/// What was handed over waits for its receiver, and what another host took since is that one's.
fn give_back(medium: &impl HeaderFile, host: Option<HostId>) {
    if let Ok(block) = OwnerBlock::read(medium)
        && block.state == OwnerState::Held
        && Some(block.host) == host
    {
        let _ = block.released().write(medium);
    }
}

/// Writes blocks anew that say nothing; gives a line for each that it wrote or could not look at. Whose the volume was is
/// forgotten, so this is for an administrator to order; a volume that somebody uses on any host that shares its locks is
/// left alone.
pub fn repair_owner_blocks(config: &AgentConfig, plan: &Plan) -> Vec<String> {
    let repaired = |disk: &PlannedDisk| match repair(config, disk) {
        Ok(false) => None,
        Ok(true) => Some(format!("the damaged owner block of {} was written anew", disk.target)),
        Err(error) => {
            Some(format!("the owner block of {} was not looked at: {}", disk.target, causes(&error)))
        }
    };
    plan.disks.iter().filter(|disk| !disk.read_only).filter_map(repaired).collect()
}

fn repair(config: &AgentConfig, disk: &PlannedDisk) -> io::Result<bool> {
    match Location::of_path(&disk.source) {
        None => {
            let file = lock_file(disk, claim_soon)?;
            repair_block(&file)
        }
        Some(location) => {
            let location = location.map_err(io::Error::other)?;
            let tool = Tool::new(config).map_err(io::Error::other)?;
            let served = Served::open(&tool, &location, &disk.disk.to_string()).map_err(io::Error::other)?;
            repair_block(&served.channel()?)
        }
    }
}

fn repair_block(medium: &impl HeaderFile) -> io::Result<bool> {
    match OwnerBlock::read(medium) {
        Ok(_) => Ok(false),
        Err(error) if error.is_rubble() => OwnerBlock::NEVER_HELD.released().write(medium).map(|()| true),
        Err(error) => Err(io::Error::other(error)),
    }
}

/// The file with a volume's block, locked.
fn lock_file(disk: &PlannedDisk, claim: fn(&File, Claim) -> Result<(), LockError>) -> io::Result<File> {
    let path = disk.header.as_deref().unwrap_or(&disk.source);
    let file = open_regular(path, true).map_err(io::Error::other)?;
    let locked = match &disk.header {
        Some(_) => claim_header(&file, false),
        None => claim(&file, Claim::Volume),
    };
    locked.map_err(io::Error::other)?;
    Ok(file)
}
