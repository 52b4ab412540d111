//! What a client did, as events that a verifier can be fed with later, up to any moment.
//!
//! Each event is noted in the store's log as a mark, before a request is sent and after its answer was seen. So a crash
//! at some entry of that log is a crash after these events at least: what the store did in between was under way.

use std::collections::HashMap;

use crate::{
    medium::Medium,
    nbd_client::{Answer, Request},
    verifier::{Fault, FlushId, ReadId, Verifier, WriteId},
};

/// One thing a client saw.
#[derive(Debug, Clone)]
enum Event {
    Sent(u64, Request),
    /// Answered; whether well, and with what.
    Answered(u64, Answer),
    /// The connection was lost: what was under way will not be answered.
    Lost,
}

/// The events of a disk so far.
#[derive(Debug, Clone, Default)]
pub struct History {
    events: Vec<Event>,
    next: u64,
}

/// A request that was noted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestId(u64);

impl History {
    /// A request is about to be sent.
    pub fn send(&mut self, request: &Request, medium: &Medium) -> RequestId {
        self.next += 1;
        self.note(Event::Sent(self.next, request.clone()), medium);
        RequestId(self.next)
    }

    /// It was answered.
    pub fn answered(&mut self, RequestId(id): RequestId, answer: Answer, medium: &Medium) {
        self.note(Event::Answered(id, answer), medium);
    }

    /// The connection was lost.
    pub fn lost(&mut self, medium: &Medium) {
        self.note(Event::Lost, medium);
    }

    fn note(&mut self, event: Event, medium: &Medium) {
        self.events.push(event);
        medium.mark(self.events.len() as u64);
    }

    /// How many events there are.
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether nothing happened.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }
}

/// A verifier that is fed with a history, further and further.
pub struct Replay<'a> {
    history: &'a History,
    at: usize,
    /// What may be read after the events so far.
    pub verifier: Verifier,
    writes: HashMap<u64, (WriteId, bool)>,
    flushes: HashMap<u64, FlushId>,
    reads: HashMap<u64, ReadId>,
}

impl<'a> Replay<'a> {
    /// From the start, on a disk of which `verifier` knows the content.
    pub fn new(history: &'a History, verifier: Verifier) -> Self {
        Self {
            history,
            at: 0,
            verifier,
            writes: HashMap::new(),
            flushes: HashMap::new(),
            reads: HashMap::new(),
        }
    }

    /// Feeds the first `mark` events, as far as that was not done before.
    ///
    /// # Errors
    ///
    /// What was read was wrong.
    pub fn go_to(&mut self, mark: u64) -> Result<(), Fault> {
        while (self.at as u64) < mark {
            let Some(event) = self.history.events.get(self.at) else { break };
            self.at += 1;
            match event {
                Event::Sent(id, request) => self.begin(*id, request),
                Event::Answered(id, answer) => self.end(*id, answer)?,
                Event::Lost => self.verifier.lose_server(),
            }
        }
        Ok(())
    }

    /// Feeds all events.
    ///
    /// # Errors
    ///
    /// As [`Replay::go_to`].
    pub fn go_to_end(&mut self) -> Result<(), Fault> {
        self.go_to(u64::MAX)
    }

    fn begin(&mut self, id: u64, request: &Request) {
        let verifier = &mut self.verifier;
        let (write, durable) = match request {
            Request::Read { offset, len } => {
                self.reads.insert(id, verifier.begin_read(*offset, u64::from(*len)));
                return;
            }
            Request::Flush => {
                self.flushes.insert(id, verifier.begin_flush());
                return;
            }
            Request::Write { offset, data, fua } => (verifier.begin_write(*offset, data), *fua),
            Request::WriteZeroes { offset, len } => {
                (verifier.begin_write_zeroes(*offset, u64::from(*len)), false)
            }
            Request::Trim { offset, len } => (verifier.begin_discard(*offset, u64::from(*len)), false),
        };
        self.writes.insert(id, (write, durable));
    }

    fn end(&mut self, id: u64, answer: &Answer) -> Result<(), Fault> {
        if let Some((write, durable)) = self.writes.remove(&id) {
            match (answer, durable) {
                (Err(_), _) => self.verifier.fail_write(write),
                (Ok(_), false) => self.verifier.end_write(write),
                (Ok(_), true) => self.verifier.end_durable_write(write),
            }
        } else if let Some(flush) = self.flushes.remove(&id) {
            match answer {
                Ok(_) => self.verifier.end_flush(flush),
                Err(_) => self.verifier.fail_flush(flush),
            }
        } else if let (Some(read), Ok(data)) = (self.reads.remove(&id), answer) {
            self.verifier.end_read(read, data)?;
        }
        Ok(())
    }
}
