//! Which block device a disk is served as, from one warden to the next.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use super::UblkError;
use crate::flush_gate::Bell;

/// Part of an export: one device at most.
#[derive(Default)]
pub struct Seat(Mutex<Option<Arc<Service>>>);

impl Seat {
    /// Number of the device that is being served.
    pub fn device(&self) -> Option<u32> {
        self.service().map(|service| service.device)
    }

    pub(super) fn service(&self) -> Option<Arc<Service>> {
        self.taken().clone()
    }

    /// Takes the disk for this device.
    pub(super) fn take(&self, service: &Arc<Service>) -> Result<(), UblkError> {
        let mut taken = self.taken();
        if let Some(other) = &*taken {
            return Err(UblkError::Taken(other.device));
        }
        *taken = Some(service.clone());
        Ok(())
    }

    /// Leaves it to the next, and says how it went.
    pub(super) fn leave(&self, outcome: Result<(), UblkError>) {
        // The seat is free before anybody hears of it.
        if let Some(service) = self.taken().take() {
            *service.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
            service.told_ended.notify_all();
            service.over.ring();
        }
    }

    fn taken(&self) -> MutexGuard<'_, Option<Arc<Service>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One device that is served, until its queues have ended.
pub(super) struct Service {
    device: u32,
    stop: AtomicBool,
    /// One for each queue: rung to make it look at `stop`.
    bells: Vec<Bell>,
    /// Rung once, at the end.
    over: Bell,
    ended: Mutex<Option<Result<(), UblkError>>>,
    told_ended: Condvar,
}

impl Service {
    pub(super) fn new(device: u32, queues: u16) -> io::Result<Self> {
        Ok(Self {
            device,
            stop: AtomicBool::new(false),
            bells: (0..queues).map(|_| Bell::new()).collect::<Result<_, _>>()?,
            over: Bell::new()?,
            ended: Mutex::new(None),
            told_ended: Condvar::new(),
        })
    }

    pub(super) fn bells(&self) -> &[Bell] {
        &self.bells
    }

    /// Whether its queues are to end.
    pub(super) fn is_told(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Tells its queues to end.
    pub(super) fn tell(&self) {
        self.stop.store(true, Ordering::Release);
        self.bells.iter().for_each(Bell::ring);
    }

    /// Tells them, and waits until nothing is under way.
    pub(super) fn end(&self) {
        self.tell();
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        while ended.is_none() {
            ended = self.told_ended.wait(ended).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Readable once it has ended.
    pub(super) fn over(&self) -> BorrowedFd<'_> {
        self.over.as_fd()
    }

    /// How it ended; told once.
    pub(super) fn outcome(&self) -> Result<(), UblkError> {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.replace(Ok(())).unwrap_or(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::descriptors::ready;

    #[test]
    fn seat_is_free_again_when_its_device_has_ended() {
        let seat = Seat::default();
        let service = Arc::new(Service::new(3, 2).unwrap());
        seat.take(&service).unwrap();
        assert_eq!(seat.device(), Some(3));
        let other = Arc::new(Service::new(4, 1).unwrap());
        assert!(matches!(seat.take(&other), Err(UblkError::Taken(3))));
        assert_eq!(ready([Some(service.over())], Some(Duration::ZERO)), [false]);
        seat.leave(Err(UblkError::NotServed));
        assert_eq!(seat.device(), None);
        assert_eq!(ready([Some(service.over())], Some(Duration::ZERO)), [true]);
        assert!(service.outcome().is_err());
        assert!(service.outcome().is_ok(), "told twice");
        seat.take(&other).unwrap();
    }

    #[test]
    fn whoever_ends_a_device_waits_for_its_queues() {
        let seat = Seat::default();
        let service = Arc::new(Service::new(0, 1).unwrap());
        seat.take(&service).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                ready([Some(service.bells()[0].as_fd())], None);
                assert!(service.is_told());
                seat.leave(Ok(()));
            });
            service.end();
        });
        assert_eq!(seat.device(), None);
    }
}
