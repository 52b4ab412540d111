//! `vmseal task`.

use clap::{Args, Subcommand};
use vmseal_api::{paths, task::Task};
use vmseal_model::task::{TaskKind, TaskState};

use crate::{context::Context, error::CliError, follow, list, output, size::Size, when};

#[derive(Debug, Subcommand)]
pub(super) enum TaskCommand {
    /// List tasks, newest first
    #[command(after_help = "Example:\n  vmseal task list --unfinished")]
    List(ListArgs),
    /// Show one task
    #[command(after_help = "Example:\n  vmseal task show 4d0c7d8e-1c1f-4c3e-9d52-6a3c7f5f0a11")]
    Show(IdArgs),
    /// Follow a task to its end; Ctrl-C leaves it going
    #[command(after_help = "Example:\n  vmseal task follow 4d0c7d8e-1c1f-4c3e-9d52-6a3c7f5f0a11")]
    Follow(IdArgs),
    /// End a task; all is as before it began
    #[command(after_help = "Example:\n  vmseal task cancel 4d0c7d8e-1c1f-4c3e-9d52-6a3c7f5f0a11")]
    Cancel(IdArgs),
}

#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// Only those that have not ended
    #[arg(long)]
    unfinished: bool,
}

#[derive(Debug, Args)]
pub(super) struct IdArgs {
    /// Id of the task
    #[arg(value_name = "ID")]
    id: String,
}

pub(super) fn run(context: &Context, command: &TaskCommand) -> Result<u8, CliError> {
    let client = context.client()?;
    match command {
        TaskCommand::List(args) => {
            let tasks = list::pages::<Task>(&client, paths::TASKS)?;
            let tasks = if args.unfinished { tasks.only(|t| !t.state.is_final()) } else { tasks };
            context.show_list(&tasks.json, || table(&tasks.items, when::now_ms()))?;
            Ok(0)
        }
        TaskCommand::Show(args) => {
            let answer = client.get(&paths::fill(paths::TASK, &args.id))?;
            context.show(&answer, || Ok(render(&answer.read()?, when::now_ms())))?;
            Ok(0)
        }
        TaskCommand::Follow(args) => follow::follow(context, &client, &args.id),
        TaskCommand::Cancel(args) => {
            let answer = client.post_empty(&paths::fill(paths::TASK_CANCEL, &args.id))?;
            context.done(&answer, &format!("task {} is being cancelled", args.id))?;
            Ok(0)
        }
    }
}

fn table(tasks: &[Task], now_ms: i64) -> String {
    output::table(
        ["ID", "WHAT", "VM", "STATE", "STEP", "DONE", "BEGUN"],
        tasks.iter().map(|t| {
            [
                t.id.clone(),
                kind(t.kind).to_owned(),
                t.vm.clone(),
                state(t.state).to_owned(),
                t.step.clone(),
                done(t),
                when::ago(t.created_ms, now_ms),
            ]
        }),
    )
}

fn render(t: &Task, now_ms: i64) -> String {
    let asked = if t.cancel_requested && !t.state.is_final() { ", cancel asked for" } else { "" };
    let end = t.finished_ms.map(|ms| format!("{} ({})", when::utc(ms), when::ago(ms, now_ms)));
    output::fields([
        ("task", t.id.clone()),
        ("what", kind(t.kind).to_owned()),
        ("VM", t.vm.clone()),
        ("host", t.host.clone()),
        ("state", format!("{}{asked}", state(t.state))),
        ("step", t.step.clone()),
        ("done", done(t)),
        ("says", t.message.clone()),
        ("code", t.code.clone().unwrap_or_default()),
        ("hint", t.hint.clone()),
        ("asked by", t.by.clone()),
        ("begun", format!("{} ({})", when::utc(t.created_ms), when::ago(t.created_ms, now_ms))),
        ("ended", end.unwrap_or_default()),
    ])
}

fn done(task: &Task) -> String {
    match task.total_bytes {
        0 => String::new(),
        total => format!("{} of {}", Size(task.done_bytes), Size(total)),
    }
}

fn kind(kind: TaskKind) -> &'static str {
    match kind {
        TaskKind::VmEncrypt => "vm encrypt",
        TaskKind::VmDecrypt => "vm decrypt",
        TaskKind::VmCreate => "vm create",
        TaskKind::DiskSet => "disk set",
        TaskKind::DiskCreate => "disk create",
        TaskKind::VmRepair => "vm repair",
    }
}

fn state(state: TaskState) -> &'static str {
    match state {
        TaskState::Queued => "queued",
        TaskState::Running => "running",
        TaskState::Waiting => "waiting",
        TaskState::Succeeded => "succeeded",
        TaskState::Failed => "failed",
        TaskState::Cancelled => "cancelled",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task() -> Task {
        Task {
            id: "4d0c7d8e".into(),
            kind: TaskKind::VmEncrypt,
            state: TaskState::Failed,
            host: "hv1".into(),
            vm: "web01".into(),
            domain_uuid: None,
            step: "vda allocated".into(),
            done_bytes: 1 << 30,
            total_bytes: 10 << 30,
            message: "/x has 1 GiB free, 10 GiB are needed".into(),
            code: Some("no-space".into()),
            hint: "make room or move the image".into(),
            cancel_requested: false,
            by: "user:alice".into(),
            created_ms: 1_795_510_212_000,
            updated_ms: 1_795_510_213_000,
            finished_ms: Some(1_795_510_213_000),
        }
    }

    #[test]
    fn failed_task_tells_why_and_what_to_do() {
        let expected = "\
task: 4d0c7d8e
what: vm encrypt
VM: web01
host: hv1
state: failed
step: vda allocated
done: 1 GiB of 10 GiB
says: /x has 1 GiB free, 10 GiB are needed
code: no-space
hint: make room or move the image
asked by: user:alice
begun: 2026-11-24 08:50:12 UTC (5 min ago)
ended: 2026-11-24 08:50:13 UTC (4 min ago)";
        assert_eq!(render(&task(), 1_795_510_512_000), expected);
    }

    #[test]
    fn list_of_tasks_has_one_line_each() {
        let text = table(&[task()], 1_795_510_512_000);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(
            lines[1].split_whitespace().collect::<Vec<_>>().join(" "),
            "4d0c7d8e vm encrypt web01 failed vda allocated 1 GiB of 10 GiB 5 min ago"
        );
    }
}
