//! Who is connected: one session a host. A newer one takes the older one's place.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64, atomic::Ordering},
};

use tokio::sync::{mpsc, watch};
use tonic::Status;
use vmseal_api::agent::v1::{ToAgent, to_agent};

/// Messages that may wait for a host; one that reads slower loses its session and connects again.
const BACKLOG: usize = 256;

/// How long a host may take to make room.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);

/// What goes down a host's stream.
pub(crate) type Outgoing = Result<ToAgent, Status>;

/// A host's session.
#[derive(Clone)]
pub(crate) struct Session {
    number: u64,
    down: mpsc::Sender<Outgoing>,
    /// Dropped with the session; whoever reads the host's stream ends then.
    ended: watch::Sender<bool>,
}

impl Session {
    /// Sends, without waiting; `false` if the session has ended or is too slow, which ends it.
    pub(crate) fn send(&self, body: to_agent::Body) -> bool {
        let sent = self.down.try_send(Ok(ToAgent { body: Some(body) })).is_ok();
        if !sent {
            self.end();
        }
        sent
    }

    /// As [`Session::send`], but waits for room: for more messages than may wait.
    pub(crate) async fn send_in_turn(&self, body: to_agent::Body) -> bool {
        let send = self.down.send(Ok(ToAgent { body: Some(body) }));
        let sent = tokio::time::timeout(PATIENCE, send).await.is_ok_and(|sent| sent.is_ok());
        if !sent {
            self.end();
        }
        sent
    }

    /// Refuses it, with the reason.
    pub(crate) fn refuse(&self, status: Status) {
        // Whoever is gone already need not know.
        let _ = self.down.try_send(Err(status));
    }

    /// Ends it.
    pub(crate) fn end(&self) {
        self.ended.send_replace(true);
    }

    /// Tells when it ended.
    pub(crate) fn watch(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }
}

/// All sessions, by host id.
#[derive(Clone, Default)]
pub struct Sessions {
    by_host: Arc<Mutex<HashMap<String, Session>>>,
    next: Arc<AtomicU64>,
}

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Session>> {
        self.by_host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session not yet in the place of another, and its stream.
    pub(crate) fn open(&self) -> (Session, mpsc::Receiver<Outgoing>) {
        let (down, stream) = mpsc::channel(BACKLOG);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        (Session { number, down, ended: watch::Sender::new(false) }, stream)
    }

    /// Puts it in its place; the one that was there ends.
    pub(crate) fn enter(&self, host_id: &str, session: &Session) {
        if let Some(older) = self.lock().insert(host_id.to_owned(), session.clone()) {
            older.end();
        }
    }

    /// Takes it out, unless a newer one is in its place.
    pub(crate) fn leave(&self, host_id: &str, session: &Session) {
        let mut sessions = self.lock();
        if sessions.get(host_id).is_some_and(|s| s.number == session.number) {
            sessions.remove(host_id);
        }
    }

    /// Whether a host is connected.
    pub fn is_connected(&self, host_id: &str) -> bool {
        self.lock().contains_key(host_id)
    }

    /// How many are.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    /// Sends to one host; `false` if it is not connected.
    pub(crate) fn send(&self, host_id: &str, body: to_agent::Body) -> bool {
        let session = self.lock().get(host_id).cloned();
        session.is_some_and(|s| s.send(body))
    }

    /// Sends to all.
    pub(crate) fn send_all(&self, body: &to_agent::Body) {
        let all: Vec<Session> = self.lock().values().cloned().collect();
        for session in all {
            session.send(body.clone());
        }
    }

    /// Ends a host's session.
    pub(crate) fn end(&self, host_id: &str) {
        if let Some(session) = self.lock().remove(host_id) {
            session.end();
        }
    }

    /// Ends all.
    pub(crate) fn end_all(&self) {
        for (_, session) in self.lock().drain() {
            session.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice() -> to_agent::Body {
        to_agent::Body::KeysAvailable(Default::default())
    }

    #[test]
    fn newer_session_ends_the_older_and_is_not_taken_out_by_it() {
        let sessions = Sessions::default();
        let (older, _older_stream) = sessions.open();
        let (newer, mut newer_stream) = sessions.open();
        sessions.enter("h", &older);
        sessions.enter("h", &newer);
        assert!(*older.watch().borrow());
        sessions.leave("h", &older);
        assert!(sessions.send("h", notice()));
        assert!(newer_stream.try_recv().is_ok());
        sessions.leave("h", &newer);
        assert!(!sessions.send("h", notice()));
    }

    #[test]
    fn host_that_reads_too_slowly_loses_its_session() {
        let sessions = Sessions::default();
        let (session, _stream) = sessions.open();
        sessions.enter("h", &session);
        for _ in 0..BACKLOG {
            assert!(sessions.send("h", notice()));
        }
        assert!(!sessions.send("h", notice()));
        assert!(*session.watch().borrow());
    }
}
