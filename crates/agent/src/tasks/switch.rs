//! The one step that counts: a domain's definition comes to name the new files, all disks at once.
//!
//! What to change and how to see that it is changed in; done, or certainly not done, out. Where nobody can say, it
//! waits: before this step everything can be undone, after it nothing must be. A crash may come between the two and
//! the journal, so the definition itself is asked before anything is undone: [`settle`], [`standing`].

use serde_json::{Value, json};
use vmseal_model::{id::DomainUuid, refusal::Code};

use crate::{
    domain_xml::DomainXml,
    ports::{Definition, HypervisorError},
    tasks::{
        context::Context,
        image::shell,
        place,
        plan::Identity,
        refusal::{Halt, Refusal},
        refuse::{check_off, uses},
    },
};

/// What a plan puts into a definition.
pub(crate) trait NewFiles {
    fn domain(&self) -> DomainUuid;
    /// The domain's name.
    fn name(&self) -> &str;
    /// The disks that get new files.
    fn targets(&self) -> Vec<&str>;
    /// Whether a definition names any of the new files.
    fn named_in(&self, xml: &DomainXml) -> bool;
    /// The same in words, where it does.
    fn is_named(&self) -> String {
        format!("the definition of {} names the new disks already", self.name())
    }
    /// Those that any definition may name by their path, each with its disk.
    fn clear_files(&self) -> Vec<(&str, &str)> {
        Vec::new()
    }
}

/// Whether the new files may be deleted.
pub(crate) enum Standing {
    /// No definition has anything to do with them.
    Unused,
    /// The VM's definition names one of them.
    Named(Refusal),
    /// Somebody else uses one of them.
    Used(Refusal),
}

/// Who uses the new files. Deleting one that a definition names would end the VM's data, whatever the journal says.
///
/// # Errors
///
/// [`Halt::Suspended`]: nobody can tell now.
pub(crate) fn standing(ctx: &Context, plan: &impl NewFiles) -> Result<Standing, Halt> {
    let unknown = |why: Refusal| Halt::Suspended(why);
    for which in [Definition::Persistent, Definition::Live] {
        let xml = match ctx.world.hypervisor.xml(plan.domain(), which) {
            Ok(xml) => DomainXml::parse(&xml).map_err(|e| unknown(e.into()))?,
            Err(HypervisorError::NoDomain { .. }) => continue,
            Err(error) => return Err(unknown(error.into())),
        };
        if plan.named_in(&xml) {
            let hint = format!("look at: virsh dumpxml {}", shell(plan.name()));
            return Ok(Standing::Named(Refusal::new(Code::Conflict, plan.is_named()).hint(hint)));
        }
    }
    let mut clear = plan.clear_files();
    // Whatever else lies there is not deleted anyway.
    clear.retain(|(target, path)| {
        let made: Option<Identity> = ctx.data(target, "created");
        made.is_some_and(|made| place::is_still(&ctx.world, path, &made))
    });
    if clear.is_empty() {
        return Ok(Standing::Unused);
    }
    let uses = uses(&ctx.world).map_err(|e| unknown(e.into()))?;
    Ok(match clear.iter().find_map(|(_, path)| Some((path, uses.other(path, None, None)?))) {
        Some((path, who)) => {
            Standing::Used(Refusal::new(Code::ImageShared, format!("{path} is used by {who} already")))
        }
        None => Standing::Unused,
    })
}

/// Whether the definition may have been changed: nothing is defined before every disk is verified.
pub(crate) fn may_be_switched(ctx: &Context, plan: &impl NewFiles) -> bool {
    plan.targets().into_iter().all(|target| ctx.is_done(target, "verified"))
}

/// After a crash: a definition that names new files was changed, although the journal does not say so. Then the task
/// goes forward and nothing else, and that before it opens or locks anything: the VM may be running, the old file gone.
///
/// # Errors
///
/// [`Halt::Suspended`]: nobody can tell, or the definition is changed in part and cannot be changed wholly now.
pub(crate) fn settle(
    ctx: &mut Context,
    plan: &impl NewFiles,
    switch: impl FnOnce(&mut Context) -> Result<Value, Halt>,
) -> Result<(), Halt> {
    if ctx.is_done("", "switched") || !may_be_switched(ctx, plan) {
        return Ok(());
    }
    match standing(ctx, plan)? {
        Standing::Unused => return Ok(()),
        Standing::Used(why) => return Err(Halt::Suspended(why)),
        Standing::Named(_) => {}
    }
    ctx.commit();
    ctx.step("", "switched", switch).map_err(|halt| match halt {
        Halt::Failed(why) => Halt::Suspended(why),
        halt => halt,
    })
}

/// Changes the definition a plan is about, or makes it of `new`, and reads it back. `apply` refuses if it is not as it
/// was planned; `is_done` says whether it is changed wholly.
///
/// # Errors
///
/// [`Halt::Failed`] or [`Halt::Cancelled`]: nothing was changed. [`Halt::Suspended`]: it is not known, or libvirt has
/// something else.
pub(crate) fn switch(
    ctx: &mut Context,
    plan: &impl NewFiles,
    new: Option<&DomainXml>,
    apply: impl Fn(&mut DomainXml) -> Result<(), Refusal>,
    is_done: impl Fn(&DomainXml) -> bool,
) -> Result<Value, Halt> {
    let switch = Switch {
        domain: plan.domain(),
        name: plan.name(),
        new,
        apply: &apply,
        is_done: &is_done,
        names_new: &|xml| plan.named_in(xml),
    };
    switch.run(ctx)?;
    Ok(json!({}))
}

/// A change to a definition.
struct Switch<'a> {
    domain: DomainUuid,
    name: &'a str,
    /// The definition of a domain that is not there yet.
    new: Option<&'a DomainXml>,
    /// Changes it; refuses if it is not as it was planned.
    apply: &'a dyn Fn(&mut DomainXml) -> Result<(), Refusal>,
    /// Whether it is changed, wholly.
    is_done: &'a dyn Fn(&DomainXml) -> bool,
    /// Whether it names any of the new files.
    names_new: &'a dyn Fn(&DomainXml) -> bool,
}

/// What libvirt has.
enum Now {
    Domain(Box<DomainXml>),
    Nothing,
    Unknown(Refusal),
}

impl Switch<'_> {
    fn run(&self, ctx: &mut Context) -> Result<(), Halt> {
        let why = match self.attempt(ctx) {
            Err(Halt::Failed(why)) => why,
            Err(Halt::Cancelled) => {
                Refusal::new(Code::Conflict, "cancelled while the definition was half changed")
            }
            done => return done,
        };
        // Whatever undoing would delete must not be what the definition names.
        match self.now(ctx) {
            Now::Nothing => Err(Halt::Failed(why)),
            Now::Domain(xml) if !(self.names_new)(&xml) => {
                ctx.check_wanted()?;
                Err(Halt::Failed(why))
            }
            Now::Domain(_) => Err(Halt::Suspended(why)),
            Now::Unknown(unknown) => Err(Halt::Suspended(unknown)),
        }
    }

    fn attempt(&self, ctx: &mut Context) -> Result<(), Halt> {
        // An answer to a define that was lost: nothing may be undone before the definition was read.
        let mut uncertain = false;
        loop {
            let current = match self.now(ctx) {
                Now::Domain(xml) if (self.is_done)(&xml) => return Ok(()),
                Now::Domain(xml) => Some(xml),
                Now::Nothing if self.new.is_some() => None,
                Now::Nothing => {
                    let text = format!("{} is not defined any more", self.name);
                    return Err(Refusal::new(Code::Conflict, text).into());
                }
                Now::Unknown(why) => {
                    self.wait(ctx, &why, uncertain)?;
                    continue;
                }
            };
            if !uncertain {
                ctx.check_wanted()?;
            }
            if let (Some(_), Some(new)) = (&current, self.new) {
                return Err(self.taken(new));
            }
            if current.is_some() {
                match ctx.world.hypervisor.domain(self.domain) {
                    Ok(info) => check_off(&info)?,
                    Err(error) => {
                        self.wait(ctx, &error.into(), uncertain)?;
                        continue;
                    }
                }
            }
            let old = current.as_ref().map(|xml| xml.to_xml());
            let Some(mut xml) = current.map(|xml| *xml).or_else(|| self.new.cloned()) else { continue };
            (self.apply)(&mut xml)?;
            match ctx.world.hypervisor.define(&xml.to_xml()) {
                Ok(_) => return self.read_back(ctx, old.as_deref()),
                Err(error @ HypervisorError::Unreachable { .. }) => {
                    uncertain = true;
                    self.wait(ctx, &error.into(), uncertain)?;
                }
                Err(error) => {
                    // It may have refused after it had taken it, in an old version perhaps: look.
                    return match self.now(ctx) {
                        Now::Domain(xml) if (self.is_done)(&xml) => Ok(()),
                        Now::Domain(_) | Now::Nothing => Err(Refusal::from(error).into()),
                        Now::Unknown(why) => Err(Halt::Suspended(why)),
                    };
                }
            }
        }
    }

    fn read_back(&self, ctx: &mut Context, old: Option<&str>) -> Result<(), Halt> {
        let unlike = Refusal::new(
            Code::Failed,
            format!("libvirt took the definition of {} and reads it back otherwise", self.name),
        );
        match self.now(ctx) {
            Now::Domain(xml) if (self.is_done)(&xml) => Ok(()),
            Now::Unknown(why) => Err(Halt::Suspended(why)),
            // Back to what it was, and certain of it, before anything is undone.
            Now::Domain(_) | Now::Nothing => match old {
                Some(old) if ctx.world.hypervisor.define(old).is_ok() && self.is_as(ctx, old) => {
                    Err(Halt::Failed(unlike))
                }
                _ => Err(Halt::Suspended(unlike.hint(format!("look at: virsh dumpxml {}", self.name)))),
            },
        }
    }

    /// Whether the disks are as in that definition.
    fn is_as(&self, ctx: &Context, old: &str) -> bool {
        match (self.now(ctx), DomainXml::parse(old)) {
            (Now::Domain(now), Ok(old)) => now.disks() == old.disks(),
            _ => false,
        }
    }

    fn now(&self, ctx: &Context) -> Now {
        match ctx.world.hypervisor.xml(self.domain, Definition::Persistent) {
            Ok(xml) => match DomainXml::parse(&xml) {
                Ok(xml) => Now::Domain(Box::new(xml)),
                Err(error) => Now::Unknown(error.into()),
            },
            Err(HypervisorError::NoDomain { .. }) => Now::Nothing,
            Err(error) => Now::Unknown(error.into()),
        }
    }

    fn taken(&self, new: &DomainXml) -> Halt {
        let name = new.name().unwrap_or(self.name);
        Refusal::new(Code::Exists, format!("a domain with the UUID of {name} was defined meanwhile")).into()
    }

    fn wait(&self, ctx: &mut Context, why: &Refusal, uncertain: bool) -> Result<(), Halt> {
        ctx.say_waiting(why);
        let patience = ctx.patience();
        if uncertain {
            ctx.control.pause_unless_stopped(patience);
            if ctx.control.is_stopped() { Err(Halt::Stopped) } else { Ok(()) }
        } else {
            ctx.control.pause(patience);
            ctx.check_wanted()
        }
    }
}
