//! The threads of one device: one for each queue, and one that waits for them.

use std::{
    fs::File,
    sync::{Arc, mpsc},
    thread,
};

use vmseal_model::ublk::Offer;

use super::{UblkError, queue::Queue, seat::Service};
use crate::{aligned::Aligned, export::Export, worker::with_causes};

/// Serves a device from now on; returns when every queue waits for requests, or none will.
pub(super) fn start(export: &Arc<Export>, offer: &Offer, device: File) -> Result<Arc<Service>, UblkError> {
    let set_up = |source| UblkError::SetUp { queue: 0, source };
    let service = Arc::new(Service::new(offer.device, offer.queues).map_err(set_up)?);
    export.seat().take(&service)?;
    let (tell, told) = mpsc::channel();
    let (for_thread, for_export, offer) = (service.clone(), export.clone(), *offer);
    let run = move || {
        let outcome = run(&for_export, &offer, device, &for_thread, tell);
        if let Err(error) = &outcome {
            for_export.tell(format_args!("/dev/ublkb{}: {}", offer.device, with_causes(error)));
        }
        for_export.seat().leave(outcome);
    };
    let started = thread::Builder::new().name(format!("ublk-{}", export.target())).spawn(run);
    if let Err(error) = started {
        export.seat().leave(Ok(()));
        return Err(set_up(error));
    }
    // Each queue says once that it is set up; one that ends before takes its sender with it.
    for _ in 0..offer.queues {
        if told.recv().is_err() {
            service.end();
            service.outcome()?;
            return Err(UblkError::NotServed);
        }
    }
    Ok(service)
}

/// Tells the queues to end, when dropped at the latest.
struct TellAtEnd<'a>(&'a Service);

impl Drop for TellAtEnd<'_> {
    fn drop(&mut self) {
        self.0.tell();
    }
}

fn run(
    export: &Export,
    offer: &Offer,
    device: File,
    service: &Service,
    tell: mpsc::Sender<()>,
) -> Result<(), UblkError> {
    let set_up = |queue| move |source| UblkError::SetUp { queue, source };
    let device = &device;
    thread::scope(|scope| {
        let tell_at_end = TellAtEnd(service);
        let mut threads = Vec::new();
        for (number, bell) in (0..offer.queues).zip(service.bells()) {
            let bytes = usize::from(offer.depth) * offer.max_io_bytes as usize;
            let memory = Aligned::new(bytes).map_err(set_up(number))?;
            let tell = tell.clone();
            let run = move || {
                let outcome =
                    Queue::new(number, offer, device, export, bell, &memory).and_then(|mut queue| {
                        // Its receiver is gone if another queue failed; then this one is told to stop.
                        let _ = tell.send(());
                        drop(tell);
                        queue.run(service)
                    });
                // A device is served by all its queues or by none: one that was told by the driver that it ends is not
                // alone in that, and one that failed must not be.
                service.tell();
                // The driver may copy into the memory as long as the thread that asked it to lives.
                (outcome, memory)
            };
            let name = format!("ublk-{}-{number}", export.target());
            threads.push(thread::Builder::new().name(name).spawn_scoped(scope, run).map_err(set_up(number))?);
        }
        drop(tell);
        let mut outcome = Ok(());
        for thread in threads {
            // A panic ends the process.
            if let Ok((ended, _memory)) = thread.join()
                && outcome.is_ok()
            {
                outcome = ended;
            }
        }
        drop(tell_at_end);
        outcome
    })
}
