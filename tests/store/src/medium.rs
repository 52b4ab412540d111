//! The store itself: bytes in memory or in a file, a log of what happened to them, and the faults it was told to have.
//!
//! In go operations, each with a way to answer; out come answers, now or when they are released. Who brings the
//! operations is [`mount`](crate::mount), the kernel's FUSE, or [`in_process`](crate::in_process).

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    entry::Entry,
    fault::{Action, Fault, Kind},
};

/// How long a test waits for something that must come.
const PATIENCE: Duration = Duration::from_secs(20);

/// An operation.
#[derive(Debug, Clone)]
pub enum Operation {
    /// Read up to so many bytes.
    Read {
        /// From where.
        offset: u64,
        /// How many.
        len: usize,
    },
    /// Write.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Vec<u8>,
        /// Who, as the kernel says.
        thread: u32,
    },
    /// Make everything durable.
    Flush,
    /// Make a hole.
    Punch {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Set the length.
    SetLen {
        /// To what.
        len: u64,
    },
}

impl Operation {
    fn kind(&self) -> Kind {
        match self {
            Self::Read { .. } => Kind::Read,
            Self::Write { .. } => Kind::Write,
            Self::Flush => Kind::Flush,
            Self::Punch { .. } => Kind::Punch,
            Self::SetLen { .. } => Kind::SetLen,
        }
    }

    fn touches(&self) -> Range<u64> {
        match self {
            Self::Read { offset, len } => *offset..offset.saturating_add(*len as u64),
            Self::Write { offset, data, .. } => *offset..offset.saturating_add(data.len() as u64),
            Self::Flush => 0..0,
            Self::Punch { offset, len } => *offset..offset.saturating_add(*len),
            Self::SetLen { len } => *len..u64::MAX,
        }
    }
}

/// An answer: bytes that were read, or how many were written in the length of an empty vector's stead.
#[derive(Debug)]
pub enum Answer {
    /// What was read.
    Data(Vec<u8>),
    /// How many bytes were written: fewer than were given where the store is full.
    Written(usize),
    /// Done.
    Done,
    /// An error number.
    Failed(i32),
}

/// How an operation is answered.
pub type Reply = Box<dyn FnOnce(Answer) + Send>;

/// Where the bytes are.
enum Bytes {
    Memory(Vec<u8>),
    File(File),
}

impl Bytes {
    fn len(&self) -> io::Result<u64> {
        match self {
            Self::Memory(bytes) => Ok(bytes.len() as u64),
            Self::File(file) => Ok(file.metadata()?.len()),
        }
    }

    fn set_len(&mut self, len: u64) -> io::Result<()> {
        match self {
            Self::Memory(bytes) => bytes.resize(len as usize, 0),
            Self::File(file) => file.set_len(len)?,
        }
        Ok(())
    }

    fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let there = self.len()?.saturating_sub(offset).min(len as u64) as usize;
        let mut out = vec![0; there];
        match self {
            Self::Memory(bytes) if there > 0 => out.copy_from_slice(&bytes[offset as usize..][..there]),
            Self::Memory(_) => {}
            Self::File(file) => file.read_exact_at(&mut out, offset)?,
        }
        Ok(out)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Memory(bytes) => {
                let end = offset as usize + data.len();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[offset as usize..end].copy_from_slice(data);
                Ok(())
            }
            Self::File(file) => file.write_all_at(data, offset),
        }
    }
}

struct Held {
    operation: Operation,
    /// The answer, if it was done already.
    answer: Option<Answer>,
    reply: Reply,
}

struct State {
    bytes: Bytes,
    /// None where nobody will ask for it: a long run in a file.
    log: Option<Vec<Entry>>,
    faults: Vec<Fault>,
    /// Bytes beyond which there is no space.
    capacity: Option<u64>,
    held: Vec<Held>,
    /// Answers that were errors of a rule's making.
    failed: u64,
}

/// A store. Copies are the same store.
#[derive(Clone)]
pub struct Medium {
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Medium {
    /// A store with these bytes, which logs.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self::of(Bytes::Memory(bytes), Some(Vec::new()))
    }

    /// A store in a file, which does not log: for runs that write more than memory holds.
    pub fn in_file(file: File) -> Self {
        Self::of(Bytes::File(file), None)
    }

    fn of(bytes: Bytes, log: Option<Vec<Entry>>) -> Self {
        let state = State { bytes, log, faults: Vec::new(), capacity: None, held: Vec::new(), failed: 0 };
        Self { shared: Arc::new((Mutex::new(state), Condvar::new())) }
    }

    /// Bytes stored now.
    ///
    /// # Errors
    ///
    /// Those of the file below.
    pub fn len(&self) -> io::Result<u64> {
        self.state().bytes.len()
    }

    /// Whether nothing is stored.
    ///
    /// # Errors
    ///
    /// Those of the file below.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Bytes as they would be read now, past every fault.
    ///
    /// # Panics
    ///
    /// If the file below fails.
    pub fn bytes(&self, range: Range<u64>) -> Vec<u8> {
        let len = range.end.saturating_sub(range.start) as usize;
        self.state().bytes.read(range.start, len).expect("the file below can be read")
    }

    /// Everything as it would be read now.
    pub fn all_bytes(&self) -> Vec<u8> {
        self.bytes(0..u64::MAX)
    }

    /// The log so far; it goes on.
    pub fn log(&self) -> Vec<Entry> {
        self.state().log.clone().unwrap_or_default()
    }

    /// The log so far, and it begins anew; with it the bytes that it led to.
    pub fn take_log(&self) -> (Vec<Entry>, Vec<u8>) {
        let mut state = self.state();
        let bytes = state.bytes.read(0, usize::MAX).unwrap_or_default();
        (state.log.as_mut().map(std::mem::take).unwrap_or_default(), bytes)
    }

    /// Notes in the log how far its user is.
    pub fn mark(&self, number: u64) {
        self.state().enter(Entry::Mark(number));
    }

    /// Adds a rule, behind those there are.
    pub fn inject(&self, fault: Fault) {
        self.state().faults.push(fault);
    }

    /// Forgets every rule. What is held stays so.
    pub fn heal(&self) {
        self.state().faults.clear();
    }

    /// From which byte on there is no space; `None`: nowhere. A write across it is done up to it.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state().capacity = bytes;
    }

    /// How many operations failed because a rule said so or the store was full.
    pub fn failures(&self) -> u64 {
        self.state().failed
    }

    /// How many operations are held.
    pub fn held(&self) -> usize {
        self.state().held.len()
    }

    /// Waits until that many operations are held.
    ///
    /// # Panics
    ///
    /// If they do not come.
    pub fn wait_held(&self, count: usize) {
        let (lock, changed) = &*self.shared;
        let until = Instant::now() + PATIENCE;
        let mut state = lock.lock().unwrap_or_else(PoisonError::into_inner);
        while state.held.len() < count {
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{} operations are held, waited for {count}", state.held.len());
            state = changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Does and answers what is held, the oldest first; gives how many. What comes later is held again.
    pub fn release(&self) -> usize {
        let held = std::mem::take(&mut self.state().held);
        self.let_go(held)
    }

    /// The same, with the youngest first: as a device that works its queue off in another order.
    pub fn release_backwards(&self) -> usize {
        let mut held = std::mem::take(&mut self.state().held);
        held.reverse();
        self.let_go(held)
    }

    /// Lets what is held fail; gives how many.
    pub fn fail_held(&self, errno: i32) -> usize {
        let mut held = std::mem::take(&mut self.state().held);
        for held in &mut held {
            let mut state = self.state();
            state.failed += 1;
            if held.operation.kind() == Kind::Flush {
                state.enter(Entry::FlushFailed);
            }
            held.answer = Some(Answer::Failed(errno));
        }
        self.let_go(held)
    }

    fn let_go(&self, held: Vec<Held>) -> usize {
        let count = held.len();
        for Held { operation, answer, reply } in held {
            // The lock is not held while answering: the answer may lead to the next operation at once.
            let answer = answer.unwrap_or_else(|| self.state().carry_out(operation));
            reply(answer);
        }
        count
    }

    /// Takes an operation. `reply` is called now, or when the operation is released.
    pub fn submit(&self, operation: Operation, reply: Reply) {
        let mut state = self.state();
        let (kind, touched) = (operation.kind(), operation.touches());
        let action = state.faults.iter_mut().find_map(|fault| fault.meets(kind, &touched));
        let answer = match action {
            None => state.carry_out(operation),
            Some(Action::Fail(errno)) => {
                state.failed += 1;
                if kind == Kind::Flush {
                    state.enter(Entry::FlushFailed);
                }
                Answer::Failed(errno)
            }
            Some(Action::Lie) if kind == Kind::Flush => {
                state.enter(Entry::FlushLied);
                Answer::Done
            }
            Some(Action::Lie) => state.carry_out(operation),
            Some(action) => {
                let answer = (action == Action::HoldAnswer).then(|| state.carry_out(operation.clone()));
                state.held.push(Held { operation, answer, reply });
                drop(state);
                self.shared.1.notify_all();
                return;
            }
        };
        drop(state);
        reply(answer);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn enter(&mut self, entry: Entry) {
        if let Some(log) = &mut self.log {
            log.push(entry);
        }
    }

    fn carry_out(&mut self, operation: Operation) -> Answer {
        let done = match operation {
            Operation::Read { offset, len } => self.bytes.read(offset, len).map(Answer::Data),
            Operation::Write { offset, data, thread } => self.write(offset, data, thread),
            Operation::Flush => {
                self.enter(Entry::Flush);
                Ok(Answer::Done)
            }
            Operation::Punch { offset, len } => self.punch(offset, len),
            Operation::SetLen { len } => self.set_len(len),
        };
        done.unwrap_or_else(|error| Answer::Failed(error.raw_os_error().unwrap_or(libc::EIO)))
    }

    fn write(&mut self, offset: u64, mut data: Vec<u8>, thread: u32) -> io::Result<Answer> {
        let room = self.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(offset));
        if room == 0 && !data.is_empty() {
            self.failed += 1;
            return Ok(Answer::Failed(libc::ENOSPC));
        }
        data.truncate(room.min(data.len() as u64) as usize);
        self.bytes.write(offset, &data)?;
        let written = data.len();
        self.enter(Entry::Write { offset, data, thread });
        Ok(Answer::Written(written))
    }

    fn punch(&mut self, offset: u64, len: u64) -> io::Result<Answer> {
        let len = self.bytes.len()?.saturating_sub(offset).min(len);
        self.bytes.write(offset, &vec![0; len as usize])?;
        self.enter(Entry::Punch { offset, len });
        Ok(Answer::Done)
    }

    fn set_len(&mut self, len: u64) -> io::Result<Answer> {
        if self.capacity.is_some_and(|capacity| len > capacity) && len > self.bytes.len()? {
            self.failed += 1;
            return Ok(Answer::Failed(libc::ENOSPC));
        }
        self.bytes.set_len(len)?;
        self.enter(Entry::SetLen { len });
        Ok(Answer::Done)
    }
}
