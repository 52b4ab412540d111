//! One queue of a device: fetches requests, has its lane carry them out, answers.
//!
//! Two rings. On this one lie the commands to the driver, one a tag at any time: it can do nothing but commands, on
//! nothing but the char device. The other is the lane's. An eventfd joins them: the kernel rings it when the driver has
//! something for us, and the lane waits for it as for its own completions.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use io_uring::{IoUring, opcode, squeue, types::Fixed};
use vmseal_model::ublk::Offer;

use super::{
    UblkError,
    abi::{self, IoCmd},
    descriptions::Descriptions,
    seat::Service,
};
use crate::{
    aligned::Aligned,
    export::Export,
    flush_gate::Bell,
    lane::{Done, Lane, Operation, Request, Segment},
    sandbox,
    volume::VolumeError,
};

/// Place of the char device in the ring's table.
const DEVICE: Fixed = Fixed(0);
/// Keys of what the lane watches.
const DRIVER: u32 = 0;
const STOP: u32 = 1;
/// So much of its data memory an idle queue keeps.
const KEPT_BYTES: usize = 2 << 20;

/// UBLK_IO_RES_ABORT: the device ends; nothing more comes with this tag.
const ABORT: i32 = -libc::ENODEV;

/// One queue, of the thread that made it.
pub(super) struct Queue<'a> {
    number: u16,
    offer: &'a Offer,
    export: &'a Export,
    /// Its requests must end before its memory does, and it before the descriptors it watches.
    lane: Lane,
    uring: IoUring,
    /// Rung by the kernel; open as long as the lane watches it.
    _bell: Bell,
    descriptions: Descriptions,
    memory: &'a Aligned,
    /// What the driver asked for and was not begun: the volume's gate is shut.
    waiting: VecDeque<u16>,
    /// What is being done with each tag.
    asked: Vec<Option<(Operation, u64)>>,
    /// Bytes of each tag's memory that were in use since it was given back.
    touched: Vec<usize>,
    touched_bytes: usize,
    /// Commands for the driver that it was not handed yet.
    pending: usize,
    /// Whether the driver has, or may have, something for us.
    rung: bool,
    ended: u16,
}

impl<'a> Queue<'a> {
    /// Sets it up and asks for the first requests. `memory` has room for the data of all.
    pub(super) fn new(
        number: u16,
        offer: &'a Offer,
        device: &File,
        export: &'a Export,
        stop: &'a Bell,
        memory: &'a Aligned,
    ) -> Result<Self, UblkError> {
        let set_up = |source| UblkError::SetUp { queue: number, source };
        let descriptions = Descriptions::map(device, number, offer.depth).map_err(set_up)?;
        let bell = Bell::new().map_err(set_up)?;
        let mut lane = Lane::new(export.volume().clone()).map_err(set_up)?;
        lane.watch(bell.as_fd(), DRIVER).map_err(set_up)?;
        lane.watch(stop.as_fd(), STOP).map_err(set_up)?;
        let uring = ring(offer.depth, device, &bell).map_err(set_up)?;
        let depth = usize::from(offer.depth);
        let mut queue = Self {
            number,
            offer,
            export,
            lane,
            uring,
            _bell: bell,
            descriptions,
            memory,
            waiting: VecDeque::with_capacity(depth),
            asked: vec![None; depth],
            touched: vec![0; depth],
            touched_bytes: 0,
            pending: 0,
            rung: false,
            ended: 0,
        };
        for tag in 0..offer.depth {
            queue.push(abi::fetch(offer.encoded), tag, 0)?;
        }
        queue.enter()?;
        // One that is refused at once.
        queue.take_up()?;
        Ok(queue)
    }

    /// Serves until the device ends or it is told to stop. What is under way then is done; what was not answered is
    /// asked of the next worker.
    pub(super) fn run(&mut self, service: &Service) -> Result<(), UblkError> {
        let number = self.number;
        let failed = move |source| UblkError::Ring { queue: number, source };
        loop {
            if self.rung || self.pending > 0 {
                self.enter()?;
                self.take_up()?;
            }
            self.begin_waiting()?;
            // A store in memory does everything at once.
            self.answer()?;
            if service.is_told() || self.ended == self.offer.depth {
                self.lane.drain();
                return Ok(());
            }
            if self.pending > 0 {
                continue;
            }
            // What waits has its data there already.
            if self.touched_bytes > KEPT_BYTES && self.waiting.is_empty() && self.lane.in_flight() == 0 {
                self.memory.release();
                self.touched.fill(0);
                self.touched_bytes = 0;
            }
            self.lane.wait().map_err(failed)?;
            while let Some(key) = self.lane.next_ready() {
                self.rung |= key == DRIVER;
            }
            self.answer()?;
        }
    }

    /// Hands commands to the driver and lets the kernel say what it has for us.
    fn enter(&mut self) -> Result<(), UblkError> {
        self.rung = false;
        loop {
            // SAFETY: the entries' memory (tags' buffers) outlives the thread; the other arguments are no pointers.
            let entered = unsafe {
                self.uring.submitter().enter::<libc::sigset_t>(
                    self.pending as u32,
                    0,
                    IORING_ENTER_GETEVENTS,
                    None,
                )
            };
            match entered {
                Ok(count) => {
                    self.pending = self.pending.saturating_sub(count);
                    if self.pending == 0 {
                        return Ok(());
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                    _ => return Err(UblkError::Ring { queue: self.number, source: error }),
                },
            }
        }
    }

    fn push(&mut self, command: u32, tag: u16, result: i32) -> Result<(), UblkError> {
        let addr = self.buffer(tag) as u64;
        let cmd = IoCmd { q_id: self.number, tag, result, addr }.bytes();
        let entry = opcode::UringCmd16::new(DEVICE, command).cmd(cmd).build();
        let entry = entry.flags(squeue::Flags::FIXED_FILE).user_data(u64::from(tag));
        // SAFETY: the buffer outlives the thread, and is not looked at before the command is done.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        // There is an entry for each tag, and a tag has one command at a time.
        pushed
            .map_err(|_| UblkError::Ring { queue: self.number, source: io::ErrorKind::OutOfMemory.into() })?;
        self.pending += 1;
        Ok(())
    }

    fn buffer(&self, tag: u16) -> *mut u8 {
        // SAFETY: there are `depth` buffers of that size, and tags are below `depth`.
        unsafe { self.memory.base().add(usize::from(tag) * self.offer.max_io_bytes as usize) }
    }

    /// Takes requests from the driver.
    fn take_up(&mut self) -> Result<(), UblkError> {
        loop {
            let Some(news) = self.uring.completion().next() else { return Ok(()) };
            let (tag, result) = (news.user_data() as u16, news.result());
            match result {
                0 => self.waiting.push_back(tag),
                ABORT => self.ended += 1,
                error => {
                    let source = io::Error::from_raw_os_error(-error);
                    return Err(UblkError::Driver { queue: self.number, tag, source });
                }
            }
        }
    }

    /// Begins what the driver asked for, as long as the volume's gate is open; a wait ends when it opens.
    fn begin_waiting(&mut self) -> Result<(), UblkError> {
        while !self.waiting.is_empty() && self.lane.has_room() {
            if let Some(tag) = self.waiting.pop_front() {
                self.begin(tag)?;
            }
        }
        Ok(())
    }

    fn begin(&mut self, tag: u16) -> Result<(), UblkError> {
        let Some(about) = self.descriptions.of(tag) else { return Ok(()) };
        let fua = about.op_flags & abi::FLAG_FUA != 0;
        let operation = match about.op_flags & 0xff {
            abi::OP_READ => Operation::Read,
            abi::OP_WRITE => Operation::Write { fua },
            abi::OP_FLUSH => Operation::Flush,
            abi::OP_DISCARD => Operation::Discard,
            abi::OP_WRITE_ZEROES => Operation::WriteZeroes { fua },
            _ => return self.commit(tag, -libc::EOPNOTSUPP),
        };
        // A flush is nowhere: the driver gives it the last of all sectors.
        let (sectors, start) = match operation {
            Operation::Flush => (0, 0),
            _ => (about.nr_sectors, about.start_sector),
        };
        let length = u64::from(sectors) * 512;
        let Some(offset) = start.checked_mul(512) else {
            return self.commit(tag, -libc::EINVAL);
        };
        let mut request = Request { token: u64::from(tag), operation, offset, length, segments: Vec::new() };
        match operation {
            Operation::Read | Operation::Write { .. } => {
                if length > u64::from(self.offer.max_io_bytes) {
                    return self.commit(tag, -libc::EINVAL);
                }
                request.segments = vec![Segment { base: self.buffer(tag), len: length as usize }];
                self.touch(tag, length as usize);
            }
            Operation::Flush | Operation::WriteZeroes { .. } | Operation::Discard => {}
        }
        if let Some(asked) = self.asked.get_mut(usize::from(tag)) {
            *asked = Some((operation, length));
        }
        // SAFETY: the tag's buffer is the lane's until the request is answered, and outlives this thread.
        unsafe { self.lane.submit(request) };
        Ok(())
    }

    fn touch(&mut self, tag: u16, length: usize) {
        if let Some(touched) = self.touched.get_mut(usize::from(tag))
            && *touched < length
        {
            self.touched_bytes += length - *touched;
            *touched = length;
        }
    }

    /// Answers what the lane has done.
    fn answer(&mut self) -> Result<(), UblkError> {
        while let Some(Done { token, result }) = self.lane.next_done() {
            let tag = token as u16;
            let asked = self.asked.get_mut(usize::from(tag)).and_then(Option::take);
            let Some((operation, length)) = asked else { continue };
            let answer = match result {
                Ok(()) => {
                    match operation {
                        Operation::Read => self.export.count_read(length),
                        Operation::Write { .. } | Operation::WriteZeroes { .. } => {
                            self.export.count_written(length);
                        }
                        Operation::Flush | Operation::Discard => {}
                    }
                    // Of data only; the driver takes every other number for success of all.
                    match operation {
                        Operation::Read | Operation::Write { .. } => length as i32,
                        _ => 0,
                    }
                }
                Err(error) => -errno(&error),
            };
            self.commit(tag, answer)?;
        }
        Ok(())
    }

    fn commit(&mut self, tag: u16, result: i32) -> Result<(), UblkError> {
        self.push(abi::commit_and_fetch(self.offer.encoded), tag, result)
    }
}

impl Drop for Queue<'_> {
    /// The descriptors the lane watches are about to close.
    fn drop(&mut self) {
        self.lane.unwatch(DRIVER);
        self.lane.unwatch(STOP);
    }
}

/// The ring of commands: enabled, for this thread, the char device and the one operation only.
fn ring(depth: u16, device: &File, bell: &Bell) -> io::Result<IoUring> {
    let entries = u32::from(depth);
    let mut builder = IoUring::builder();
    builder.setup_r_disabled().dontfork().setup_single_issuer().setup_defer_taskrun();
    let uring = match builder.build(entries) {
        // An old kernel.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().setup_r_disabled().dontfork().build(entries)?
        }
        other => other?,
    };
    let submitter = uring.submitter();
    submitter.register_files(&[device.as_raw_fd()])?;
    submitter.register_eventfd(bell.as_fd().as_raw_fd())?;
    // SAFETY: the descriptor is open as long as the ring lives.
    let itself = unsafe { BorrowedFd::borrow_raw(uring.as_raw_fd()) };
    sandbox::ring::restrict(itself, &[opcode::UringCmd16::CODE], 0)?;
    Ok(uring)
}

/// From linux/io_uring.h; the crate does not name it.
const IORING_ENTER_GETEVENTS: u32 = 1;

fn errno(error: &VolumeError) -> i32 {
    match error {
        VolumeError::Unaligned | VolumeError::OutOfRange => libc::EINVAL,
        VolumeError::ReadOnly => libc::EPERM,
        VolumeError::NoSpace(_) => libc::ENOSPC,
        VolumeError::Io(error) if error.raw_os_error() == Some(libc::ENOMEM) => libc::ENOMEM,
        VolumeError::FlushFailed | VolumeError::Truncated | VolumeError::Fenced | VolumeError::Io(_) => {
            libc::EIO
        }
    }
}
