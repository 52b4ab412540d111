//! The plaintext view of one volume: reads, writes, zeros, discards, flushes, extents.
//!
//! Everything is in whole data units within the presented size, checked here whoever asks. Buffers are the caller's
//! and are encrypted and decrypted in place. Nothing is held back: what was written is in the kernel, what was flushed
//! is on the medium.
//!
//! A volume that *grows* shows more than it stores. Reads past the stored end give zeros; a write past it makes the
//! file longer, and what it leaps over is filled with encrypted zeros, up to [`MAX_FILLED_GAP`]. A wider gap stays a
//! hole, and holes read as unspecified bytes, as after a discard.

use std::{
    io,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use vmseal_xts::Cipher;

use crate::{
    flush_gate::FlushGate,
    gate::{Gate, Way},
    latch::FlushLatch,
    store::{Alignment, Store},
};

/// The widest gap a write may leave behind the stored end that is filled with encrypted zeros.
pub const MAX_FILLED_GAP: u64 = 64 << 20;
/// Zeros are encrypted and written in pieces of this size.
const ZERO_CHUNK: u64 = 1 << 20;
/// The tweak counts these, whatever the unit.
const SECTOR: u64 = 512;

/// How a volume is laid out and presented.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Bytes of a data unit: 512 or 4096.
    pub unit: u64,
    /// Where the payload begins in the store.
    pub payload_offset: u64,
    /// Bytes shown.
    pub presented: u64,
    /// Whether the store may be shorter and grow.
    pub grows: bool,
    /// Whether nothing may be written.
    pub read_only: bool,
    /// Whether a discard makes holes.
    pub discard: bool,
}

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VolumeError {
    /// Not in whole data units.
    #[error("request is not in whole data units")]
    Unaligned,
    /// Not within the presented size.
    #[error("request is past the end of the disk")]
    OutOfRange,
    /// The volume is read-only.
    #[error("disk is read-only")]
    ReadOnly,
    /// It is another process's to write.
    #[error("the volume was handed over, or is not handed to this process yet: nothing is written")]
    Fenced,
    /// The file system under the volume is full, or the file may not grow further.
    #[error("no space left for the volume")]
    NoSpace(#[source] io::Error),
    /// A flush failed, now or earlier: what was written since the last good one may be lost. It fails from now on,
    /// for the kernel reports a lost page once only.
    #[error("a flush of the volume failed")]
    FlushFailed,
    /// The store is shorter than it must be.
    #[error("volume ended early")]
    Truncated,
    /// The medium failed.
    #[error("volume I/O failed")]
    Io(#[source] io::Error),
}

impl From<io::Error> for VolumeError {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Self::NoSpace(error),
            _ => Self::Io(error),
        }
    }
}

/// A piece of the disk and whether anything is stored for it. A hole says nothing about what is read there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Its length in bytes.
    pub len: u64,
    /// Whether nothing is stored.
    pub hole: bool,
}

/// One volume.
pub struct Volume {
    store: Box<dyn Store>,
    /// None only in a benchmark's reference.
    cipher: Option<Cipher>,
    layout: Layout,
    /// Bytes shown now; not fewer than at the start.
    presented: AtomicU64,
    /// Whether it is another process's to write.
    fenced: AtomicBool,
    gate: Gate,
    /// Whether everything this process was ever told to write is durable, and it takes nothing more.
    at_rest: AtomicBool,
    /// Whole units stored, in bytes from the payload's start.
    stored: AtomicU64,
    /// Held while the stored end moves.
    growth: Mutex<()>,
    pub(crate) flushes: FlushGate,
}

impl Volume {
    /// The volume on this store.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Truncated`] if the store is shorter than a volume that does not grow must be.
    pub fn new(store: Box<dyn Store>, cipher: Cipher, layout: Layout) -> Result<Self, VolumeError> {
        Self::with(store, Some(cipher), layout)
    }

    /// What a benchmark compares with: the same way to the store without the cipher. No program that serves guests
    /// calls this.
    ///
    /// # Errors
    ///
    /// As [`Volume::new`].
    #[doc(hidden)]
    pub fn plain_for_bench(store: Box<dyn Store>, layout: Layout) -> Result<Self, VolumeError> {
        Self::with(store, None, layout)
    }

    /// The same, and every flush fails if one failed already.
    pub fn latched(self, latch: FlushLatch) -> Self {
        Self { flushes: FlushGate::new(latch), ..self }
    }

    fn with(store: Box<dyn Store>, cipher: Option<Cipher>, layout: Layout) -> Result<Self, VolumeError> {
        let volume = Self {
            store,
            cipher,
            layout,
            presented: AtomicU64::new(layout.presented),
            fenced: AtomicBool::new(false),
            gate: Gate::default(),
            at_rest: AtomicBool::new(false),
            stored: AtomicU64::new(0),
            growth: Mutex::new(()),
            flushes: FlushGate::default(),
        };
        volume.remeasure()?;
        Ok(volume)
    }

    /// Where its ciphertext lies.
    pub(crate) fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// What memory and offsets must be multiples of, if they are to go to the store as they are.
    pub(crate) fn alignment(&self) -> Alignment {
        self.store.alignment()
    }

    /// How it is laid out, as of now.
    pub fn layout(&self) -> Layout {
        Layout { presented: self.presented_bytes(), ..self.layout }
    }

    /// Bytes shown now.
    pub fn presented_bytes(&self) -> u64 {
        self.presented.load(Ordering::Acquire)
    }

    /// What every request passes.
    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Opens or shuts the gate; a shut one may be one behind which everything is durable.
    pub(crate) fn let_pass(&self, way: Way, at_rest: bool) {
        self.at_rest.store(at_rest, Ordering::SeqCst);
        self.gate.set(way);
    }

    /// Whether everything this process was ever told to write is durable, and it takes nothing more.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.at_rest.load(Ordering::SeqCst)
    }

    /// Writes nothing from now on, or writes again.
    pub(crate) fn set_fenced(&self, fenced: bool) {
        self.fenced.store(fenced, Ordering::SeqCst);
    }

    /// Looks again how much is stored: another process may have written it.
    ///
    /// # Errors
    ///
    /// As [`Volume::new`].
    pub(crate) fn remeasure(&self) -> Result<(), VolumeError> {
        let _growing = self.growth.lock().unwrap_or_else(PoisonError::into_inner);
        self.stored.store(self.measure()?, Ordering::Release);
        Ok(())
    }

    /// Whole units stored, as the store has it.
    fn measure(&self) -> Result<u64, VolumeError> {
        let presented = self.presented_bytes();
        let stored = self.store.len()?.saturating_sub(self.layout.payload_offset).min(presented);
        let stored = stored - stored % self.layout.unit;
        if !self.layout.grows && stored < presented {
            return Err(VolumeError::Truncated);
        }
        Ok(stored)
    }

    /// Shows `bytes` instead of fewer. What is new reads as zeros, which are on the medium when this returns, unless the
    /// store grows by itself: then there is nothing to be done.
    ///
    /// # Errors
    ///
    /// [`VolumeError::OutOfRange`] for fewer bytes, or a number that is not of whole units; otherwise the store's, and
    /// everything is as before.
    pub(crate) fn grow_to(&self, bytes: u64, before_it_shows: impl FnOnce()) -> Result<(), VolumeError> {
        let before = self.presented_bytes();
        if !bytes.is_multiple_of(self.layout.unit) || bytes < before {
            return Err(VolumeError::OutOfRange);
        }
        if !self.layout.grows && bytes > before {
            let (from, to) = (self.layout.payload_offset + before, self.layout.payload_offset + bytes);
            let end = self.store.len()?.max(from);
            let grown = self.store.reserve(from, to).map_err(VolumeError::from);
            if let Err(error) = grown.and_then(|()| self.fill_with_zeros(before, bytes)) {
                self.stored.store(before, Ordering::Release);
                self.store.give_back(end);
                return Err(error);
            }
        }
        before_it_shows();
        self.presented.store(bytes, Ordering::Release);
        Ok(())
    }

    /// Beyond what is shown, where nobody else looks.
    fn fill_with_zeros(&self, from: u64, to: u64) -> Result<(), VolumeError> {
        let mut zeros = vec![0; (to - from).min(ZERO_CHUNK) as usize];
        let mut at = from;
        while at < to {
            let piece = zeros.get_mut(..(to - at).min(ZERO_CHUNK) as usize).unwrap_or_default();
            piece.fill(0);
            self.encrypt_into(at, piece)?;
            at += piece.len() as u64;
        }
        self.flush()
    }

    /// Bytes stored now.
    pub fn stored_bytes(&self) -> u64 {
        self.stored.load(Ordering::Acquire)
    }

    /// Fills `buf` with plaintext from `offset`.
    ///
    /// # Errors
    ///
    /// [`VolumeError`]; `buf` may hold ciphertext then and must not be shown.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), VolumeError> {
        self.check(offset, buf.len() as u64)?;
        let within = self.stored_bytes().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (inside, beyond) = buf.split_at_mut(within);
        beyond.fill(0);
        if inside.is_empty() {
            return Ok(());
        }
        if self.store.read_at(self.layout.payload_offset + offset, inside)? < inside.len() {
            return Err(VolumeError::Truncated);
        }
        // SAFETY: an exclusive slice.
        unsafe { self.decrypt_raw(offset, inside.as_mut_ptr(), inside.len()) }
    }

    /// Writes `buf`, which is ciphertext afterwards.
    ///
    /// # Errors
    ///
    /// [`VolumeError`]; a part may have been written.
    pub fn write(&self, offset: u64, buf: &mut [u8]) -> Result<(), VolumeError> {
        self.check_write(offset, buf.len() as u64)?;
        self.encrypt_into(offset, buf)
    }

    /// Writes encrypted zeros, never a hole.
    ///
    /// # Errors
    ///
    /// As [`Volume::write`].
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.check_write(offset, len)?;
        let mut zeros = vec![0; len.min(ZERO_CHUNK) as usize];
        let mut done = 0;
        while done < len {
            let piece = zeros.get_mut(..(len - done).min(ZERO_CHUNK) as usize).unwrap_or_default();
            piece.fill(0);
            self.encrypt_into(offset + done, piece)?;
            done += piece.len() as u64;
        }
        Ok(())
    }

    /// Gives back the space of a range, where the policy says so; otherwise does nothing.
    ///
    /// # Errors
    ///
    /// [`VolumeError`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.check_write(offset, len)?;
        let len = self.stored_bytes().saturating_sub(offset).min(len);
        if !self.layout.discard || len == 0 {
            return Ok(());
        }
        Ok(self.store.punch(self.layout.payload_offset + offset, len)?)
    }

    /// Makes every write that ended before durable.
    ///
    /// # Errors
    ///
    /// [`VolumeError::FlushFailed`], and from then on every time.
    pub fn flush(&self) -> Result<(), VolumeError> {
        if self.flushes.flush_by(|| self.store.flush()) { Ok(()) } else { Err(VolumeError::FlushFailed) }
    }

    /// What is stored for a range: at most `most` extents, at least one, together as long as the range or shorter.
    ///
    /// # Errors
    ///
    /// [`VolumeError`] for a range that is not within the disk.
    pub fn extents(&self, offset: u64, len: u64, most: usize) -> Result<Vec<Extent>, VolumeError> {
        self.check(offset, len)?;
        let (base, unit, end) = (self.layout.payload_offset, self.layout.unit, offset + len);
        let stored = self.stored_bytes().min(end);
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = offset;
        while at < end {
            let (run_end, hole) = if at >= stored {
                (end, true)
            } else {
                let run = self.store.run_at(base + at, base + stored);
                let run_end = run.end.saturating_sub(base).min(stored);
                // Holes shrink and data widens to whole units.
                if run.hole {
                    let whole = run_end - run_end % unit;
                    if whole > at { (whole, true) } else { (at + unit, false) }
                } else {
                    (run_end.next_multiple_of(unit).max(at + unit), false)
                }
            };
            let run_end = run_end.min(end);
            let full = extents.len() >= most;
            match extents.last_mut() {
                Some(last) if last.hole == hole => last.len += run_end - at,
                _ if full => break,
                _ => extents.push(Extent { len: run_end - at, hole }),
            }
            at = run_end;
        }
        Ok(extents)
    }

    /// Decrypts whole units that lie at `offset` of the disk, where they are.
    ///
    /// # Safety
    ///
    /// `data` is valid for reading and writing `len` bytes; others may change them meanwhile.
    pub(crate) unsafe fn decrypt_raw(
        &self,
        offset: u64,
        data: *mut u8,
        len: usize,
    ) -> Result<(), VolumeError> {
        let Some(cipher) = &self.cipher else { return Ok(()) };
        // SAFETY: passed on.
        unsafe { cipher.decrypt_raw(offset / SECTOR, data, data, len) }.map_err(cipher_failed)
    }

    /// Encrypts whole units for `offset` of the disk from `src` to `dst`, which is the same or does not overlap.
    ///
    /// # Safety
    ///
    /// `src` is valid for reading and `dst` for writing `len` bytes; others may change `src` meanwhile.
    pub(crate) unsafe fn encrypt_raw(
        &self,
        offset: u64,
        src: *const u8,
        dst: *mut u8,
        len: usize,
    ) -> Result<(), VolumeError> {
        let Some(cipher) = &self.cipher else {
            // SAFETY: passed on.
            unsafe { std::ptr::copy(src, dst, len) };
            return Ok(());
        };
        // SAFETY: passed on.
        unsafe { cipher.encrypt_raw(offset / SECTOR, src, dst, len) }.map_err(cipher_failed)
    }

    /// Encrypts and writes a range that was checked, and moves the stored end where it goes past it.
    pub(crate) fn encrypt_into(&self, offset: u64, buf: &mut [u8]) -> Result<(), VolumeError> {
        // SAFETY: an exclusive slice, encrypted in place.
        unsafe { self.encrypt_raw(offset, buf.as_ptr(), buf.as_mut_ptr(), buf.len())? };
        let (at, end) = (self.layout.payload_offset + offset, offset + buf.len() as u64);
        if end <= self.stored_bytes() {
            return Ok(self.store.write_at(at, buf)?);
        }
        let _growing = self.growth.lock().unwrap_or_else(PoisonError::into_inner);
        self.fill_gap(offset)?;
        self.store.write_at(at, buf)?;
        self.stored.fetch_max(end, Ordering::AcqRel);
        Ok(())
    }

    /// Fills the gap between the stored end and `to` with encrypted zeros. The growth lock is held.
    fn fill_gap(&self, to: u64) -> Result<(), VolumeError> {
        let mut at = self.stored_bytes();
        if to <= at || to - at > MAX_FILLED_GAP {
            return Ok(());
        }
        let mut zeros = vec![0; (to - at).min(ZERO_CHUNK) as usize];
        while at < to {
            let piece = zeros.get_mut(..(to - at).min(ZERO_CHUNK) as usize).unwrap_or_default();
            piece.fill(0);
            // SAFETY: an exclusive slice, encrypted in place.
            unsafe { self.encrypt_raw(at, piece.as_ptr(), piece.as_mut_ptr(), piece.len())? };
            self.store.write_at(self.layout.payload_offset + at, piece)?;
            at += piece.len() as u64;
            self.stored.fetch_max(at, Ordering::AcqRel);
        }
        Ok(())
    }

    pub(crate) fn check(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        if !offset.is_multiple_of(self.layout.unit) || !len.is_multiple_of(self.layout.unit) {
            return Err(VolumeError::Unaligned);
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.presented_bytes() => Ok(()),
            _ => Err(VolumeError::OutOfRange),
        }
    }

    pub(crate) fn check_write(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        if self.layout.read_only {
            return Err(VolumeError::ReadOnly);
        }
        if self.fenced.load(Ordering::Relaxed) {
            return Err(VolumeError::Fenced);
        }
        self.check(offset, len)
    }
}

/// Ranges are checked before the cipher sees them, so this is the library's failure and not the client's.
fn cipher_failed(error: vmseal_xts::XtsError) -> VolumeError {
    VolumeError::Io(io::Error::other(error))
}

#[cfg(test)]
#[path = "volume_tests.rs"]
pub(crate) mod tests;
