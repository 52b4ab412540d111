//! Plays QEMU and its guest: the vhost crate's front end sets a device up, a small virtio driver on memory of its own
//! uses it. It does what a test says, also what no driver would do.

use std::{
    fs::File,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::atomic::{AtomicU16, Ordering, fence},
    time::{Duration, Instant},
};

use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend, VhostUserProtocolFeatures as Protocol,
        message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight},
    },
};
use vmm_sys_util::eventfd::EventFd;

pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
pub(crate) const F_INDIRECT: u64 = 1 << 28;
pub(crate) const F_LOG_ALL: u64 = 1 << 26;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Descriptors of a queue, and descriptors of one slot: so many requests at a time.
pub(crate) const SIZE: u16 = 128;
const PER_SLOT: u16 = 8;
pub(crate) const SLOTS: u16 = SIZE / PER_SLOT;
/// Bytes of a slot's data.
pub(crate) const ROOM: usize = 256 << 10;
const MEMORY: usize = 64 << 20;
/// The guest's memory begins here, for itself and for QEMU.
pub(crate) const GUEST: u64 = 0x4000_0000;
/// Parts of a queue's 8 MiB.
const PER_QUEUE: usize = 8 << 20;
const AVAILABLE: usize = 0x1000;
const USED: usize = 0x2000;
const HEADERS: usize = 0x4000;
const TABLES: usize = 0x8000;
const DATA: usize = 1 << 20;

pub(crate) fn eventfd() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

/// A file in memory.
pub(crate) fn memfd(len: usize) -> File {
    // SAFETY: a C string and numbers; the descriptor is new.
    unsafe {
        let fd = OwnedFd::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC));
        assert_eq!(libc::ftruncate(fd.as_raw_fd(), len as i64), 0);
        File::from(fd)
    }
}

/// The guest's memory.
pub(crate) struct Memory {
    pub(crate) file: File,
    pub(crate) base: *mut u8,
}

// SAFETY: shared memory of the process; used by one test at a time.
unsafe impl Send for Memory {}

impl Memory {
    pub(crate) fn new() -> Self {
        let file = memfd(MEMORY);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), MEMORY, access, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(base, libc::MAP_FAILED);
        Self { file, base: base.cast() }
    }

    pub(crate) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST,
            memory_size: MEMORY as u64,
            userspace_addr: GUEST,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= MEMORY);
        // SAFETY: within the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(at), bytes.len()) };
    }

    pub(crate) fn read(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= MEMORY);
        let mut bytes = vec![0; len];
        // SAFETY: within the mapping.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(at), bytes.as_mut_ptr(), len) };
        bytes
    }

    pub(crate) fn word(&self, at: usize) -> &AtomicU16 {
        assert!(at.is_multiple_of(2) && at + 2 <= MEMORY);
        // SAFETY: within the mapping, aligned.
        unsafe { AtomicU16::from_ptr(self.base.add(at).cast()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping.
        unsafe { libc::munmap(self.base.cast(), MEMORY) };
    }
}

/// What a driver asks for and how it lays it out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// By an indirect table.
    pub(crate) indirect: bool,
    /// Data in so many descriptors.
    pub(crate) pieces: usize,
    /// Status in the same descriptor as the data that are read, header in the same as those that are written.
    pub(crate) merged: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self { indirect: false, pieces: 1, merged: false }
    }
}

pub(crate) struct DriverQueue {
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) base: usize,
    pub(crate) available: u16,
    pub(crate) used: u16,
    pub(crate) kicks: u64,
}

/// A device that was set up.
pub(crate) struct Driver {
    pub(crate) frontend: Frontend,
    pub(crate) memory: Memory,
    pub(crate) features: u64,
    pub(crate) queues: Vec<DriverQueue>,
    pub(crate) inflight: Option<(VhostUserInflight, File)>,
}

/// Everything but what a test leaves out.
pub(crate) const ALL: u64 = !0;

impl Driver {
    /// Connects and sets up; `wanted` are the features to accept of those that are offered, the log excepted.
    pub(crate) fn new(stream: UnixStream, queues: usize, wanted: u64) -> Self {
        let memory = Memory::new();
        let queues = (0..queues)
            .map(|index| DriverQueue {
                kick: eventfd(),
                call: eventfd(),
                base: index * PER_QUEUE,
                available: 0,
                used: 0,
                kicks: 0,
            })
            .collect();
        let frontend = Frontend::from_stream(stream, 16);
        let mut driver = Self { frontend, memory, features: 0, queues, inflight: None };
        driver.negotiate(wanted);
        driver.set_up();
        driver
    }

    fn negotiate(&mut self, wanted: u64) {
        let frontend = &mut self.frontend;
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        self.features = offered & wanted & !F_LOG_ALL | 1 << 30 | 1 << 32;
        let protocol = frontend.get_protocol_features().unwrap();
        let used = Protocol::MQ
            | Protocol::CONFIG
            | Protocol::REPLY_ACK
            | Protocol::INFLIGHT_SHMFD
            | Protocol::LOG_SHMFD
            | Protocol::BACKEND_REQ
            | Protocol::CONFIGURE_MEM_SLOTS
            | Protocol::RESET_DEVICE;
        assert!(protocol.contains(used), "{protocol:?}");
        frontend.set_protocol_features(used).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert_eq!(frontend.get_queue_num().unwrap(), 16);
        frontend.set_features(self.features).unwrap();
    }

    /// As QEMU does when the guest's driver is ready.
    pub(crate) fn set_up(&mut self) {
        if self.inflight.is_none() {
            let shape = VhostUserInflight::new(0, 0, self.queues.len() as u16, SIZE);
            self.inflight = Some(self.frontend.get_inflight_fd(&shape).unwrap());
        }
        let (spec, file) = self.inflight.as_ref().unwrap();
        self.frontend.set_inflight_fd(spec, file.as_raw_fd()).unwrap();
        self.frontend.set_mem_table(&[self.memory.region()]).unwrap();
        for index in 0..self.queues.len() {
            self.start_queue(index);
        }
    }

    pub(crate) fn start_queue(&mut self, index: usize) {
        let queue = &self.queues[index];
        self.frontend.set_vring_num(index, SIZE).unwrap();
        // QEMU does not know how far a back end was that vanished; it says what is used.
        self.frontend
            .set_vring_base(index, self.memory.word(queue.base + USED + 2).load(Ordering::SeqCst))
            .unwrap();
        self.set_addresses(index, None);
        let queue = &self.queues[index];
        self.frontend.set_vring_kick(index, &queue.kick).unwrap();
        self.frontend.set_vring_call(index, &queue.call).unwrap();
        self.frontend.set_vring_enable(index, true).unwrap();
    }

    pub(crate) fn set_addresses(&self, index: usize, log_addr: Option<u64>) {
        let base = GUEST + self.queues[index].base as u64;
        let at = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: u32::from(log_addr.is_some()),
            desc_table_addr: base,
            used_ring_addr: base + USED as u64,
            avail_ring_addr: base + AVAILABLE as u64,
            log_addr,
        };
        self.frontend.set_vring_addr(index, &at).unwrap();
    }

    /// The same guest and the same QEMU find a new back end.
    pub(crate) fn reconnect(&mut self, stream: UnixStream) {
        self.frontend = Frontend::from_stream(stream, 16);
        self.negotiate(self.features);
        self.set_up();
    }

    pub(crate) fn config(&mut self) -> Vec<u8> {
        let flags = VhostUserConfigFlags::empty();
        self.frontend.get_config(0, 60, flags, &[0; 60]).unwrap().1
    }

    pub(crate) fn set_writeback(&mut self, writeback: bool) -> bool {
        self.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[u8::from(writeback)]).is_ok()
    }

    /// Where the ring, the headers and the data of a queue lie.
    pub(crate) fn data_at(&self, queue: usize, slot: u16) -> usize {
        self.queues[queue].base + DATA + usize::from(slot) * ROOM
    }

    pub(crate) fn header_at(&self, queue: usize, slot: u16) -> usize {
        self.queues[queue].base + HEADERS + usize::from(slot) * 64
    }

    pub(crate) fn used_at(&self, queue: usize) -> usize {
        self.queues[queue].base + USED
    }

    pub(crate) fn descriptor(&self, queue: usize, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.queues[queue].base + usize::from(index) * 16;
        self.memory.write(at, &descriptor(address, len, flags, next));
    }

    /// Lays a request out in a slot; gives its head. Nobody is told.
    pub(crate) fn lay_out(
        &self,
        queue: usize,
        slot: u16,
        kind: u32,
        sector: u64,
        out: &[u8],
        read: usize,
        shape: Shape,
    ) -> u16 {
        assert!(slot < SLOTS && out.len().max(read) < ROOM);
        let (header, data) = (self.header_at(queue, slot), self.data_at(queue, slot));
        let mut head = kind.to_le_bytes().to_vec();
        head.extend([0; 4]);
        head.extend(sector.to_le_bytes());
        let mut chain: Vec<(usize, usize, u16)> = Vec::new();
        let status = if shape.merged && read > 0 { data + read } else { header + 32 };
        self.memory.write(status, &[0xff]);
        if shape.merged && !out.is_empty() {
            // Right in front of the data.
            self.memory.write(data, &head);
            self.memory.write(data + 16, out);
            split(&mut chain, data, 16 + out.len(), shape.pieces, 0);
        } else {
            self.memory.write(header, &head);
            chain.push((header, 16, 0));
            self.memory.write(data, out);
            split(&mut chain, data, out.len(), shape.pieces, 0);
        }
        if shape.merged && read > 0 {
            split(&mut chain, data, read + 1, shape.pieces, WRITE);
        } else {
            split(&mut chain, data, read, shape.pieces, WRITE);
            chain.push((status, 1, WRITE));
        }
        let first = slot * PER_SLOT;
        let guest = |at: usize| GUEST + at as u64;
        if shape.indirect {
            let table = self.queues[queue].base + TABLES + usize::from(slot) * 1024;
            for (place, (at, len, flags)) in chain.iter().enumerate() {
                let next = if place + 1 < chain.len() { NEXT } else { 0 };
                let bytes = descriptor(guest(*at), *len as u32, flags | next, place as u16 + 1);
                self.memory.write(table + 16 * place, &bytes);
            }
            self.descriptor(queue, first, guest(table), 16 * chain.len() as u32, INDIRECT, 0);
        } else {
            assert!(chain.len() <= usize::from(PER_SLOT));
            for (place, (at, len, flags)) in chain.iter().enumerate() {
                let next = if place + 1 < chain.len() { NEXT } else { 0 };
                let index = first + place as u16;
                self.descriptor(queue, index, guest(*at), *len as u32, flags | next, index + 1);
            }
        }
        first
    }

    /// Makes a chain available, and tells if it must.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let event_idx = self.features & F_EVENT_IDX != 0;
        let (memory, queue) = (&self.memory, &mut self.queues[queue]);
        let ring = queue.base + AVAILABLE;
        let place = usize::from(queue.available % SIZE);
        memory.word(ring + 4 + 2 * place).store(head, Ordering::Relaxed);
        let old = queue.available;
        queue.available = old.wrapping_add(1);
        memory.word(ring + 2).store(queue.available, Ordering::Release);
        fence(Ordering::SeqCst);
        let used = queue.base + USED;
        let must = if event_idx {
            let wish = memory.word(used + 4 + 8 * usize::from(SIZE)).load(Ordering::Relaxed);
            queue.available.wrapping_sub(wish).wrapping_sub(1) < queue.available.wrapping_sub(old)
        } else {
            memory.word(used).load(Ordering::Relaxed) & 1 == 0
        };
        if must {
            queue.kicks += 1;
            queue.kick.write(1).unwrap();
        }
    }

    /// The next used chain: its head and length. Waits for the call; `None` if there is none in time.
    pub(crate) fn next_used(&mut self, queue: usize, limit: Duration) -> Option<(u16, u32)> {
        let deadline = Instant::now() + limit;
        let (memory, queue) = (&self.memory, &mut self.queues[queue]);
        let (used, available) = (queue.base + USED, queue.base + AVAILABLE);
        loop {
            if memory.word(used + 2).load(Ordering::Acquire) != queue.used {
                let entry = memory.read(used + 4 + 8 * usize::from(queue.used % SIZE), 8);
                queue.used = queue.used.wrapping_add(1);
                let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
                return Some((word(&entry[..4]) as u16, word(&entry[4..])));
            }
            // Asks to be told of the next one, and looks again.
            memory.word(available + 4 + 2 * usize::from(SIZE)).store(queue.used, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            if memory.word(used + 2).load(Ordering::Acquire) != queue.used {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !readable(&queue.call, left) {
                return None;
            }
            let _ = queue.call.read();
        }
    }

    /// One request from beginning to end: its status, what was read, and the length the device says it wrote.
    pub(crate) fn request(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        out: &[u8],
        read: usize,
        shape: Shape,
    ) -> (u8, Vec<u8>, u32) {
        let head = self.lay_out(queue, 0, kind, sector, out, read, shape);
        self.offer(queue, head);
        let (used, written) = self.next_used(queue, Duration::from_secs(20)).expect("no answer");
        assert_eq!(used, head);
        (self.status(queue, 0, read, shape), self.memory.read(self.data_at(queue, 0), read), written)
    }

    pub(crate) fn status(&self, queue: usize, slot: u16, read: usize, shape: Shape) -> u8 {
        let merged = shape.merged && read > 0;
        let at = if merged { self.data_at(queue, slot) + read } else { self.header_at(queue, slot) + 32 };
        self.memory.read(at, 1)[0]
    }

    pub(crate) fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.request(0, OUT, sector, data, 0, Shape::default()).0
    }

    pub(crate) fn read(&mut self, sector: u64, len: usize) -> (u8, Vec<u8>) {
        let (status, data, written) = self.request(0, IN, sector, &[], len, Shape::default());
        assert_eq!(written as usize, if status == 0 { len + 1 } else { written as usize });
        (status, data)
    }

    /// A discard or a write of zeros.
    pub(crate) fn ranged(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let range = [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat();
        self.request(0, kind, 0, &range, 0, Shape::default()).0
    }
}

pub(crate) fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}

/// Adds a range in so many pieces.
fn split(chain: &mut Vec<(usize, usize, u16)>, at: usize, len: usize, pieces: usize, flags: u16) {
    let piece = len.div_ceil(pieces.max(1)).max(1);
    for start in (0..len).step_by(piece) {
        chain.push((at + start, piece.min(len - start), flags));
    }
}

/// Whether it becomes readable in time.
pub(crate) fn readable(fd: &impl AsRawFd, limit: Duration) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd.
    unsafe { libc::poll(&mut poll, 1, limit.as_millis().clamp(1, 60_000) as i32) == 1 }
}

/// Sends a message as it stands, with descriptors.
pub(crate) fn send_raw(stream: &UnixStream, code: u32, flags: u32, body: &[u8], fds: &[&dyn AsRawFd]) {
    let mut bytes = [code.to_ne_bytes(), flags.to_ne_bytes(), (body.len() as u32).to_ne_bytes()].concat();
    bytes.extend(body);
    send_bytes(stream, &bytes, fds);
}

pub(crate) fn send_bytes(stream: &UnixStream, bytes: &[u8], fds: &[&dyn AsRawFd]) {
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;
    let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    // The other end may have hung up by now.
    let _ = stream.send_with_fds(&[bytes], &raw);
}
