//! `vmseal audit`.

use clap::{Args, Subcommand};
use vmseal_api::{
    audit::{AuditEntry, AuditVerification},
    paths,
};

use crate::{
    context::Context,
    error::{self, CliError},
    list, output, when,
};

#[derive(Debug, Subcommand)]
pub(super) enum AuditCommand {
    /// List entries, oldest first
    #[command(after_help = "Example:\n  vmseal audit list --after 1200")]
    List(ListArgs),
    /// Check the whole chain; exit code 1 if it is broken
    #[command(after_help = "Example:\n  vmseal audit verify")]
    Verify,
}

#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// Begin after this entry
    #[arg(long, value_name = "SEQ")]
    after: Option<u64>,
    /// At most so many [default: all]
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

pub(super) fn run(context: &Context, command: &AuditCommand) -> Result<u8, CliError> {
    let client = context.client()?;
    match command {
        AuditCommand::List(args) => {
            let limit = args.limit.unwrap_or(usize::MAX);
            let entries = list::pages_after::<AuditEntry>(&client, paths::AUDIT, args.after, limit)?;
            context.show_list(&entries.json, || table(&entries.items))?;
            Ok(0)
        }
        AuditCommand::Verify => {
            let answer = client.get(paths::AUDIT_VERIFY)?;
            let found: AuditVerification = answer.read()?;
            context.show(&answer, || Ok(render(&found)))?;
            Ok(if found.intact { 0 } else { error::FAILED })
        }
    }
}

fn table(entries: &[AuditEntry]) -> String {
    output::table(
        ["SEQ", "AT", "WHO", "WHAT", "OBJECT", "OUTCOME", "DETAIL"],
        entries.iter().map(|e| {
            [
                e.seq.to_string(),
                when::utc(e.at_ms),
                e.who.clone(),
                e.verb.clone(),
                e.object.clone(),
                e.outcome.clone(),
                e.detail.clone(),
            ]
        }),
    )
}

fn render(found: &AuditVerification) -> String {
    match &found.broken {
        None if found.intact => format!("intact: {} entries, head {}", found.entries, found.head),
        None => format!("broken: {} entries checked", found.entries),
        Some(at) => output::fields([
            ("broken at entry", format!("{}: {}", at.seq, at.what)),
            ("good until there", format!("{} entries, head {}", found.entries, found.head)),
        ]),
    }
}

#[cfg(test)]
mod tests {
    use vmseal_api::audit::AuditBreak;

    use super::*;

    #[test]
    fn broken_chain_is_told_with_its_place() {
        let mut found = AuditVerification { intact: true, entries: 12, head: "ab12".into(), broken: None };
        assert_eq!(render(&found), "intact: 12 entries, head ab12");
        found.intact = false;
        found.broken = Some(AuditBreak { seq: 13, what: "the hash does not match".into() });
        assert_eq!(
            render(&found),
            "broken at entry: 13: the hash does not match\ngood until there: 12 entries, head ab12"
        );
    }
}
