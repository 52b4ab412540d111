//! Runs programs: the product's own and the system's. Waits with a deadline, never for ever.

use std::{
    io::Read,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::interrupt;

/// How a program ended and what it printed.
#[derive(Debug)]
pub struct Outcome {
    /// Its status.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
}

impl Outcome {
    /// Whether it exited 0.
    pub fn ok(&self) -> bool {
        self.status.success()
    }

    /// Its exit code; 128 + n for a signal.
    pub fn code(&self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Everything it printed.
    pub fn all(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

/// A program that runs longer is worth a line in a failing test's output.
const SLOW: Duration = Duration::from_secs(10);

/// Runs to the end, at most `deadline`; past it the program is killed and this panics with what it printed.
pub fn run_within(command: &mut Command, deadline: Duration) -> Outcome {
    let begin = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{command:?} does not start: {e}"));
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let status = wait_within(&mut child, deadline);
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    if begin.elapsed() > SLOW {
        eprintln!("{command:?} took {:?}", begin.elapsed());
    }
    let (stdout, stderr) = (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
    match status {
        Some(status) => Outcome { status, stdout, stderr, took: begin.elapsed() },
        None => panic!("{command:?} did not end within {deadline:?}; it printed:\n{stdout}{stderr}"),
    }
}

/// Runs to the end, at most a minute.
pub fn run(command: &mut Command) -> Outcome {
    run_within(command, Duration::from_secs(60))
}

/// Runs and demands exit 0; panics with everything it printed otherwise.
pub fn must(command: &mut Command) -> Outcome {
    let outcome = run(command);
    assert!(outcome.ok(), "{command:?} failed with {}:\n{}", outcome.code(), outcome.all());
    outcome
}

/// A system program, found on a root's PATH.
pub fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C");
    command
}

/// Waits until `done` holds, at most `deadline`; panics with `what` past it. The condition is looked at, never slept on
/// for longer than a scheduler's tick or two.
pub fn until(what: &str, deadline: Duration, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + deadline;
    while !done() {
        interrupt::check();
        assert!(Instant::now() < end, "{what}: not within {deadline:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Waits for a child, at most `deadline`.
pub fn wait_within(child: &mut Child, deadline: Duration) -> Option<ExitStatus> {
    let end = Instant::now() + deadline;
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if Instant::now() >= end {
            return None;
        }
        interrupt::check();
        thread::sleep(Duration::from_millis(10));
    }
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
