//! Tasks: what was asked, and what the host last said of it.

use sqlx::{FromRow, SqliteConnection};
use vmseal_api::task::Task;

use super::{StoreError, from_db, word};

/// A task.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct TaskRow {
    /// Its id.
    pub id: String,
    /// Kind, as its word.
    pub kind: String,
    /// State, as its word.
    pub state: String,
    /// The host that does it.
    pub host_id: String,
    /// That host's name, kept when the host goes.
    pub host_name: String,
    /// libvirt's UUID of the VM; absent while it is being made.
    pub domain_uuid: Option<String>,
    /// The VM's name.
    pub vm_name: String,
    /// The step reached.
    pub step: String,
    /// Bytes done.
    pub done_bytes: i64,
    /// Bytes in all.
    pub total_bytes: i64,
    /// What it says.
    pub message: String,
    /// Word of the refusal once it failed, else empty.
    pub code: String,
    /// What to do next.
    pub hint: String,
    /// Id of the command that asks for its end.
    pub cancel_id: Option<String>,
    /// Who asked for it.
    pub by_whom: String,
    /// When.
    pub created_ms: i64,
    /// When it last changed.
    pub updated_ms: i64,
    /// When it ended.
    pub finished_ms: Option<i64>,
    /// When the host need not begin any more.
    pub deadline_ms: i64,
    /// The command, encoded.
    pub command: Vec<u8>,
}

impl TaskRow {
    /// As the API shows it.
    pub fn to_api(&self) -> Result<Task, StoreError> {
        Ok(Task {
            id: self.id.clone(),
            kind: word("task kind", &self.kind)?,
            state: word("task state", &self.state)?,
            host: self.host_name.clone(),
            vm: self.vm_name.clone(),
            domain_uuid: self.domain_uuid.clone(),
            step: self.step.clone(),
            done_bytes: from_db(self.done_bytes),
            total_bytes: from_db(self.total_bytes),
            message: self.message.clone(),
            code: (!self.code.is_empty()).then(|| self.code.clone()),
            hint: self.hint.clone(),
            cancel_requested: self.cancel_id.is_some(),
            by: self.by_whom.clone(),
            created_ms: self.created_ms,
            updated_ms: self.updated_ms,
            finished_ms: self.finished_ms,
        })
    }
}

/// One.
pub async fn get(db: &mut SqliteConnection, id: &str) -> Result<Option<TaskRow>, StoreError> {
    Ok(sqlx::query_as("SELECT * FROM tasks WHERE id = $1").bind(id).fetch_optional(db).await?)
}

/// So many, newest first, before that time and id.
pub async fn page(
    db: &mut SqliteConnection,
    before: &(i64, String),
    limit: i64,
) -> Result<Vec<TaskRow>, StoreError> {
    Ok(sqlx::query_as(
        "SELECT * FROM tasks WHERE (created_ms, id) < ($1, $2) ORDER BY created_ms DESC, id DESC LIMIT $3",
    )
    .bind(before.0)
    .bind(&before.1)
    .bind(limit)
    .fetch_all(db)
    .await?)
}

/// Those that have not ended, oldest first; of one host, or all if `host_id` is empty.
pub async fn unfinished(db: &mut SqliteConnection, host_id: &str) -> Result<Vec<TaskRow>, StoreError> {
    Ok(sqlx::query_as(
        "SELECT * FROM tasks WHERE finished_ms IS NULL AND ($1 = '' OR host_id = $1) ORDER BY created_ms, id",
    )
    .bind(host_id)
    .fetch_all(db)
    .await?)
}

/// The one at work on this domain.
pub async fn at_work_on(
    db: &mut SqliteConnection,
    host_id: &str,
    domain_uuid: &str,
) -> Result<Option<String>, StoreError> {
    Ok(sqlx::query_scalar(
        "SELECT MIN(id) FROM tasks WHERE host_id = $1 AND domain_uuid = $2 AND finished_ms IS NULL",
    )
    .bind(host_id)
    .bind(domain_uuid)
    .fetch_one(db)
    .await?)
}

/// Adds one.
pub async fn insert(db: &mut SqliteConnection, task: &TaskRow) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO tasks (id, kind, state, host_id, host_name, domain_uuid, vm_name, by_whom, created_ms, \
         updated_ms, deadline_ms, command) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
    )
    .bind(&task.id)
    .bind(&task.kind)
    .bind(&task.state)
    .bind(&task.host_id)
    .bind(&task.host_name)
    .bind(&task.domain_uuid)
    .bind(&task.vm_name)
    .bind(&task.by_whom)
    .bind(task.created_ms)
    .bind(task.updated_ms)
    .bind(task.deadline_ms)
    .bind(&task.command)
    .execute(db)
    .await?;
    Ok(())
}

/// Writes down what may change of one.
pub async fn update(db: &mut SqliteConnection, task: &TaskRow) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE tasks SET state = $2, domain_uuid = $3, step = $4, done_bytes = $5, total_bytes = $6, message = $7, \
         code = $8, hint = $9, cancel_id = $10, updated_ms = $11, finished_ms = $12 WHERE id = $1",
    )
    .bind(&task.id)
    .bind(&task.state)
    .bind(&task.domain_uuid)
    .bind(&task.step)
    .bind(task.done_bytes)
    .bind(task.total_bytes)
    .bind(&task.message)
    .bind(&task.code)
    .bind(&task.hint)
    .bind(&task.cancel_id)
    .bind(task.updated_ms)
    .bind(task.finished_ms)
    .execute(db)
    .await?;
    Ok(())
}
