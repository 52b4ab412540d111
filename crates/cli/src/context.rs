//! What every command needs: which server, and how to write.

use std::path::PathBuf;

use clap::Args;
use vmseal_model::refusal::Code;

use crate::{
    client::{Answer, Client, Endpoint},
    config::ConfigDir,
    error::CliError,
    output::{self, Format},
    pin,
    server_url::ServerUrl,
};

const DEFAULT_SOCKET: &str = "/run/vmseal/api.sock";

/// Options of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Common options")]
pub(crate) struct Context {
    /// The server's socket on this machine [default: /run/vmseal/api.sock]
    #[arg(long, global = true, value_name = "PATH", conflicts_with = "server")]
    pub(crate) socket: Option<PathBuf>,
    /// A server elsewhere: https://HOST[:PORT]
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) server: Option<ServerUrl>,
    /// Standard output as a table for people, or as the API's JSON, which is stable
    #[arg(long, global = true, value_enum, default_value = "table", value_name = "FORMAT")]
    pub(crate) output: Format,
}

impl Context {
    /// The server that the options, else `client.toml`, else the machine's own socket name.
    pub(crate) fn client(&self) -> Result<Client, CliError> {
        if let Some(socket) = &self.socket {
            return Client::new(Endpoint::Socket(socket.clone()));
        }
        let dir = match ConfigDir::of_caller() {
            Ok(dir) => dir,
            // A service has no home, and needs none to use the socket.
            Err(_) if self.server.is_none() => return Client::new(Endpoint::Socket(DEFAULT_SOCKET.into())),
            Err(e) => return Err(e),
        };
        let config = dir.load()?;
        let Some(remote) = config.remote else {
            if let Some(url) = &self.server {
                return Err(not_signed_in(url));
            }
            let socket = config.socket.unwrap_or_else(|| DEFAULT_SOCKET.into());
            return Client::new(Endpoint::Socket(socket));
        };
        let url: ServerUrl = remote.server.parse().map_err(CliError::usage)?;
        if let Some(asked) = self.server.as_ref().filter(|asked| **asked != url) {
            // The token belongs to the server it came from, and goes to no other.
            return Err(not_signed_in(asked));
        }
        let tls = pin::pinned(&remote.ca_der()?)?;
        let token = dir.token()?;
        if token.is_none() {
            return Err(not_signed_in(&url));
        }
        Client::new(Endpoint::Remote { url, tls, token })
    }

    /// Writes an answer: the API's object, or what `table` makes of it.
    pub(crate) fn show(
        &self,
        answer: &Answer,
        table: impl FnOnce() -> Result<String, CliError>,
    ) -> Result<(), CliError> {
        match self.output {
            Format::Json => output::json(&answer.json()?),
            Format::Table => output::data(&table()?),
        }
    }

    /// Writes a list.
    pub(crate) fn show_list(
        &self,
        json: &serde_json::Value,
        table: impl FnOnce() -> String,
    ) -> Result<(), CliError> {
        match self.output {
            Format::Json => output::json(json),
            Format::Table => output::data(&table()),
        }
    }

    /// Writes an answer where JSON is asked for; says `text` on stderr otherwise.
    pub(crate) fn done(&self, answer: &Answer, text: &str) -> Result<(), CliError> {
        match self.output {
            Format::Json => output::json(&answer.json()?),
            Format::Table => {
                output::note(text);
                Ok(())
            }
        }
    }
}

fn not_signed_in(url: &ServerUrl) -> CliError {
    CliError::coded(Code::Unauthenticated, format!("not signed in at {url}"))
        .hint(format!("sign in: vmseal login --server {url}"))
}
