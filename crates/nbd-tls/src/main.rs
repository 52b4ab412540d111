//! `vmseal-nbd-tls`: NBD over TLS in front of one export of a disk process. Started by systemd or the agent.

use std::{io::Write, net::TcpListener, process::ExitCode, sync::Arc};

use vmseal_nbd_tls::{
    confine::{self, ConfineError, Walls},
    identity::{self, IdentityError},
    log::line,
    options::{Options, USAGE},
    serve::Server,
};

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    if let [only] = &words[..]
        && (only == "--version" || only == "-V")
    {
        let _ = writeln!(std::io::stdout(), "vmseal-nbd-tls {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let options = match Options::parse(words) {
        Ok(options) => options,
        Err(error) => {
            let _ = write!(std::io::stderr(), "error: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match prepare(&options) {
        Ok((server, listener)) => server.run(&listener),
        Err(error) => {
            line(format_args!("cannot serve: {error}"));
            ExitCode::FAILURE
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum PrepareError {
    #[error(transparent)]
    Confine(#[from] ConfineError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Everything that needs a file or a privilege; none is left afterwards.
fn prepare(options: &Options) -> Result<(Arc<Server>, TcpListener), PrepareError> {
    confine::harden()?;
    let listener = confine::listener(options.listen_fd)?;
    let config = identity::load(options)?;
    let Walls { landlock, seccomp } = confine::enter(options.user.as_deref())?;
    let landlock = match landlock {
        0 => "WITHOUT landlock (not in this kernel)".to_owned(),
        abi => format!("landlock {abi}"),
    };
    let seccomp = if seccomp { "seccomp" } else { "WITHOUT seccomp (not in this kernel)" };
    let who = match &options.allow[..] {
        [] => "every client of the authority".to_owned(),
        names => format!("{names:?}"),
    };
    line(format_args!("serving {} over TLS 1.3 to {who}; {landlock}, {seccomp}", options.export.display()));
    let server = Server::new(
        config,
        options.export.clone(),
        options.handshake,
        options.handshakes,
        options.connections,
    );
    Ok((Arc::new(server), listener))
}
