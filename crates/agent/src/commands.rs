//! What the server asks for, and what follows when it is there again: events of the session in, work out.
//!
//! Tasks go to the [`Runner`], which journals them; adopting and repairing are short, leave no half-way state and are
//! simply done again when asked again. Commands of a server that a newer one has replaced are refused.

use std::{
    collections::HashSet,
    fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc::Receiver},
    thread,
};

use vmseal_api::agent::v1::{Command, command};
use vmseal_model::{
    id::{DomainUuid, TaskId},
    refusal::Code,
    task::TaskState,
};

use crate::{
    adopt::adopt,
    clock::now_ms,
    config::AgentConfig,
    identity::JoinedHost,
    inventory::Inventory,
    ports::{Hypervisor, TaskReport, TaskSink},
    repair::Repairer,
    session::ServerEvent,
    store::Store,
    tasks::{Refusal, Runner, TaskCommand},
    uplink::Uplink,
    wanted::Wanted,
};

/// What commands need.
pub struct Commands {
    /// Paths.
    pub config: Arc<AgentConfig>,
    /// libvirt.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Records and bindings.
    pub store: Arc<Store>,
    /// Tasks.
    pub runner: Arc<Runner>,
    /// Repairs.
    pub repairer: Arc<Repairer>,
    /// VMs that wait for keys.
    pub wanted: Arc<Wanted>,
    /// What the server hears.
    pub inventory: Arc<Inventory>,
    /// Reports.
    pub uplink: Arc<Uplink>,
    /// The highest fencing token seen.
    pub fence: Fence,
    /// Commands at work that are no tasks: the server sends them again at every session.
    pub at_work: Mutex<HashSet<String>>,
}

impl Commands {
    /// Follows the session until its sender is gone.
    pub fn follow(self: &Arc<Self>, events: &Receiver<ServerEvent>) {
        while let Ok(event) = events.recv() {
            match event {
                ServerEvent::Connected => self.connected(),
                ServerEvent::Lost => {}
                ServerEvent::KeysAvailable(_) => self.wanted.ring(),
                ServerEvent::Command(command) => self.command(&command),
            }
        }
    }

    fn connected(&self) {
        if let Ok(Some(joined)) = JoinedHost::load(&self.config.state_dir) {
            self.runner.set_host(joined.host);
        }
        // Keys are given only for VMs the server has heard of, so this comes before anybody asks for one.
        self.inventory.session_began();
        self.inventory.send();
        self.wanted.ring();
    }

    fn command(self: &Arc<Self>, command: &Command) {
        if let Err(refusal) = self.fence.admit(command.fencing_token) {
            return self.answer(&command.id, Err(refusal));
        }
        match TaskCommand::from_protocol(command) {
            Some(Ok(task)) if self.is_late(command, task.task) => {
                let text = "the command came after its deadline; nothing was begun";
                self.answer(&command.id, Err(Refusal::new(Code::Failed, text).hint("ask for it again")));
            }
            Some(Ok(task)) => self.runner.submit(task),
            Some(Err(refusal)) => self.answer(&command.id, Err(refusal)),
            None => self.no_task(command),
        }
    }

    /// A task that was begun is gone on with whenever its command comes again.
    fn is_late(&self, command: &Command, task: TaskId) -> bool {
        command.deadline_ms > 0 && now_ms() > command.deadline_ms && !self.runner.knows(task)
    }

    fn no_task(self: &Arc<Self>, command: &Command) {
        match &command.body {
            Some(command::Body::CancelTask(cancel)) => {
                if let Ok(task) = cancel.task_id.parse() {
                    self.runner.cancel(task);
                }
            }
            // It would act on what was meant for then; nobody waits for its answer.
            Some(command::Body::AdoptVm(_)) if command.deadline_ms > 0 && now_ms() > command.deadline_ms => {}
            Some(command::Body::RepairVm(c)) => {
                self.apart(command, &c.domain_uuid, |this, domain| this.repairer.repair(domain));
            }
            Some(command::Body::AdoptVm(c)) => self.apart(command, &c.domain_uuid, |this, domain| {
                let adopted = if this.runner.busy(domain) {
                    Err(Refusal::new(Code::TaskRunning, "a task works on the VM's disks"))
                } else {
                    adopt(&*this.hypervisor, &this.config, &this.store, domain)
                };
                if let Err(refusal) = &adopted {
                    // No task tells its end, so the audit does.
                    this.uplink.notice("vm-not-adopted", Some(domain), refusal.message.clone());
                }
                adopted
            }),
            _ => {
                let text = "this agent does not know that command";
                self.answer(
                    &command.id,
                    Err(Refusal::new(Code::BadRequest, text).hint("update vmseal-agent")),
                );
            }
        }
    }

    /// Does something that asks libvirt, on a thread of its own, and answers.
    fn apart(
        self: &Arc<Self>,
        command: &Command,
        domain: &str,
        work: impl FnOnce(&Self, DomainUuid) -> Result<String, Refusal> + Send + 'static,
    ) {
        let Ok(domain) = domain.parse::<DomainUuid>() else {
            let refusal = Refusal::new(Code::BadRequest, "the command's domain_uuid is not understood");
            return self.answer(&command.id, Err(refusal));
        };
        let (this, id) = (Arc::clone(self), command.id.clone());
        if !self.at_work().insert(id.clone()) {
            return;
        }
        let work = move || {
            let done = work(&this, domain);
            this.inventory.refresh(domain);
            this.inventory.send();
            this.answer(&id, done);
            this.at_work().remove(&id);
        };
        if let Err(error) = thread::Builder::new().name("command".to_owned()).spawn(work) {
            self.at_work().remove(&command.id);
            let refusal = Refusal::new(Code::Failed, format!("cannot start a thread: {error}"));
            self.answer(&command.id, Err(refusal));
        }
    }

    fn at_work(&self) -> MutexGuard<'_, HashSet<String>> {
        self.at_work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, id: &str, done: Result<String, Refusal>) {
        let Ok(task) = id.parse::<TaskId>() else { return };
        let (state, message, code, hint) = match done {
            Ok(message) => (TaskState::Succeeded, message, None, String::new()),
            Err(refusal) => (TaskState::Failed, refusal.message, Some(refusal.code), refusal.hint),
        };
        let step = String::new();
        self.uplink.report(TaskReport {
            task,
            state,
            step,
            done_bytes: 0,
            total_bytes: 0,
            message,
            code,
            hint,
        });
    }
}

/// Keeps commands of a server out that a newer one has replaced.
pub struct Fence {
    file: PathBuf,
    highest: Mutex<u64>,
}

impl Fence {
    /// The highest token that an earlier run of the agent saw.
    pub fn open(state_dir: &std::path::Path) -> Self {
        let file = state_dir.join("fence");
        let highest = fs::read_to_string(&file).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        Self { file, highest: Mutex::new(highest) }
    }

    /// Lets a token through that is not below the highest.
    ///
    /// # Errors
    ///
    /// [`Code::Conflict`] with what to do.
    pub fn admit(&self, token: u64) -> Result<(), Refusal> {
        let mut highest = self.highest.lock().unwrap_or_else(PoisonError::into_inner);
        if token < *highest {
            let text = format!(
                "the command is of an older server: its fencing token is {token}, seen was {highest}"
            );
            let hint = format!(
                "stop the older server; if this one was restored from a backup, remove {} and restart vmseal-agent",
                self.file.display()
            );
            return Err(Refusal::new(Code::Conflict, text).hint(hint));
        }
        if token > *highest {
            *highest = token;
            if let Err(error) = self.keep(token) {
                tracing::warn!("the fencing token is not kept: {}: {error}", self.file.display());
            }
        }
        Ok(())
    }

    fn keep(&self, token: u64) -> io::Result<()> {
        let tmp = self.file.with_extension("tmp");
        fs::write(&tmp, token.to_string())?;
        fs::File::open(&tmp)?.sync_all()?;
        fs::rename(&tmp, &self.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn older_server_is_kept_out_after_a_restart_too() {
        let scratch = Scratch::new();
        let fence = Fence::open(scratch.path());
        fence.admit(3).unwrap();
        fence.admit(3).unwrap();
        let again = Fence::open(scratch.path());
        let refusal = again.admit(2).unwrap_err();
        assert!(refusal.hint.contains("restored from a backup"), "{refusal:?}");
        again.admit(4).unwrap();
    }
}
