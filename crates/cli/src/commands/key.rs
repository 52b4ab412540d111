//! `vmseal key`: who uses which, and getting data back without a server.

use clap::Subcommand;
use vmseal_api::{key::Key, paths};

use super::{recover, runbook};
use crate::{context::Context, error::CliError, list, output, when};

#[derive(Debug, Subcommand)]
pub(super) enum KeyCommand {
    /// List keys, whose they are, and which are missing
    #[command(after_help = "Example:\n  vmseal key list")]
    List,
    /// Get a volume's key from the provider's backup; needs no server
    #[command(
        after_help = "Example:\n  vmseal key recover --volume web01.img.vmseal --backup main.p12 --out vda.key"
    )]
    Recover(recover::RecoverArgs),
    /// Print how to get a volume's data back with stock tools alone; needs no server
    #[command(after_help = "Example:\n  vmseal key runbook --volume web01.img.vmseal")]
    Runbook(runbook::RunbookArgs),
}

pub(super) fn run(context: &Context, command: &KeyCommand) -> Result<u8, CliError> {
    match command {
        KeyCommand::List => {
            let keys = list::whole::<Key>(&context.client()?, paths::KEYS)?;
            context.show_list(&keys.json, || table(&keys.items, when::now_ms()))?;
            Ok(0)
        }
        KeyCommand::Recover(args) => recover::run(context, args),
        KeyCommand::Runbook(args) => runbook::run(context, args),
    }
}

fn table(keys: &[Key], now_ms: i64) -> String {
    output::table(
        ["KEY", "PROVIDER", "STATE", "VM", "HOST", "LAST GIVEN"],
        keys.iter().map(|k| {
            let state = match k.missing_since_ms {
                Some(ms) => format!("{} since {}", k.state.as_str(), when::utc(ms)),
                None => k.state.as_str().to_owned(),
            };
            [
                k.key.clone(),
                k.provider.clone(),
                state,
                k.vm.clone().unwrap_or_default(),
                k.host.clone().unwrap_or_default(),
                when::ago(k.granted_ms.unwrap_or(0), now_ms),
            ]
        }),
    )
}

#[cfg(test)]
mod tests {
    use vmseal_api::key::KeyState;

    use super::*;

    #[test]
    fn missing_key_says_since_when_and_whose_it_is() {
        let key = Key {
            provider: "main".into(),
            key: "6f3c/g1".into(),
            state: KeyState::Missing,
            vm: Some("web01".into()),
            host: None,
            created_ms: 1,
            granted_ms: None,
            missing_since_ms: Some(1_795_510_212_000),
        };
        let text = table(&[key], 1_795_510_212_000);
        let row = text.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(row, "6f3c/g1 main missing since 2026-11-24 08:50:12 UTC web01 - -");
    }
}
