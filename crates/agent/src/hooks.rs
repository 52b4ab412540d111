//! What libvirt's hook is told in each phase: a domain's definition in, a verdict out.
//!
//! Only `prepare` does anything before it answers: it serves the disks, or refuses in one line. `release` ends the
//! process that served them. Every other phase is told to go on, whatever is wrong; reconciling is done after libvirt's
//! events, when libvirt can be asked. Nothing here talks to libvirt, which waits for the answer.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use vmseal_model::{
    hook::{HookReply, HookRequest, Phase},
    id::DomainUuid,
};

use crate::{
    backend::Backends,
    domain_xml::DomainXml,
    hook_server::HookHandler,
    inventory::Inventory,
    start::{NoStart, Starter},
    tasks::Runner,
    wanted::Wanted,
};

/// How long the hook waits for `prepare`, less what it takes itself to come and go.
const GIVE_UP: Duration = Duration::from_millis(9_500);

/// What the phases need.
pub struct Hooks {
    /// Serves disks.
    pub starter: Arc<Starter>,
    /// Ends what serves them.
    pub backends: Arc<Backends>,
    /// Tells the server of a VM before its key is asked for.
    pub inventory: Arc<Inventory>,
    /// Remembers whom a key was missing for.
    pub wanted: Arc<Wanted>,
    /// Knows whose disks are being worked on.
    pub runner: Arc<Runner>,
}

impl HookHandler for Hooks {
    fn answer(&self, request: HookRequest, asked: Instant) -> HookReply {
        let name = request.domain_name.as_str();
        let verdict = match (request.phase, DomainXml::parse(&request.xml)) {
            (Phase::Prepare, Ok(xml)) => self.prepare(name, &xml, asked + GIVE_UP),
            (Phase::Prepare, Err(error)) => {
                Err(format!("VM '{name}' does not start: its definition is not understood: {error}"))
            }
            (Phase::Release, Ok(xml)) => {
                if let Some(domain) = xml.uuid() {
                    self.release(domain, asked);
                }
                Ok(())
            }
            _ => Ok(()),
        };
        match verdict {
            Ok(()) => HookReply::default(),
            Err(message) => {
                tracing::warn!("{message}");
                HookReply { code: 1, message, xml: None }
            }
        }
    }
}

impl Hooks {
    fn prepare(&self, name: &str, xml: &DomainXml, until: Instant) -> Result<(), String> {
        let Some(domain) = xml.uuid() else {
            return Err(format!("VM '{name}' does not start: its definition has no UUID"));
        };
        if self.runner.busy(domain) {
            return Err(format!(
                "VM '{name}' does not start: a task works on its disks; wait for it: vmseal task list"
            ));
        }
        self.inventory.announce(domain, xml);
        let prepared = self.starter.prepare(xml, until);
        match &prepared {
            Err(NoStart::Locked(missing)) => self.wanted.refused(domain, name, missing),
            Ok(_) | Err(NoStart::Refused(_)) => self.wanted.settled(domain),
        }
        // Of a VM that waited for its process as well: what is there now is the new one.
        self.wanted.ended(domain);
        self.inventory.send();
        prepared.map(drop).map_err(|why| why.line(name))
    }

    /// `asked` keeps a call that waited from ending what a later start has begun.
    fn release(&self, domain: DomainUuid, asked: Instant) {
        self.wanted.ended(domain);
        self.backends.clear_out(domain, asked);
    }
}
