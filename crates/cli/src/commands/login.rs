//! `vmseal login` and `vmseal logout`.
//!
//! The first contact shows the fingerprint of the server's CA and asks; from then on that CA is the only one believed.
//! The password goes only over a connection checked against it. The token is kept in a 0600 file.

use std::io::{self, IsTerminal, Write};

use base64::{Engine, engine::general_purpose::STANDARD};
use clap::Args;
use vmseal_api::{
    login::{Login, Session},
    paths,
};
use vmseal_model::refusal::Code;

use crate::{
    client::{Client, Endpoint, look_at_chain},
    config::{ClientConfig, ConfigDir, Remote},
    context::Context,
    error::CliError,
    output::{self, Format},
    password::PasswordArgs,
    pin::{self, Fingerprint},
    server_url::ServerUrl,
    when,
};

#[derive(Debug, Args)]
pub(super) struct LoginArgs {
    /// User name [default: that of the last login]
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// SHA-256 of the server's CA certificate, to accept it without being asked
    #[arg(long, value_name = "SHA256")]
    ca_fingerprint: Option<Fingerprint>,
    #[command(flatten)]
    password: PasswordArgs,
}

#[derive(Debug, Args)]
pub(super) struct LogoutArgs {
    /// Forget the server and its CA too
    #[arg(long)]
    forget_server: bool,
}

pub(super) fn login(context: &Context, args: &LoginArgs) -> Result<u8, CliError> {
    let dir = ConfigDir::of_caller()?;
    let mut config = dir.load()?;
    let url = address(context, &config)?;
    let known = config.remote.as_ref().filter(|remote| remote.server == url.to_string());
    let ca = match known {
        Some(remote) => remote.ca_der()?,
        None => first_contact(&url, args.ca_fingerprint)?,
    };
    if args.ca_fingerprint.is_some_and(|wanted| wanted != Fingerprint::of(&ca)) {
        return Err(other_ca(&url, &Fingerprint::of(&ca)));
    }
    let user = match args.user.clone().or_else(|| known.map(|remote| remote.user.clone())) {
        Some(user) => user,
        None => ask("User name: ")?,
    };
    let client = Client::new(Endpoint::Remote { url: url.clone(), tls: pin::pinned(&ca)?, token: None })?;
    let password = args.password.read(&format!("Password of {user} at {url}"))?;
    let session: Session = client.post(paths::LOGIN, &Login { name: user.clone(), password })?.read()?;
    // The old token goes first: it must never stand beside another server's name.
    dir.forget_token()?;
    config.remote = Some(Remote { server: url.to_string(), user, ca: STANDARD.encode(&ca) });
    dir.save(&config)?;
    dir.save_token(&session.token)?;
    match context.output {
        Format::Json => output::json(&serde_json::json!({
            "name": session.name, "roles": session.roles, "expires_ms": session.expires_ms, "server": url.to_string(),
        }))?,
        Format::Table => output::note(&format!(
            "signed in at {url} as {} ({}) until {}",
            session.name,
            if session.roles.is_empty() { "no role".to_owned() } else { session.roles.join(", ") },
            when::utc(session.expires_ms)
        )),
    }
    Ok(0)
}

pub(super) fn logout(context: &Context, args: &LogoutArgs) -> Result<u8, CliError> {
    let dir = ConfigDir::of_caller()?;
    let mut config = dir.load()?;
    if config.remote.is_some() && dir.token()?.is_some() && context.socket.is_none() {
        // Here the token is forgotten in any case; a server that cannot be reached lets it expire.
        if let Err(e) = context.client().and_then(|client| client.delete(paths::LOGIN)) {
            output::warn(&format!("the session was not ended at the server: {e}"));
        }
    }
    dir.forget_token()?;
    if args.forget_server {
        config.remote = None;
        dir.save(&config)?;
    }
    Ok(0)
}

fn address(context: &Context, config: &ClientConfig) -> Result<ServerUrl, CliError> {
    if context.socket.is_some() {
        return Err(CliError::usage("root needs no login on the server's socket")
            .hint("name the server: vmseal login --server URL"));
    }
    if let Some(url) = &context.server {
        return Ok(url.clone());
    }
    let remote = config.remote.as_ref().ok_or_else(|| {
        CliError::usage("no server is named").hint(
            "vmseal login --server https://HOST; root on the server's machine needs no login: its socket is enough",
        )
    })?;
    remote.server.parse().map_err(CliError::usage)
}

fn first_contact(url: &ServerUrl, wanted: Option<Fingerprint>) -> Result<Vec<u8>, CliError> {
    let ca =
        look_at_chain(url)?.pop().ok_or_else(|| CliError::failed(format!("{url} shows no certificate")))?;
    let seen = Fingerprint::of(&ca);
    if wanted.is_some_and(|wanted| wanted != seen) {
        return Err(other_ca(url, &seen));
    }
    // Before anybody is asked to believe it: it must vouch for the server it was shown by.
    Client::new(Endpoint::Remote { url: url.clone(), tls: pin::pinned(&ca)?, token: None })?.greet()?;
    if wanted.is_some() {
        return Ok(ca);
    }
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        return Err(CliError::usage(format!(
            "{url} is not known yet, and there is nobody to ask; its CA is {seen}"
        ))
        .hint("compare it with the fingerprint shown on the server, then give it: --ca-fingerprint SHA256"));
    }
    eprintln!("{url} is not known yet. The SHA-256 fingerprint of its CA certificate is");
    eprintln!("  {seen}");
    eprintln!("Compare it with what this prints on the server:");
    eprintln!("  openssl x509 -in /var/lib/vmseal/server/ca.pem -noout -fingerprint -sha256");
    match ask("Is it the same? [y/N] ")?.as_str() {
        "y" | "yes" | "Y" => Ok(ca),
        _ => Err(CliError::coded(
            Code::Unauthenticated,
            format!("{url} was not accepted; nothing was sent to it"),
        )),
    }
}

fn other_ca(url: &ServerUrl, seen: &Fingerprint) -> CliError {
    CliError::coded(Code::Integrity, format!("the CA of {url} has another fingerprint: {seen}"))
        .hint("nothing was sent to it; look at the fingerprint on the server itself before trying again")
}

fn ask(question: &str) -> Result<String, CliError> {
    if !io::stdin().is_terminal() {
        return Err(CliError::usage("no terminal to ask for the user name").hint("give it with --user NAME"));
    }
    eprint!("{question}");
    let _ = io::stderr().flush();
    let mut answer = String::new();
    io::stdin()
        .read_line(&mut answer)
        .map_err(|e| CliError::failed(format!("cannot read the terminal: {e}")))?;
    Ok(answer.trim().to_owned())
}
