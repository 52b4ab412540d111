//! Tasks: asked for here, done by a host, mirrored here.
//!
//! A task, its key and its audit entry are one transaction; then the command is sent. It is sent again at every new
//! session until the host says that the task ended, so neither side's restart loses it. The host's journal is the
//! truth about the work; this module only writes down what the host says.

use axum::http::StatusCode;
use prost::Message as _;
use sqlx::SqliteConnection;
use vmseal_api::{
    agent::v1::{CancelTask, Command, GroupCapabilities, TaskEvent, command, to_agent},
    task::Task,
};
use vmseal_keys::random_bytes;
use vmseal_model::{
    id::{KekId, TaskId},
    refusal::Code,
    task::{TaskKind, TaskState},
};

use crate::{
    audit::{DONE, Entry},
    authz::{Change, Permit},
    gate::{Host, sessions::Session},
    http::answer::Answer,
    providers,
    refusal::{Refusal, causes, shown},
    server::Server,
    store::{
        StoreError, host, key,
        key::{KeyRow, column},
        task,
        task::TaskRow,
        to_db, to_word, word,
    },
};

/// A host that has not begun by then need not begin any more.
const DEADLINE_MS: i64 = 3_600_000;
/// Most hosts that a command names.
const MAX_NAMED: usize = 100;

/// What is asked for.
pub(crate) struct NewTask {
    /// What it does.
    pub(crate) kind: TaskKind,
    /// Id of the host that is to do it.
    pub(crate) host_id: String,
    /// Its name.
    pub(crate) host_name: String,
    /// The VM, if it is there already.
    pub(crate) domain_uuid: Option<String>,
    /// Its id, if it has one.
    pub(crate) vm_id: Option<String>,
    /// Its name.
    pub(crate) vm_name: String,
    /// Whether a key is needed, and of which provider; `Some(None)` for the default one.
    pub(crate) key_of: Option<Option<String>>,
    /// The command; provider and key, and what all hosts have, are filled in here.
    pub(crate) body: command::Body,
}

/// Writes the task down, answers with it, sends its command.
pub(crate) async fn start(server: &Server, permit: &Permit, new: NewTask) -> Result<Answer, Refusal> {
    if !server.sessions.is_connected(&new.host_id) {
        return Err(Refusal::new(
            Code::HostUnreachable,
            format!("host {} is not connected; nothing was begun", new.host_name),
        )
        .hint("check vmseal-agent on it: `systemctl status vmseal-agent`"));
    }
    let id = TaskId::from_random(random_bytes()?).to_string();
    let mut change = permit.begin().await?;
    if let Some(domain) = &new.domain_uuid
        && let Some(other) = task::at_work_on(&mut change, &new.host_id, domain).await?
    {
        return Err(Refusal::new(
            Code::TaskRunning,
            format!("task {other} is at work on VM {}", new.vm_name),
        )
        .hint(format!("wait for it: `vmseal task show {other}`")));
    }
    let mut body = new.body.clone();
    if let Some(wanted) = &new.key_of {
        let (provider, kek) = allocate(server, &mut change, &new, wanted.as_deref(), &id).await?;
        fill_in(&mut body, provider, &kek);
    }
    if let Some(hosts) = hosts_of(&mut body) {
        *hosts = Some(group(&mut change).await?);
    }
    let now_ms = change.now_ms();
    let deadline_ms = now_ms.saturating_add(DEADLINE_MS);
    let command =
        Command { id: id.clone(), fencing_token: 0, deadline_ms, approvals: Vec::new(), body: Some(body) };
    let row = TaskRow {
        id: id.clone(),
        kind: to_word(&new.kind),
        state: to_word(&TaskState::Queued),
        host_id: new.host_id.clone(),
        host_name: new.host_name,
        domain_uuid: new.domain_uuid,
        vm_name: new.vm_name,
        step: String::new(),
        done_bytes: 0,
        total_bytes: 0,
        message: String::new(),
        code: String::new(),
        hint: String::new(),
        cancel_id: None,
        by_whom: permit.who().to_owned(),
        created_ms: now_ms,
        updated_ms: now_ms,
        finished_ms: None,
        deadline_ms,
        command: command.encode_to_vec(),
    };
    task::insert(&mut change, &row).await?;
    let shown = row.to_api()?;
    let detail = format!("task {id}{}", about(&command));
    let answer = change.commit(StatusCode::ACCEPTED, &shown, &detail).await?;
    server.tell(shown);
    // If the session ended meanwhile, the next one gets it.
    server.sessions.send(&new.host_id, to_agent::Body::Command(fenced(server, command)));
    Ok(answer)
}

/// What else of a command belongs into the audit: what no later event of its task tells.
fn about(command: &Command) -> String {
    match &command.body {
        Some(command::Body::SetDisk(c)) => format!(": disk {}, class {}", shown(&c.target), shown(&c.class)),
        _ => String::new(),
    }
}

/// The key for a task: the VM's own if it has a current one of that provider, else a new one.
async fn allocate(
    server: &Server,
    change: &mut Change<'_>,
    new: &NewTask,
    wanted: Option<&str>,
    task_id: &str,
) -> Result<(String, KekId), Refusal> {
    let provider = providers::choose(server, change, wanted).await?;
    let name = provider.id().as_str().to_owned();
    let current = provider.current().map(vmseal_provider::Generation::number);
    if let Some(vm_id) = &new.vm_id {
        for kek in providers::keys_of_vm(change, &name, vm_id).await? {
            if kek.as_native().is_some_and(|(generation, _)| Some(generation) == current) {
                return Ok((name, kek));
            }
        }
    }
    let kek = provider.new_kek_id().map_err(providers::refused)?;
    let row = KeyRow {
        provider: name.clone(),
        kek_id: column(&kek),
        provider_uuid: Some(provider.uuid().to_string()),
        domain_uuid: new.domain_uuid.clone(),
        host_id: Some(new.host_id.clone()),
        task_id: Some(task_id.to_owned()),
        created_ms: change.now_ms(),
        ..KeyRow::default()
    };
    key::put(change, &row).await?;
    Ok((name, kek))
}

fn fill_in(body: &mut command::Body, provider: String, kek: &KekId) {
    let kek_id = kek.as_bytes().to_vec();
    match body {
        command::Body::EncryptVm(c) => (c.provider, c.kek_id) = (provider, kek_id),
        command::Body::CreateDisk(c) => (c.provider, c.kek_id) = (provider, kek_id),
        command::Body::CreateVm(c) => (c.provider, c.kek_id) = (provider, kek_id),
        command::Body::DecryptVm(_)
        | command::Body::SetDisk(_)
        | command::Body::RepairVm(_)
        | command::Body::AdoptVm(_)
        | command::Body::CancelTask(_) => {}
    }
}

/// Where a command that defines disks says what all hosts have.
fn hosts_of(body: &mut command::Body) -> Option<&mut Option<GroupCapabilities>> {
    match body {
        command::Body::EncryptVm(c) => Some(&mut c.hosts),
        command::Body::CreateDisk(c) => Some(&mut c.hosts),
        command::Body::CreateVm(c) => Some(&mut c.hosts),
        command::Body::SetDisk(c) => Some(&mut c.hosts),
        command::Body::DecryptVm(_)
        | command::Body::RepairVm(_)
        | command::Body::AdoptVm(_)
        | command::Body::CancelTask(_) => None,
    }
}

/// What every host has that a VM may come to run on: all that joined, whether they can be reached now or not.
async fn group(db: &mut SqliteConnection) -> Result<GroupCapabilities, StoreError> {
    let hosts = host::list(db).await?;
    let without = hosts.into_iter().filter(|host| !host.capabilities().ublk);
    let without_ublk: Vec<String> = without.map(|host| host.name).take(MAX_NAMED).collect();
    Ok(GroupCapabilities { ublk: without_ublk.is_empty(), without_ublk })
}

/// A command with the token of this start: an agent that has seen a later one refuses it.
pub(crate) fn fenced(server: &Server, command: Command) -> Command {
    Command { fencing_token: server.fencing_token, ..command }
}

/// Asks for the end of a task.
pub(crate) async fn cancel(server: &Server, permit: &Permit, id: &str) -> Result<Answer, Refusal> {
    let mut change = permit.begin().await?;
    let mut row = task::get(&mut change, id).await?.ok_or_else(|| Refusal::not_found("task", id))?;
    if row.finished_ms.is_some() {
        return Err(Refusal::new(Code::NothingToDo, format!("task {id} has ended already: {}", row.state)));
    }
    if row.cancel_id.is_none() {
        row.cancel_id = Some(TaskId::from_random(random_bytes()?).to_string());
    }
    row.updated_ms = change.now_ms();
    task::update(&mut change, &row).await?;
    let task = row.to_api()?;
    let answer = change.commit(StatusCode::ACCEPTED, &task, &format!("VM {}", shown(&row.vm_name))).await?;
    server.tell(task);
    if let Some(command) = cancel_command(&row) {
        server.sessions.send(&row.host_id, to_agent::Body::Command(fenced(server, command)));
    }
    Ok(answer)
}

fn cancel_command(row: &TaskRow) -> Option<Command> {
    Some(Command {
        id: row.cancel_id.clone()?,
        fencing_token: 0,
        deadline_ms: row.deadline_ms,
        approvals: Vec::new(),
        body: Some(command::Body::CancelTask(CancelTask { task_id: row.id.clone() })),
    })
}

/// Sends the commands of all tasks that have not ended, to a host that just connected.
pub(crate) async fn send_again(server: &Server, host_id: &str, session: &Session) -> Result<(), StoreError> {
    let mut db = server.store.read().await?;
    for row in task::unfinished(&mut db, host_id).await? {
        let command = Command::decode(row.command.as_slice())
            .map_err(|_| StoreError::Row { what: "command", text: row.id.clone() })?;
        for command in [Some(command), cancel_command(&row)].into_iter().flatten() {
            if !session.send_in_turn(to_agent::Body::Command(fenced(server, command))).await {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Writes down what a host says of one of its tasks.
pub(crate) async fn mirror(server: &Server, host: &Host, event: TaskEvent) -> Result<(), StoreError> {
    let mut write = server.store.write().await?;
    let now_ms = write.now_ms;
    let Some(row) = task::get(&mut write, &event.task_id).await? else {
        // `vm adopt` is no task; its command's id comes back here when it is done.
        tracing::debug!(host = host.name, task = shown(&event.task_id), "an event of no task");
        return Ok(());
    };
    let Ok(state) = word::<TaskState>("task state", &event.state) else {
        tracing::warn!(
            host = host.name,
            state = shown(&event.state),
            "a task's state is none this server knows"
        );
        return Ok(());
    };
    if row.host_id != host.id.to_string() || row.finished_ms.is_some() {
        return Ok(());
    }
    let short = |text: &str| text.chars().take(2000).collect::<String>();
    let row = TaskRow {
        state: to_word(&state),
        step: short(&event.step),
        done_bytes: to_db(event.done_bytes),
        total_bytes: to_db(event.total_bytes),
        message: short(&event.message),
        code: short(&event.code),
        hint: short(&event.hint),
        updated_ms: now_ms,
        finished_ms: state.is_final().then_some(now_ms),
        ..row
    };
    task::update(&mut write, &row).await?;
    if state.is_final() {
        if state != TaskState::Succeeded {
            key::forget_unused(&mut write, &row.id).await?;
        }
        let outcome = match (state, row.code.as_str()) {
            (TaskState::Succeeded, _) => DONE,
            (_, "") => Code::Failed.as_str(),
            (_, code) => code,
        };
        let (who, object) = (host.who(), format!("/tasks/{}", row.id));
        let verb = format!("task.{}", row.state);
        let detail = format!("{} of VM {}: {}", row.kind, shown(&row.vm_name), row.message);
        write
            .audit(&Entry {
                who: &who,
                verb: &verb,
                object: &object,
                outcome,
                detail: detail.trim_end_matches(": "),
            })
            .await?;
    }
    let task = row.to_api()?;
    write.commit().await?;
    server.tell(task);
    Ok(())
}

/// Tasks that have not ended, for those who begin to watch.
pub(crate) async fn unfinished(server: &Server) -> Result<Vec<Task>, StoreError> {
    let mut db = server.store.read().await?;
    let read = |row: &TaskRow| row.to_api();
    task::unfinished(&mut db, "").await?.iter().map(read).collect::<Result<_, _>>().inspect_err(|error| {
        tracing::error!(error = causes(error), "a task does not read");
    })
}
