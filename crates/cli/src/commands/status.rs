//! `vmseal status`.

use vmseal_api::{paths, status::Status};

use crate::{context::Context, error::CliError, output, when};

pub(super) fn run(context: &Context) -> Result<u8, CliError> {
    let answer = context.client()?.get(paths::STATUS)?;
    context.show(&answer, || Ok(render(&answer.read()?, when::now_ms())))?;
    Ok(0)
}

fn render(s: &Status, now_ms: i64) -> String {
    let findings = match s.findings {
        0 => "none".to_owned(),
        n => format!("{n} (vmseal doctor lists them)"),
    };
    output::fields([
        ("server", format!("{} ({}), started {}", s.version, s.server_id, when::ago(s.started_ms, now_ms))),
        ("you", s.you.clone()),
        (
            "providers",
            format!("{}, default {}", s.providers, s.default_provider.as_deref().unwrap_or("none")),
        ),
        ("hosts", format!("{}, {} connected", s.hosts, s.hosts_connected)),
        ("VMs", s.vms.to_string()),
        ("  encrypted", s.vms_encrypted.to_string()),
        ("  partly encrypted", s.vms_partly_encrypted.to_string()),
        ("  clear", s.vms_clear.to_string()),
        ("  locked", s.vms_locked.to_string()),
        ("tasks at work", s.tasks_unfinished.to_string()),
        ("findings", findings),
        ("keys in memory", format!("kept in {}", s.secret_memory)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_tells_what_is_at_risk() {
        let status = Status {
            version: "0.1.0".into(),
            server_id: "5c9d1a52".into(),
            started_ms: 1_000,
            you: "local root".into(),
            default_provider: Some("main".into()),
            providers: 1,
            hosts: 2,
            hosts_connected: 1,
            vms: 4,
            vms_encrypted: 1,
            vms_partly_encrypted: 1,
            vms_clear: 2,
            vms_locked: 1,
            tasks_unfinished: 0,
            findings: 3,
            secret_memory: "memfd_secret".into(),
        };
        let expected = "\
server: 0.1.0 (5c9d1a52), started 3 min ago
you: local root
providers: 1, default main
hosts: 2, 1 connected
VMs: 4
  encrypted: 1
  partly encrypted: 1
  clear: 2
  locked: 1
tasks at work: 0
findings: 3 (vmseal doctor lists them)
keys in memory: kept in memfd_secret";
        assert_eq!(render(&status, 181_000), expected);
    }
}
