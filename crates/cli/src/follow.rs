//! Follows a task to its end. Ctrl-C never ends the task, which is the host's; it asks what to do.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
    time::sleep,
};
use vmseal_api::{paths, task::Task};
use vmseal_model::{refusal::Code, task::TaskState};

use crate::{
    client::{Answer, Client},
    context::Context,
    error::{self, CliError},
    output::{self, Format},
    progress::Progress,
};

const POLL: Duration = Duration::from_millis(250);
/// How long a server that is restarted, or a network that is mended, is waited for.
const PATIENCE: Duration = Duration::from_secs(120);

/// Whether a command waits for the task it began.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct WaitArgs {
    /// Do not wait for the task: print its id
    #[arg(long)]
    no_wait: bool,
}

/// Reads the task that `answer` began and follows it, unless told not to. Gives the exit code.
pub(crate) fn begun(
    context: &Context,
    client: &Client,
    answer: &Answer,
    wait: &WaitArgs,
) -> Result<u8, CliError> {
    let task: Task = answer.read()?;
    if wait.no_wait {
        context.show(answer, || Ok(task.id.clone()))?;
        return Ok(0);
    }
    follow(context, client, &task.id)
}

/// Follows the task to its end. Gives the exit code.
pub(crate) fn follow(context: &Context, client: &Client, id: &str) -> Result<u8, CliError> {
    let path = paths::fill(paths::TASK, id);
    let mut progress = Progress::on_stderr();
    let mut interrupt = client
        .block_on(async { signal(SignalKind::interrupt()) })
        .map_err(|e| CliError::failed(format!("cannot wait for Ctrl-C: {e}")))?;
    let mut silent_since: Option<Instant> = None;
    loop {
        match client.get(&path) {
            Ok(answer) => {
                silent_since = None;
                let task: Task = answer.read()?;
                if task.state.is_final() {
                    progress.clear();
                    return ended(context, &answer, &task);
                }
                progress.update(&task);
            }
            Err(e) if e.code() == Some(Code::ServerUnreachable) => {
                let since = *silent_since.get_or_insert_with(|| {
                    progress.say("the server does not answer; the task goes on at its host, waiting");
                    Instant::now()
                });
                if since.elapsed() > PATIENCE {
                    progress.clear();
                    return Err(e.hint(format!(
                        "the task goes on at its host; follow it with: vmseal task follow {id}"
                    )));
                }
            }
            Err(e) => {
                progress.clear();
                return Err(e);
            }
        }
        let interrupted = client.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => true,
                () = sleep(POLL) => false,
            }
        });
        if interrupted {
            progress.clear();
            match ask(client, &mut interrupt) {
                Choice::Follow => progress = Progress::on_stderr(),
                Choice::Cancel => {
                    client.post_empty(&paths::fill(paths::TASK_CANCEL, id))?;
                    progress = Progress::on_stderr();
                }
                Choice::Detach => {
                    output::note(&format!("task {id} goes on at its host"));
                    output::note(&format!("follow it with: vmseal task follow {id}"));
                    output::note(&format!("end it with:    vmseal task cancel {id}"));
                    return Ok(error::INTERRUPTED);
                }
            }
        }
    }
}

fn ended(context: &Context, answer: &Answer, task: &Task) -> Result<u8, CliError> {
    if context.output == Format::Json {
        output::json(&answer.json()?)?;
    }
    match task.state {
        TaskState::Succeeded => {
            if context.output == Format::Table {
                output::note(&format!("{}: {}", task.vm, succeeded(task)));
            }
            Ok(0)
        }
        TaskState::Cancelled => {
            Err(CliError::failed(format!("task {} was cancelled; all is as before", task.id)))
        }
        _ => {
            let code = task.code.as_deref().and_then(Code::from_word).unwrap_or(Code::Failed);
            Err(CliError::coded(code, task.message.clone()).hint(task.hint.clone()))
        }
    }
}

fn succeeded(task: &Task) -> &str {
    if task.message.is_empty() { "done" } else { &task.message }
}

enum Choice {
    Follow,
    Cancel,
    Detach,
}

/// Asks at the terminal; without one, and at a second Ctrl-C, the answer is to detach.
fn ask(client: &Client, interrupt: &mut Signal) -> Choice {
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        return Choice::Detach;
    }
    eprint!("\nThe task is the host's and goes on. [d]etach, [c]ancel the task, [f]ollow on? [d] ");
    let (tell, told) = oneshot::channel();
    // A thread of its own: a read of the terminal cannot be called off, and must not keep the program from ending.
    std::thread::spawn(move || {
        let mut answer = String::new();
        let _ = io::stdin().read_line(&mut answer);
        let _ = tell.send(answer);
    });
    let answer = client.block_on(async {
        tokio::select! {
            answer = told => answer.unwrap_or_default(),
            _ = interrupt.recv() => String::new(),
        }
    });
    match answer.trim() {
        "c" | "cancel" => Choice::Cancel,
        "f" | "follow" => Choice::Follow,
        _ => Choice::Detach,
    }
}
