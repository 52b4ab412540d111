//! The requests of a lane that does many at a time: whose turn it is to be cut further, which wait for a flush, and when
//! one is over.
//!
//! An engine cuts requests into pieces as its store takes them, and says here what became of each. A request is over when
//! it was cut to its end and its last piece is over; after an error nothing more is cut from it.

use std::{collections::VecDeque, io, sync::Arc};

use slab::Slab;

use super::{Done, Operation, Outbox, Request, pieces::Place};
use crate::{
    flush_gate::{Begun, Bell},
    volume::{Volume, VolumeError},
};

/// The requests of one lane.
pub(super) struct Requests {
    volume: Arc<Volume>,
    bell: Arc<Bell>,
    /// Whether a piece that is written is durable already: then FUA asks for nothing more.
    writes_are_durable: bool,
    active: Slab<Active>,
    /// Requests with more pieces to give out, in turn.
    turns: VecDeque<usize>,
    /// Requests that want a flush, and those the flush under way is for.
    flush_wanted: Vec<usize>,
    flush_running: Vec<usize>,
}

/// A request and how far it is.
pub(super) struct Active {
    pub(super) request: Request,
    /// Where in its memory the next piece begins.
    pub(super) place: Place,
    /// Bytes that were given out as pieces.
    pub(super) given: u64,
    /// Whether it had its last turn.
    cut_up: bool,
    under_way: usize,
    error: Option<VolumeError>,
}

/// What became of a request's turn.
pub(super) enum Given {
    /// A piece, and there are more.
    More,
    /// The last one, or there was none left.
    All,
    /// None, for want of bounce memory.
    NoRoom,
}

/// What is to be done about flushes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Flush {
    /// Nothing.
    No,
    /// One begins; [`Requests::flushed`] must follow.
    Now,
    /// Another lane's is under way: the bell rings.
    Later,
}

impl Requests {
    pub(super) fn new(volume: Arc<Volume>, bell: Arc<Bell>, writes_are_durable: bool) -> Self {
        Self {
            volume,
            bell,
            writes_are_durable,
            active: Slab::new(),
            turns: VecDeque::new(),
            flush_wanted: Vec::new(),
            flush_running: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.active.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.active.is_empty()
    }

    /// Takes a request in, or answers it at once if it may not be done or asks for nothing.
    pub(super) fn submit(&mut self, request: Request, outbox: &mut Outbox) {
        let flush = request.operation == Operation::Flush;
        let checked = request.check(&self.volume);
        let nothing = !flush && request.length == 0
            || request.operation == Operation::Discard && !self.volume.layout().discard;
        if checked.is_err() || nothing {
            outbox.done.push_back(Done { token: request.token, result: checked });
            return;
        }
        let place = Place::default();
        let at =
            self.active.insert(Active { request, place, given: 0, cut_up: false, under_way: 0, error: None });
        if flush {
            self.flush_wanted.push(at);
        } else {
            self.turns.push_back(at);
        }
    }

    /// The request whose turn it is.
    pub(super) fn front(&self) -> Option<usize> {
        self.turns.front().copied()
    }

    /// A request of which there is more to give out. After an error there is not.
    pub(super) fn unfinished(&mut self, at: usize) -> Option<&mut Active> {
        let active = self.active.get_mut(at)?;
        if active.error.is_some() {
            active.given = active.request.length;
        }
        (active.given < active.request.length).then_some(active)
    }

    /// So many bytes of it go out as a piece.
    pub(super) fn give(&mut self, at: usize, length: u64) -> Given {
        let Some(active) = self.active.get_mut(at) else { return Given::All };
        active.given += length;
        active.under_way += 1;
        if active.given == active.request.length { Given::All } else { Given::More }
    }

    /// Its turn is over; false if nobody's can come now.
    pub(super) fn turn_over(&mut self, at: usize, given: &Given, outbox: &mut Outbox) -> bool {
        match given {
            Given::More => self.turns.rotate_left(1),
            Given::All => {
                self.turns.pop_front();
                if let Some(active) = self.active.get_mut(at) {
                    active.cut_up = true;
                }
                self.settle(at, outbox);
            }
            Given::NoRoom => return false,
        }
        true
    }

    /// A piece of it is over.
    pub(super) fn piece_over(&mut self, at: usize, result: Result<(), VolumeError>, outbox: &mut Outbox) {
        let Some(active) = self.active.get_mut(at) else { return };
        active.under_way -= 1;
        if let Err(error) = result {
            active.error.get_or_insert(error);
        }
        self.settle(at, outbox);
    }

    /// Ends a request that had its last turn and whose pieces are all over: once.
    fn settle(&mut self, at: usize, outbox: &mut Outbox) {
        let Some(active) = self.active.get_mut(at) else { return };
        if active.under_way > 0 || !active.cut_up {
            return;
        }
        let fua = matches!(
            active.request.operation,
            Operation::Write { fua: true } | Operation::WriteZeroes { fua: true }
        );
        match active.error.take() {
            Some(error) => self.finish(at, Err(error), outbox),
            None if fua && !self.writes_are_durable => self.flush_wanted.push(at),
            None => self.finish(at, Ok(()), outbox),
        }
    }

    fn finish(&mut self, at: usize, result: Result<(), VolumeError>, outbox: &mut Outbox) {
        if let Some(active) = self.active.try_remove(at) {
            outbox.done.push_back(Done { token: active.request.token, result });
        }
    }

    /// Begins a flush if one is wanted and may begin. It is for what wants one now; what comes later waits for the next.
    pub(super) fn begin_flush(&mut self, outbox: &mut Outbox) -> Flush {
        if self.flush_wanted.is_empty() || !self.flush_running.is_empty() {
            return Flush::No;
        }
        match self.volume.flushes.begin(&self.bell) {
            Begun::Now => {
                self.flush_running.append(&mut self.flush_wanted);
                Flush::Now
            }
            Begun::Later => Flush::Later,
            Begun::Failed => {
                for at in std::mem::take(&mut self.flush_wanted) {
                    self.finish(at, Err(VolumeError::FlushFailed), outbox);
                }
                Flush::No
            }
        }
    }

    /// The flush that had begun has ended.
    pub(super) fn flushed(&mut self, result: io::Result<()>, outbox: &mut Outbox) {
        let durable = self.volume.flushes.end(result);
        for at in std::mem::take(&mut self.flush_running) {
            let result = if durable { Ok(()) } else { Err(VolumeError::FlushFailed) };
            self.finish(at, result, outbox);
        }
    }

    /// Fails everything, for the store is somebody else's now. No piece is over afterwards.
    pub(super) fn fail_all(&mut self, error: impl Fn() -> io::Error, outbox: &mut Outbox) {
        if !self.flush_running.is_empty() {
            self.volume.flushes.end(Err(error()));
        }
        self.turns.clear();
        self.flush_wanted.clear();
        self.flush_running.clear();
        for active in self.active.drain() {
            outbox.done.push_back(Done { token: active.request.token, result: Err(error().into()) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::tests::fixture;

    fn requests(writes_are_durable: bool) -> Requests {
        let volume = Arc::new(fixture(8192, |_| {}).volume);
        Requests::new(volume, Arc::new(Bell::new().unwrap()), writes_are_durable)
    }

    fn write(token: u64, length: u64) -> Request {
        let operation = Operation::WriteZeroes { fua: true };
        Request { token, operation, offset: 0, length, segments: Vec::new() }
    }

    fn tokens(outbox: &mut Outbox) -> Vec<(u64, bool)> {
        outbox.done.drain(..).map(|done| (done.token, done.result.is_ok())).collect()
    }

    #[test]
    fn request_is_over_once_after_its_last_piece_and_its_flush() {
        let (mut requests, mut outbox) = (requests(false), Outbox::default());
        requests.submit(write(7, 1024), &mut outbox);
        let at = requests.front().unwrap();
        assert!(requests.unfinished(at).is_some());
        let given = requests.give(at, 512);
        assert!(requests.turn_over(at, &given, &mut outbox));
        let given = requests.give(at, 512);
        // Pieces may be over before their request's turn is.
        requests.piece_over(at, Ok(()), &mut outbox);
        requests.piece_over(at, Ok(()), &mut outbox);
        assert_eq!(requests.begin_flush(&mut outbox), Flush::No);
        assert!(requests.turn_over(at, &given, &mut outbox));
        assert_eq!(requests.front(), None);
        assert_eq!(requests.begin_flush(&mut outbox), Flush::Now);
        assert_eq!(requests.begin_flush(&mut outbox), Flush::No);
        assert!(tokens(&mut outbox).is_empty());
        requests.flushed(Ok(()), &mut outbox);
        assert_eq!(tokens(&mut outbox), [(7, true)]);
        assert!(requests.is_empty());
    }

    #[test]
    fn nothing_more_is_cut_from_a_request_that_failed() {
        let (mut requests, mut outbox) = (requests(true), Outbox::default());
        requests.submit(write(1, 4096), &mut outbox);
        requests.submit(write(2, 512), &mut outbox);
        let first = requests.front().unwrap();
        let given = requests.give(first, 512);
        requests.turn_over(first, &given, &mut outbox);
        requests.piece_over(first, Err(VolumeError::Truncated), &mut outbox);
        assert!(tokens(&mut outbox).is_empty(), "it is still in the queue of turns");
        let second = requests.front().unwrap();
        let given = requests.give(second, 512);
        requests.turn_over(second, &given, &mut outbox);
        assert!(requests.unfinished(first).is_none());
        requests.turn_over(first, &Given::All, &mut outbox);
        assert_eq!(tokens(&mut outbox), [(1, false)]);
        requests.piece_over(second, Ok(()), &mut outbox);
        // Durable when written, so nobody waits for a flush.
        assert_eq!(tokens(&mut outbox), [(2, true)]);
        assert_eq!(requests.begin_flush(&mut outbox), Flush::No);
    }

    #[test]
    fn everything_that_waits_is_told_when_the_store_is_lost() {
        let (mut requests, mut outbox) = (requests(false), Outbox::default());
        requests.submit(write(1, 512), &mut outbox);
        let flush = Operation::Flush;
        requests.submit(
            Request { token: 2, operation: flush, offset: 0, length: 0, segments: vec![] },
            &mut outbox,
        );
        assert_eq!(requests.begin_flush(&mut outbox), Flush::Now);
        requests.fail_all(|| io::Error::from_raw_os_error(libc::ESHUTDOWN), &mut outbox);
        assert_eq!(tokens(&mut outbox), [(1, false), (2, false)]);
        assert!(requests.is_empty() && requests.front().is_none());
        // A flush that was under way counts as failed.
        requests.submit(
            Request { token: 3, operation: flush, offset: 0, length: 0, segments: vec![] },
            &mut outbox,
        );
        assert_eq!(requests.begin_flush(&mut outbox), Flush::No);
        assert_eq!(tokens(&mut outbox), [(3, false)]);
    }
}
