//! What is done to each export: eight kinds of load.

use std::fmt;

/// One kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Job {
    /// Whether it writes.
    pub(crate) write: bool,
    /// Bytes of one operation.
    pub(crate) bytes: usize,
    /// Operations in flight.
    pub(crate) depth: usize,
    /// Anywhere, or one after the other.
    pub(crate) random: bool,
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

impl Job {
    const fn read(bytes: usize, depth: usize, random: bool) -> Self {
        Self { write: false, bytes, depth, random }
    }

    const fn written(self) -> Self {
        Self { write: true, ..self }
    }

    /// 1 MiB, one at a time, in order.
    pub(crate) const STREAM: Self = Self::read(MIB, 1, false);
    /// 128 KiB, eight in flight, in order.
    pub(crate) const SEQUENTIAL: Self = Self::read(128 * KIB, 8, false);
    /// 4 KiB, one at a time, anywhere.
    pub(crate) const SINGLE: Self = Self::read(4 * KIB, 1, true);
    /// 4 KiB, 32 in flight, anywhere.
    pub(crate) const DEEP: Self = Self::read(4 * KIB, 32, true);

    /// All of them, each reading and then writing.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        [Self::STREAM, Self::SEQUENTIAL, Self::SINGLE, Self::DEEP].into_iter().flat_map(Self::both)
    }

    /// Reading and writing.
    pub(crate) fn both(self) -> [Self; 2] {
        [self, self.written()]
    }

    /// Unit of [`crate::sample::Sample::rate`].
    pub(crate) fn unit(self) -> &'static str {
        if self.random { "kIOPS" } else { "MB/s" }
    }
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = if self.random { "random" } else { "seq" };
        let kind = if self.write { "write" } else { "read" };
        match self.bytes {
            MIB => write!(f, "{way} {kind} 1M qd{}", self.depth),
            bytes => write!(f, "{way} {kind} {}K qd{}", bytes / KIB, self.depth),
        }
    }
}
