//! A guest's serial console: a shell in the guest, driven from here.

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::interrupt;

/// One guest's console.
#[derive(Debug)]
pub struct Console {
    stream: UnixStream,
    path: PathBuf,
    heard: String,
    commands: u32,
}

/// How long a guest may take for anything: it is emulated, on a shared machine.
pub const PATIENCE: Duration = Duration::from_secs(90);

impl Console {
    /// Connects; QEMU made the socket.
    pub fn open(path: &Path) -> Self {
        let end = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout can be set");
                    return Self { stream, path: path.to_owned(), heard: String::new(), commands: 0 };
                }
                Err(e) if Instant::now() >= end => panic!("no console at {}: {e}", path.display()),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Waits for the guest's shell. What it said before we came is lost, so this asks until it answers.
    pub fn wait_ready(&mut self) {
        let end = Instant::now() + PATIENCE;
        let mut asked = 0;
        while Instant::now() < end {
            asked += 1;
            let mark = format!("READY-{asked}-YES");
            // The echo of the typed line holds the mark in two pieces, the answer in one.
            self.send(&format!("echo READY-{asked}-\"YES\"\n"));
            if self.heard_within(&mark, Duration::from_secs(3)) {
                return;
            }
        }
        panic!(
            "the guest at {} gave no shell within {PATIENCE:?}; it said:\n{}",
            self.path.display(),
            self.tail()
        );
    }

    /// Runs a command in the guest: exit status and what it printed.
    pub fn try_sh(&mut self, command: &str) -> (i32, String) {
        self.try_sh_within(command, PATIENCE)
    }

    /// As [`Console::try_sh`], with a deadline of its own.
    pub fn try_sh_within(&mut self, command: &str, deadline: Duration) -> (i32, String) {
        self.commands += 1;
        let n = self.commands;
        self.heard.clear();
        self.send(&format!("{command}; echo \"END\"{n}=$?.\n"));
        let mark = format!("END{n}=");
        let end = Instant::now() + deadline;
        loop {
            if let Some(at) = self.heard.find(&mark)
                && let Some(stop) = self.heard[at..].find('.')
            {
                let status = self.heard[at + mark.len()..at + stop].parse().unwrap_or(-1);
                let said = self.heard[..at].replace('\r', "");
                return (status, said);
            }
            assert!(
                Instant::now() < end,
                "the guest did not finish `{command}` within {deadline:?}; it said:\n{}",
                self.tail()
            );
            self.listen();
        }
    }

    /// Runs a command in the guest and demands exit 0.
    pub fn sh(&mut self, command: &str) -> String {
        let (status, said) = self.try_sh(command);
        assert_eq!(status, 0, "in the guest, `{command}` said:\n{said}");
        said
    }

    /// Types a line without waiting for its end.
    pub fn send(&mut self, text: &str) {
        let _ = self.stream.write_all(text.as_bytes());
    }

    fn heard_within(&mut self, mark: &str, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        while Instant::now() < end {
            if self.heard.contains(mark) {
                return true;
            }
            self.listen();
        }
        false
    }

    fn listen(&mut self) {
        interrupt::check();
        let mut bytes = [0u8; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) => {
                if let Ok(stream) = UnixStream::connect(&self.path) {
                    let _ = stream.set_read_timeout(Some(Duration::from_millis(200)));
                    self.stream = stream;
                } else {
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
            Ok(n) => self.heard.push_str(&String::from_utf8_lossy(&bytes[..n])),
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }

    fn tail(&self) -> &str {
        let mut from = self.heard.len().saturating_sub(2000);
        while !self.heard.is_char_boundary(from) {
            from += 1;
        }
        &self.heard[from..]
    }
}
