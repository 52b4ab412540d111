//! `vmseal-server`: see the library for what it does.

use std::{
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use vmseal_server::{
    clock::Clock,
    config::ServerConfig,
    http,
    refusal::causes,
    server::{self, StartError},
};

const DEFAULT_CONFIG: &str = "/etc/vmseal/server.toml";

/// VM encryption for QEMU/KVM: the server.
#[derive(Parser)]
#[command(name = "vmseal-server", version)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Serve until told to stop.
    Run {
        /// Configuration file.
        #[arg(long, value_name = "FILE", default_value = DEFAULT_CONFIG)]
        config: PathBuf,
    },
    /// Print the OpenAPI document of the HTTP API.
    Openapi,
}

fn main() -> ExitCode {
    // Before anything else: TLS has one back end, and no key of this process gets into a core dump.
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        return fail("TLS was set up twice");
    }
    if let Err(error) = vmseal_keys::harden_process() {
        return fail(&format!("this process cannot be kept from dumping its memory: {error}"));
    }
    match Arguments::parse().what {
        What::Openapi => match std::io::stdout().write_all(http::document().as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error.to_string()),
        },
        What::Run { config } => {
            tracing_subscriber::fmt()
                .with_env_filter(
                    tracing_subscriber::EnvFilter::try_from_env("VMSEAL_LOG")
                        .unwrap_or_else(|_| "info,sqlx=warn".into()),
                )
                .with_ansi(std::io::stderr().is_terminal())
                .with_writer(std::io::stderr)
                .init();
            match run(&config) {
                Ok(()) => ExitCode::SUCCESS,
                Err(why) => fail(&why),
            }
        }
    }
}

fn fail(why: &str) -> ExitCode {
    eprintln!("error: {why}");
    ExitCode::FAILURE
}

fn run(path: &std::path::Path) -> Result<(), String> {
    let config =
        ServerConfig::read(path, path == std::path::Path::new(DEFAULT_CONFIG)).map_err(|e| causes(&e))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(|e| causes(&e))?;
    runtime.block_on(serve(&config))
}

async fn serve(config: &ServerConfig) -> Result<(), String> {
    let ended = |kind| signal(kind).map_err(|e| causes(&e));
    let (mut terminate, mut interrupt) = (ended(SignalKind::terminate())?, ended(SignalKind::interrupt())?);
    let running = server::start(config, Clock::default()).await.map_err(|e: StartError| causes(&e))?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    running.stop().await;
    Ok(())
}
