//! That the server stops, told to all its parts.

use tokio::sync::watch;

/// Waits for the server to stop.
#[derive(Debug, Clone)]
pub(crate) struct Shutdown(watch::Receiver<bool>);

impl Shutdown {
    /// Of the one who says so.
    pub(crate) fn of(sender: &watch::Sender<bool>) -> Self {
        Self(sender.subscribe())
    }

    /// Returns once it stops.
    pub(crate) async fn begun(&mut self) {
        // An error means that nobody can say so any more, which is a stop too.
        let _ = self.0.wait_for(|stopped| *stopped).await;
    }
}
