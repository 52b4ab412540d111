//! A server small enough to read, the `vmseal` program run against it, and a scratch directory.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use serde_json::Value;

/// A directory of this test, removed at its end.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        // Short: the path of a unix socket has at most 107 bytes.
        let path = std::env::temp_dir().join(format!("vmseal-cli-{}-{n}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Asked {
    /// `GET /v1/status`.
    pub what: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Asked {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// What the server does with a request.
pub enum Reply {
    /// 200 with JSON.
    Json(Value),
    /// A status with problem+json.
    Problem(u16, Value),
    /// These bytes, whatever they are, and the end of the connection.
    Raw(Vec<u8>),
    /// Bytes of a body without end.
    Endless,
}

/// Reads one request and answers it.
pub fn serve_one(
    stream: &mut (impl Read + Write),
    log: &Mutex<Vec<Asked>>,
    answer: &dyn Fn(&Asked, usize) -> Reply,
) {
    let Some(asked) = read_request(stream) else { return };
    let number = {
        let mut log = log.lock().unwrap();
        log.push(asked.clone());
        log.len()
    };
    let head = |status: u16, kind: &str, length: usize| {
        format!("HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n")
    };
    let bytes = match answer(&asked, number) {
        Reply::Json(value) => {
            let body = value.to_string();
            [head(200, "application/json", body.len()).into_bytes(), body.into_bytes()].concat()
        }
        Reply::Problem(status, value) => {
            let body = value.to_string();
            [head(status, "application/problem+json", body.len()).into_bytes(), body.into_bytes()].concat()
        }
        Reply::Raw(bytes) => bytes,
        Reply::Endless => {
            let _ = stream.write_all(b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n");
            let chunk = [b"100000\r\n".to_vec(), vec![b' '; 1 << 20], b"\r\n".to_vec()].concat();
            while stream.write_all(&chunk).is_ok() {}
            return;
        }
    };
    let _ = stream.write_all(&bytes).and_then(|()| stream.flush());
}

fn read_request(stream: &mut impl Read) -> Option<Asked> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let first = lines.next().unwrap();
    let what = first.strip_suffix(" HTTP/1.1").unwrap().to_owned();
    let headers: Vec<_> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let length = headers.iter().find(|(n, _)| n == "content-length").map_or(0, |(_, v)| v.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    Some(Asked { what, headers, body })
}

/// A server on a unix socket.
pub struct FakeServer {
    pub scratch: Scratch,
    log: Arc<Mutex<Vec<Asked>>>,
}

impl FakeServer {
    /// Answers each request by `answer`, which also gets its number, from 1 on.
    pub fn start(answer: impl Fn(&Asked, usize) -> Reply + Send + 'static) -> Self {
        let scratch = Scratch::new();
        let listener = UnixListener::bind(scratch.path("api.sock")).unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let seen = log.clone();
        // Ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming() {
                serve_one(&mut stream.unwrap(), &seen, &answer);
            }
        });
        Self { scratch, log }
    }

    /// Requests so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.log.lock().unwrap().clone()
    }

    /// Runs `vmseal --socket …` with these arguments.
    pub fn vmseal(&self, args: &[&str]) -> Said {
        let socket = self.scratch.path("api.sock");
        let mut all = vec!["--socket", socket.to_str().unwrap()];
        all.extend(args);
        vmseal(&self.scratch, &all)
    }
}

/// What a run said.
#[derive(Debug)]
pub struct Said {
    pub exit: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Said {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Self {
            exit: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// The program, with a home of its own and no terminal.
pub fn command(scratch: &Scratch) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmseal"));
    with_home(&mut command, scratch.0.as_path());
    command
}

/// Runs it.
pub fn vmseal(scratch: &Scratch, args: &[&str]) -> Said {
    command(scratch).args(args).output().unwrap().into()
}

/// Runs it with descriptor 3 as the shell's `redirection` says.
pub fn vmseal_with_fd3(scratch: &Scratch, redirection: &str, args: &[&str]) -> Said {
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("exec \"$0\" \"$@\" {redirection}"), env!("CARGO_BIN_EXE_vmseal")])
        .args(args);
    with_home(&mut command, scratch.0.as_path());
    command.output().unwrap().into()
}

/// Runs it on a terminal, by script(1); what it shows there comes as `stdout`. `typed` waits in the terminal.
pub fn at_terminal(scratch: &Scratch, args: &[&str], typed: &str) -> Said {
    let words: Vec<String> =
        [env!("CARGO_BIN_EXE_vmseal")].iter().chain(args).map(|w| format!("'{w}'")).collect();
    let mut command = Command::new("script");
    command.args(["-qec", &words.join(" "), "/dev/null"]);
    with_home(&mut command, scratch.0.as_path());
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script is installed (package bsdutils)");
    child.stdin.take().unwrap().write_all(typed.as_bytes()).unwrap();
    child.wait_with_output().unwrap().into()
}

fn with_home(command: &mut Command, home: &Path) {
    command.env_remove("XDG_CONFIG_HOME").env("HOME", home).stdin(Stdio::null());
}
