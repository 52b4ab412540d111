//! What shall go wrong in a store: which operations, how often, how.

use std::ops::Range;

/// A kind of operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Flushing.
    Flush,
    /// Making a hole.
    Punch,
    /// Setting the length.
    SetLen,
}

/// What happens to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It fails with this error number and changes nothing. A flush that fails loses what it should have made durable
    /// and is a good flush the next time, as in the kernel.
    Fail(i32),
    /// It is neither done nor answered until it is released.
    Hold,
    /// It is done, and not answered until it is released.
    HoldAnswer,
    /// A flush is answered as if it were done.
    Lie,
}

/// A rule: the first one that an operation meets decides about it.
#[derive(Debug, Clone)]
pub struct Fault {
    kind: Kind,
    range: Option<Range<u64>>,
    skip: u64,
    times: Option<u64>,
    action: Action,
}

impl Fault {
    /// Every operation of this kind, from now on.
    pub fn on(kind: Kind, action: Action) -> Self {
        Self { kind, range: None, skip: 0, times: None, action }
    }

    /// Only operations that touch these bytes. A flush touches none, and is met all the same.
    #[must_use]
    pub fn within(self, range: Range<u64>) -> Self {
        Self { range: Some(range), ..self }
    }

    /// Not the first `skip` that it would meet.
    #[must_use]
    pub fn after(self, skip: u64) -> Self {
        Self { skip, ..self }
    }

    /// So many, and no more.
    #[must_use]
    pub fn times(self, times: u64) -> Self {
        Self { times: Some(times), ..self }
    }

    /// Whether it meets an operation; counts it if so.
    pub(crate) fn meets(&mut self, kind: Kind, touched: &Range<u64>) -> Option<Action> {
        let apart = |range: &Range<u64>| touched.end <= range.start || range.end <= touched.start;
        if self.kind != kind || (kind != Kind::Flush && self.range.as_ref().is_some_and(apart)) {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        match &mut self.times {
            Some(0) => return None,
            Some(left) => *left -= 1,
            None => {}
        }
        Some(self.action)
    }
}
