//! How a task's way is shown on stderr: a bar with rate and ETA on a terminal, a line a step elsewhere.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use vmseal_api::task::Task;
use vmseal_model::task::TaskState;

use crate::{
    output,
    rate::{Rate, duration},
    size::Size,
    text::printable,
};

const COUNTED: &str = "{prefix} [{bar:24}] {msg}";
const UNCOUNTED: &str = "{prefix} {spinner} {elapsed} {msg}";

/// Shows one task.
pub(crate) enum Progress {
    /// On a terminal.
    Bar {
        /// The bar.
        bar: ProgressBar,
        /// Bytes in all, as last told; 0: not known yet.
        total: u64,
        /// Its speed. Ours, since the bar's own counts what was done before it was there.
        rate: Rate,
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
        Self::Bar { bar, total: 0, rate: Rate::default() }
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
            Self::Bar { bar, total, rate } => {
                if task.total_bytes != *total {
                    *total = task.total_bytes;
                    bar.set_length(*total);
                    bar.set_style(style(if *total > 0 { COUNTED } else { UNCOUNTED }));
                }
                rate.add(Instant::now(), task.done_bytes);
                bar.set_position(task.done_bytes);
                bar.set_prefix(printable(&task.vm).into_owned());
                bar.set_message(printable(&counts(task, rate.bytes_per_second())).into_owned());
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

/// `1 GiB of 10 GiB, 400 MiB/s, ETA 23 s, vda copied`.
fn counts(task: &Task, bytes_per_second: Option<u64>) -> String {
    if task.total_bytes == 0 {
        return doing(task);
    }
    let mut text = format!("{} of {}", Size(task.done_bytes), Size(task.total_bytes));
    if let Some(rate) = bytes_per_second {
        text.push_str(&format!(", {}/s", Size(rate)));
        if let Some(seconds) = task.total_bytes.saturating_sub(task.done_bytes).checked_div(rate) {
            text.push_str(&format!(", ETA {}", duration(seconds)));
        }
    }
    format!("{text}, {}", doing(task))
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
    fn counts_have_rate_and_eta_once_they_are_known() {
        let mut task = task(TaskState::Running, "vda copied", 10 << 30);
        task.done_bytes = 1 << 30;
        assert_eq!(counts(&task, None), "1 GiB of 10 GiB, vda copied");
        assert_eq!(counts(&task, Some(400 << 20)), "1 GiB of 10 GiB, 400 MiB/s, ETA 23 s, vda copied");
        assert_eq!(counts(&task, Some(0)), "1 GiB of 10 GiB, 0 B/s, vda copied");
    }

    #[test]
    fn bar_templates_are_valid() {
        style(COUNTED);
        style(UNCOUNTED);
    }
}
