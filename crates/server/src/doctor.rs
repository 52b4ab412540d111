//! What an administrator should look at: the server's own findings, then each host's.

use sqlx::SqliteConnection;
use vmseal_api::status::Finding;

use crate::{
    refusal::Refusal,
    server::Server,
    store::{StoreError, host, provider},
};

const DAY_MS: i64 = 24 * 3_600_000;
/// How long before its end a host's certificate is found.
const CERTIFICATE_MS: i64 = 30 * DAY_MS;
/// Most alarms shown.
const MAX_ALARMS: i64 = 50;

/// All findings.
pub(crate) async fn findings(server: &Server, db: &mut SqliteConnection) -> Result<Vec<Finding>, Refusal> {
    let mut all = providers(server, db).await?;
    all.extend(keys(db).await?);
    all.extend(alarms(server, db).await?);
    all.extend(hosts(server, db).await?);
    Ok(all)
}

fn finding(code: &str, message: String, hint: &str) -> Finding {
    Finding { code: code.into(), message, hint: hint.into(), host: None }
}

async fn providers(server: &Server, db: &mut SqliteConnection) -> Result<Vec<Finding>, StoreError> {
    let mut found = Vec::new();
    let rows = provider::list(db).await?;
    if !rows.is_empty() && rows.iter().all(|row| row.is_default == 0) {
        found.push(finding(
            "no-default-provider",
            "no key provider is the default: operations have to name one".into(),
            "`vmseal provider default NAME`",
        ));
    }
    for (name, why) in server.providers.broken() {
        found.push(finding(
            "provider-unreadable",
            format!("the keys of provider {name} do not open: {why}"),
            "put root.key and server.db back from the same backup, or remove the provider and import its backup",
        ));
    }
    for row in rows {
        for generation in provider::generations(db, &row.name).await? {
            if generation.backed_up_at_ms.is_none() {
                found.push(finding(
                    "provider-not-backed-up",
                    format!(
                        "provider {}, generation {}, has no verified backup",
                        row.name, generation.number
                    ),
                    &format!("`vmseal provider export {}`", row.name),
                ));
            }
        }
    }
    Ok(found)
}

async fn keys(db: &mut SqliteConnection) -> Result<Vec<Finding>, StoreError> {
    let missing: Vec<(String, i64)> = sqlx::query_as(
        "SELECT provider, COUNT(*) FROM keys WHERE missing_since_ms IS NOT NULL AND \
         (vm_id IN (SELECT vm_id FROM bindings)) GROUP BY provider ORDER BY provider",
    )
    .fetch_all(&mut *db)
    .await?;
    let mut found: Vec<Finding> = missing
        .into_iter()
        .map(|(name, number)| {
            let message = format!("{number} keys of provider {name} that VMs need are missing");
            finding("keys-missing", message, "`vmseal provider import` its backup")
        })
        .collect();
    let strange: Vec<(String, String)> = sqlx::query_as(
        "SELECT v.name, h.name FROM vms v JOIN hosts h ON h.id = v.host_id WHERE v.unknown_ids = 1 ORDER BY 1, 2",
    )
    .fetch_all(db)
    .await?;
    found.extend(strange.into_iter().map(|(vm, host)| Finding {
        host: Some(host),
        ..finding(
            "unknown-vm",
            format!("the ids of VM {vm} are not known to belong together here: it will not start"),
            &format!("if this copy is the one to run: `vmseal vm adopt {vm}`"),
        )
    }));
    Ok(found)
}

/// Alarms of the last day.
async fn alarms(server: &Server, db: &mut SqliteConnection) -> Result<Vec<Finding>, StoreError> {
    let rows: Vec<(String, String, String)> = sqlx::query_as(
        "SELECT verb, who, detail FROM audit WHERE verb LIKE 'alarm.%' AND at_ms > $1 ORDER BY seq DESC LIMIT $2",
    )
    .bind(server.clock.now_ms() - DAY_MS)
    .bind(MAX_ALARMS)
    .fetch_all(db)
    .await?;
    let shown = |(verb, who, detail): (String, String, String)| Finding {
        host: who.strip_prefix("host:").map(str::to_owned),
        ..finding(&verb.replacen('.', "-", 1), detail, "`vmseal audit list` has the whole story")
    };
    Ok(rows.into_iter().map(shown).collect())
}

async fn hosts(server: &Server, db: &mut SqliteConnection) -> Result<Vec<Finding>, StoreError> {
    let mut found = Vec::new();
    for host in host::list(db).await? {
        let on = |finding: Finding| Finding { host: Some(host.name.clone()), ..finding };
        if !server.sessions.is_connected(&host.id) {
            found.push(on(finding(
                "host-unreachable",
                format!("host {} is not connected", host.name),
                "check vmseal-agent on it: `systemctl status vmseal-agent`",
            )));
        }
        if host.certificate_expires_ms - server.clock.now_ms() < CERTIFICATE_MS {
            found.push(on(finding(
                "certificate-expires",
                format!("the certificate of host {} expires soon", host.name),
                "let it join again: `vmseal host add`",
            )));
        }
        let warnings: Vec<Finding> = serde_json::from_str(&host.warnings).unwrap_or_default();
        found.extend(warnings.into_iter().map(on));
    }
    Ok(found)
}
