//! What goes up to the server: messages in from any thread, out on the session's stream. Never blocks.
//!
//! While there is no session, a message is refused with since when and why; of tasks the last report is kept and sent
//! when the session is back, since nobody asks for it again.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::mpsc::Sender;
use vmseal_api::agent::v1::{FromAgent, Notice, TaskEvent, from_agent::Body};
use vmseal_model::id::{DomainUuid, TaskId};

use crate::{
    clock::now_ms,
    ports::{TaskReport, TaskSink},
};

/// Messages that may wait for the stream.
pub const QUEUE: usize = 256;

/// The way to the server.
pub struct Uplink {
    state: Mutex<State>,
}

struct State {
    out: Option<Sender<FromAgent>>,
    down: Down,
    reports: BTreeMap<TaskId, TaskReport>,
}

/// There is no session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Down {
    /// Why, for people.
    pub reason: String,
    /// Since when, milliseconds since 1970.
    pub since_ms: i64,
}

impl Uplink {
    /// No session yet, for this reason.
    pub fn new(reason: &str) -> Self {
        let down = Down { reason: reason.to_owned(), since_ms: now_ms() };
        Self { state: Mutex::new(State { out: None, down, reports: BTreeMap::new() }) }
    }

    /// Sends, or says why not.
    ///
    /// # Errors
    ///
    /// [`Down`] if there is no session, or one that takes nothing.
    pub fn send(&self, body: Body) -> Result<(), Down> {
        let state = self.lock();
        let out = state.out.as_ref().ok_or_else(|| state.down.clone())?;
        out.try_send(FromAgent { body: Some(body) }).map_err(|_| Down {
            reason: "the session to the server takes no messages".to_owned(),
            since_ms: now_ms(),
        })
    }

    /// Tells the administrator something, if there is a session; the agent's log has it in any case.
    pub fn notice(&self, code: &str, domain: Option<DomainUuid>, message: String) {
        let domain_uuid = domain.map_or(String::new(), |d| d.to_string());
        tracing::warn!(code, domain = %domain_uuid, "{message}");
        let _ = self.send(Body::Notice(Notice { code: code.to_owned(), message, domain_uuid }));
    }

    /// Whether there is a session.
    pub fn is_up(&self) -> bool {
        self.lock().out.is_some()
    }

    /// A session stands: sends what tasks said meanwhile.
    pub fn opened(&self, out: Sender<FromAgent>) {
        let mut state = self.lock();
        let kept = std::mem::take(&mut state.reports);
        state.out = Some(out);
        kept.into_values().for_each(|report| state.report(report));
    }

    /// The session is gone; one that was never there keeps its first date.
    pub fn closed(&self, reason: &str) {
        let mut state = self.lock();
        let since_ms = if state.out.take().is_some() { now_ms() } else { state.down.since_ms };
        state.down = Down { reason: reason.to_owned(), since_ms };
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn report(&mut self, report: TaskReport) {
        let message = FromAgent { body: Some(Body::TaskEvent(event(&report))) };
        let sent = self.out.as_ref().is_some_and(|out| out.try_send(message).is_ok());
        // Kept also when sent, until the task has ended: the stream may break before the server has read it.
        if sent && report.state.is_final() {
            self.reports.remove(&report.task);
        } else {
            self.reports.insert(report.task, report);
        }
    }
}

impl TaskSink for Uplink {
    fn report(&self, report: TaskReport) {
        self.lock().report(report);
    }
}

fn event(report: &TaskReport) -> TaskEvent {
    TaskEvent {
        task_id: report.task.to_string(),
        state: word(&report.state),
        step: report.step.clone(),
        done_bytes: report.done_bytes,
        total_bytes: report.total_bytes,
        message: report.message.clone(),
        code: report.code.map_or(String::new(), |c| c.as_str().to_owned()),
        hint: report.hint.clone(),
    }
}

/// The word of a state of the model on the wire.
pub fn word(state: &impl serde::Serialize) -> String {
    match serde_json::to_value(state) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use vmseal_model::{state::VmState, task::TaskState};

    use super::*;

    fn report(state: TaskState, done_bytes: u64) -> TaskReport {
        TaskReport {
            task: TaskId::from_bytes([1; 16]),
            state,
            step: String::new(),
            done_bytes,
            total_bytes: 10,
            message: String::new(),
            code: None,
            hint: String::new(),
        }
    }

    #[test]
    fn without_a_session_sending_says_since_when_and_why() {
        let uplink = Uplink::new("not joined");
        let first = uplink.send(Body::Notice(Notice::default())).unwrap_err();
        assert_eq!(first.reason, "not joined");
        uplink.closed("refused");
        let second = uplink.send(Body::Notice(Notice::default())).unwrap_err();
        assert_eq!((second.reason.as_str(), second.since_ms), ("refused", first.since_ms));
    }

    #[test]
    fn last_report_of_a_task_is_sent_when_the_session_is_back() {
        let uplink = Uplink::new("not joined");
        uplink.report(report(TaskState::Running, 1));
        uplink.report(report(TaskState::Succeeded, 10));
        let (out, mut sent) = tokio::sync::mpsc::channel(QUEUE);
        uplink.opened(out);
        let Some(Body::TaskEvent(event)) = sent.try_recv().unwrap().body else { panic!("a task event") };
        assert_eq!((event.state.as_str(), event.done_bytes), ("succeeded", 10));
        assert!(sent.try_recv().is_err());
        let (out, mut sent) = tokio::sync::mpsc::channel(QUEUE);
        uplink.opened(out);
        assert!(sent.try_recv().is_err(), "a final report is sent once");
    }

    #[test]
    fn full_queue_loses_progress_and_no_end() {
        let uplink = Uplink::new("not joined");
        let (out, _stuck) = tokio::sync::mpsc::channel(1);
        uplink.opened(out);
        uplink.report(report(TaskState::Running, 1));
        uplink.report(report(TaskState::Failed, 2));
        let (out, mut sent) = tokio::sync::mpsc::channel(QUEUE);
        uplink.opened(out);
        let Some(Body::TaskEvent(event)) = sent.try_recv().unwrap().body else { panic!("a task event") };
        assert_eq!(event.state, "failed");
    }

    #[test]
    fn words_are_the_models() {
        assert_eq!(word(&VmState::Off), "off");
        assert_eq!(word(&TaskState::Waiting), "waiting");
    }
}
