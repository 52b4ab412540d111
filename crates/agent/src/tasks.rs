//! Long operations on disks: encrypting, decrypting, creating. One task a VM at a time, each on a thread of its own.
//!
//! Commands in; changed disks, reports and a journal out. The journal is the truth: a command is written down before it
//! is worked on, and a task whose agent was killed goes on, or goes back, at [`Runner::resume_all`]. Keys come from a
//! [`KeySource`], libvirt is a [`Hypervisor`]. Step lists: `vmseal_model::task`; places to crash at:
//! [`crate::failpoint`].

mod backing;
mod command;
mod context;
mod create_disk;
mod create_vm;
mod decrypt;
mod decrypt_steps;
mod encrypt;
mod encrypt_steps;
mod encrypt_switch;
mod hold;
mod image;
mod origin;
mod pass;
mod place;
mod plan;
mod qcow2;
mod refusal;
mod refuse;
mod run;
mod set_class;
mod switch;
mod unlock;
mod wipe;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, SystemTime},
};

use vmseal_model::{
    id::{DomainUuid, HostId, TaskId},
    refusal::Code,
    task::TaskState,
};

pub use command::{KeyChoice, TaskCommand, Work};
use context::{Context, Control, World};
pub use refusal::Refusal;

use crate::{
    causes::causes,
    config::AgentConfig,
    journal::{Entry, Journal, JournalError, Outcome},
    ports::{Hypervisor, KeySource, TaskReport, TaskSink},
    store::Store,
    ublk,
};

/// How long journals of ended tasks are kept.
const RETENTION: Duration = Duration::from_secs(30 * 24 * 3600);
/// At most between two tries of what cannot be had now.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs tasks. When it is dropped they stop where they are; their journals go on at the next start.
pub struct Runner {
    world: Arc<World>,
    /// Held while a command is taken; the table is not, for the hook asks it.
    taking: Mutex<()>,
    running: Mutex<BTreeMap<TaskId, Running>>,
}

struct Running {
    domain: Option<DomainUuid>,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Runner {
    /// A runner that does nothing yet: see [`Runner::resume_all`].
    pub fn new(
        config: &AgentConfig,
        hypervisor: Arc<dyn Hypervisor>,
        keys: Arc<dyn KeySource>,
        store: Arc<Store>,
        sink: Arc<dyn TaskSink>,
    ) -> Self {
        Self::with_world(World {
            config: config.clone(),
            hypervisor,
            keys,
            store,
            sink,
            host: Mutex::default(),
            capabilities: Box::new({
                let config = config.clone();
                move || ublk::capabilities(&config, Path::new("/"))
            }),
            patience: PATIENCE,
            crash_at: None,
        })
    }

    fn with_world(world: World) -> Self {
        Self { world: Arc::new(world), taking: Mutex::default(), running: Mutex::default() }
    }

    /// Whose name stands in the owner blocks of volumes this host holds; nobody's until the host has joined.
    pub fn set_host(&self, host: HostId) {
        *self.world.host.lock().unwrap_or_else(PoisonError::into_inner) = Some(host);
    }

    /// Takes a command. It is written down when this returns; everything else, refusals too, is told to the sink. The
    /// same command again is the same task: what became of it is told again.
    pub fn submit(&self, command: TaskCommand) {
        let _one = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        let task = command.task;
        if let Err(refusal) = self.begin(command) {
            self.world.sink.report(report_of(task, &failed(refusal)));
        }
    }

    fn begin(&self, mut command: TaskCommand) -> Result<(), Refusal> {
        if let Work::CreateVm { xml, .. } = &mut command.work {
            *xml = create_vm::with_uuid(xml)?;
        }
        let domain = command.domain();
        {
            let mut running = self.lock();
            running.retain(|_, task| !task.is_over());
            if running.contains_key(&command.task) {
                return Ok(());
            }
            if let Some((other, _)) =
                running.iter().find(|(_, task)| domain.is_some() && task.domain == domain)
            {
                let text = format!("task {other} works on this VM");
                return Err(Refusal::new(Code::TaskRunning, text)
                    .hint(format!("wait for it, or end it: vmseal task cancel {other}")));
            }
        }
        if let Some(known) = self.known(command.task)? {
            self.world.sink.report(known);
            return Ok(());
        }
        let journal = self.write_down(&command).map_err(|e| Refusal::new(Code::Failed, causes(&e)))?;
        self.start(command, journal, false)
    }

    fn write_down(&self, command: &TaskCommand) -> Result<(Journal, Vec<Entry>), JournalError> {
        let mut journal = Journal::create(&self.world.config.state_dir, command.task)?;
        let command = serde_json::to_value(command).expect("a command has nothing that JSON cannot say");
        let begun = Entry::TaskBegun { command };
        journal.append(&begun)?;
        Ok((journal, vec![begun]))
    }

    fn start(
        &self,
        command: TaskCommand,
        journal: (Journal, Vec<Entry>),
        resumed: bool,
    ) -> Result<(), Refusal> {
        let (task, domain) = (command.task, command.domain());
        let control = Arc::new(Control::default());
        let ctx = Context::new(self.world.clone(), command, control.clone(), journal, resumed);
        let mut running = self.lock();
        let thread = thread::Builder::new()
            .name(format!("task {task}"))
            .spawn(move || run::run(ctx))
            .map_err(|e| Refusal::new(Code::Failed, format!("cannot start a thread: {e}")))?;
        running.insert(task, Running { domain, control, thread: Some(thread) });
        Ok(())
    }

    /// Asks a task to end. It goes back, unless its VM is switched already: then it goes on to its end.
    pub fn cancel(&self, task: TaskId) {
        match self.lock().get(&task) {
            Some(running) => running.control.cancel(),
            None => {
                if let Ok(Some(known)) = self.known(task) {
                    self.world.sink.report(known);
                }
            }
        }
    }

    /// Goes on with every task whose journal has no end; once, at the agent's start, before anything else is submitted.
    /// Old journals are deleted.
    pub fn resume_all(&self) {
        let _one = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        let journals = match Journal::list(&self.world.config.state_dir) {
            Ok(journals) => journals,
            Err(error) => {
                tracing::error!("tasks cannot be resumed: {}", causes(&error));
                return;
            }
        };
        for (task, path) in journals {
            let recovered = match Journal::recover(&path) {
                Ok(recovered) => recovered,
                Err(error) => {
                    tracing::error!("{}", causes(&error));
                    self.world.sink.report(report_of(task, &damaged(&error)));
                    continue;
                }
            };
            match (command_of(&recovered.1), recovered.1.last()) {
                (_, Some(Entry::Finished { .. })) => forget_if_old(&path),
                (Some(command), _) => {
                    if let Err(refusal) = self.start(command, recovered, true) {
                        tracing::error!("task {task} cannot be resumed: {}", refusal.message);
                    }
                }
                // Killed before the command was written down: it was never taken.
                (None, None) => forget(&path),
                (None, Some(_)) => {
                    tracing::error!(
                        "the journal {} begins with no command this version knows",
                        path.display()
                    );
                }
            }
        }
    }

    /// Whether a task works on this VM's disks, so that it must not start.
    pub fn busy(&self, domain: DomainUuid) -> bool {
        let running = self.lock();
        running.values().any(|t| t.domain == Some(domain) && !t.is_over() && !t.control.is_startable())
    }

    /// Whether a task was taken, now or by an earlier run of the agent.
    pub fn knows(&self, task: TaskId) -> bool {
        self.lock().contains_key(&task) || !matches!(self.known(task), Ok(None))
    }

    /// The end of a task that is not running; `None` if it was never heard of.
    fn known(&self, task: TaskId) -> Result<Option<TaskReport>, Refusal> {
        let path = crate::journal::directory(&self.world.config.state_dir).join(task.to_string());
        if !path.exists() {
            return Ok(None);
        }
        match Journal::read(&path) {
            Ok(entries) => Ok(Some(match entries.last() {
                Some(Entry::Finished { outcome }) => report_of(task, outcome),
                // Not running and not ended: it waits for the agent's next start.
                _ => report_of(task, &waiting()),
            })),
            Err(error) => Err(Refusal::new(Code::Failed, causes(&error))),
        }
    }

    /// Waits until no task runs.
    #[cfg(test)]
    fn wait(&self) {
        let threads: Vec<_> = self.lock().values_mut().filter_map(|t| t.thread.take()).collect();
        threads.into_iter().for_each(|t| t.join().expect("a task does not panic"));
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<TaskId, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        let mut running = self.lock();
        running.values().for_each(|task| task.control.stop());
        for task in running.values_mut() {
            if let Some(thread) = task.thread.take() {
                let _ = thread.join();
            }
        }
    }
}

fn command_of(entries: &[Entry]) -> Option<TaskCommand> {
    match entries.first() {
        Some(Entry::TaskBegun { command }) => serde_json::from_value(command.clone()).ok(),
        _ => None,
    }
}

fn failed(refusal: Refusal) -> Outcome {
    Outcome {
        state: TaskState::Failed,
        message: refusal.message,
        code: Some(refusal.code),
        hint: refusal.hint,
    }
}

fn damaged(error: &JournalError) -> Outcome {
    Outcome {
        state: TaskState::Waiting,
        message: causes(error),
        code: Some(Code::Failed),
        hint: "both the clear image and the volume may be there: nothing was deleted".to_owned(),
    }
}

fn waiting() -> Outcome {
    let hint = "systemctl restart vmseal-agent".to_owned();
    Outcome {
        state: TaskState::Waiting,
        message: "it goes on when the agent starts again".into(),
        code: None,
        hint,
    }
}

fn report_of(task: TaskId, outcome: &Outcome) -> TaskReport {
    TaskReport {
        task,
        state: outcome.state,
        step: String::new(),
        done_bytes: 0,
        total_bytes: 0,
        message: outcome.message.clone(),
        code: outcome.code,
        hint: outcome.hint.clone(),
    }
}

fn forget_if_old(path: &std::path::Path) {
    let age = std::fs::metadata(path).and_then(|m| m.modified()).map(|t| SystemTime::now().duration_since(t));
    if let Ok(Ok(age)) = age
        && age > RETENTION
    {
        forget(path);
    }
}

fn forget(path: &std::path::Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::warn!("cannot delete the task journal {}: {error}", path.display());
    }
}

#[cfg(test)]
mod tests;
