//! What a store was made to do, in order: the log from which crashes are rebuilt.

/// One thing that happened to a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// Bytes were written.
    Write {
        /// Where.
        offset: u64,
        /// Which.
        data: Vec<u8>,
        /// By which thread, as the kernel tells a file system; 0 for writes within the process.
        thread: u32,
    },
    /// A range was made a hole; it reads as zeros.
    Punch {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// The length was set: truncated, or longer by zeros.
    SetLen {
        /// To what.
        len: u64,
    },
    /// Everything before is on the medium.
    Flush,
    /// A flush failed, as the kernel lets it fail: what was not on the medium may be there or not, is not tried again,
    /// and no later flush will say so.
    FlushFailed,
    /// The store said that a flush is done, and did nothing.
    FlushLied,
    /// Whoever works on the store has done so much: a number of its own, from [`Medium::mark`](crate::medium::Medium::mark).
    Mark(u64),
}

impl Entry {
    /// Whether it changes what is stored.
    pub fn changes(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Punch { .. } | Self::SetLen { .. })
    }
}
