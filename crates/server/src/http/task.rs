//! Tasks.

use std::sync::Arc;

use axum::extract::State;
use vmseal_api::{page::Page, paths, problem::Problem, task::Task};

use super::{
    answer::{Answer, Outcome},
    call::{Call, Name},
    page::Part,
};
use crate::{authz::allow, refusal::Refusal, server::Server, store::task, tasks};

/// All tasks, newest first.
#[utoipa::path(get, path = paths::TASKS, operation_id = "task-list", tag = "tasks", params(Part), responses(
    (status = 200, body = Page<Task>),
    (status = "default", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn list(State(server): State<Arc<Server>>, call: Call) -> Outcome {
    let permit = allow(&server, &call, "task-list", "").await?;
    let outcome = list_part(&server, &call).await;
    permit.settle(outcome).await
}

async fn list_part(server: &Server, call: &Call) -> Result<Answer, Refusal> {
    let part: Part = call.query()?;
    let before: (i64, String) = part.after((i64::MAX, String::new()))?;
    let mut db = server.store.read().await?;
    let rows = task::page(&mut db, &before, part.fetch()).await?;
    let shown = rows.iter().map(task::TaskRow::to_api).collect::<Result<Vec<Task>, _>>()?;
    Answer::ok(&part.page(shown, |task| (task.created_ms, task.id.clone()), |task| task))
}

/// One task.
#[utoipa::path(get, path = paths::TASK, operation_id = "task-show", tag = "tasks",
    params(("id" = String, Path)), responses(
        (status = 200, body = Task),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn show(State(server): State<Arc<Server>>, Name(id): Name, call: Call) -> Outcome {
    let permit = allow(&server, &call, "task-show", &id).await?;
    let outcome = show_one(&server, &id).await;
    permit.settle(outcome).await
}

async fn show_one(server: &Server, id: &str) -> Result<Answer, Refusal> {
    let mut db = server.store.read().await?;
    let row = task::get(&mut db, id).await?.ok_or_else(|| Refusal::not_found("task", id))?;
    Answer::ok(&row.to_api()?)
}

/// Asks for the end of a task; what it did is undone.
#[utoipa::path(post, path = paths::TASK_CANCEL, operation_id = "task-cancel", tag = "tasks",
    params(("id" = String, Path)), responses(
        (status = 202, body = Task),
        (status = "default", body = Problem, content_type = "application/problem+json"),
    ))]
pub(super) async fn cancel(State(server): State<Arc<Server>>, Name(id): Name, call: Call) -> Outcome {
    let permit = allow(&server, &call, "task-cancel", &id).await?;
    let outcome = tasks::cancel(&server, &permit, &id).await;
    permit.settle(outcome).await
}
