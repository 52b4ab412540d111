//! `vmseal provider`: where keys come from, and their backups.
//!
//! A backup counts only once the server has opened the very bytes that were read back from where they are kept.

use std::path::{Path, PathBuf};

use base64::{Engine, engine::general_purpose::STANDARD};
use clap::{Args, Subcommand};
use vmseal_api::{
    paths,
    provider::{
        ConfirmBackup, CreateProvider, ExportProvider, ImportProvider, ImportedProvider, Provider,
        ProviderBackup, ProviderKind, RemovedProvider,
    },
};

use crate::{
    client::Client,
    context::Context,
    error::CliError,
    list,
    output::{self, Format},
    password::PasswordArgs,
    secret_file, when,
};

/// Most bytes of a backup; a real one has a few hundred for each generation.
pub(super) const MAX_BACKUP_BYTES: u64 = 1 << 20;

#[derive(Debug, Subcommand)]
pub(super) enum ProviderCommand {
    /// Make a key provider; it gives no key before its first backup
    #[command(after_help = "Example:\n  vmseal provider create --native main")]
    Create(CreateArgs),
    /// List key providers
    #[command(after_help = "Example:\n  vmseal provider list")]
    List,
    /// Show a key provider, its backups and the VMs that need it
    #[command(after_help = "Example:\n  vmseal provider show main")]
    Show(NameArgs),
    /// Back a key provider up: write a password-protected PKCS#12 file, read it back, have it verified
    #[command(after_help = "Example:\n  vmseal provider export main --out /media/usb/main.p12")]
    Export(ExportArgs),
    /// Bring a key provider back from its backup
    #[command(after_help = "Example:\n  vmseal provider import main.p12 --dry-run")]
    Import(ImportArgs),
    /// Take new keys from this provider when none is named
    #[command(after_help = "Example:\n  vmseal provider default main")]
    Default(NameArgs),
    /// Remove a key provider; refused while keys of it are in use
    #[command(after_help = "Example:\n  vmseal provider remove old")]
    Remove(RemoveArgs),
}

#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// A native provider of this name: the server derives keys itself
    #[arg(long, value_name = "NAME", required = true)]
    native: String,
    /// Make it the default; the first one is it anyway
    #[arg(long)]
    default: bool,
}

#[derive(Debug, Args)]
pub(super) struct NameArgs {
    /// Name of the provider
    name: String,
}

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// Name of the provider
    name: String,
    /// File to write; it must not exist
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    password: PasswordArgs,
}

#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    /// The backup
    file: PathBuf,
    /// Say what would happen, change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    password: PasswordArgs,
}

#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    /// Name of the provider
    name: String,
    /// Remove it although VMs need its keys: without a backup their data is lost
    #[arg(long)]
    danger_lose_keys: bool,
}

pub(super) fn run(context: &Context, command: &ProviderCommand) -> Result<u8, CliError> {
    let client = context.client()?;
    match command {
        ProviderCommand::Create(args) => {
            let body = CreateProvider {
                name: args.native.clone(),
                kind: ProviderKind::Native,
                default: args.default,
            };
            let answer = client.post(paths::PROVIDERS, &body)?;
            context.done(
                &answer,
                &format!("provider {} made; it gives no key before its first backup", args.native),
            )?;
            if context.output == Format::Table {
                output::note(&format!("next: vmseal provider export {0} --out {0}.p12", args.native));
            }
        }
        ProviderCommand::List => {
            let providers = list::whole::<Provider>(&client, paths::PROVIDERS)?;
            context.show_list(&providers.json, || table(&providers.items))?;
        }
        ProviderCommand::Show(args) => {
            let answer = client.get(&paths::fill(paths::PROVIDER, &args.name))?;
            context.show(&answer, || Ok(render(&answer.read()?, when::now_ms())))?;
        }
        ProviderCommand::Export(args) => export(context, &client, args)?,
        ProviderCommand::Import(args) => import(context, &client, args)?,
        ProviderCommand::Default(args) => {
            let answer = client.post_empty(&paths::fill(paths::PROVIDER_DEFAULT, &args.name))?;
            context.done(&answer, &format!("new keys come from {}", args.name))?;
        }
        ProviderCommand::Remove(args) => remove(context, &client, args)?,
    }
    Ok(0)
}

fn export(context: &Context, client: &Client, args: &ExportArgs) -> Result<(), CliError> {
    let out = &args.out;
    if out.symlink_metadata().is_ok() {
        return Err(CliError::failed(format!("{} exists already; nothing was exported", out.display()))
            .hint("name a file that does not exist"));
    }
    let password = args.password.read_new(&format!("New password of the backup of {}", args.name))?;
    let request = ExportProvider { password: password.clone() };
    let backup: ProviderBackup =
        client.post(&paths::fill(paths::PROVIDER_EXPORT, &args.name), &request)?.read()?;
    let bytes = STANDARD
        .decode(&backup.p12)
        .map_err(|_| CliError::failed("the server's backup is not base64; nothing was written"))?;
    secret_file::write_new(out, &bytes)?;
    let confirmed = secret_file::read_back(out, MAX_BACKUP_BYTES).and_then(|kept| {
        let confirm = ConfirmBackup { p12: STANDARD.encode(&*kept), password };
        client.post(&paths::fill(paths::PROVIDER_CONFIRM_BACKUP, &args.name), &confirm)
    });
    match confirmed {
        Ok(answer) => {
            let text =
                format!("backup {} read back and verified; provider {} is usable", out.display(), args.name);
            context.done(&answer, &text)
        }
        Err(e) => {
            output::warn(&format!(
                "{} was written but not verified: this backup does not count",
                out.display()
            ));
            Err(e)
        }
    }
}

fn import(context: &Context, client: &Client, args: &ImportArgs) -> Result<(), CliError> {
    let p12 = STANDARD.encode(&*secret_file::read(&args.file, MAX_BACKUP_BYTES)?);
    let password = args.password.read(&format!("Password of {}", args.file.display()))?;
    let request = ImportProvider { p12, password, dry_run: args.dry_run };
    let answer = client.post(paths::PROVIDER_IMPORT, &request)?;
    context.show(&answer, || Ok(render_import(&answer.read()?, &args.file)))
}

fn remove(context: &Context, client: &Client, args: &RemoveArgs) -> Result<(), CliError> {
    let mut path = paths::fill(paths::PROVIDER, &args.name);
    if args.danger_lose_keys {
        path = paths::with_query(&path, "danger_lose_keys", "true");
    }
    let answer = client.delete(&path)?;
    context.show(&answer, || Ok(render_removed(&answer.read()?)))
}

fn table(providers: &[Provider]) -> String {
    output::table(
        ["NAME", "KIND", "DEFAULT", "STATE", "KEYS", "VMS"],
        providers.iter().map(|p| {
            [
                p.name.clone(),
                p.kind.as_str().to_owned(),
                if p.default { "yes" } else { "" }.to_owned(),
                if p.usable { "usable" } else { "not backed up" }.to_owned(),
                p.keys.to_string(),
                p.vms.len().to_string(),
            ]
        }),
    )
}

fn render(p: &Provider, now_ms: i64) -> String {
    let state = match p.usable {
        true => "usable".to_owned(),
        false => format!("not backed up: gives no new key before vmseal provider export {}", p.name),
    };
    let mut text = output::fields([
        ("provider", p.name.clone()),
        ("id", p.uuid.clone()),
        ("kind", p.kind.as_str().to_owned()),
        ("state", state),
        ("default", if p.default { "yes" } else { "no" }.to_owned()),
        ("made", format!("{} ({})", when::utc(p.created_ms), when::ago(p.created_ms, now_ms))),
        ("keys", p.keys.to_string()),
        ("VMs", p.vms.join(" ")),
    ]);
    for g in &p.generations {
        let backup = match g.backed_up_ms {
            Some(ms) => format!("backup verified {} ({})", when::utc(ms), when::ago(ms, now_ms)),
            None => "no verified backup".to_owned(),
        };
        text.push_str(&format!("\ngeneration {}: made {}, {backup}", g.number, when::utc(g.created_ms)));
    }
    text
}

fn render_import(i: &ImportedProvider, file: &Path) -> String {
    let numbers: Vec<String> = i.generations_added.iter().map(u32::to_string).collect();
    let what = match (i.new, numbers.is_empty()) {
        (true, _) => format!("provider {} ({}) with generations {}", i.name, i.uuid, numbers.join(", ")),
        (false, false) => format!("generations {} of provider {} ({})", numbers.join(", "), i.name, i.uuid),
        (false, true) => format!("nothing new of provider {} ({})", i.name, i.uuid),
    };
    let verb = if i.dry_run { "would bring back" } else { "brought back" };
    let head = format!("{} {verb} {what}", file.display());
    output::fields([
        ("import", head),
        ("keys back", i.keys_back.to_string()),
        ("VMs that wait for them", i.vms.join(" ")),
        ("changed", if i.dry_run { "nothing (--dry-run)".to_owned() } else { String::new() }),
    ])
}

fn render_removed(r: &RemovedProvider) -> String {
    output::fields([
        ("removed", r.name.clone()),
        ("keys lost", r.keys_lost.to_string()),
        ("run on but will not start again", r.vms.join(" ")),
        (
            "way back",
            if r.keys_lost > 0 { "vmseal provider import of its backup".to_owned() } else { String::new() },
        ),
    ])
}

#[cfg(test)]
mod tests {
    use vmseal_api::provider::Generation;

    use super::*;

    fn provider() -> Provider {
        Provider {
            name: "main".into(),
            uuid: "1f0c".into(),
            kind: ProviderKind::Native,
            default: true,
            usable: false,
            generations: vec![Generation { number: 1, created_ms: 1_795_510_212_000, backed_up_ms: None }],
            keys: 2,
            vms: vec!["db\n".into(), "web01".into()],
            created_ms: 1_795_510_212_000,
        }
    }

    #[test]
    fn provider_without_backup_says_what_to_do() {
        let expected = "\
provider: main
id: 1f0c
kind: native
state: not backed up: gives no new key before vmseal provider export main
default: yes
made: 2026-11-24 08:50:12 UTC (3 min ago)
keys: 2
VMs: db\\n web01
generation 1: made 2026-11-24 08:50:12 UTC, no verified backup";
        assert_eq!(render(&provider(), 1_795_510_392_000), expected);
        let text = table(&[provider()]);
        assert!(text.ends_with("main  native  yes      not backed up  2     2"), "{text}");
    }

    #[test]
    fn removed_provider_names_the_vms_that_break() {
        let gone = RemovedProvider { name: "main".into(), keys_lost: 1, vms: vec!["web01".into()] };
        assert_eq!(
            render_removed(&gone),
            "removed: main\nkeys lost: 1\nrun on but will not start again: web01\nway back: vmseal provider import of its backup"
        );
    }

    #[test]
    fn dry_run_of_an_import_says_that_nothing_changed() {
        let imported = ImportedProvider {
            name: "main".into(),
            uuid: "1f0c".into(),
            new: true,
            generations_added: vec![1, 2],
            keys_back: 3,
            vms: vec!["web01".into()],
            dry_run: true,
        };
        let text = render_import(&imported, Path::new("m.p12"));
        assert!(
            text.starts_with("import: m.p12 would bring back provider main (1f0c) with generations 1, 2\n"),
            "{text}"
        );
        assert!(text.ends_with("changed: nothing (--dry-run)"), "{text}");
    }
}
