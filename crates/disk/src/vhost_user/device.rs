//! The device a front end sets up: what was agreed on, the guest's memory, its queues.
//!
//! Messages come one after another. What changes under a running queue (memory, addresses, logs) is changed while the
//! queue stands still with nothing in flight; it goes on right after.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
};

use vmseal_model::control::MAX_QUEUES;

use super::{
    config,
    connection::BackendChannel,
    dirty_log::DirtyLog,
    features,
    inflight::{self, InflightArea, InflightError},
    mapping::{self, Mapping, MappingError},
    memory::{GuestMemory, MAX_REGIONS, MemoryError, RegionSpec},
    message::{InflightSpec, Message},
    notifier::{Notifier, is_eventfd},
    queue::{Log, Queue, QueueError, Shared, Stop},
    request::ID_LEN,
    ring::{MAX_SIZE, Ring, RingAddresses, RingError, RingFeatures},
};
use crate::{export::Export, flush_gate::Bell, lane::Lane, log, volume::VolumeError, worker::with_causes};

/// Why something the front end wants is not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// Features that were not offered.
    #[error("features {0:#x} were not offered")]
    Features(u64),
    /// A queue that does not exist.
    #[error("there is no queue {0}")]
    NoQueue(u32),
    /// An index or size no queue has.
    #[error("a queue cannot have the value {0}")]
    Value(u32),
    /// Not an eventfd, or none at all where one is needed.
    #[error("a queue's descriptor is not an eventfd")]
    NotAnEvent,
    /// The channel is no socket.
    #[error("the back end's channel is not a socket")]
    NotASocket,
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The log or the in-flight area.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// The in-flight area.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// The in-flight area has no part for a queue.
    #[error("the in-flight area has no part for queue {0}")]
    NoInflight(u32),
    /// A queue that cannot be.
    #[error("queue {queue} cannot start: {cause}")]
    Ring {
        /// Which.
        queue: u32,
        /// Why.
        cause: RingError,
    },
    /// A field of the configuration space that is not for writing, or a value it cannot have.
    #[error("the configuration space cannot be changed like that")]
    Config,
    /// What was written cannot be made durable.
    #[error("{0}")]
    Flush(VolumeError),
    /// No thread, no descriptor, no memory.
    #[error("no thread, descriptor or memory left for a queue; see LimitNOFILE and TasksMax of vmseal-agent")]
    Resources(#[source] std::io::Error),
}

/// What the front end is told.
pub(super) enum Answer {
    /// Nothing, unless it asked whether it was done.
    Done,
    /// A number.
    Value(u64),
    /// Bytes.
    Body(Vec<u8>),
    /// Bytes and a descriptor.
    File(Vec<u8>, OwnedFd),
}

/// A queue as it was set up.
#[derive(Default)]
struct Setup {
    size: u32,
    at: Option<RingAddresses>,
    log_used: Option<u64>,
    base: u16,
    kick: Option<Arc<OwnedFd>>,
    call: Notifier,
    error: Notifier,
    enabled: bool,
    /// Stopped for a mistake; it stays so until it is set up anew.
    failed: bool,
    running: Option<Running>,
}

struct Running {
    thread: thread::JoinHandle<(u16, bool)>,
    stop: Arc<Stop>,
}

/// A device, as long as its connection.
pub(super) struct Device {
    shared: Arc<Shared>,
    accepted: u64,
    protocol: u64,
    writeback: bool,
    memory: Arc<GuestMemory>,
    log: Option<Arc<DirtyLog>>,
    inflight: Option<InflightArea>,
    queues: Vec<Setup>,
    /// Lines about a guest's mistakes so far.
    said: Arc<AtomicU32>,
}

impl Device {
    pub(super) fn new(export: Arc<Export>) -> Self {
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(export.serial().bytes()) {
            *to = from;
        }
        let mut queues = Vec::new();
        queues.resize_with(usize::from(MAX_QUEUES), Setup::default);
        Self {
            shared: Arc::new(Shared { export, id, write_through: AtomicBool::new(false) }),
            accepted: 0,
            protocol: 0,
            writeback: true,
            memory: Arc::default(),
            log: None,
            inflight: None,
            queues,
            said: Arc::default(),
        }
    }

    /// Whether the front end may ask if something was done.
    pub(super) fn acknowledges(&self) -> bool {
        self.protocol & vhost::vhost_user::VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    /// Does what a message says. An error comes with whether an acknowledgement can carry it.
    pub(super) fn handle(&mut self, message: Message) -> Result<Answer, (DeviceError, bool)> {
        let by_ack = !matches!(
            message,
            Message::GetQueueBase { .. } | Message::GetInflight(_) | Message::SetLogBase { .. }
        );
        let outcome = self.carry_out(message);
        // Also where nothing came of it: queues may have been stopped for it.
        let started = self.start_queues();
        let answer = outcome.map_err(|error| (error, by_ack))?;
        started.map_err(|error| (error, matches!(answer, Answer::Done)))?;
        Ok(answer)
    }

    fn carry_out(&mut self, message: Message) -> Result<Answer, DeviceError> {
        match message {
            Message::GetFeatures => return Ok(Answer::Value(self.offered())),
            Message::GetProtocolFeatures => return Ok(Answer::Value(features::protocol().bits())),
            Message::GetQueueCount => return Ok(Answer::Value(u64::from(MAX_QUEUES))),
            Message::GetMaxRegions => return Ok(Answer::Value(MAX_REGIONS as u64)),
            Message::GetConfig { offset, len, flags } => return Ok(self.get_config(offset, len, flags)),
            Message::GetInflight(wanted) => return self.make_inflight(wanted),
            Message::GetQueueBase { queue } => return self.stop_queue(queue),
            Message::SetOwner => {}
            Message::ResetOwner => {
                self.pause_all();
                self.queues.iter_mut().for_each(|queue| queue.enabled = false);
            }
            Message::ResetDevice => self.reset(),
            Message::SetFeatures(accepted) => self.set_features(accepted)?,
            Message::SetProtocolFeatures(accepted) => {
                let foreign = accepted & !features::protocol().bits();
                if foreign != 0 {
                    return Err(DeviceError::Features(foreign));
                }
                self.protocol = accepted;
            }
            Message::SetMemoryTable(regions) => {
                self.pause_all();
                let table = regions.iter().try_fold(GuestMemory::default(), |table, (spec, file)| {
                    table.with_file(*spec, file.as_fd())
                });
                self.memory = Arc::new(table?);
            }
            Message::AddRegion(spec, file) => {
                self.change_memory(|memory| memory.with_file(spec, file.as_fd()))?;
            }
            Message::RemoveRegion(spec) => self.remove_region(&spec)?,
            Message::SetLogBase { len, offset, file } => {
                let log = DirtyLog::of_file(file.as_fd(), offset, len)?;
                self.pause_all();
                self.log = Some(Arc::new(log));
                // The message comes back: libvhost-user's answer is shorter, but this one pleases every front end.
                return Ok(Answer::Body([len.to_ne_bytes(), offset.to_ne_bytes()].concat()));
            }
            Message::SetInflight(spec, file) => self.set_inflight(spec, &file)?,
            Message::SetBackendChannel(fd) => {
                let channel = BackendChannel::new(fd).ok_or(DeviceError::NotASocket)?;
                self.shared.export.link().set_channel(Some(channel));
            }
            Message::SetConfig { offset, bytes } => {
                let writeback = config::written(offset, &bytes).ok_or(DeviceError::Config)?;
                self.set_writeback(writeback)?;
            }
            Message::SetQueueSize { queue, size } => {
                self.queue_at_rest(queue)?.size = size;
            }
            Message::SetQueueAddresses { queue, at, log_used } => {
                let queue = self.queue_at_rest(queue)?;
                (queue.at, queue.log_used) = (Some(at), log_used);
            }
            Message::SetQueueBase { queue, base } => {
                let base = u16::try_from(base).map_err(|_| DeviceError::Value(base))?;
                let queue = self.queue_at_rest(queue)?;
                (queue.base, queue.failed) = (base, false);
            }
            Message::SetKick { queue, fd } => {
                let fd = fd.filter(is_eventfd).ok_or(DeviceError::NotAnEvent)?;
                self.queue_at_rest(queue)?.kick = Some(Arc::new(fd));
            }
            Message::SetCall { queue, fd } => self.queue(queue)?.call.set(event_or_none(fd)?),
            Message::SetError { queue, fd } => self.queue(queue)?.error.set(event_or_none(fd)?),
            Message::EnableQueue { queue, enable } => self.queue_at_rest(queue)?.enabled = enable,
        }
        Ok(Answer::Done)
    }

    fn offered(&self) -> u64 {
        features::offered(&self.shared.export.volume().layout())
    }

    fn set_features(&mut self, accepted: u64) -> Result<(), DeviceError> {
        let foreign = accepted & !self.offered();
        if foreign != 0 {
            return Err(DeviceError::Features(foreign));
        }
        self.pause_all();
        self.accepted = accepted;
        if accepted & features::PROTOCOL_FEATURES == 0 {
            // A front end that cannot enable queues has them enabled.
            self.queues.iter_mut().for_each(|queue| queue.enabled = true);
        }
        self.apply_writeback();
        Ok(())
    }

    fn get_config(&self, offset: u32, len: u32, flags: u32) -> Answer {
        let space = config::space(&self.shared.export.volume().layout(), self.writeback);
        // Without payload: the front end takes it for an error.
        let part = config::read(&space, offset, len).unwrap_or_default();
        let mut body = Vec::with_capacity(12 + part.len());
        for word in [offset, part.len() as u32, flags] {
            body.extend(word.to_ne_bytes());
        }
        body.extend(part);
        Answer::Body(body)
    }

    /// Switches between writing back and writing through. Once it writes through, what was written before is durable.
    fn set_writeback(&mut self, writeback: bool) -> Result<(), DeviceError> {
        self.writeback = writeback;
        self.apply_writeback();
        if !writeback {
            self.pause_all();
            self.shared.export.volume().flush().map_err(DeviceError::Flush)?;
        }
        Ok(())
    }

    fn apply_writeback(&mut self) {
        let write_through = features::is_write_through(self.accepted, self.writeback);
        self.shared.write_through.store(write_through, Ordering::Relaxed);
        if let Some(area) = &self.inflight {
            area.remember_write_through(!self.writeback);
        }
    }

    fn make_inflight(&self, wanted: InflightSpec) -> Result<Answer, DeviceError> {
        let InflightSpec { queues, size, .. } = wanted;
        check_shape(queues, size)?;
        let len = inflight::area_len(queues, size);
        let file = mapping::sealed_memory(c"vmseal-inflight", len).map_err(DeviceError::Resources)?;
        let area = InflightArea::new(Mapping::of_file(file.as_fd(), 0, len)?, queues, size)?;
        area.remember_write_through(!self.writeback);
        Ok(Answer::File(InflightSpec { len, offset: 0, queues, size }.to_body().to_vec(), file))
    }

    fn set_inflight(&mut self, spec: InflightSpec, file: &OwnedFd) -> Result<(), DeviceError> {
        check_shape(spec.queues, spec.size)?;
        self.pause_all();
        let mapping = Mapping::of_file(file.as_fd(), spec.offset, spec.len)?;
        let area = InflightArea::new(mapping, spec.queues, spec.size)?;
        if let Some(write_through) = area.write_through() {
            self.writeback = !write_through;
        }
        self.inflight = Some(area);
        self.apply_writeback();
        Ok(())
    }

    fn change_memory(
        &mut self,
        change: impl FnOnce(&GuestMemory) -> Result<GuestMemory, MemoryError>,
    ) -> Result<(), DeviceError> {
        self.pause_all();
        self.memory = Arc::new(change(&self.memory)?);
        Ok(())
    }

    fn remove_region(&mut self, spec: &RegionSpec) -> Result<(), DeviceError> {
        self.change_memory(|memory| memory.without(spec))
    }

    fn queue(&mut self, index: u32) -> Result<&mut Setup, DeviceError> {
        let place = usize::try_from(index).map_err(|_| DeviceError::NoQueue(index))?;
        self.queues.get_mut(place).ok_or(DeviceError::NoQueue(index))
    }

    /// A queue that does not run, whether it did or not.
    fn queue_at_rest(&mut self, index: u32) -> Result<&mut Setup, DeviceError> {
        let queue = self.queue(index)?;
        queue.pause();
        Ok(queue)
    }

    fn stop_queue(&mut self, index: u32) -> Result<Answer, DeviceError> {
        let queue = self.queue_at_rest(index)?;
        (queue.kick, queue.failed) = (None, false);
        queue.call.set(None);
        let base = u32::from(queue.base);
        Ok(Answer::Body([index.to_ne_bytes(), base.to_ne_bytes()].concat()))
    }

    fn reset(&mut self) {
        self.pause_all();
        for queue in &mut self.queues {
            *queue = Setup { enabled: false, ..Setup::default() };
        }
        (self.accepted, self.writeback) = (0, true);
        self.apply_writeback();
    }

    fn pause_all(&mut self) {
        // All are told before the first is waited for.
        self.queues.iter().filter_map(|queue| queue.running.as_ref()).for_each(Running::tell);
        self.queues.iter_mut().for_each(Setup::pause);
    }

    /// Starts what can run and does not.
    fn start_queues(&mut self) -> Result<(), DeviceError> {
        for index in 0..self.queues.len() {
            let ready = self.queues.get(index).is_some_and(Setup::is_ready);
            if !ready {
                continue;
            }
            let Err(error) = self.start(index) else { continue };
            if let Some(queue) = self.queues.get_mut(index) {
                queue.failed = true;
                // A ring that cannot be is the driver's mistake, and no reason to end the front end's connection.
                if matches!(error, DeviceError::Ring { .. }) {
                    queue.error.tell();
                    self.say(format_args!("{error}"));
                    continue;
                }
            }
            return Err(error);
        }
        Ok(())
    }

    fn start(&mut self, index: usize) -> Result<(), DeviceError> {
        let number = index as u32;
        let Some(setup) = self.queues.get_mut(index) else { return Err(DeviceError::NoQueue(number)) };
        let (Some(at), Some(kick)) = (setup.at, setup.kick.clone()) else { return Ok(()) };
        let agreed = RingFeatures {
            event_idx: self.accepted & features::EVENT_IDX != 0,
            indirect: self.accepted & features::INDIRECT_DESC != 0,
        };
        let ring = Ring::new(self.memory.clone(), at, setup.size, agreed, setup.base)
            .map_err(|cause| DeviceError::Ring { queue: number, cause })?;
        let inflight = match &self.inflight {
            None => None,
            Some(area) => {
                Some(area.queue(number as u16, ring.size()).ok_or(DeviceError::NoInflight(number))?)
            }
        };
        let logging = self.accepted & features::LOG_ALL != 0;
        let log = self.log.clone().filter(|_| logging).map(|log| Log { log, used: setup.log_used });
        let bell = Bell::new().map_err(DeviceError::Resources)?;
        let stop = Arc::new(Stop { ordered: AtomicBool::new(false), bell });
        let (shared, accepted, call) = (self.shared.clone(), self.accepted, setup.call.clone());
        let (ordered, error_event, said) = (stop.clone(), setup.error.clone(), self.said.clone());
        let base = setup.base;
        let name = format!("{}-queue{number}", shared.export.target());
        let work = move || {
            let export = shared.export.clone();
            let (next, result) = match Lane::new(export.volume().clone()) {
                Ok(lane) => {
                    Queue { lane, ring, shared, accepted, inflight, log, kick, call, stop: ordered }.run()
                }
                Err(error) => (base, Err(QueueError::Io(error))),
            };
            let Err(error) = result else { return (next, false) };
            let (target, why) = (export.target(), with_causes(&error));
            say(&said, format_args!("{target}: queue {number} stopped: {why}"));
            if matches!(error, QueueError::Io(_)) {
                // Ours, and not the guest's: the front end comes back, and in-flight tracking begins again what was begun.
                export.hang_up();
                return (next, false);
            }
            error_event.tell();
            (next, true)
        };
        let thread = thread::Builder::new().name(name).spawn(work).map_err(DeviceError::Resources)?;
        setup.running = Some(Running { thread, stop });
        Ok(())
    }
}

impl Device {
    /// Says something about what the front end or its guest does, not more often than is good for the log.
    pub(super) fn say(&self, what: std::fmt::Arguments<'_>) {
        say(&self.said, format_args!("{}: {what}", self.shared.export.target()));
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.pause_all();
    }
}

impl Setup {
    fn is_ready(&self) -> bool {
        self.enabled
            && !self.failed
            && self.running.is_none()
            && self.size != 0
            && self.at.is_some()
            && self.kick.is_some()
    }

    /// Stops a queue, with nothing in flight, if it runs.
    fn pause(&mut self) {
        let Some(running) = self.running.take() else { return };
        running.tell();
        match running.thread.join() {
            Ok((next, failed)) => (self.base, self.failed) = (next, failed),
            // It said so already; what it had in flight was waited for when its lane was dropped.
            Err(_) => self.failed = true,
        }
    }
}

impl Running {
    fn tell(&self) {
        self.stop.ordered.store(true, Ordering::Release);
        self.stop.bell.ring();
    }
}

/// The first ten lines, then each power of two: a guest that does nothing else must not fill the disk.
fn say(said: &AtomicU32, line: std::fmt::Arguments<'_>) {
    let count = said.fetch_add(1, Ordering::Relaxed).saturating_add(1);
    if count <= 10 || count.is_power_of_two() {
        log::line(line);
    }
}

fn check_shape(queues: u16, size: u16) -> Result<(), InflightError> {
    if queues == 0 || queues > MAX_QUEUES || !size.is_power_of_two() || size > MAX_SIZE {
        return Err(InflightError::Shape { queues, size });
    }
    Ok(())
}

fn event_or_none(fd: Option<OwnedFd>) -> Result<Option<OwnedFd>, DeviceError> {
    match fd {
        Some(fd) if !is_eventfd(&fd) => Err(DeviceError::NotAnEvent),
        other => Ok(other),
    }
}
