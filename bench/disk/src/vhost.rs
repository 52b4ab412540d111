//! A front end of vhost-user-blk: what a guest's virtio-blk driver does, without the guest.
//!
//! Split rings in shared memory, EVENT_IDX and indirect descriptors where the back end has them (as Linux does), a kick
//! only when the device asks for one, sleep on the call descriptor when nothing is there.

use std::{
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    ptr,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering, fence},
    },
};

use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures, message::VhostUserConfigFlags},
};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    error::{BenchError, Trying},
    sample::Client,
};

/// Entries of a ring.
const RING: usize = 256;
/// Most requests in flight in a queue.
const SLOTS: usize = 64;
/// Memory of a queue: rings first, data from [`DATA`].
const QUEUE_BYTES: usize = 8 << 20;
const AVAIL: usize = 8 << 10;
const USED: usize = 16 << 10;
const INDIRECT: usize = 24 << 10;
const HEADERS: usize = 32 << 10;
const DATA: usize = 1 << 20;
/// Descriptors of a request: header, data, status.
const CHAIN: usize = 3;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;

const VIRTIO_BLK_F_FLUSH: u64 = 1 << 9;
const VIRTIO_BLK_F_MQ: u64 = 1 << 12;
const VIRTIO_RING_F_INDIRECT_DESC: u64 = 1 << 28;
const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;
const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;

/// Name of the guest's memory in `/proc/PID/smaps`: it is not the server's.
pub(crate) const GUEST_MEMORY: &str = "memfd:vmseal-bench-guest";

/// Memory of a guest: shared, mapped.
pub(crate) struct Memory {
    base: *mut u8,
    len: usize,
    fd: OwnedFd,
}

// SAFETY: the mapping is of the whole process and lives as long as the value; who reads and writes which part is the
// queues' matter, and no two queues share a byte.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// For a disk with this many queues.
    pub(crate) fn new(queues: usize) -> Result<Self, BenchError> {
        Self::map(queues * QUEUE_BYTES).trying(|| "making guest memory".to_owned())
    }

    fn map(len: usize) -> io::Result<Self> {
        // SAFETY: a NUL-terminated name and a flag; the descriptor is owned at once.
        let fd = unsafe { libc::memfd_create(c"vmseal-bench-guest".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was just made and is nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
        // SAFETY: a new mapping of a descriptor that was made long enough.
        let base = unsafe {
            if libc::ftruncate(fd.as_raw_fd(), len as i64) != 0 {
                return Err(io::Error::last_os_error());
            }
            libc::mmap(ptr::null_mut(), len, protection, flags, fd.as_raw_fd(), 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { base: base.cast(), len, fd })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping made above, which nothing uses any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// One disk, and one connection to it.
pub(crate) struct Device {
    _frontend: Frontend,
    queues: Vec<Queue>,
}

/// One of its queues.
pub(crate) struct Queue {
    memory: Arc<Memory>,
    /// Where its part of the memory begins.
    at: usize,
    peer: String,
    bytes: u64,
    kick: EventFd,
    call: EventFd,
    indirect: bool,
    event_idx: bool,
    /// Next entry of the available ring; up to `kicked` the device was told.
    available: u16,
    kicked: u16,
    used: u16,
}

impl Device {
    /// Sets up this many queues.
    pub(crate) fn new(stream: UnixStream, peer: &str, queues: usize) -> Result<Self, BenchError> {
        Self::with_memory(Memory::new(queues)?, stream, peer)
    }

    /// Sets up the queues of a guest's memory.
    pub(crate) fn with_memory(memory: Memory, stream: UnixStream, peer: &str) -> Result<Self, BenchError> {
        let failed = |message: &'static str| {
            move |source| BenchError::VhostUser { peer: peer.to_owned(), message, source }
        };
        let queues = memory.len / QUEUE_BYTES;
        let memory = Arc::new(memory);
        let mut frontend = Frontend::from_stream(stream, queues as u64);
        frontend.set_owner().map_err(failed("SET_OWNER"))?;
        let offered = frontend.get_features().map_err(failed("GET_FEATURES"))?;
        let wanted = VIRTIO_F_VERSION_1
            | VHOST_USER_F_PROTOCOL_FEATURES
            | VIRTIO_RING_F_EVENT_IDX
            | VIRTIO_RING_F_INDIRECT_DESC
            | VIRTIO_BLK_F_FLUSH
            | VIRTIO_BLK_F_MQ;
        let features = offered & wanted;
        let protocol = frontend.get_protocol_features().map_err(failed("GET_PROTOCOL_FEATURES"))?;
        frontend
            .set_protocol_features(
                protocol & (VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ),
            )
            .map_err(failed("SET_PROTOCOL_FEATURES"))?;
        if queues > 1 {
            let most = frontend.get_queue_num().map_err(failed("GET_QUEUE_NUM"))?;
            if most < queues as u64 {
                return Err(BenchError::peer(peer, format!("has {most} queues, and {queues} are wanted")));
            }
        }
        let flags = VhostUserConfigFlags::empty();
        let (_, config) = frontend.get_config(0, 60, flags, &[0; 60]).map_err(failed("GET_CONFIG"))?;
        let sectors = config.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
        let bytes = sectors.ok_or_else(|| BenchError::peer(peer, "gives no configuration"))? * 512;
        frontend.set_features(features).map_err(failed("SET_FEATURES"))?;
        let base = memory.base as u64;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: memory.len as u64,
            userspace_addr: base,
            mmap_offset: 0,
            mmap_handle: memory.fd.as_raw_fd(),
        };
        frontend.set_mem_table(&[region]).map_err(failed("SET_MEM_TABLE"))?;
        let mut made = Vec::with_capacity(queues);
        for index in 0..queues {
            let at = index * QUEUE_BYTES;
            let event = || EventFd::new(libc::EFD_CLOEXEC).trying(|| "making an eventfd".to_owned());
            let (kick, call) = (event()?, event()?);
            frontend.set_vring_num(index, RING as u16).map_err(failed("SET_VRING_NUM"))?;
            let ring = VringConfigData {
                queue_max_size: RING as u16,
                queue_size: RING as u16,
                flags: 0,
                desc_table_addr: base + at as u64,
                used_ring_addr: base + (at + USED) as u64,
                avail_ring_addr: base + (at + AVAIL) as u64,
                log_addr: None,
            };
            frontend.set_vring_addr(index, &ring).map_err(failed("SET_VRING_ADDR"))?;
            frontend.set_vring_base(index, 0).map_err(failed("SET_VRING_BASE"))?;
            frontend.set_vring_call(index, &call).map_err(failed("SET_VRING_CALL"))?;
            frontend.set_vring_kick(index, &kick).map_err(failed("SET_VRING_KICK"))?;
            frontend.set_vring_enable(index, true).map_err(failed("SET_VRING_ENABLE"))?;
            made.push(Queue {
                memory: memory.clone(),
                at,
                peer: peer.to_owned(),
                bytes,
                kick,
                call,
                indirect: features & VIRTIO_RING_F_INDIRECT_DESC != 0,
                event_idx: features & VIRTIO_RING_F_EVENT_IDX != 0,
                available: 0,
                kicked: 0,
                used: 0,
            });
        }
        Ok(Self { _frontend: frontend, queues: made })
    }

    /// All its queues, for a thread each.
    pub(crate) fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }
}

impl Queue {
    /// `T` at this place of the queue's memory.
    fn place<T>(&self, at: usize) -> *mut T {
        assert!(at + size_of::<T>() <= QUEUE_BYTES && at.is_multiple_of(align_of::<T>()));
        // SAFETY: within the queue's part of the mapping, which lives as long as the queue.
        unsafe { self.memory.base.add(self.at + at).cast() }
    }

    fn write<T>(&self, at: usize, value: T) {
        // SAFETY: a place within the mapping and aligned; the device looks at it only once the available index says so.
        unsafe { self.place::<T>(at).write_volatile(value) }
    }

    fn read<T>(&self, at: usize) -> T {
        // SAFETY: a place within the mapping and aligned; integers only, for which any bytes are a value.
        unsafe { self.place::<T>(at).read_volatile() }
    }

    fn index(&self, at: usize) -> &AtomicU16 {
        // SAFETY: a place within the mapping and aligned; both sides use it as an atomic.
        unsafe { AtomicU16::from_ptr(self.place(at)) }
    }

    fn descriptor(&self, at: usize, address: usize, len: usize, flags: u16, next: u16) {
        self.write(at, (self.at + address) as u64);
        self.write(at + 8, len as u32);
        self.write(at + 12, flags);
        self.write(at + 14, next);
    }

    fn push(&mut self, kind: u32, slot: usize, offset: u64, len: usize) {
        assert!(slot < SLOTS && DATA + (slot + 1) * len <= QUEUE_BYTES);
        let header = HEADERS + slot * 32;
        self.write(header, kind);
        self.write(header + 4, 0u32);
        self.write(header + 8, offset / 512);
        self.write(header + 16, 0xffu8);
        // The chain lies in a table of its own, or in the ring itself.
        let head = if self.indirect { slot } else { slot * CHAIN };
        let (table, first) = if self.indirect { (INDIRECT + slot * 64, 0) } else { (head * 16, head) };
        let data_flags = if kind == T_IN { F_NEXT | F_WRITE } else { F_NEXT };
        let mut filled = 0;
        let mut link = |address, len, flags| {
            self.descriptor(table + filled * 16, address, len, flags, (first + filled + 1) as u16);
            filled += 1;
        };
        link(header, 16, F_NEXT);
        if len > 0 {
            link(DATA + slot * len, len, data_flags);
        }
        link(header + 16, 1, F_WRITE);
        if self.indirect {
            self.descriptor(head * 16, table, filled * 16, F_INDIRECT, 0);
        }
        self.write(AVAIL + 4 + self.available as usize % RING * 2, head as u16);
        self.available = self.available.wrapping_add(1);
    }

    /// Takes what the device has done; fails if it says a request failed.
    fn reap(&mut self, done: &mut Vec<usize>) -> Result<(), BenchError> {
        let index = self.index(USED + 2).load(Ordering::Acquire);
        while self.used != index {
            let head = self.read::<u32>(USED + 4 + self.used as usize % RING * 8) as usize;
            let slot = if self.indirect { head } else { head / CHAIN };
            if slot >= SLOTS {
                return Err(BenchError::peer(&self.peer, "used a descriptor it was not given"));
            }
            let status = self.read::<u8>(HEADERS + slot * 32 + 16);
            if status != 0 {
                return Err(BenchError::peer(&self.peer, format!("request failed with status {status}")));
            }
            self.used = self.used.wrapping_add(1);
            done.push(slot);
        }
        Ok(())
    }
}

impl Client for Queue {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn submit(&mut self, slot: usize, write: bool, offset: u64, len: usize) {
        self.push(if write { T_OUT } else { T_IN }, slot, offset, len);
    }

    fn submit_flush(&mut self, slot: usize) {
        self.push(T_FLUSH, slot, 0, 0);
    }

    fn send(&mut self) -> Result<(), BenchError> {
        let (from, to) = (self.kicked, self.available);
        if from == to {
            return Ok(());
        }
        self.kicked = to;
        self.index(AVAIL + 2).store(to, Ordering::Release);
        fence(Ordering::SeqCst);
        let asked = if self.event_idx {
            let event = self.index(USED + 4 + RING * 8).load(Ordering::Acquire);
            to.wrapping_sub(event).wrapping_sub(1) < to.wrapping_sub(from)
        } else {
            self.index(USED).load(Ordering::Acquire) & 1 == 0
        };
        if asked { self.kick.write(1).trying(|| format!("kicking {}", self.peer)) } else { Ok(()) }
    }

    fn wait(&mut self, done: &mut Vec<usize>) -> Result<(), BenchError> {
        loop {
            self.reap(done)?;
            if !done.is_empty() {
                return Ok(());
            }
            if self.event_idx {
                // "Interrupt me at the next one", and it may have come meanwhile.
                self.index(AVAIL + 4 + RING * 2).store(self.used, Ordering::Release);
                fence(Ordering::SeqCst);
                self.reap(done)?;
                if !done.is_empty() {
                    return Ok(());
                }
            }
            match self.call.read() {
                // QEMU makes the descriptor non-blocking, which the two of us share.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => make_blocking(&self.call),
                other => other.map(drop),
            }
            .trying(|| format!("waiting for {}", self.peer))?;
        }
    }

    fn fill(&mut self, at: usize, bytes: &[u8]) {
        assert!(DATA + at + bytes.len() <= QUEUE_BYTES);
        // SAFETY: within the queue's data, and no request about it is in flight.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.place(DATA + at), bytes.len()) }
    }

    fn take(&self, at: usize, bytes: &mut [u8]) {
        assert!(DATA + at + bytes.len() <= QUEUE_BYTES);
        // SAFETY: as above.
        unsafe { ptr::copy_nonoverlapping(self.place(DATA + at), bytes.as_mut_ptr(), bytes.len()) }
    }
}

fn make_blocking(event: &EventFd) -> io::Result<()> {
    // SAFETY: flags of a descriptor that is open.
    let done = unsafe {
        let flags = libc::fcntl(event.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(event.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Client for Device {
    fn bytes(&self) -> u64 {
        self.queues[0].bytes()
    }

    fn submit(&mut self, slot: usize, write: bool, offset: u64, len: usize) {
        self.queues[0].submit(slot, write, offset, len);
    }

    fn submit_flush(&mut self, slot: usize) {
        self.queues[0].submit_flush(slot);
    }

    fn send(&mut self) -> Result<(), BenchError> {
        self.queues[0].send()
    }

    fn wait(&mut self, done: &mut Vec<usize>) -> Result<(), BenchError> {
        self.queues[0].wait(done)
    }

    fn fill(&mut self, at: usize, bytes: &[u8]) {
        self.queues[0].fill(at, bytes);
    }

    fn take(&self, at: usize, bytes: &mut [u8]) {
        self.queues[0].take(at, bytes);
    }
}
