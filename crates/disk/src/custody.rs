//! Whose volumes they are: how a VM's disks go from one disk process to another without two that write, and without a
//! write lost.
//!
//! In: orders of the agent (drain, hand over, activate, resume), one at a time. Out: owner blocks and locks, and a gate
//! that lets requests in or makes them wait. Where a worker is in this outlives it on the keeper's page, so the next one
//! goes on there. What is on the medium at each step, and what becomes of a crash between any two:
//! `docs/design/hand-over.md`.

mod error;
mod kept;

use std::{
    fmt,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError},
    thread,
    time::{Duration, Instant},
};

use vmseal_luks::OwnerBlock;
use vmseal_model::{
    control::{DRAINED_MS, MAX_DRAINED_MS, Ownership, Phase},
    id::HostId,
};

pub use self::{error::CustodyError, kept::Kept};
use crate::{gate::Way, latch::SharedPage, log};

/// How long requests under way may take to end.
const REST: Duration = Duration::from_secs(10);

/// The volumes of a VM that are written, and what may be done with them.
pub struct Custody {
    host: Option<HostId>,
    /// What it is before the first order.
    first: Phase,
    page: Arc<SharedPage>,
    volumes: Vec<Kept>,
    /// One order at a time; counts those to drain.
    turn: Mutex<u64>,
    changed: Condvar,
}

/// An order's turn.
pub struct Turn<'a>(MutexGuard<'a, u64>);

impl Custody {
    /// Goes on where the last worker of the same keeper was: gates are open or shut when this returns.
    pub fn new(host: Option<HostId>, waiting: bool, page: Arc<SharedPage>, volumes: Vec<Kept>) -> Arc<Self> {
        let first = if waiting { Phase::Waiting } else { Phase::Serving };
        let (turn, changed) = (Mutex::default(), Condvar::new());
        let custody = Arc::new(Self { host, first, page, volumes, turn, changed });
        let (fenced, way) = match custody.phase() {
            Phase::Serving => (false, Way::Open),
            Phase::Drained => (false, Way::Shut),
            // A client that opens the disk before it is ours may look, as at a disk on shared storage.
            Phase::Waiting | Phase::Activating => (true, Way::Reading),
            Phase::HandingOver | Phase::HandedOver => (true, Way::Shut),
        };
        custody.let_pass(fenced, way);
        custody
    }

    /// Starts what has to be watched; once the process may have threads.
    pub fn watch(self: &Arc<Self>) {
        if self.phase() == Phase::Drained {
            self.watch_drained(0);
        }
    }

    /// What the volumes are now.
    pub fn phase(&self) -> Phase {
        self.page.phase().unwrap_or(self.first)
    }

    /// Whether what this process wrote is there to be flushed at its end.
    pub fn is_ours(&self) -> bool {
        matches!(self.phase(), Phase::Serving | Phase::Drained)
    }

    /// Keeps the volumes from changing hands while the result lives.
    ///
    /// # Errors
    ///
    /// They are not being served, or just changing hands.
    pub fn serving(&self, order: &'static str) -> Result<Turn<'_>, CustodyError> {
        let turn = self.turn()?;
        match self.phase() {
            Phase::Serving => Ok(turn),
            phase => Err(CustodyError::Phase { order, phase }),
        }
    }

    /// Takes nothing more, ends what is under way, flushes. Goes on by itself after `limit_ms`.
    ///
    /// # Errors
    ///
    /// [`CustodyError`]; the VM goes on then.
    pub fn drain(self: &Arc<Self>, limit_ms: u64) -> Result<(), CustodyError> {
        let mut turn = self.turn()?;
        let limit = if limit_ms == 0 { DRAINED_MS } else { limit_ms.min(MAX_DRAINED_MS) };
        self.page.set_drained_ms(limit as u32);
        self.come_to_rest("drain")?;
        *turn.0 += 1;
        let count = *turn.0;
        drop(turn);
        log::line(format_args!("drained, for at most {limit} ms"));
        self.changed.notify_all();
        self.watch_drained(count);
        Ok(())
    }

    /// Gives the volumes to `to`. This process writes nothing from the first block on, and has no locks at the end.
    ///
    /// # Errors
    ///
    /// [`CustodyError`]. Once a block may have been written the VM does not go on by itself: the order is to be given
    /// again, or taken back by [`Custody::resume`].
    pub fn hand_over(&self, to: HostId) -> Result<Vec<Ownership>, CustodyError> {
        let _turn = self.turn()?;
        let host = self.host()?;
        let before = self.phase();
        match before {
            Phase::Serving | Phase::Drained => self.come_to_rest("hand over")?,
            // Only to be told again, and what is written stays as it is.
            Phase::HandingOver => {}
            Phase::HandedOver => return self.handed_over_before(to),
            phase => return Err(CustodyError::Phase { order: "hand over", phase }),
        }
        // Whether it can be done at all is known before there is no way back.
        let given = |block: &OwnerBlock| block.hand_over_to.filter(|_| block.host == host);
        // What another host took after an order that was cut short is that one's.
        let ours = |kept: &Kept| {
            let block = kept.block()?;
            let claimed = block.claimed_by(host, None);
            claimed.map_err(|cause| CustodyError::Claim { target: kept.target(), cause })?;
            Ok(block)
        };
        let blocks = self.volumes.iter().map(ours).collect::<Result<Vec<_>, _>>();
        let blocks = blocks.and_then(|blocks| {
            let other = blocks.iter().filter_map(given).find(|other| *other != to);
            other.map_or(Ok(blocks), |to| Err(CustodyError::GivenTo { to }))
        });
        if blocks.is_err() && before == Phase::Serving {
            self.open();
        }
        let blocks = blocks?;
        self.page.set_phase(Phase::HandingOver);
        self.let_pass(true, Way::Shut);
        let mut disks = Vec::new();
        for (kept, block) in self.volumes.iter().zip(&blocks) {
            disks.push(match given(block) {
                Some(_) => kept.ownership(block),
                None => kept.write(&block.handed_over(host, to))?,
            });
        }
        // The next worker must not think that the locks are still there.
        self.page.set_phase(Phase::HandedOver);
        self.volumes.iter().for_each(Kept::unlock);
        log::line(format_args!(
            "{} volumes handed over to host {to}; nothing is written any more",
            disks.len()
        ));
        Ok(disks)
    }

    /// The order came again, after an answer that was lost.
    fn handed_over_before(&self, to: HostId) -> Result<Vec<Ownership>, CustodyError> {
        self.volumes.iter().for_each(Kept::unlock);
        let mut disks = Vec::new();
        for kept in &self.volumes {
            let block = kept.block()?;
            match block.hand_over_to {
                Some(other) if other != to => return Err(CustodyError::GivenTo { to: other }),
                // Taken since, or not.
                _ => disks.push(kept.ownership(&block)),
            }
        }
        Ok(disks)
    }

    /// Takes volumes that this host was given, and serves them.
    ///
    /// # Errors
    ///
    /// [`CustodyError`]; it waits on. If a block may have been written, the locks are kept, and the order is to be given
    /// again.
    pub fn activate(&self, ended: Option<HostId>) -> Result<Vec<Ownership>, CustodyError> {
        let _turn = self.turn()?;
        let host = self.host()?;
        match self.phase() {
            Phase::Waiting | Phase::Activating => {}
            Phase::Serving => return self.blocks(),
            phase => return Err(CustodyError::Phase { order: "activate", phase }),
        }
        let before = self.phase();
        self.page.set_phase(Phase::Activating);
        let claimed = self.claim(host, ended);
        if claimed.is_err() {
            self.page.set_phase(before);
        }
        self.take(&claimed?)
    }

    /// Takes back what was handed over and not taken, or ends a drain.
    ///
    /// # Errors
    ///
    /// [`CustodyError`]; everything is as before. If a block may have been written, the locks are kept, and the order is
    /// to be given again.
    pub fn resume(&self, ended: Option<HostId>) -> Result<Vec<Ownership>, CustodyError> {
        let _turn = self.turn()?;
        match self.phase() {
            Phase::Serving => {}
            Phase::Drained => self.open(),
            Phase::HandingOver | Phase::HandedOver => {
                let host = self.host()?;
                // Also while it is being handed over: a block may say so already.
                self.check_arbitrated(ended)?;
                let claimed = self.claim(host, ended)?;
                // The locks are here again. If not all blocks are written, handing over again does not rely on them.
                self.page.set_phase(Phase::HandingOver);
                return self.take(&claimed);
            }
            phase => return Err(CustodyError::Phase { order: "resume", phase }),
        }
        // Owner blocks are of no use to a VM whose host has no id.
        if self.host.is_none() { Ok(Vec::new()) } else { self.blocks() }
    }

    /// Of two hosts that write a block at the same time the lock lets one; where it does not reach, the asker's word must.
    fn check_arbitrated(&self, ended: Option<HostId>) -> Result<(), CustodyError> {
        for kept in self.volumes.iter().filter(|kept| kept.is_unarbitrated()) {
            if let Some(to) =
                kept.block()?.hand_over_to.filter(|to| Some(*to) != ended && Some(*to) != self.host)
            {
                return Err(CustodyError::Unarbitrated { target: kept.target(), to });
            }
        }
        Ok(())
    }

    /// All locks, then a look at all blocks. On an error what was locked here is let go, unless it was ours before.
    fn claim(&self, host: HostId, ended: Option<HostId>) -> Result<Vec<OwnerBlock>, CustodyError> {
        let has_locks = self.phase() == Phase::HandingOver;
        let locked = if has_locks { Ok(()) } else { self.volumes.iter().try_for_each(Kept::lock) };
        let claimed = locked.and_then(|()| {
            let claim = |kept: &Kept| {
                let claimed = kept.block()?.claimed_by(host, ended);
                claimed.map_err(|cause| CustodyError::Claim { target: kept.target(), cause })
            };
            self.volumes.iter().map(claim).collect::<Result<Vec<_>, _>>()
        });
        if claimed.is_err() && !has_locks {
            self.volumes.iter().for_each(Kept::unlock);
        }
        claimed
    }

    /// Writes the blocks, and opens the volumes.
    fn take(&self, blocks: &[OwnerBlock]) -> Result<Vec<Ownership>, CustodyError> {
        let mut disks = Vec::new();
        for (kept, block) in self.volumes.iter().zip(blocks) {
            disks.push(kept.write(block)?);
        }
        for kept in &self.volumes {
            kept.volume.store().forget_cached();
            let measured = kept.volume.remeasure();
            measured.map_err(|cause| CustodyError::Volume { target: kept.target(), cause })?;
        }
        self.open();
        log::line(format_args!("{} volumes are this process's, and served", disks.len()));
        Ok(disks)
    }

    fn blocks(&self) -> Result<Vec<Ownership>, CustodyError> {
        self.volumes.iter().map(|kept| Ok(kept.ownership(&kept.block()?))).collect()
    }

    fn come_to_rest(&self, order: &'static str) -> Result<(), CustodyError> {
        if !self.is_ours() {
            return Err(CustodyError::Phase { order, phase: self.phase() });
        }
        self.volumes.iter().try_for_each(Kept::reach)?;
        // A worker that dies in here is followed by one that takes nothing either.
        self.page.set_phase(Phase::Drained);
        self.let_pass(false, Way::Shut);
        let rested = self.rest();
        if rested.is_err() {
            self.open();
        }
        rested
    }

    fn rest(&self) -> Result<(), CustodyError> {
        let deadline = Instant::now() + REST;
        for kept in &self.volumes {
            if !kept.volume.gate().wait_until_left(deadline) {
                return Err(CustodyError::Busy { target: kept.target() });
            }
        }
        for kept in &self.volumes {
            let flushed = kept.volume.flush();
            flushed.map_err(|cause| CustodyError::Flush { target: kept.target(), cause })?;
            kept.volume.let_pass(Way::Shut, true);
        }
        Ok(())
    }

    fn open(&self) {
        self.page.set_phase(Phase::Serving);
        self.let_pass(false, Way::Open);
        self.changed.notify_all();
    }

    fn let_pass(&self, fenced: bool, way: Way) {
        for kept in &self.volumes {
            kept.volume.set_fenced(fenced);
            // A process that is fenced has flushed, or never wrote.
            kept.volume.let_pass(way, fenced);
        }
    }

    /// An agent that dies must not leave a guest behind that hangs.
    fn watch_drained(self: &Arc<Self>, count: u64) {
        let (custody, limit) = (self.clone(), Duration::from_millis(self.page.drained_ms().into()));
        let until = Instant::now() + limit;
        let watch = move || {
            let mut turn = custody.turn.lock().unwrap_or_else(PoisonError::into_inner);
            while *turn == count && custody.phase() == Phase::Drained {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    log::line(format_args!(
                        "drained for {} ms and nothing came of it: going on",
                        limit.as_millis()
                    ));
                    return custody.open();
                }
                turn = custody.changed.wait_timeout(turn, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        };
        if let Err(error) = thread::Builder::new().name("drained".into()).spawn(watch) {
            log::line(format_args!(
                "cannot start a thread, so the VM stays drained until it is told otherwise: {error}"
            ));
        }
    }

    fn host(&self) -> Result<HostId, CustodyError> {
        self.host.ok_or(CustodyError::NoHost)
    }

    fn turn(&self) -> Result<Turn<'_>, CustodyError> {
        match self.turn.try_lock() {
            Ok(turn) => Ok(Turn(turn)),
            Err(TryLockError::Poisoned(turn)) => Ok(Turn(turn.into_inner())),
            Err(TryLockError::WouldBlock) => Err(CustodyError::Occupied),
        }
    }
}

impl fmt::Debug for Custody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Custody")
            .field("host", &self.host)
            .field("phase", &self.phase())
            .finish_non_exhaustive()
    }
}
