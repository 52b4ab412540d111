//! What a running task has: the world, its journal, whether it is still wanted, and a voice.
//!
//! Steps go through [`Context::step`], which is where the journal is written, cancelling is noticed and crashes are
//! tried. It knows no step.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Serialize, de::DeserializeOwned};
use vmseal_model::{
    class::{ClassChoice, GroupCapabilities, HostCapabilities, Resolved, resolve},
    id::HostId,
    refusal::Code,
    task::TaskState,
};

use crate::{
    config::AgentConfig,
    failpoint,
    job::{GoOn, JobProgram},
    journal::{self, Entry, Journal, Outcome},
    ports::{Hypervisor, KeySource, TaskReport, TaskSink},
    spawn::ServiceUser,
    store::Store,
    tasks::{
        command::TaskCommand,
        refusal::{Halt, Refusal},
    },
};

/// The first wait for what cannot be had now; each next one is twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(200);
/// Reports of progress are at least this far apart.
const REPORT_EVERY: Duration = Duration::from_millis(500);

/// Asked at every named place whether a crash is to be tried there.
pub(crate) type CrashAt = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// What all tasks share.
pub(crate) struct World {
    pub(crate) config: AgentConfig,
    pub(crate) hypervisor: Arc<dyn Hypervisor>,
    pub(crate) keys: Arc<dyn KeySource>,
    pub(crate) store: Arc<Store>,
    pub(crate) sink: Arc<dyn TaskSink>,
    pub(crate) host: Mutex<Option<HostId>>,
    /// What disks can be presented by here.
    pub(crate) capabilities: Box<dyn Fn() -> HostCapabilities + Send + Sync>,
    /// At most between two tries of what cannot be had now.
    pub(crate) patience: Duration,
    pub(crate) crash_at: Option<CrashAt>,
}

impl World {
    /// The job program and whom it runs as.
    pub(crate) fn job_program(&self) -> Result<JobProgram, Refusal> {
        let (path, user) = (self.config.disk_program(), ServiceUser::find(&self.config.disk_user)?);
        if !path.is_file() {
            let text = format!("the disk program {} is not there", path.display());
            let hint = "install it, or set disk_binary in agent.toml";
            return Err(Refusal::new(Code::HostNotReady, text).hint(hint));
        }
        Ok(JobProgram { path, user })
    }

    /// The class of a disk that is being defined.
    pub(crate) fn resolve(&self, asked: ClassChoice, hosts: &GroupCapabilities) -> Resolved {
        resolve(asked, &(self.capabilities)(), hosts)
    }

    /// This host, once it has joined.
    pub(crate) fn host(&self) -> Option<HostId> {
        *self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What others may tell a running task.
#[derive(Default)]
pub(crate) struct Control {
    cancel: AtomicBool,
    stop: AtomicBool,
    /// The VM may start although the task is not over.
    startable: AtomicBool,
    bell: (Mutex<()>, Condvar),
}

impl Control {
    pub(crate) fn cancel(&self) {
        self.cancel.store(true, Ordering::Release);
        self.ring();
    }

    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.ring();
    }

    pub(crate) fn is_startable(&self) -> bool {
        self.startable.load(Ordering::Acquire)
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Acquire)
    }

    fn ring(&self) {
        let _held = self.bell.0.lock().unwrap_or_else(PoisonError::into_inner);
        self.bell.1.notify_all();
    }

    /// Waits, or until somebody says something.
    pub(crate) fn pause(&self, at_most: Duration) {
        let quiet = |_: &mut ()| !self.is_stopped() && !self.is_cancelled();
        let held = self.bell.0.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.bell.1.wait_timeout_while(held, at_most, quiet));
    }

    /// As [`Control::pause`], but where cancelling changes nothing any more.
    pub(crate) fn pause_unless_stopped(&self, at_most: Duration) {
        let held = self.bell.0.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.bell.1.wait_timeout_while(held, at_most, |_: &mut ()| !self.is_stopped()));
    }
}

/// A running task.
pub(crate) struct Context {
    pub(crate) world: Arc<World>,
    pub(crate) command: TaskCommand,
    pub(crate) control: Arc<Control>,
    /// It was begun by an earlier run of the agent: it waits for what the first run would have refused for.
    pub(crate) resumed: bool,
    journal: Journal,
    entries: Vec<Entry>,
    /// Where it cannot go back any more, cancelling changes nothing.
    committed: bool,
    /// How often it has waited.
    waits: u32,
    progress: Progress,
}

#[derive(Default)]
struct Progress {
    total: u64,
    finished: u64,
    current: u64,
    step: String,
    said: Option<Instant>,
}

impl Context {
    pub(crate) fn new(
        world: Arc<World>,
        command: TaskCommand,
        control: Arc<Control>,
        (journal, entries): (Journal, Vec<Entry>),
        resumed: bool,
    ) -> Self {
        let progress = Progress::default();
        Self { world, command, control, resumed, journal, entries, committed: false, waits: 0, progress }
    }

    /// Reads the journal again, after something could not be written down.
    pub(crate) fn reopen(&mut self) -> Result<(), Halt> {
        let path = self.journal.path().to_owned();
        (self.journal, self.entries) = Journal::recover(&path)?;
        self.resumed = true;
        self.committed = false;
        self.progress = Progress::default();
        Ok(())
    }

    /// Does a step unless the journal says it is done: `work` gives what later steps need of it.
    pub(crate) fn step<T: Serialize>(
        &mut self,
        target: &str,
        step: &str,
        work: impl FnOnce(&mut Self) -> Result<T, Halt>,
    ) -> Result<(), Halt> {
        if self.is_done(target, step) {
            return Ok(());
        }
        self.reach(step, "begin")?;
        self.check_wanted()?;
        let data = work(self)?;
        self.reach(step, "before")?;
        self.note(target, step, &data)
    }

    /// Writes down that a step is done, or what a later one must know.
    pub(crate) fn note<T: Serialize>(&mut self, target: &str, step: &str, data: &T) -> Result<(), Halt> {
        let data = serde_json::to_value(data)
            .map_err(|e| Refusal::new(Code::Failed, format!("cannot write down step {step}: {e}")))?;
        self.append(Entry::Step { target: target.to_owned(), step: step.to_owned(), data })?;
        self.say_step(target, step);
        self.reach(step, "after")
    }

    /// Writes down how far a step is.
    pub(crate) fn note_durable(&mut self, target: &str, step: &str, durable: u64) -> Result<(), Halt> {
        self.append(Entry::Progress { target: target.to_owned(), step: step.to_owned(), durable })?;
        self.reach(step, "progress")
    }

    /// Writes down that it goes back, or is over.
    pub(crate) fn append(&mut self, entry: Entry) -> Result<(), Halt> {
        self.journal.append(&entry)?;
        self.entries.push(entry);
        Ok(())
    }

    pub(crate) fn is_done(&self, target: &str, step: &str) -> bool {
        journal::is_done(&self.entries, target, step)
    }

    pub(crate) fn data<T: DeserializeOwned>(&self, target: &str, step: &str) -> Option<T> {
        journal::step_data(&self.entries, target, step)
    }

    pub(crate) fn durable(&self, target: &str, step: &str) -> u64 {
        journal::durable(&self.entries, target, step)
    }

    /// Why it was going back, if it was.
    pub(crate) fn going_back(&self) -> Option<Outcome> {
        self.entries.iter().rev().find_map(|entry| match entry {
            Entry::RollingBack { outcome } => Some(outcome.clone()),
            _ => None,
        })
    }

    /// From here on it only goes forward.
    pub(crate) fn commit(&mut self) {
        self.committed = true;
    }

    /// The VM may be started from here on.
    pub(crate) fn make_startable(&self) {
        self.control.startable.store(true, Ordering::Release);
    }

    /// How long to wait for what cannot be had now: short at first, since an agent that comes back is often a moment
    /// ahead of libvirtd and the server.
    pub(crate) fn patience(&mut self) -> Duration {
        let wait = FIRST_WAIT.saturating_mul(1 << self.waits.min(16));
        self.waits = self.waits.saturating_add(1);
        wait.min(self.world.patience)
    }

    /// Whether anybody wants it to end here.
    pub(crate) fn check_wanted(&self) -> Result<(), Halt> {
        if self.control.is_stopped() {
            return Err(Halt::Stopped);
        }
        if self.control.is_cancelled() && !self.committed { Err(Halt::Cancelled) } else { Ok(()) }
    }

    /// The same for a job.
    pub(crate) fn go_on(control: &Control) -> GoOn {
        if control.is_stopped() || control.is_cancelled() { GoOn::No } else { GoOn::Yes }
    }

    /// A place at which a crash can be tried.
    pub(crate) fn reach(&self, step: &str, place: &str) -> Result<(), Halt> {
        let name = format!("{}:{step}:{place}", self.command.word());
        failpoint::reach(&name);
        match &self.world.crash_at {
            Some(crash_at) if crash_at(&name) => Err(Halt::Stopped),
            _ => Ok(()),
        }
    }

    /// Sets the bytes there are to pass in all.
    pub(crate) fn set_total(&mut self, bytes: u64) {
        self.progress.total = bytes;
    }

    /// So many bytes of a pass are over; `whole` when the pass is.
    pub(crate) fn passed(&mut self, bytes: u64, whole: bool) {
        if whole {
            self.progress.finished = self.progress.finished.saturating_add(bytes);
            self.progress.current = 0;
        } else {
            self.progress.current = bytes;
        }
        let due = self.progress.said.is_none_or(|said| said.elapsed() >= REPORT_EVERY);
        if due {
            self.say(TaskState::Running, "");
        }
    }

    /// Counts a pass that an earlier run of the agent did.
    pub(crate) fn count_done(&mut self, target: &str, step: &str, bytes: u64) {
        if self.is_done(target, step) {
            self.passed(bytes, true);
        }
    }

    /// A step was reached.
    fn say_step(&mut self, target: &str, step: &str) {
        self.progress.step = if target.is_empty() { step.to_owned() } else { format!("{target} {step}") };
        self.say(TaskState::Running, "");
    }

    /// It waits for something outside.
    pub(crate) fn say_waiting(&mut self, why: &Refusal) {
        let outcome = Outcome {
            state: TaskState::Waiting,
            message: why.message.clone(),
            code: Some(why.code),
            hint: why.hint.clone(),
        };
        self.say_outcome(&outcome);
    }

    pub(crate) fn say(&mut self, state: TaskState, message: &str) {
        let outcome = Outcome { state, message: message.to_owned(), code: None, hint: String::new() };
        self.say_outcome(&outcome);
    }

    pub(crate) fn say_outcome(&mut self, outcome: &Outcome) {
        self.progress.said = Some(Instant::now());
        let progress = &self.progress;
        let done_bytes = match outcome.state {
            TaskState::Succeeded => progress.total,
            _ => progress.finished.saturating_add(progress.current).min(progress.total),
        };
        self.world.sink.report(TaskReport {
            task: self.command.task,
            state: outcome.state,
            step: progress.step.clone(),
            done_bytes,
            total_bytes: progress.total,
            message: outcome.message.clone(),
            code: outcome.code,
            hint: outcome.hint.clone(),
        });
    }
}
