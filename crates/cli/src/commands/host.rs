//! `vmseal host`.
//!
//! The join token is a secret. It goes to stdout, or to the agent's standard input; never into an argument list.

use std::{
    env,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use clap::{Args, Subcommand};
use vmseal_api::{
    host::{Capabilities, Host, JoinToken},
    paths,
    secret_text::SecretText,
};

use crate::{
    context::Context,
    error::CliError,
    list,
    output::{self, Format},
    when,
};

const AGENT: &str = "vmseal-agent";

#[derive(Debug, Subcommand)]
pub(super) enum HostCommand {
    /// Print a join token for a new host, or join this machine
    #[command(after_help = "Example:\n  vmseal host add | ssh root@hv1 vmseal-agent join -")]
    Add(AddArgs),
    /// List hosts
    #[command(after_help = "Example:\n  vmseal host list")]
    List,
    /// Show a host and what its doctor found
    #[command(after_help = "Example:\n  vmseal host show hv1")]
    Show(NameArgs),
    /// Remove a host: its agent gets no key any more
    #[command(after_help = "Example:\n  vmseal host remove hv1")]
    Remove(NameArgs),
}

#[derive(Debug, Args)]
pub(super) struct AddArgs {
    /// Join this machine, by vmseal-agent
    #[arg(long)]
    local: bool,
}

#[derive(Debug, Args)]
pub(super) struct NameArgs {
    /// Name or id of the host
    name: String,
}

pub(super) fn run(context: &Context, command: &HostCommand) -> Result<u8, CliError> {
    let client = context.client()?;
    match command {
        HostCommand::Add(args) => {
            let answer = client.post_empty(paths::JOIN_TOKENS)?;
            let token: JoinToken = answer.read()?;
            if args.local {
                join_this_machine(&agent_program(), &token.token)?;
                return Ok(0);
            }
            if context.output == Format::Table {
                let end = when::utc(token.expires_ms);
                output::note("on the new host, as root: vmseal-agent join -");
                output::note(&format!("then give it this line; it works once, until {end}:"));
            }
            context.show(&answer, || Ok(token.token.expose().to_owned()))?;
        }
        HostCommand::List => {
            let hosts = list::whole::<Host>(&client, paths::HOSTS)?;
            context.show_list(&hosts.json, || table(&hosts.items, when::now_ms()))?;
        }
        HostCommand::Show(args) => {
            let answer = client.get(&paths::fill(paths::HOST, &args.name))?;
            context.show(&answer, || Ok(render(&answer.read()?, when::now_ms())))?;
        }
        HostCommand::Remove(args) => {
            client.delete(&paths::fill(paths::HOST, &args.name))?;
            output::note(&format!("host {} gets no key any more; its running VMs run on", args.name));
        }
    }
    Ok(0)
}

/// The agent beside this program, as packages and builds put it; else the one in PATH.
fn agent_program() -> PathBuf {
    let beside = env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(AGENT)));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| AGENT.into())
}

fn join_this_machine(program: &Path, token: &SecretText) -> Result<(), CliError> {
    let cannot = |e: std::io::Error| {
        CliError::failed(format!("cannot run {}: {e}", program.display()))
            .hint("install vmseal-agent on this machine, or use: vmseal host add | ssh root@HOST vmseal-agent join -")
    };
    let mut child =
        Command::new(program).args(["join", "-"]).stdin(Stdio::piped()).spawn().map_err(cannot)?;
    let mut input = child.stdin.take().expect("stdin is piped");
    // An agent that ends early tells its own reason; the broken pipe would only hide it.
    let _ = input.write_all(token.expose().as_bytes()).and_then(|()| input.write_all(b"\n"));
    drop(input);
    let status = child.wait().map_err(cannot)?;
    if status.success() {
        Ok(())
    } else {
        Err(CliError::failed(format!("vmseal-agent join did not succeed ({status})")))
    }
}

fn table(hosts: &[Host], now_ms: i64) -> String {
    output::table(
        ["NAME", "STATE", "VMS", "WARNINGS", "AGENT", "SEEN"],
        hosts.iter().map(|h| {
            [
                h.name.clone(),
                h.state.as_str().to_owned(),
                h.vms.to_string(),
                h.warnings.len().to_string(),
                h.version.clone(),
                when::ago(h.seen_ms.unwrap_or(0), now_ms),
            ]
        }),
    )
}

fn render(h: &Host, now_ms: i64) -> String {
    let mut text = output::fields([
        ("host", h.name.clone()),
        ("id", h.id.clone()),
        ("state", format!("{}, seen {}", h.state.as_str(), when::ago(h.seen_ms.unwrap_or(0), now_ms))),
        ("agent", h.version.clone()),
        ("libvirt", h.libvirt_uri.clone()),
        ("keys in memory", h.secret_memory.clone()),
        ("disks by", ways(&h.capabilities)),
        ("VMs", h.vms.to_string()),
        ("joined", when::utc(h.joined_ms)),
        ("certificate until", when::utc(h.certificate_expires_ms)),
    ]);
    for warning in &h.warnings {
        let line = output::fields([("\nwarning", warning.message.clone()), ("  hint", warning.hint.clone())]);
        text.push_str(&line);
    }
    text
}

/// The ways in which it can give a VM its disks.
fn ways(has: &Capabilities) -> String {
    let mut ways = vec!["NBD".to_owned()];
    if has.vhost_user {
        ways.push("vhost-user".to_owned());
    }
    match (has.ublk, has.no_ublk.as_str()) {
        (true, _) => ways.push("ublk".to_owned()),
        (false, "") => {}
        (false, why) => ways.push(format!("not ublk: {why}")),
    }
    ways.join(", ")
}

#[cfg(test)]
mod tests {
    use vmseal_api::{host::HostState, status::Finding};

    use super::*;

    #[test]
    fn host_is_shown_with_its_warnings() {
        let host = Host {
            id: "9a".into(),
            name: "hv1".into(),
            state: HostState::Connected,
            version: "0.1.0".into(),
            libvirt_uri: "qemu:///system".into(),
            secret_memory: "mlock".into(),
            vms: 3,
            capabilities: Capabilities {
                ublk: false,
                no_ublk: "its kernel 6.1 has no module ublk_drv".into(),
                vhost_user: true,
            },
            warnings: vec![Finding {
                code: "clear-swap".into(),
                message: "swap is clear".into(),
                hint: "encrypt it".into(),
                host: Some("hv1".into()),
            }],
            joined_ms: 1_795_510_212_000,
            seen_ms: Some(1_795_510_212_000),
            certificate_expires_ms: 1_795_510_212_000,
        };
        let expected = "\
host: hv1
id: 9a
state: connected, seen now
agent: 0.1.0
libvirt: qemu:///system
keys in memory: mlock
disks by: NBD, vhost-user, not ublk: its kernel 6.1 has no module ublk_drv
VMs: 3
joined: 2026-11-24 08:50:12 UTC
certificate until: 2026-11-24 08:50:12 UTC
warning: swap is clear
  hint: encrypt it";
        assert_eq!(render(&host, 1_795_510_212_000), expected);
        assert!(table(&[host], 1_795_510_212_000).ends_with("hv1   connected  3    1         0.1.0  now"));
    }

    #[test]
    fn host_says_by_what_it_gives_disks() {
        let has = |ublk, vhost_user| ways(&Capabilities { ublk, vhost_user, no_ublk: String::new() });
        assert_eq!((&*has(true, true), &*has(false, false)), ("NBD, vhost-user, ublk", "NBD"));
    }

    #[test]
    fn token_reaches_the_agent_by_standard_input() {
        let dir = env::temp_dir().join(format!("vmseal-cli-join-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let script = dir.join("agent");
        let body = format!("#!/bin/sh\necho \"$*\" > {0}/args\ncat > {0}/input\n", dir.display());
        std::fs::write(&script, body).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(&script, mode).unwrap();
        join_this_machine(&script, &SecretText::new("vmseal1.TEST".into())).unwrap();
        assert_eq!(std::fs::read_to_string(dir.join("args")).unwrap(), "join -\n");
        assert_eq!(std::fs::read_to_string(dir.join("input")).unwrap(), "vmseal1.TEST\n");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn agent_that_is_not_installed_is_named() {
        let error = join_this_machine(Path::new("/nonexistent/vmseal-agent"), &SecretText::new("x".into()));
        assert!(error.unwrap_err().to_string().contains("/nonexistent/vmseal-agent"));
    }
}
