//! `vm repair`: brings back what a VM lacks, now and with an answer: its disk process, the copies of its key records.
//!
//! The same work as after libvirt's events, for an administrator who does not want to wait, or wants to know why not.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use vmseal_model::{id::DomainUuid, refusal::Code};

use crate::{
    backend::repair_owner_blocks,
    ports::DomainInfo,
    reconcile::Reconciler,
    start::{NoStart, Starter, plan::Plan},
    tasks::Refusal,
};

/// How long keys may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Repairs VMs.
pub struct Repairer {
    /// Serves disks.
    pub starter: Arc<Starter>,
    /// Knows what is stale.
    pub reconciler: Arc<Reconciler>,
}

impl Repairer {
    /// Repairs one; what was done, in words.
    ///
    /// # Errors
    ///
    /// [`Refusal`] with what is in the way.
    pub fn repair(&self, domain: DomainUuid) -> Result<String, Refusal> {
        let info = self.reconciler.hypervisor.domain(domain)?;
        if !info.state.has_qemu() {
            return self.repair_off(&info);
        }
        let Some(plan) = self.reconciler.plan_of(domain)? else {
            let text = format!("VM '{}' has no encrypted disk", info.name);
            return Err(Refusal::new(Code::NothingToDo, text));
        };
        let mut done = Vec::new();
        if !matches!(self.reconciler.backends.adopt(&plan), Ok(true)) {
            self.serve(&info, &plan)?;
            done.push("its disks are served again".to_owned());
        }
        if self.reconciler.hypervisor.resume_after_io_error(domain)? {
            done.push("the guest goes on".to_owned());
        }
        self.finish(&info, &plan, done)
    }

    fn serve(&self, info: &DomainInfo, plan: &Plan) -> Result<(), Refusal> {
        self.starter.serve_running(plan.clone(), PATIENCE).map_err(|why| match why {
            NoStart::Locked(missing) => {
                self.reconciler.wanted.lost(Arc::new(plan.clone()));
                Refusal::from(missing).hint(format!("vmseal vm show {}", info.name))
            }
            NoStart::Refused(refusal) => refusal,
        })?;
        self.reconciler.wanted.ended(plan.domain);
        Ok(())
    }

    /// Of a VM that is off only the definition can be stale, and something may be left over.
    fn repair_off(&self, info: &DomainInfo) -> Result<String, Refusal> {
        let moment = Instant::now();
        if !self.reconciler.hypervisor.domain(info.uuid)?.state.has_qemu() {
            self.reconciler.backends.clear_out(info.uuid, moment);
        }
        match self.reconciler.plan_of(info.uuid)? {
            Some(plan) => {
                let blocks = repair_owner_blocks(&self.reconciler.config, &plan);
                self.finish(info, &plan, blocks)
            }
            None => {
                let text = format!("VM '{}' has no encrypted disk", info.name);
                Err(Refusal::new(Code::NothingToDo, text))
            }
        }
    }

    fn finish(&self, info: &DomainInfo, plan: &Plan, mut done: Vec<String>) -> Result<String, Refusal> {
        if self.reconciler.repair_metadata(info, plan)? {
            done.push("its metadata was written anew".to_owned());
        }
        if info.state.has_qemu() && self.reconciler.repair_tokens(plan)? {
            done.push("records in its volumes' headers were written anew".to_owned());
        }
        let what = if done.is_empty() { "nothing was amiss".to_owned() } else { done.join("; ") };
        Ok(what)
    }
}
