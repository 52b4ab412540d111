//! Changes of tasks as server-sent events: first those that have not ended, then every change.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::State,
    response::{
        IntoResponse as _, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use tokio::sync::{broadcast::error::RecvError, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use vmseal_api::{paths, problem::Problem, task::Task};

use super::{answer::Stop, call::Call};
use crate::{authz::allow, server::Server, tasks};

/// How often it is asked whether the watcher still may.
const RECHECK: Duration = Duration::from_secs(5);
/// Events that may wait for a watcher.
const BACKLOG: usize = 64;

/// Watches tasks. Ends when the session does; a watcher that is too slow starts anew.
#[utoipa::path(get, path = paths::EVENTS, operation_id = "task-events", tag = "tasks", responses(
    (status = 200, description = "Events named `task`; the data of each is a Task.", body = Task,
        content_type = "text/event-stream"),
    (status = "default", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn watch(State(server): State<Arc<Server>>, call: Call) -> Result<Response, Stop> {
    // Permission is asked for again as long as the stream lives; there is nothing to settle.
    drop(allow(&server, &call, "task-events", "").await?);
    let (events, stream) = mpsc::channel(BACKLOG);
    tokio::spawn(follow(server, call, events));
    let sse = Sse::new(ReceiverStream::new(stream)).keep_alive(KeepAlive::default());
    Ok(sse.into_response())
}

async fn follow(server: Arc<Server>, call: Call, events: mpsc::Sender<Result<Event, Infallible>>) {
    let mut changes = server.watch_tasks();
    let mut stop = server.stopping();
    let Ok(unfinished) = tasks::unfinished(&server).await else { return };
    for task in unfinished {
        if events.send(Ok(event(&task))).await.is_err() {
            return;
        }
    }
    let mut recheck = tokio::time::interval(RECHECK);
    loop {
        let task = tokio::select! {
            change = changes.recv() => match change {
                Ok(task) => task,
                Err(RecvError::Lagged(_) | RecvError::Closed) => return,
            },
            _ = recheck.tick() => {
                let Ok(again) = call.again().await else { return };
                if allow(&server, &again, "task-events", "").await.is_err() || events.is_closed() {
                    return;
                }
                continue;
            }
            () = stop.begun() => return,
        };
        if events.send(Ok(event(&task))).await.is_err() {
            return;
        }
    }
}

fn event(task: &Task) -> Event {
    Event::default().event("task").id(&task.id).data(serde_json::to_string(task).unwrap_or_default())
}
