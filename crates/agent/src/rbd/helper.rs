//! An image that is held: a helper has its lock and serves whoever has its socket; one that dies is started again.
//!
//! A location in; a listening socket for a disk process or a job out. The helper lives in a session of its own, as keepers
//! do, and ends when nobody has the socket any more. Its lock is broken for its successor only, and only when it is
//! known to be dead; what another host holds, or held meanwhile, is left alone. See `docs/design/rbd.md`.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    },
    path::PathBuf,
    process::{Child, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use crate::{
    backend::process::Process,
    causes::causes,
    rbd::{
        Location, RbdError, Tool,
        channel::{self, Channel},
        remembered::Remembered,
        tool::{REACH, error_of},
    },
    volume::hex,
};

/// How long a new helper may take to have its lock: the cluster is reached, a dead one's lock broken.
const LOCKED: Duration = Duration::from_secs(REACH.as_secs() + 9);
/// How long it may take to connect.
const CONNECT: Duration = Duration::from_secs(5);
/// How long one may take to end in order: what is under way ends first.
const END: Duration = Duration::from_secs(10);
/// Between two tries to start one again, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(15);
/// Bytes of an owner block that are compared: its magic, host, generation, state.
pub(crate) const OWNER_BYTES: usize = 56;

/// A held image.
#[derive(Debug)]
pub struct Served {
    shared: Arc<Shared>,
    listener: Option<OwnedFd>,
    /// It stays when this is dropped: a disk process uses it.
    kept: bool,
}

#[derive(Debug)]
struct Shared {
    tool: Tool,
    location: Location,
    name: String,
    socket: PathBuf,
    state: Mutex<State>,
    bell: Condvar,
}

#[derive(Debug)]
struct State {
    /// It is no longer wanted.
    ending: bool,
    process: Option<Arc<Process>>,
    owner: String,
    owner_block: String,
    /// The thread that watches it has ended.
    unwatched: bool,
    /// It was killed, or ended otherwise than in order: its lock may be there still.
    lock_may_stay: bool,
}

impl Served {
    /// Takes the image for this process, and whom it passes the socket on to. `name` stands for the image in the agent's
    /// state: a helper that an earlier run of the agent started under it is ended first, its lock taken over.
    ///
    /// # Errors
    ///
    /// [`RbdError`]; nothing stays started then.
    pub fn open(tool: &Tool, location: &Location, name: &str) -> Result<Self, RbdError> {
        let io = |action| {
            let image = location.name();
            move |source| RbdError::Io { action, image, source }
        };
        let dir = tool.run_dir.join("rbd");
        DirBuilder::new().recursive(true).mode(0o755).create(&dir).map_err(io("make a directory"))?;
        // Its names are known anyway; what lies in it belongs to the helpers' user.
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o711)).map_err(io("open a directory"))?;
        let socket = dir.join(format!("{name}.sock"));
        let old = Remembered::load(&tool.state_dir, name).filter(|old| old.location == location.to_string());
        if let Some(process) = old.as_ref().and_then(Remembered::process) {
            tracing::info!(helper = process.pid(), "ending a helper of {} that nobody uses", location.name());
            end_process(&process);
        }
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io("remove a socket")(error));
            }
            _ => {}
        }
        let listener = channel::listen(&socket, tool.uid()).map_err(io("listen"))?;
        let shared = Arc::new(Shared {
            tool: tool.clone(),
            location: location.clone(),
            name: name.to_owned(),
            socket,
            state: Mutex::new(State {
                ending: false,
                process: None,
                owner: old.map(|old| old.owner).unwrap_or_default(),
                owner_block: String::new(),
                unwatched: false,
                lock_may_stay: false,
            }),
            bell: Condvar::new(),
        });
        let child = shared.start().inspect_err(|_| drop(fs::remove_file(&shared.socket)))?;
        let watched = shared.clone();
        let watch = move || watched.watch(Some(child));
        thread::Builder::new().name("rbd-watch".to_owned()).spawn(watch).map_err(io("start a thread"))?;
        Ok(Self { shared, listener: Some(listener), kept: false })
    }

    /// Watches over the helper of a disk process that an earlier run of the agent started; one that is dead is started
    /// again.
    pub fn adopt(tool: &Tool, location: &Location, name: &str) -> Self {
        let old = Remembered::load(&tool.state_dir, name).filter(|old| old.location == location.to_string());
        let process = old.as_ref().and_then(Remembered::process).map(Arc::new);
        let (owner, owner_block) = old.map(|old| (old.owner, old.owner_block)).unwrap_or_default();
        let (ending, unwatched, lock_may_stay) = (false, false, false);
        let state = State { ending, process, owner, owner_block, unwatched, lock_may_stay };
        let shared = Arc::new(Shared {
            tool: tool.clone(),
            location: location.clone(),
            name: name.to_owned(),
            socket: tool.run_dir.join("rbd").join(format!("{name}.sock")),
            state: Mutex::new(state),
            bell: Condvar::new(),
        });
        let watched = shared.clone();
        if let Err(error) =
            thread::Builder::new().name("rbd-watch".to_owned()).spawn(move || watched.watch(None))
        {
            tracing::error!("the helper of {} is not watched: {error}", location.name());
            shared.state().unwatched = true;
        }
        Self { shared, listener: None, kept: true }
    }

    /// The socket for whoever uses the image.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().map(AsFd::as_fd)
    }

    /// The image.
    pub fn location(&self) -> &Location {
        &self.shared.location
    }

    /// A connection for the agent itself. Nobody else may be served meanwhile.
    ///
    /// # Errors
    ///
    /// None comes; or this is of an earlier run, whose socket the disk process has.
    pub fn channel(&self) -> io::Result<Channel> {
        let listener = self.listener().ok_or(io::ErrorKind::Unsupported)?;
        // SAFETY: takes nothing and cannot fail.
        let own = unsafe { libc::geteuid() };
        let users = [0, own, self.shared.tool.uid().unwrap_or(own)];
        Channel::accept(listener, &users, CONNECT)
    }

    /// Remembers what the volume's owner block says, so that a helper that is started again finds it so or ends.
    ///
    /// # Errors
    ///
    /// It cannot be written down.
    pub fn remember_owner(&self, block: &[u8]) -> io::Result<()> {
        let mut state = self.shared.state();
        state.owner_block = hex(block.get(..OWNER_BYTES).unwrap_or(block));
        self.shared.remember(&state)
    }

    /// Leaves the helper to the disk process that has the socket; it is watched as before.
    pub fn keep(mut self) -> Self {
        self.kept = true;
        self
    }

    /// The process of the helper now, if there is one.
    pub fn pid(&self) -> Option<i32> {
        self.shared.state().process.as_ref().map(|process| process.pid())
    }

    /// Ends the helper once everything under way has ended: the lock is given back when this returns.
    pub fn end(&mut self) {
        let process = {
            let mut state = self.shared.state();
            state.ending = true;
            self.shared.bell.notify_all();
            state.process.clone()
        };
        // Nobody listens any more: it ends by itself.
        self.listener = None;
        if let Some(process) = process {
            // Told as well: a process that was told to end may have the socket a moment longer.
            process.terminate();
            if !end_process(&process) {
                self.shared.state().lock_may_stay = true;
            }
        }
        let mut state = self.shared.state();
        let until = Instant::now() + CONNECT;
        while !state.unwatched && Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now());
            state = self.shared.bell.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        // One that is just being started ends by itself, but may have the lock for a moment yet.
        if !state.lock_may_stay && state.unwatched {
            Remembered::forget(&self.shared.tool.state_dir, &self.shared.name);
        }
        let _ = fs::remove_file(&self.shared.socket);
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if !self.kept {
            self.end();
        }
    }
}

/// Ends a helper, by force if it must be; whether it ended by itself.
fn end_process(process: &Process) -> bool {
    process.terminate();
    if process.wait_for(END) {
        return true;
    }
    process.kill();
    process.wait_for(END);
    false
}

impl Shared {
    /// Starts a helper and waits until it has the lock.
    fn start(&self) -> Result<Child, RbdError> {
        let io = |action| {
            let image = self.location.name();
            move |source| RbdError::Io { action, image, source }
        };
        let (owner, owner_block) = {
            let state = self.state();
            (state.owner.clone(), state.owner_block.clone())
        };
        let mut more: Vec<OsString> = Vec::new();
        if !owner.is_empty() {
            more.extend(["--take-over".into(), owner.into()]);
        }
        if !owner_block.is_empty() {
            more.extend([
                OsString::from("--same"),
                format!("{}:{owner_block}", vmseal_luks::OWNER_BLOCK_OFFSET).into(),
            ]);
        }
        let (log, from) = self.open_log().map_err(io("open a log"))?;
        let again = log.try_clone().map_err(io("open a log"))?;
        let child = self.tool.serve(&self.location, &self.socket, &more, Stdio::from(log));
        let mut child = child.map_err(io("start a helper"))?;
        let process = match Process::open(child.id().cast_signed()) {
            Ok(process) => process,
            Err(source) => {
                let _ = child.kill().and_then(|()| child.wait());
                return Err(io("watch a helper")(source));
            }
        };
        let said = child.stdout.take().map(|out| first_line(out, LOCKED));
        let Some(Ok(Some(owner))) = said.map(|line| line.map(|line| owner_of(&line))) else {
            let ended = process.wait_for(Duration::from_secs(1));
            if !ended {
                process.kill();
            }
            let status = child.wait().ok().and_then(|status| status.code());
            if !ended {
                return Err(RbdError::Silent { image: self.location.name(), seconds: LOCKED.as_secs() });
            }
            return Err(error_of(status, &self.location.name(), &tail(again, from)));
        };
        let mut state = self.state();
        if state.ending {
            drop(state);
            // It came too late, and gives the lock back.
            let in_order = end_process(&process);
            let _ = child.wait();
            self.state().lock_may_stay |= !in_order;
            return Err(io("go on with")(io::ErrorKind::Interrupted.into()));
        }
        state.owner = owner;
        state.process = Some(Arc::new(process));
        if let Err(source) = self.remember(&state) {
            state.process = None;
            drop(state);
            let _ = child.kill().and_then(|()| child.wait());
            return Err(io("write down the lock's owner")(source));
        }
        Ok(child)
    }

    fn remember(&self, state: &State) -> io::Result<()> {
        let Some(process) = &state.process else { return Ok(()) };
        let (location, owner) = (self.location.to_string(), state.owner.clone());
        let remembered = Remembered::of(location, owner, process.pid(), state.owner_block.clone())?;
        remembered.save(&self.tool.state_dir, &self.name)
    }

    /// Waits for the helper's end, again and again, and starts the next one while it is wanted.
    fn watch(&self, mut child: Option<Child>) {
        loop {
            let process = self.state().process.clone();
            if let Some(process) = process {
                process.wait_until(None);
            }
            // Only our own child leaves something to be waited for.
            let status = child.take().and_then(|mut child| child.wait().ok());
            {
                let mut state = self.state();
                state.process = None;
                if state.ending {
                    state.lock_may_stay |= status.is_some_and(|status| !status.success());
                    break;
                }
            }
            let how = status.map_or("is gone".to_owned(), |status| format!("ended: {status}"));
            tracing::error!(
                "the helper of RBD image {} {how}; requests wait for the next one",
                self.location.name()
            );
            match self.start_again() {
                Some(next) => child = Some(next),
                None => break,
            }
        }
        self.state().unwatched = true;
        self.bell.notify_all();
    }

    /// None when it is no longer wanted.
    fn start_again(&self) -> Option<Child> {
        let (mut pause, mut said) = (FIRST_PAUSE, String::new());
        loop {
            if self.state().ending {
                return None;
            }
            match self.start() {
                Ok(child) => {
                    tracing::info!(helper = child.id(), "RBD image {} is served again", self.location.name());
                    return Some(child);
                }
                Err(error) => {
                    let text = format!("{}; {}", causes(&error), error.hint());
                    // Once for each reason; it may go on for days.
                    if text != said {
                        tracing::error!("no helper for RBD image {}: {text}", self.location.name());
                        said = text;
                    }
                }
            }
            let state = self.state();
            let wanted = |state: &mut State| !state.ending;
            drop(self.bell.wait_timeout_while(state, pause, wanted));
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// The helper's log, and where it ends now.
    fn open_log(&self) -> io::Result<(File, u64)> {
        let dir = &self.tool.log_dir;
        DirBuilder::new().recursive(true).mode(0o750).create(dir)?;
        let mut options = OpenOptions::new();
        let file = options
            .append(true)
            .read(true)
            .create(true)
            .mode(0o640)
            .custom_flags(libc::O_NOFOLLOW)
            .open(dir.join(format!("rbd-{}.log", self.name)))?;
        let end = file.metadata()?.len();
        Ok((file, end))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The first line a helper says, if it says one in time.
fn first_line(out: impl Read + AsRawFd, within: Duration) -> io::Result<String> {
    let mut poll = libc::pollfd { fd: out.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let timeout = i32::try_from(within.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one pollfd, valid during the call.
    if unsafe { libc::poll(&mut poll, 1, timeout) } <= 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line)?;
    Ok(line)
}

fn owner_of(line: &str) -> Option<String> {
    line.trim_end().strip_prefix("owner ").filter(|owner| !owner.is_empty()).map(str::to_owned)
}

fn tail(mut log: File, from: u64) -> String {
    let mut text = Vec::new();
    if log.seek(SeekFrom::Start(from)).is_ok() {
        let _ = log.take(16 << 10).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}
