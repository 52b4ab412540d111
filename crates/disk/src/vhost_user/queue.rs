//! One queue at work: a thread, a ring, a lane.
//!
//! Takes requests while the lane has room, gives back what is done, tells the driver as it wishes, and sleeps when there
//! is nothing to do. It ends when told to, with nothing in flight, or when the driver breaks the rules of the ring.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    dirty_log::DirtyLog,
    inflight::InflightQueue,
    memory::Piece,
    notifier::Notifier,
    request::{self, Command, ID_LEN, RequestError},
    ring::{Chain, Ring, RingError},
};
use crate::{
    export::Export,
    flush_gate::Bell,
    gate::Way,
    lane::{Done, Lane, Operation, Request, Segment},
    volume::VolumeError,
};

/// The driver sees what is done at the latest after so many chains, or so many bytes: while one processor works on,
/// another can go on with what it has.
const BATCH_CHAINS: u16 = 16;
const BATCH_BYTES: u64 = 128 << 10;

/// Keys of watched descriptors.
const KICK: u32 = 0;
const STOP: u32 = 1;

/// Why a queue stopped by itself.
#[derive(Debug, thiserror::Error)]
pub(super) enum QueueError {
    /// The driver's mistake.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The driver's mistake too.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The front end took memory away.
    #[error("shared memory was taken away")]
    MemoryLost,
    /// The front end's log is too short.
    #[error("the dirty log does not reach all of guest memory")]
    Log,
    /// The kernel's: not the guest's mistake.
    #[error("its way to the volume failed")]
    Io(#[from] io::Error),
}

/// Where writes to the guest's memory are logged.
#[derive(Clone)]
pub(super) struct Log {
    pub(super) log: Arc<DirtyLog>,
    /// Where the guest sees the used ring, if writes to it are logged too.
    pub(super) used: Option<u64>,
}

/// What all queues of a device share.
pub(super) struct Shared {
    pub(super) export: Arc<Export>,
    pub(super) id: [u8; ID_LEN],
    /// Whether writes are durable when they are done.
    pub(super) write_through: AtomicBool,
}

/// The order to end.
pub(super) struct Stop {
    pub(super) ordered: AtomicBool,
    pub(super) bell: Bell,
}

/// What a queue works with.
pub(super) struct Queue {
    // First, for it is dropped first: it waits until the kernel uses no memory of `ring` any more.
    pub(super) lane: Lane,
    pub(super) ring: Ring,
    pub(super) shared: Arc<Shared>,
    pub(super) accepted: u64,
    pub(super) inflight: Option<InflightQueue>,
    pub(super) log: Option<Log>,
    pub(super) kick: Arc<OwnedFd>,
    pub(super) call: Notifier,
    pub(super) stop: Arc<Stop>,
}

/// A request the lane has.
struct Pending {
    status: *mut u8,
    status_guest: u64,
    written: u32,
    effect: Effect,
    /// What of the guest's memory it may change, while a log is kept.
    dirty: Vec<(u64, u64)>,
}

#[derive(Clone, Copy)]
enum Effect {
    Read(u64),
    Wrote(u64),
    None,
}

/// A queue while it runs.
struct Running {
    queue: Queue,
    /// By the head of its chain.
    pending: Vec<Option<Pending>>,
    chain: Chain,
    /// Heads in the used ring that the driver does not see yet.
    batch: Vec<u16>,
    batch_bytes: u64,
}

impl Queue {
    /// Works until told to stop. Gives the index of the next chain to be taken, and why it stopped otherwise.
    pub(super) fn run(self) -> (u16, Result<(), QueueError>) {
        let mut pending = Vec::new();
        pending.resize_with(usize::from(self.ring.size()), || None);
        let chain = Chain::default();
        let mut running = Running { queue: self, pending, chain, batch: Vec::new(), batch_bytes: 0 };
        let result = running.serve();
        // Whatever happened, what was begun ends here: memory and ring may be somebody else's next.
        running.queue.lane.drain();
        let ended = running.give_back();
        let published = running.publish();
        running.queue.lane.unwatch(KICK);
        running.queue.lane.unwatch(STOP);
        // What stands where memory was taken away looks like other mistakes.
        let lost = if running.is_memory_lost() { Err(QueueError::MemoryLost) } else { Ok(()) };
        (running.queue.ring.next_available(), lost.and(result).and(ended).and(published))
    }
}

impl Running {
    fn serve(&mut self) -> Result<(), QueueError> {
        let (kick, stop) = (self.queue.kick.clone(), self.queue.stop.clone());
        self.queue.lane.watch(kick.as_fd(), KICK)?;
        self.queue.lane.watch(stop.bell.as_fd(), STOP)?;
        self.resubmit()?;
        self.queue.ring.ask_for_silence();
        // A call of a process that died may be lost.
        self.queue.call.tell();
        loop {
            while self.queue.lane.next_ready().is_some() {}
            if stop.ordered.load(Ordering::Acquire) {
                return Ok(());
            }
            if self.is_memory_lost() {
                return Err(QueueError::MemoryLost);
            }
            let more = self.take()?;
            self.give_back()?;
            self.publish()?;
            if more {
                // There is more in the ring than a round takes; the lane looks after what it has meanwhile.
                self.queue.lane.poll()?;
                continue;
            }
            // Without room nothing is taken, so nothing has to be told: something will be done before long.
            if self.queue.lane.has_room() && self.ask_to_be_told()? {
                self.queue.ring.ask_for_silence();
                continue;
            }
            self.queue.lane.wait()?;
            self.queue.ring.ask_for_silence();
            self.give_back()?;
        }
    }

    fn ask_to_be_told(&mut self) -> Result<bool, QueueError> {
        let more = self.queue.ring.ask_to_be_told();
        if let Some(Log { log, used: Some(used) }) = &self.queue.log {
            let end = used.checked_add(self.queue.ring.used_len());
            if !end.is_some_and(|end| log.mark(end - 2, 2) && log.mark(*used, 2)) {
                return Err(QueueError::Log);
            }
        }
        Ok(more)
    }

    fn is_memory_lost(&self) -> bool {
        self.queue.ring.memory().is_lost() || self.queue.log.as_ref().is_some_and(|log| log.log.is_lost())
    }

    /// Begins again what a process that died had begun.
    fn resubmit(&mut self) -> Result<(), QueueError> {
        let Some(inflight) = &mut self.queue.inflight else { return Ok(()) };
        let used = self.queue.ring.published_used();
        let heads = inflight.recover(used);
        self.queue.ring.resume_at(used.wrapping_add(heads.len() as u16));
        for head in heads {
            while !self.queue.lane.has_room() {
                // What a process that died had begun can neither be done now nor be given back undone. The front end comes
                // back, and begins it again behind an open gate.
                if self.queue.stop.ordered.load(Ordering::Acquire) && self.queue.lane.way() != Way::Open {
                    return Err(QueueError::Io(io::ErrorKind::WouldBlock.into()));
                }
                self.queue.lane.wait()?;
                self.give_back()?;
            }
            self.start(head)?;
        }
        self.give_back()?;
        self.publish()
    }

    /// Takes chains while there are some, at most as many as the queue holds; gives whether there may be more.
    fn take(&mut self) -> Result<bool, QueueError> {
        for _ in 0..self.queue.ring.size() {
            if !self.queue.lane.has_room() {
                return Ok(false);
            }
            let Some(head) = self.queue.ring.next_head()? else { return Ok(false) };
            self.start(head)?;
            self.give_back()?;
            if self.queue.ring.unpublished() >= BATCH_CHAINS || self.batch_bytes >= BATCH_BYTES {
                self.publish()?;
            }
        }
        Ok(true)
    }

    /// Begins one request.
    fn start(&mut self, head: u16) -> Result<(), QueueError> {
        let queue = &mut self.queue;
        match self.pending.get(usize::from(head)) {
            Some(None) => {}
            Some(Some(_)) => return Err(RingError::Twice(head).into()),
            None => return Err(RingError::Index(head).into()),
        }
        queue.ring.walk(head, &mut self.chain)?;
        let fua = queue.shared.write_through.load(Ordering::Relaxed);
        let parsed = request::parse(&mut self.chain, queue.accepted, fua)?;
        if let Some(inflight) = &mut queue.inflight {
            inflight.begin(head);
        }
        let written = u32::try_from(parsed.writable).unwrap_or(u32::MAX);
        let mut pending = Pending {
            status: parsed.status,
            status_guest: parsed.status_guest,
            written: 1,
            effect: Effect::None,
            dirty: Vec::new(),
        };
        if queue.log.is_some() {
            pending.dirty.extend(self.chain.writable.iter().map(|piece| (piece.guest, piece.len as u64)));
        }
        let (operation, offset, length) = match parsed.command {
            Command::Carry { operation, offset, len } => (operation, offset, len),
            Command::Identify => {
                // SAFETY: the pieces lie in mapped memory.
                let wrote = unsafe { request::write_id(&queue.shared.id, &self.chain.writable) };
                pending.written = wrote + 1;
                return self.finish(head, pending, request::OK);
            }
            Command::Answer(status) => return self.finish(head, pending, status),
        };
        let segments = match operation {
            Operation::Read => {
                (pending.written, pending.effect) = (written, Effect::Read(length));
                segments(&self.chain.writable)
            }
            Operation::Write { .. } => {
                pending.effect = Effect::Wrote(length);
                segments(&self.chain.readable)
            }
            Operation::WriteZeroes { .. } => {
                pending.effect = Effect::Wrote(length);
                Vec::new()
            }
            Operation::Discard | Operation::Flush => Vec::new(),
        };
        if let Some(place) = self.pending.get_mut(usize::from(head)) {
            *place = Some(pending);
        }
        let request = Request { token: u64::from(head), operation, offset, length, segments };
        // SAFETY: the segments lie in regions that the ring keeps mapped, for writing too, and it outlives the lane's work
        // on them: `run` drains the lane before it ends, and so does the lane when it is dropped, before the ring.
        unsafe { queue.lane.submit(request) };
        Ok(())
    }

    /// Gives back what the lane has done: all of it, whatever becomes of one.
    fn give_back(&mut self) -> Result<(), QueueError> {
        let mut outcome = Ok(());
        while let Some(Done { token, result }) = self.queue.lane.next_done() {
            let head = token as u16;
            let Some(pending) = self.pending.get_mut(usize::from(head)).and_then(Option::take) else {
                continue;
            };
            // What stands where memory was taken away is not what the guest wrote, or will read.
            let result = if self.is_memory_lost() { Err(VolumeError::Truncated) } else { result };
            let status = if result.is_ok() { request::OK } else { request::IO_ERROR };
            match pending.effect {
                Effect::Read(bytes) if result.is_ok() => {
                    self.batch_bytes += bytes;
                    self.queue.shared.export.count_read(bytes);
                }
                Effect::Wrote(bytes) if result.is_ok() => {
                    self.batch_bytes += bytes;
                    self.queue.shared.export.count_written(bytes);
                }
                _ => {}
            }
            outcome = outcome.and(self.finish(head, pending, status));
        }
        outcome
    }

    /// Writes a status and puts the chain into the used ring.
    fn finish(&mut self, head: u16, pending: Pending, status: u8) -> Result<(), QueueError> {
        // SAFETY: a byte of mapped guest memory.
        unsafe { pending.status.write_volatile(status) };
        let entry = self.queue.ring.push_used(head, pending.written);
        if let Some(inflight) = &mut self.queue.inflight {
            inflight.link(head);
            self.batch.push(head);
        }
        let Some(log) = &self.queue.log else { return Ok(()) };
        let mut marked = log.log.mark(pending.status_guest, 1);
        for (guest, len) in pending.dirty {
            marked &= log.log.mark(guest, len);
        }
        if let Some(used) = log.used {
            marked &= used.checked_add(entry).is_some_and(|at| log.log.mark(at, 8));
        }
        if marked { Ok(()) } else { Err(QueueError::Log) }
    }

    /// Lets the driver see what was given back, and tells it if it wishes.
    fn publish(&mut self) -> Result<(), QueueError> {
        if self.queue.ring.unpublished() == 0 {
            return Ok(());
        }
        self.queue.ring.publish();
        self.batch_bytes = 0;
        if let Some(inflight) = &mut self.queue.inflight {
            inflight.settle(&self.batch, self.queue.ring.published_used());
            self.batch.clear();
        }
        if self.queue.ring.must_tell() {
            self.queue.call.tell();
        }
        // After the write it stands for: a page that is copied in between is copied again.
        match &self.queue.log {
            Some(Log { log, used: Some(used) }) if !log.mark(*used, 4) => Err(QueueError::Log),
            _ => Ok(()),
        }
    }
}

fn segments(pieces: &[Piece]) -> Vec<Segment> {
    pieces.iter().map(|piece| Segment { base: piece.base, len: piece.len }).collect()
}
