//! A warden's life: has its device served, again and again, until it is told to end or nobody keeps the disk any more.
//!
//! START_DEV and END_USER_RECOVERY wait in the driver until the worker has all its queues. They are asked for *before* the
//! worker gets the device, so that the moment between its last queue and their effect is the kernel's own: a worker that
//! died in between would leave a device that looks served and is not, and that no driver up to Linux 6.14 lets recover.

use std::{
    convert::Infallible,
    io::{self, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use vmseal_model::{
    id::DiskId,
    ublk::{DiskShown, UBLK_VERSION, WardenSays, WorkerSays},
};

use crate::{
    abi::{DevInfo, Op, STATE_DEAD, STATE_QUIESCED},
    control::{Control, ControlError, Ticket},
    device::{self, DeviceError, refused},
    line,
    names::{Names, NamesError},
    privileges,
    refill::refill,
    signals::{Signals, Woken},
    talk::{self, TalkError},
    with_causes,
};

/// How long a message may take, once it has begun.
const STEP: Duration = Duration::from_secs(30);
/// First and longest pause between two looks at a driver that says nothing by itself.
const LOOKS: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(100));
/// First and longest pause before another attempt.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// How long the driver may still be at it once it says that a device waits for recovery: it says so before it has let go of
/// the last worker's commands, and would then let go of the next one's. It says nowhere that it is done.
const SETTLE: Duration = Duration::from_millis(30);
/// How long a wait may last before a line is worth it.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a warden is told on its command line.
#[derive(Debug, Clone)]
pub struct Arguments {
    /// The disk.
    pub disk: DiskId,
    /// Where its worker listens.
    pub socket: PathBuf,
    /// Queues of the device; the driver gives no more than there are processors.
    pub queues: u16,
    /// Requests under way in each.
    pub depth: u16,
    /// How long the device outlives a disk process that ended, waiting for the next at the same socket.
    pub linger: Duration,
}

/// Why there is no block device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WardenError {
    /// Not root, or root without its rights.
    #[error("block devices of the host are made by root with CAP_SYS_ADMIN only")]
    NotRoot(#[source] io::Error),
    /// No driver.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// No device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// No names.
    #[error(transparent)]
    Names(#[from] NamesError),
    /// The disk is not kept.
    #[error("nobody listens at {socket}: the disk process is not running")]
    NobodyListens {
        /// Where.
        socket: PathBuf,
    },
    /// The socket cannot be used.
    #[error("{socket} cannot be connected to")]
    Connect {
        /// Which.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The worker does not speak as it should.
    #[error(transparent)]
    Talk(#[from] TalkError),
    /// The worker has another disk.
    #[error("at {socket} is disk {found}, not {wanted}")]
    OtherDisk {
        /// Where.
        socket: PathBuf,
        /// Which is there.
        found: DiskId,
        /// Which was meant.
        wanted: DiskId,
    },
    /// Another release.
    #[error(
        "the worker speaks version {found}, this warden {UBLK_VERSION}; install one release of vmseal on this host"
    )]
    Version {
        /// What it speaks.
        found: u32,
    },
    /// The worker does not serve it.
    #[error("the worker refuses the device: {0}")]
    Refused(String),
    /// Somebody else ended the device.
    #[error("/dev/ublkb{0} is gone: somebody else ended it")]
    Vanished(u32),
    /// Told to end.
    #[error("told to end before the device was there")]
    Ended,
    /// No signals, no pipe.
    #[error("this process cannot be set up")]
    Process(#[source] io::Error),
}

/// Why a device is not served for the moment, or not at all any more.
enum Cut {
    /// This process is to end.
    Asked,
    /// The worker is gone; another comes.
    Lost,
    /// So is its keeper: none comes.
    NobodyListens,
    /// It does not work.
    Failed(WardenError),
}

impl<E: Into<WardenError>> From<E> for Cut {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// The warden of one disk.
struct Warden {
    arguments: Arguments,
    signals: Signals,
    names: Names,
    control: Control,
    device: Option<u32>,
    /// Whether a worker is known to have had every queue, which makes a recovery safe: see [`refill`].
    whole: bool,
    /// Whether somebody was told that the block device may be used.
    announced: bool,
    pause: Duration,
    /// When it was first seen that nobody listens.
    alone_since: Option<Instant>,
}

/// Makes the device, or goes on with it, until the end.
///
/// # Errors
///
/// [`WardenError`]: the block device was never there, or is not what it was said to be any more.
pub fn run(arguments: Arguments) -> Result<(), WardenError> {
    privileges::keep_needed().map_err(WardenError::NotRoot)?;
    let signals = Signals::block().map_err(WardenError::Process)?;
    let names = Names::take(arguments.disk)?;
    let control = match Control::open() {
        Ok(control) => control,
        Err(error) => {
            names.remove(None);
            names.remove_directories();
            return Err(error.into());
        }
    };
    let mut warden = Warden {
        arguments,
        signals,
        names,
        control,
        device: None,
        whole: false,
        announced: false,
        pause: Duration::ZERO,
        alone_since: None,
    };
    warden.live()
}

impl Warden {
    fn live(&mut self) -> Result<(), WardenError> {
        let found = device::find(&mut self.control, self.names.driver_mark())?;
        if let Some(info) = found {
            if info.state == STATE_DEAD {
                // A warden died before it had started it: nobody can have used it.
                device::end(&mut self.control, info.dev_id)?;
            } else {
                line(format_args!("going on with /dev/ublkb{}", info.dev_id));
                self.device = Some(info.dev_id);
            }
        }
        let was_there = self.device.is_some();
        loop {
            let Err(cut) = self.attend();
            match cut {
                Cut::Asked => return self.end_as_asked(),
                Cut::NobodyListens if self.lingers() => {}
                Cut::NobodyListens => {
                    line(format_args!("the disk process has ended; so does the block device"));
                    self.dismantle()?;
                    let socket = self.arguments.socket.clone();
                    return if self.announced { Ok(()) } else { Err(WardenError::NobodyListens { socket }) };
                }
                Cut::Failed(error @ WardenError::Vanished(_)) => {
                    self.names.remove(self.device);
                    return Err(error);
                }
                Cut::Failed(error) if !self.announced => {
                    // One that was there before may be in use.
                    if !was_there {
                        self.dismantle()?;
                    }
                    return Err(error);
                }
                Cut::Failed(error) => line(format_args!("{}; trying again", with_causes(&error))),
                Cut::Lost => {}
            }
            // At once the first time: whoever uses the device waits.
            let pause = self.pause;
            self.pause = (pause * 2).clamp(PAUSES.0, PAUSES.1);
            if !pause.is_zero() && self.signals.wait([], Some(pause)) == Woken::Asked {
                return self.end_as_asked();
            }
        }
    }

    fn end_as_asked(&mut self) -> Result<(), WardenError> {
        self.dismantle()?;
        if self.announced { Ok(()) } else { Err(WardenError::Ended) }
    }

    /// Whether another disk process is waited for, now that one has ended.
    fn lingers(&mut self) -> bool {
        if !self.announced {
            return false;
        }
        let since = *self.alone_since.get_or_insert_with(|| {
            if !self.arguments.linger.is_zero() {
                line(format_args!(
                    "the disk process has ended; the block device waits {} s for the next",
                    self.arguments.linger.as_secs()
                ));
            }
            Instant::now()
        });
        since.elapsed() < self.arguments.linger
    }

    /// Has the device served by the worker that listens now, as long as that does.
    fn attend(&mut self) -> Result<Infallible, Cut> {
        let socket = &self.arguments.socket;
        let stream = UnixStream::connect(socket).map_err(|source| match source.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => Cut::NobodyListens,
            _ => Cut::Failed(WardenError::Connect { socket: socket.clone(), source }),
        })?;
        self.alone_since = None;
        for set in [UnixStream::set_read_timeout, UnixStream::set_write_timeout] {
            set(&stream, Some(STEP)).map_err(TalkError::Io)?;
        }
        let disk = self.hear_disk(&stream)?;
        match self.device {
            None if disk.serves.is_some() => {
                // It is about to see that the device is gone.
                return Err(Cut::Lost);
            }
            None => self.start(&stream, &disk)?,
            Some(device) if disk.serves == Some(device) => {
                talk::say(&stream, &WardenSays::Keep, None::<&UnixStream>).map_err(cut)?;
                self.confirm(&stream)?;
                self.whole = true;
            }
            Some(device) => {
                self.recover(&stream, &disk, device)?;
                line(format_args!("/dev/ublkb{device} goes on with worker {}", disk.pid));
            }
        }
        let device = self.device.ok_or(Cut::Lost)?;
        self.names.mark(device)?;
        self.names.point_to(device)?;
        self.spare_one(&stream, device)?;
        self.fit(device, &disk);
        self.announce()?;
        self.pause = Duration::ZERO;
        loop {
            match self.signals.wait([Some(stream.as_fd())], None) {
                Woken::Asked => return Err(Cut::Asked),
                Woken::Ready(_) => self.hear(&stream)?,
                Woken::Over => {}
            }
        }
    }

    /// What the worker says first. It may take as long as there is no worker.
    fn hear_disk(&mut self, stream: &UnixStream) -> Result<DiskShown, Cut> {
        loop {
            match self.signals.wait([Some(stream.as_fd())], None) {
                Woken::Asked => return Err(Cut::Asked),
                Woken::Over => {}
                Woken::Ready(_) => break,
            }
        }
        match talk::hear(stream).map_err(cut)? {
            WorkerSays::Disk(disk) if disk.version != UBLK_VERSION => {
                Err(WardenError::Version { found: disk.version }.into())
            }
            WorkerSays::Disk(disk) if disk.disk != self.arguments.disk => {
                let (socket, wanted) = (self.arguments.socket.clone(), self.arguments.disk);
                Err(WardenError::OtherDisk { socket, found: disk.disk, wanted }.into())
            }
            WorkerSays::Disk(disk) => Ok(disk),
            WorkerSays::Refused { message } => Err(WardenError::Refused(message).into()),
            WorkerSays::Serving => Err(Cut::Lost),
        }
    }

    fn start(&mut self, stream: &UnixStream, disk: &DiskShown) -> Result<(), Cut> {
        let mark = self.names.driver_mark();
        let info = device::add(&mut self.control, disk, mark, self.arguments.queues, self.arguments.depth)?;
        self.device = Some(info.dev_id);
        let started = self
            .names
            .mark(info.dev_id)
            .map_err(Cut::from)
            .and_then(|()| self.hand_over(Op::StartDev, stream, disk, &info));
        if started.is_err() {
            // Nobody was told of it. To start it for another worker is not possible: the driver counts the queues of
            // the one that died as ready.
            device::end(&mut self.control, info.dev_id)?;
            self.names.remove_mark(info.dev_id);
            self.device = None;
        }
        started
    }

    fn recover(&mut self, stream: &UnixStream, disk: &DiskShown, number: u32) -> Result<(), Cut> {
        let info = self.wait_until_noticed(stream, number)?;
        if self.signals.wait([], Some(SETTLE)) == Woken::Asked {
            return Err(Cut::Asked);
        }
        if !self.whole {
            let device = self.open(stream, number)?;
            let encoded = self.control.encoded();
            let taken = refill(device, info.nr_hw_queues, info.queue_depth, encoded)
                .map_err(refused("have its queues taken"))?;
            if taken > 0 {
                line(format_args!("/dev/ublkb{number}: a recovery was cut off before; it is begun anew"));
            }
        }
        let mut looks = Looks::default();
        loop {
            match self.control.simple(Op::StartUserRecovery, number, 0) {
                Ok(()) => break,
                // Its last worker is not quite gone.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    self.look_again(stream, &mut looks, format_args!("/dev/ublkc{number} is still open"))?;
                }
                Err(error) => return Err(refused("begin a device's recovery")(error).into()),
            }
        }
        self.whole = false;
        self.hand_over(Op::EndUserRecovery, stream, disk, &info)
    }

    /// Waits until the driver has seen that the last worker is gone.
    fn wait_until_noticed(&mut self, stream: &UnixStream, number: u32) -> Result<DevInfo, Cut> {
        let mut looks = Looks::default();
        loop {
            let info = self.control.info(number).map_err(refused("say what a device is"))?;
            match info.filter(|info| info.ublksrv_flags == self.names.driver_mark()) {
                Some(info) if info.state == STATE_QUIESCED => return Ok(info),
                Some(info) if info.state != STATE_DEAD => self.look_again(
                    stream,
                    &mut looks,
                    format_args!(
                        "the driver does not see that the worker of /dev/ublkb{number} ended; if this does not pass, end \
                         what uses the device, and this process by SIGTERM"
                    ),
                )?,
                _ => return Err(WardenError::Vanished(number).into()),
            }
        }
    }

    fn open(&mut self, stream: &UnixStream, number: u32) -> Result<std::fs::File, Cut> {
        let mut looks = Looks::default();
        loop {
            match device::open(number)? {
                Some(device) => return Ok(device),
                None => {
                    self.look_again(stream, &mut looks, format_args!("/dev/ublkc{number} is still open"))?
                }
            }
        }
    }

    /// Gives the device to the worker; returns when it is started, and served.
    fn hand_over(
        &mut self,
        op: Op,
        stream: &UnixStream,
        disk: &DiskShown,
        info: &DevInfo,
    ) -> Result<(), Cut> {
        let device = self.open(stream, info.dev_id)?;
        let begun = self.control.begin(op, info.dev_id, u64::from(disk.pid.unsigned_abs()));
        let ticket = begun.map_err(refused("start a device"))?;
        let offer = WardenSays::Offer(device::offer(&self.control, info));
        let said = talk::say(stream, &offer, Some(&device)).map_err(cut);
        // From here on it is the worker's: it can be open once.
        drop(device);
        let started = said.and_then(|()| self.wait_until_started(stream, &ticket));
        if started.is_err() && self.control.cancel(&ticket).is_ok() {
            // It was started, so the worker had all queues.
            self.whole = true;
        }
        started?;
        self.whole = true;
        self.confirm(stream)
    }

    fn wait_until_started(&mut self, stream: &UnixStream, ticket: &Ticket) -> Result<(), Cut> {
        loop {
            if let Some(result) = self.control.finished(ticket) {
                return Ok(result.map(|_| ()).map_err(refused("start a device"))?);
            }
            match self.signals.wait([Some(self.control.as_fd()), Some(stream.as_fd())], None) {
                Woken::Asked => return Err(Cut::Asked),
                Woken::Ready(1) => self.hear(stream)?,
                Woken::Ready(_) | Woken::Over => {}
            }
        }
    }

    /// Hears that the worker serves the device after it was started: then the driver sees its end.
    fn confirm(&mut self, stream: &UnixStream) -> Result<(), Cut> {
        talk::say(stream, &WardenSays::Started, None::<&UnixStream>).map_err(cut)?;
        loop {
            match self.signals.wait([Some(stream.as_fd())], None) {
                Woken::Asked => return Err(Cut::Asked),
                Woken::Over => {}
                Woken::Ready(_) => {
                    return match talk::hear(stream).map_err(cut)? {
                        WorkerSays::Serving => Ok(()),
                        WorkerSays::Refused { message } => Err(WardenError::Refused(message).into()),
                        WorkerSays::Disk(_) => Err(Cut::Lost),
                    };
                }
            }
        }
    }

    /// Hears a worker that has nothing to say but that it does not serve.
    fn hear(&mut self, stream: &UnixStream) -> Result<(), Cut> {
        match talk::hear(stream).map_err(cut)? {
            WorkerSays::Refused { message } => Err(WardenError::Refused(message).into()),
            WorkerSays::Disk(_) | WorkerSays::Serving => Err(Cut::Lost),
        }
    }

    /// A pause, unless the worker is gone or this process is to end.
    fn look_again(
        &mut self,
        stream: &UnixStream,
        looks: &mut Looks,
        about: std::fmt::Arguments<'_>,
    ) -> Result<(), Cut> {
        if looks.since.elapsed() > PATIENCE && !looks.said {
            looks.said = true;
            line(about);
        }
        let pause = looks.pause;
        looks.pause = (pause * 2).min(LOOKS.1);
        match self.signals.wait([Some(stream.as_fd())], Some(pause)) {
            Woken::Asked => Err(Cut::Asked),
            Woken::Ready(_) => self.hear(stream),
            Woken::Over => Ok(()),
        }
    }

    /// See [`device::spare_one`].
    fn spare_one(&mut self, stream: &UnixStream, number: u32) -> Result<(), Cut> {
        let info = self.control.info(number).map_err(refused("say what a device is"))?;
        let depth = info.ok_or(WardenError::Vanished(number))?.queue_depth;
        if device::spares_one(number, depth) {
            return Ok(());
        }
        let thread = thread::Builder::new()
            .name("spare-one".into())
            .spawn(move || device::spare_one(number, depth))
            .map_err(WardenError::Process)?;
        let mut looks = Looks::default();
        while !thread.is_finished() {
            self.look_again(stream, &mut looks, format_args!("/dev/ublkb{number} does not come to rest"))?;
        }
        let done = thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")));
        Ok(done.map_err(refused("limit a device's requests"))?)
    }

    /// The block device has the disk's size, if the driver can.
    fn fit(&mut self, number: u32, disk: &DiskShown) {
        let Some(bytes) = device::size(number).filter(|bytes| *bytes != disk.bytes) else { return };
        match device::resize(&mut self.control, number, disk.bytes) {
            Ok(()) => line(format_args!("/dev/ublkb{number} has {} bytes now, not {bytes}", disk.bytes)),
            Err(error) => line(format_args!(
                "the disk has {} bytes, and /dev/ublkb{number} stays at {bytes} until its VM is off: {}",
                disk.bytes,
                with_causes(&error)
            )),
        }
    }

    fn announce(&mut self) -> Result<(), Cut> {
        if !self.announced {
            self.announced = true;
            let told = writeln!(io::stdout(), "ready {}", self.names.link().display());
            if told.and_then(|()| io::stdout().flush()).is_err() {
                line(format_args!("whoever started this process does not hear it"));
            }
            crate::signals::close_stdout().map_err(WardenError::Process)?;
        }
        Ok(())
    }

    /// Ends the device, and with it all its names.
    fn dismantle(&mut self) -> Result<(), WardenError> {
        if let Some(number) = self.device {
            device::end(&mut self.control, number)?;
        }
        self.names.remove(self.device.take());
        self.names.remove_directories();
        Ok(())
    }
}

/// What a failed talk means: an end is no failure.
fn cut(error: TalkError) -> Cut {
    match error {
        TalkError::Ended => Cut::Lost,
        other => Cut::Failed(other.into()),
    }
}

/// Pauses between looks, which become longer.
struct Looks {
    since: Instant,
    pause: Duration,
    said: bool,
}

impl Default for Looks {
    fn default() -> Self {
        Self { since: Instant::now(), pause: LOOKS.0, said: false }
    }
}
