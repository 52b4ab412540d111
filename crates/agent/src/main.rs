//! `vmseal-agent`: see the library for what it does.

use std::{
    io::{IsTerminal as _, Read as _, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use vmseal_agent::{
    agent,
    causes::causes,
    config::{AgentConfig, DEFAULT_PATH},
    doctor,
    identity::JoinedHost,
    join::{Joined, join},
    rbd::{Location, RbdError, Tool},
    ublk,
};
use zeroize::Zeroizing;

const HELP: &str = "\
vmseal-agent: unwraps the keys of this host's VMs and serves their disks

Usage: vmseal-agent <COMMAND> [--config FILE]

Commands:
  run     Run until ended; systemd does this
  join    Join a server: the token of 'vmseal host add' comes on standard input
  status  What this host is, and what is not right on it
  fence-rbd POOL/IMAGE
          Take an RBD image from a host that is off: breaks its lock and blocklists
          that host's client. Says who it is; does it with --that-host-is-off

Options:
  --config FILE  Configuration [default: /etc/vmseal/agent.toml]
  --version      Print the version
  --help         Print this

Example:
  vmseal host add | ssh root@hv1 vmseal-agent join -
";

/// Longest token that is read.
const MAX_TOKEN: u64 = 8192;
const USAGE: u8 = 2;

enum What {
    Run,
    Join,
    Status,
    FenceRbd { image: String, sure: bool },
    Version,
    Help,
}

fn main() -> ExitCode {
    // Before anything else: no key of this process gets into a core dump, and TLS has one back end.
    if let Err(error) = vmseal_keys::harden_process() {
        return fail(&format!("this process cannot be kept from dumping its memory: {error}"));
    }
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        return fail("TLS was set up twice");
    }
    let (what, path) = match arguments() {
        Ok(arguments) => arguments,
        Err(why) => {
            eprintln!("error: {why}\n\n{HELP}");
            return ExitCode::from(USAGE);
        }
    };
    let done = match what {
        What::Help => print(HELP),
        What::Version => print(&format!("vmseal-agent {}\n", env!("CARGO_PKG_VERSION"))),
        What::Run => with_config(&path, run),
        What::Join => with_config(&path, |config| join_server(&config)),
        What::Status => with_config(&path, |config| status(&config)),
        What::FenceRbd { image, sure } => with_config(&path, |config| fence_rbd(&config, &image, sure)),
    };
    done.map_or_else(|why| fail(&why), |()| ExitCode::SUCCESS)
}

fn arguments() -> Result<(What, PathBuf), String> {
    let mut what = None;
    let mut path = PathBuf::from(DEFAULT_PATH);
    let mut arguments = std::env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy();
        let (name, value) = text.split_once('=').map_or((&*text, None), |(n, v)| (n, Some(v.to_owned())));
        match (name, &what) {
            ("--help" | "-h" | "help", _) => return Ok((What::Help, path)),
            ("--version" | "-V", _) => return Ok((What::Version, path)),
            ("--config", _) => {
                let value = value.map(Into::into).or_else(|| arguments.next());
                path = value.ok_or("--config needs a file")?.into();
            }
            ("run", None) => what = Some(What::Run),
            ("join", None) => what = Some(What::Join),
            ("status", None) => what = Some(What::Status),
            ("fence-rbd", None) => what = Some(What::FenceRbd { image: String::new(), sure: false }),
            ("--that-host-is-off", Some(What::FenceRbd { image, .. })) => {
                what = Some(What::FenceRbd { image: image.clone(), sure: true });
            }
            (_, Some(What::FenceRbd { image, sure })) if image.is_empty() && !name.starts_with('-') => {
                what = Some(What::FenceRbd { image: text.clone().into_owned(), sure: *sure });
            }
            // Standard input is where the token comes from anyway.
            ("-", Some(What::Join)) => {}
            (_, Some(What::Join)) => {
                return Err("the token must not be an argument, which others can see; \
                            give it on standard input: vmseal-agent join -"
                    .to_owned());
            }
            _ => return Err(format!("'{text}' is not understood")),
        }
    }
    what.map(|what| (what, path)).ok_or_else(|| "say what to do".to_owned())
}

fn with_config(
    path: &std::path::Path,
    work: impl FnOnce(AgentConfig) -> Result<(), String>,
) -> Result<(), String> {
    work(AgentConfig::load(path).map_err(|error| causes(&error))?)
}

fn run(config: AgentConfig) -> Result<(), String> {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("VMSEAL_LOG").unwrap_or_else(|_| "info".into()),
        )
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    agent::run(config).map_err(|error| causes(&error))
}

fn join_server(config: &AgentConfig) -> Result<(), String> {
    if std::io::stdin().is_terminal() {
        eprintln!("paste the line that 'vmseal host add' printed, then press Enter:");
    }
    let mut token = Zeroizing::new(String::new());
    read_line(&mut token).map_err(|error| format!("cannot read the token: {error}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    match runtime.block_on(join(&token, &config.state_dir)).map_err(|error| causes(&error))? {
        Joined::Now(host) => print(&format!("joined as host {host}\n")),
        Joined::Before(host) => {
            print(&format!("had joined already, as host {host}; the token was not used\n"))
        }
    }
}

fn read_line(token: &mut String) -> std::io::Result<()> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_TOKEN as usize + 1));
    for byte in std::io::stdin().lock().take(MAX_TOKEN).bytes() {
        match byte? {
            b'\n' => break,
            byte => bytes.push(byte),
        }
    }
    let text = std::str::from_utf8(&bytes).map_err(std::io::Error::other)?;
    token.push_str(text);
    Ok(())
}

fn status(config: &AgentConfig) -> Result<(), String> {
    let mut text = match JoinedHost::load(&config.state_dir).map_err(|error| causes(&error))? {
        Some(joined) => format!("host: {}\nserver: {}\n", joined.host, joined.server),
        None => "host: not joined; make a token with 'vmseal host add'\n".to_owned(),
    };
    let running = if agent::is_running(config) { "running" } else { "not running" };
    text += &format!("agent: {running}\nsecret memory: {}\n", vmseal_keys::protection());
    let here = ublk::capabilities(config, std::path::Path::new("/"));
    text +=
        &format!("ublk: {}\n", if here.ublk { "yes".to_owned() } else { format!("no: {}", here.no_ublk) });
    for finding in doctor::findings(config, std::path::Path::new("/")) {
        text += &format!("warning: {}: {}\n  hint: {}\n", finding.code, finding.message, finding.hint);
    }
    print(&text)
}

/// An explicit order of whoever knows that the other host is off: nothing here ever does it by itself.
fn fence_rbd(config: &AgentConfig, image: &str, sure: bool) -> Result<(), String> {
    let location = if Location::is_meant_by(image) { image.to_owned() } else { format!("rbd:{image}") };
    let words = |error: RbdError| format!("{}\nhint: {}", causes(&error), error.hint());
    let location = Location::parse(&location).map_err(words)?;
    let tool = Tool::new(config).map_err(words)?;
    let Some(info) = tool.info(&location).map_err(words)? else {
        return Err(format!("there is no RBD image {}", location.name()));
    };
    if !sure {
        let who = if info.watchers.is_empty() { "nobody".to_owned() } else { info.watchers.join(", ") };
        return Err(format!(
            "nothing was done: {} is open at {who}\nhint: if that host is off or cut from the cluster, add \
             --that-host-is-off; one that still writes loses what it has not written",
            location.name()
        ));
    }
    let done = tool.fence(&location).map_err(words)?;
    print(&format!("{}: {done}\n", location.name()))
}

fn print(text: &str) -> Result<(), String> {
    std::io::stdout().write_all(text.as_bytes()).map_err(|error| error.to_string())
}

fn fail(why: &str) -> ExitCode {
    eprintln!("error: {why}");
    ExitCode::FAILURE
}
