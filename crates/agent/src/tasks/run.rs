//! One task from its command to its end: plan, steps, and what happens when they stop.

use serde::{Serialize, de::DeserializeOwned};
use vmseal_model::{refusal::Code, task::TaskState};

use crate::{
    journal::{Entry, Outcome},
    tasks::{
        command::Work,
        context::Context,
        create_disk::{self, Wanted},
        create_vm, decrypt, decrypt_steps, encrypt, encrypt_steps,
        plan::{DecryptPlan, EncryptPlan},
        refusal::{Halt, Refusal},
        set_class::{self, ClassPlan},
        switch::{NewFiles, Standing, may_be_switched, standing},
    },
};

/// Runs it to its end, or until the agent ends.
pub(crate) fn run(mut ctx: Context) {
    loop {
        match attempt(&mut ctx) {
            Ok(()) | Err(Halt::Stopped) => return,
            // Cancelled and failed were dealt with; what is left cannot be done, or not be written down, now.
            Err(Halt::Cancelled) => {}
            Err(Halt::Failed(why) | Halt::Suspended(why)) => ctx.say_waiting(&why),
        }
        let patience = ctx.patience();
        ctx.control.pause_unless_stopped(patience);
        if ctx.control.is_stopped() || ctx.reopen().is_err() {
            return;
        }
    }
}

fn attempt(ctx: &mut Context) -> Result<(), Halt> {
    match ctx.command.work.clone() {
        Work::EncryptVm { domain, targets, key, class, hosts, source } => {
            let class = ctx.world.resolve(class, &hosts);
            let plan = planned(ctx, |ctx| Ok(encrypt::plan(ctx, domain, &targets, &key, &class, source)?));
            finish(ctx, plan, encrypt_steps::run, encrypt_steps::roll_back)
        }
        Work::CreateDisk { domain, target, path, format, bytes, key, class, hosts } => {
            let class = &ctx.world.resolve(class, &hosts);
            let wanted = Wanted { target: &target, path: &path, format, bytes, class };
            let plan = planned(ctx, |ctx| Ok(create_disk::plan(ctx, domain, &wanted, &key)?));
            finish(ctx, plan, encrypt_steps::run, encrypt_steps::roll_back)
        }
        Work::CreateVm { xml, key, class, hosts, sizes } => {
            let class = ctx.world.resolve(class, &hosts);
            let plan: Result<EncryptPlan, Halt> =
                planned(ctx, |ctx| Ok(create_vm::plan(ctx, &xml, &key, &class, &sizes)?));
            finish(ctx, plan, encrypt_steps::run, encrypt_steps::roll_back)
        }
        Work::DecryptVm { domain, targets, source } => {
            let plan: Result<DecryptPlan, Halt> =
                planned(ctx, |ctx| decrypt::plan(ctx, domain, &targets, source));
            finish(ctx, plan, decrypt_steps::run, decrypt_steps::roll_back)
        }
        Work::SetDisk { domain, target, class, hosts } => {
            let class = ctx.world.resolve(class, &hosts);
            let plan: Result<ClassPlan, Halt> =
                planned(ctx, |ctx| Ok(set_class::plan(ctx, domain, &target, class)?));
            finish(ctx, plan, set_class::run, set_class::roll_back)
        }
    }
}

/// The plan in the journal, or a new one, then written down.
fn planned<P: Serialize + DeserializeOwned>(
    ctx: &mut Context,
    make: impl FnOnce(&mut Context) -> Result<P, Halt>,
) -> Result<P, Halt> {
    if !ctx.is_done("", "planned") {
        ctx.reach("planned", "begin")?;
        // Nothing is begun that could not be done.
        ctx.world.job_program()?;
        let plan = match make(ctx) {
            Ok(plan) => plan,
            // An agent that comes back is there before libvirtd is.
            Err(Halt::Failed(why)) if ctx.resumed && why.code == Code::HostNotReady => {
                return Err(Halt::Suspended(why));
            }
            Err(halt) => return Err(halt),
        };
        ctx.reach("planned", "before")?;
        ctx.note("", "planned", &plan)?;
    }
    ctx.data("", "planned").ok_or_else(|| {
        Halt::Suspended(Refusal::new(
            Code::Failed,
            "the task's plan was written by another version of vmseal",
        ))
    })
}

type RollBack<P> = fn(&mut Context, &P) -> Result<Vec<String>, Halt>;

/// The steps; if they stop for good, back to where it began; the end is written down and told.
fn finish<P: NewFiles>(
    ctx: &mut Context,
    plan: Result<P, Halt>,
    run: fn(&mut Context, &P) -> Result<String, Halt>,
    roll_back: RollBack<P>,
) -> Result<(), Halt> {
    let plan = match plan {
        Ok(plan) => plan,
        // Nothing was begun.
        Err(halt) => return end(ctx, outcome(halt)?),
    };
    let mut back = match ctx.going_back() {
        Some(outcome) => outcome,
        None => match run(ctx, &plan) {
            Ok(message) => return end(ctx, success(message)),
            // Past the switch everything goes forward.
            Err(Halt::Failed(why)) if ctx.is_done("", "switched") => return Err(Halt::Suspended(why)),
            Err(halt) => {
                let outcome = outcome(halt)?;
                // Once it is written down it never goes forward again.
                if may_be_switched(ctx, &plan)
                    && let Standing::Named(why) | Standing::Used(why) = standing(ctx, &plan)?
                {
                    return Err(Halt::Suspended(why));
                }
                ctx.append(Entry::RollingBack { outcome: outcome.clone() })?;
                ctx.reach("rolling-back", "written")?;
                outcome
            }
        },
    };
    ctx.commit();
    // Asked again: an earlier run may have written it down long ago.
    let left = match standing(ctx, &plan)? {
        Standing::Unused => roll_back(ctx, &plan)?,
        // Of a plan that makes no files there is nothing to delete.
        Standing::Named(why) | Standing::Used(why) if plan.targets().is_empty() => vec![why.message],
        Standing::Named(why) | Standing::Used(why) => vec![format!("{}: nothing was deleted", why.message)],
    };
    if !left.is_empty() {
        back.message = format!("{}; not undone: {}", back.message, left.join("; "));
    }
    end(ctx, back)
}

/// How it ends; what is no end comes back as it is.
fn outcome(halt: Halt) -> Result<Outcome, Halt> {
    match halt {
        Halt::Failed(r) => {
            Ok(Outcome { state: TaskState::Failed, message: r.message, code: Some(r.code), hint: r.hint })
        }
        Halt::Cancelled => Ok(Outcome {
            state: TaskState::Cancelled,
            message: "cancelled; everything is as before".to_owned(),
            code: None,
            hint: String::new(),
        }),
        halt => Err(halt),
    }
}

fn success(message: String) -> Outcome {
    Outcome { state: TaskState::Succeeded, message, code: None, hint: String::new() }
}

fn end(ctx: &mut Context, outcome: Outcome) -> Result<(), Halt> {
    ctx.reach("finished", "before")?;
    ctx.append(Entry::Finished { outcome: outcome.clone() })?;
    ctx.say_outcome(&outcome);
    ctx.reach("finished", "after")
}
