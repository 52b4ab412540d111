//! What a disk knows of its vhost-user connection: that there is one, and the way to tell it of a change.

use std::{
    io,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::connection::BackendChannel;

/// How long a new connection waits for the one before it: a front end that comes back does so at once, and what it left
/// may still have to be worked off.
const WAIT: Duration = Duration::from_secs(2);

/// Part of an export.
#[derive(Debug, Default)]
pub struct Link {
    taken: Mutex<bool>,
    freed: Condvar,
    channel: Mutex<Option<BackendChannel>>,
}

impl Link {
    /// Takes the disk for one connection: two would each have rings of their own on it.
    pub(super) fn claim(&self) -> Option<Claim<'_>> {
        let deadline = Instant::now() + WAIT;
        let mut taken = self.taken();
        while *taken {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            taken = self.freed.wait_timeout(taken, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        *taken = true;
        Some(Claim(self))
    }

    fn taken(&self) -> MutexGuard<'_, bool> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the front end that the disk's size or another value of its configuration space changed; the guest hears of
    /// it at once. Gives whether there was somebody to tell.
    ///
    /// # Errors
    ///
    /// The front end does not take the message.
    pub fn tell_config_changed(&self) -> io::Result<bool> {
        let channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        channel.as_ref().map_or(Ok(false), |channel| channel.tell_config_changed().map(|()| true))
    }

    pub(super) fn set_channel(&self, channel: Option<BackendChannel>) {
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = channel;
    }
}

/// The disk is one connection's until this is dropped.
pub(super) struct Claim<'a>(&'a Link);

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.set_channel(None);
        *self.0.taken() = false;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        os::{fd::OwnedFd, unix::net::UnixStream},
        thread,
    };

    use super::*;

    #[test]
    fn disk_is_one_connections_at_a_time_and_the_next_ones_after_it() {
        let link = Link::default();
        let claim = link.claim().unwrap();
        assert!(link.claim().is_none());
        thread::scope(|scope| {
            let waits = scope.spawn(|| link.claim().is_some());
            drop(claim);
            assert!(waits.join().unwrap());
        });
    }

    #[test]
    fn front_end_is_told_of_a_change_while_it_has_a_channel() {
        let link = Link::default();
        assert!(!link.tell_config_changed().unwrap());
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let claim = link.claim().unwrap();
        link.set_channel(BackendChannel::new(OwnedFd::from(ours)));
        assert!(link.tell_config_changed().unwrap());
        let mut message = [0; 12];
        theirs.read_exact(&mut message).unwrap();
        // CONFIG_CHANGE_MSG, version 1, no body.
        assert_eq!(message, *[2u32, 1, 0].map(u32::to_ne_bytes).as_flattened());
        drop(claim);
        assert!(!link.tell_config_changed().unwrap());
        assert_eq!(theirs.read(&mut message).unwrap(), 0, "the channel is kept");
    }
}
