//! Carries each request out at once, by pread and pwrite.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::Arc,
};

use super::{Done, Operation, Outbox, Request, pieces, pieces::Place};
use crate::{
    aligned::Aligned,
    volume::{Volume, VolumeError},
};

/// So much is read and decrypted, or encrypted and written, at a time: it stays in the processor's cache.
const CHUNK: usize = 128 << 10;
/// Most descriptors looked at in one turn.
const EVENTS: usize = 16;

pub(super) struct Blocking {
    volume: Arc<Volume>,
    bounce: Aligned,
    pieces: Vec<libc::iovec>,
    epoll: OwnedFd,
    watched: Vec<(u32, i32)>,
}

impl Blocking {
    pub(super) fn new(volume: Arc<Volume>) -> io::Result<Self> {
        // SAFETY: no pointers; the descriptor is new and ours alone.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if epoll < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
        Ok(Self { volume, bounce: Aligned::new(CHUNK)?, pieces: Vec::new(), epoll, watched: Vec::new() })
    }

    /// # Safety
    ///
    /// As [`super::Lane::submit`].
    pub(super) unsafe fn submit(&mut self, request: &Request, outbox: &mut Outbox) {
        // SAFETY: passed on.
        let result = unsafe { self.carry_out(request) };
        outbox.done.push_back(Done { token: request.token, result });
    }

    /// # Safety
    ///
    /// As [`super::Lane::submit`].
    unsafe fn carry_out(&mut self, request: &Request) -> Result<(), VolumeError> {
        request.check(&self.volume)?;
        let (offset, length) = (request.offset, request.length);
        let fua = match request.operation {
            // SAFETY: passed on.
            Operation::Read => return unsafe { self.read(request) },
            Operation::Write { fua } => {
                // SAFETY: passed on.
                unsafe { self.write(request)? };
                fua
            }
            Operation::WriteZeroes { fua } => {
                self.volume.write_zeroes(offset, length)?;
                fua
            }
            Operation::Discard => return self.volume.discard(offset, length),
            Operation::Flush => true,
        };
        if fua { self.volume.flush() } else { Ok(()) }
    }

    /// # Safety
    ///
    /// As [`super::Lane::submit`].
    unsafe fn read(&mut self, request: &Request) -> Result<(), VolumeError> {
        let volume = &*self.volume;
        let (base, unit) = (volume.layout().payload_offset, volume.layout().unit as usize);
        let stored = volume.stored_bytes();
        let mut place = Place::default();
        let mut at = request.offset;
        let end = request.offset + request.length;
        while at < end {
            let within = stored.saturating_sub(at).min(CHUNK as u64) as usize;
            let length = ((end - at) as usize).min(if within == 0 { usize::MAX } else { within });
            pieces::take(&request.segments, &mut place, length, &mut self.pieces);
            if within == 0 {
                // SAFETY: segments of the request.
                unsafe { pieces::zero(&self.pieces) };
            } else if pieces::suit(&self.pieces, unit, volume.alignment().memory) {
                // SAFETY: segments of the request, which the front keeps.
                unsafe { read_in_place(volume, base, at, &self.pieces)? };
            } else {
                let bounce = self.bounce.first(length);
                if volume.store().read_at(base + at, bounce)? < length {
                    return Err(VolumeError::Truncated);
                }
                // SAFETY: the bounce buffer is ours, the pieces are segments of the request.
                unsafe {
                    volume.decrypt_raw(at, bounce.as_mut_ptr(), length)?;
                    pieces::scatter(bounce.as_ptr(), &self.pieces);
                }
            }
            at += length as u64;
        }
        Ok(())
    }

    /// # Safety
    ///
    /// As [`super::Lane::submit`].
    unsafe fn write(&mut self, request: &Request) -> Result<(), VolumeError> {
        let volume = &*self.volume;
        let (base, unit) = (volume.layout().payload_offset, volume.layout().unit as usize);
        let mut place = Place::default();
        let mut at = request.offset;
        let end = request.offset + request.length;
        while at < end {
            let length = ((end - at) as usize).min(CHUNK);
            pieces::take(&request.segments, &mut place, length, &mut self.pieces);
            let bounce = self.bounce.base();
            let grows = at + length as u64 > volume.stored_bytes();
            // SAFETY: the bounce buffer holds CHUNK bytes and is ours; the pieces are segments of the request.
            unsafe {
                if grows || !pieces::suit(&self.pieces, unit, 1) {
                    pieces::gather(&self.pieces, bounce);
                    if !grows {
                        volume.encrypt_raw(at, bounce, bounce, length)?;
                    }
                } else {
                    let mut done = 0;
                    for piece in &self.pieces {
                        let (from, len) = (piece.iov_base.cast::<u8>(), piece.iov_len);
                        volume.encrypt_raw(at + done as u64, from, bounce.add(done), len)?;
                        done += len;
                    }
                }
            }
            let bounce = self.bounce.first(length);
            if grows {
                volume.encrypt_into(at, bounce)?;
            } else {
                volume.store().write_at(base + at, bounce)?;
            }
            at += length as u64;
        }
        Ok(())
    }

    pub(super) fn watch(&mut self, fd: BorrowedFd<'_>, key: u32) -> io::Result<()> {
        let events = (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLET).cast_unsigned();
        let mut event = libc::epoll_event { events, u64: u64::from(key) };
        let (epoll, raw) = (self.epoll.as_raw_fd(), fd.as_raw_fd());
        // SAFETY: both descriptors are open; the event is copied.
        if unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, raw, &mut event) } != 0 {
            return Err(io::Error::last_os_error());
        }
        self.watched.push((key, raw));
        Ok(())
    }

    pub(super) fn unwatch(&mut self, key: u32) {
        let epoll = self.epoll.as_raw_fd();
        self.watched.retain(|&(watched, fd)| {
            if watched == key {
                // SAFETY: a descriptor that was closed already gives an error, which is as good.
                unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
            }
            watched != key
        });
    }

    pub(super) fn turn(&mut self, wait: bool, outbox: &mut Outbox) -> io::Result<()> {
        let wait = wait && outbox.is_empty();
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        loop {
            let timeout = if wait { -1 } else { 0 };
            // SAFETY: as many events as said.
            let count = unsafe {
                libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), EVENTS as libc::c_int, timeout)
            };
            if let Ok(count) = usize::try_from(count) {
                outbox.ready.extend(events.iter().take(count).map(|event| event.u64 as u32));
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

/// Reads ciphertext into the pieces and decrypts it there.
///
/// # Safety
///
/// The pieces are valid for writing.
unsafe fn read_in_place(
    volume: &Volume,
    base: u64,
    at: u64,
    pieces: &[libc::iovec],
) -> Result<(), VolumeError> {
    let wanted: usize = pieces.iter().map(|piece| piece.iov_len).sum();
    // SAFETY: passed on.
    let mut got = unsafe { volume.store().read_pieces(base + at, pieces)? };
    if got < wanted {
        let mut rest = pieces.to_vec();
        let mut last = got;
        while got < wanted {
            pieces::advance(&mut rest, last);
            // SAFETY: passed on.
            last = unsafe { volume.store().read_pieces(base + at + got as u64, &rest)? };
            if last == 0 {
                return Err(VolumeError::Truncated);
            }
            got += last;
        }
    }
    let mut done = 0;
    for piece in pieces {
        // SAFETY: passed on.
        unsafe { volume.decrypt_raw(at + done as u64, piece.iov_base.cast(), piece.iov_len)? };
        done += piece.iov_len;
    }
    Ok(())
}
