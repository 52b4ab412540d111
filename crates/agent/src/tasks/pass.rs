//! One pass of the job program over a disk, for a task: progress written down, ended when the task is.

use std::os::fd::BorrowedFd;

use vmseal_keys::Dek;
use vmseal_model::{control::Job, id::VmId};

use crate::{
    job::JobOrder,
    tasks::{context::Context, refusal::Halt},
    volume::OpenVolume,
};

/// A pass.
pub(crate) struct Pass<'a> {
    pub(crate) vm: VmId,
    pub(crate) target: &'a str,
    pub(crate) job: Job,
    pub(crate) volume: &'a OpenVolume,
    pub(crate) dek: &'a Dek,
    /// The clear file.
    pub(crate) other: Option<BorrowedFd<'a>>,
    pub(crate) bytes: u64,
}

impl Pass<'_> {
    /// Runs it; a pass that writes goes on where an earlier one was durable. Gives the hash of one that compares.
    pub(crate) fn run(&self, ctx: &mut Context) -> Result<String, Halt> {
        let program = ctx.world.job_program()?;
        let writes = self.job != Job::Verify;
        // An image may end within a data unit: that unit is done again.
        let durable = if writes { ctx.durable(self.target, "copied") } else { 0 };
        let from = durable - durable % u64::from(self.volume.setup.unit_bytes);
        let order = JobOrder {
            vm: self.vm,
            job: self.job,
            volume: self.volume,
            dek: self.dek,
            other: self.other,
            bytes: self.bytes,
            from,
        };
        let control = ctx.control.clone();
        let ran = program.run(
            &order,
            |durable| {
                if writes {
                    ctx.note_durable(self.target, "copied", durable)?;
                }
                ctx.passed(durable, false);
                Ok(())
            },
            || Context::go_on(&control),
        );
        let sha256 = ran.or_else(|halt: Halt| {
            // Ended because it is no longer wanted, and not because it failed.
            ctx.check_wanted()?;
            Err(halt)
        })?;
        ctx.passed(self.bytes, true);
        Ok(sha256)
    }
}
