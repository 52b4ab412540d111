//! What a disk knows of its vhost-user connection: that there is one, and the way to tell it of a change.

use std::{
    io,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use super::connection::BackendChannel;

/// Part of an export.
#[derive(Debug, Default)]
pub struct Link {
    taken: AtomicBool,
    channel: Mutex<Option<BackendChannel>>,
}

impl Link {
    /// Takes the disk for one connection: two would each have rings of their own on it.
    pub(super) fn claim(&self) -> Option<Claim<'_>> {
        (!self.taken.swap(true, Ordering::AcqRel)).then_some(Claim(self))
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
        self.0.taken.store(false, Ordering::Release);
    }
}
