//! How a task's way is shown on stderr: a bar with rate and ETA on a terminal, a line a step elsewhere.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use vmseal_api::task::Task;
use vmseal_model::task::TaskState;

use crate::{output, size::Size, text::printable};

const COUNTED: &str =
    "{prefix} [{bar:24}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} ETA {eta} {msg}";
const UNCOUNTED: &str = "{prefix} {spinner} {elapsed} {msg}";

/// Shows one task.
pub(crate) enum Progress {
    /// On a terminal.
    Bar {
        /// The bar.
        bar: ProgressBar,
        /// Bytes in all, as last told; 0: not known yet.
        total: u64,
    },
    /// Elsewhere: the last line written.
    Lines {
        /// Not written again.
        last: String,
    },
}

impl Progress {
    /// On stderr.
    pub(crate) fn on_stderr() -> Self {
        if !io::stderr().is_terminal() {
            return Self::Lines { last: String::new() };
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(style(UNCOUNTED));
        bar.enable_steady_tick(Duration::from_millis(200));
        Self::Bar { bar, total: 0 }
    }

    /// The task as it is now.
    pub(crate) fn update(&mut self, task: &Task) {
        match self {
            Self::Lines { last } => {
                let line = line(task);
                if line != *last {
                    output::note(&line);
                    *last = line;
                }
            }
            Self::Bar { bar, total } => {
                let jumped = task.done_bytes < bar.position();
                if task.total_bytes != *total {
                    let was_uncounted = *total == 0;
                    *total = task.total_bytes;
                    bar.set_length(*total);
                    if was_uncounted {
                        bar.set_style(style(COUNTED));
                    }
                    bar.set_position(task.done_bytes);
                    // The rate counts from here: what was done before was done at another time.
                    bar.reset_eta();
                } else {
                    bar.set_position(task.done_bytes);
                    if jumped {
                        bar.reset_eta();
                    }
                }
                bar.set_prefix(printable(&task.vm).into_owned());
                bar.set_message(printable(&doing(task)).into_owned());
            }
        }
    }

    /// Says something between.
    pub(crate) fn say(&self, text: &str) {
        match self {
            Self::Lines { .. } => output::note(text),
            Self::Bar { bar, .. } => bar.println(printable(text)),
        }
    }

    /// Takes the bar off the terminal.
    pub(crate) fn clear(&self) {
        if let Self::Bar { bar, .. } = self {
            bar.finish_and_clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template).expect("a fixed template");
    style.progress_chars("=> ")
}

fn line(task: &Task) -> String {
    // No byte counts: a line a step, not a line a poll.
    let total = if task.total_bytes > 0 { format!(" ({})", Size(task.total_bytes)) } else { String::new() };
    format!("{}: {}{total}", task.vm, doing(task))
}

fn doing(task: &Task) -> String {
    let state = match task.state {
        TaskState::Queued => "queued",
        TaskState::Waiting if task.message.is_empty() => "waiting",
        TaskState::Waiting => task.message.as_str(),
        _ if !task.step.is_empty() => task.step.as_str(),
        _ => "begun",
    };
    if task.cancel_requested { format!("{state}, being cancelled") } else { state.to_owned() }
}

#[cfg(test)]
mod tests {
    use vmseal_model::task::TaskKind;

    use super::*;

    fn task(state: TaskState, step: &str, total_bytes: u64) -> Task {
        Task {
            id: "4d0c7d8e-0000-4000-8000-000000000001".into(),
            kind: TaskKind::VmEncrypt,
            state,
            host: "hv1".into(),
            vm: "web01".into(),
            domain_uuid: None,
            step: step.into(),
            done_bytes: 7,
            total_bytes,
            message: String::new(),
            code: None,
            hint: String::new(),
            cancel_requested: false,
            by: "local root".into(),
            created_ms: 1,
            updated_ms: 1,
            finished_ms: None,
        }
    }

    #[test]
    fn line_names_vm_step_and_size() {
        assert_eq!(line(&task(TaskState::Queued, "", 0)), "web01: queued");
        assert_eq!(line(&task(TaskState::Running, "vda copied", 10 << 30)), "web01: vda copied (10 GiB)");
        let mut waiting = task(TaskState::Waiting, "vda keyed", 0);
        waiting.message = "waits for host hv1".into();
        waiting.cancel_requested = true;
        assert_eq!(line(&waiting), "web01: waits for host hv1, being cancelled");
    }

    #[test]
    fn bar_templates_are_valid() {
        style(COUNTED);
        style(UNCOUNTED);
    }
}
