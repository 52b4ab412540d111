//! `vmseal-hook`, installed as `/etc/libvirt/hooks/qemu.d/50-vmseal`: libvirt's call in, the agent's verdict out.
//!
//! It decides by itself whether a VM is ours: a clear VM never depends on the agent, not even on its being there.
//! It exits non-zero only where libvirt takes that as a refusal and nothing else (`prepare`, `migrate`, `restore`);
//! in every other phase it exits 0 whatever happens, since there a non-zero exit kills a running guest. It waits no
//! longer than its phase allows, since libvirtd waits with it. It must not talk to libvirt: that would be a deadlock.
//!
//! libvirt cleans the environment, so the socket is found through files: `50-vmseal.conf` beside the hook (for a
//! private libvirtd), then `/etc/vmseal/agent.toml`, of each only the key `run_dir`, then `/run/vmseal`.

use std::{
    ffi::OsString,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use vmseal_model::{
    hook::{FrameError, HookReply, HookRequest, MAX_TEXT, MAX_XML, Phase},
    metadata::NAMESPACE,
};

/// The socket's directory where no file says otherwise.
const DEFAULT_RUN_DIR: &str = "/run/vmseal";
/// Configuration of an installed agent.
const AGENT_CONFIG: &str = "/etc/vmseal/agent.toml";
/// Configuration beside the hook.
const OWN_CONFIG: &str = "50-vmseal.conf";
/// Most bytes read of either.
const MAX_CONFIG: u64 = 64 << 10;
/// How long the agent may take to accept.
const CONNECT: Duration = Duration::from_secs(1);
/// Kept back from a phase's deadline for our own start and end.
const MARGIN: Duration = Duration::from_millis(150);

fn main() {
    let begun = Instant::now();
    let args: Vec<OsString> = std::env::args_os().collect();
    let text = |n: usize| args.get(n).map(|a| a.to_string_lossy().into_owned()).unwrap_or_default();
    // A phase this version does not know cannot be one in which a refusal is safe.
    let Some(phase) = Phase::from_arg(&text(2)) else { process::exit(0) };
    let deadline = begun + Duration::from_millis(phase.deadline_ms()) - MARGIN;

    let ours = Arc::new(AtomicBool::new(false));
    let (verdict_out, verdict_in) = mpsc::channel();
    let call =
        Call { name: text(1), phase, sub_phase: text(3), extra: text(4), hook: text(0).into(), deadline };
    let worker = {
        let ours = Arc::clone(&ours);
        let call = call.clone();
        thread::Builder::new().spawn(move || {
            let _ = verdict_out.send(call.run(&ours));
        })
    };
    let verdict = match worker {
        Err(e) => Err(format!("the hook cannot start a thread ({e})")),
        Ok(_) => match verdict_in.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(verdict) => verdict,
            Err(mpsc::RecvTimeoutError::Timeout) => Err(call.too_late()),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err("the hook failed".to_owned()),
        },
    };
    match verdict {
        Err(reason) if phase.may_refuse() && ours.load(Ordering::Acquire) => {
            let _ = writeln!(io::stderr(), "{}", one_line(&reason));
            process::exit(1)
        }
        _ => process::exit(0),
    }
}

/// What libvirt called us for.
#[derive(Clone)]
struct Call {
    name: String,
    phase: Phase,
    sub_phase: String,
    extra: String,
    hook: PathBuf,
    deadline: Instant,
}

impl Call {
    /// The whole work. `ours` is set as soon as the XML shows a VM of ours; an error counts only then.
    fn run(&self, ours: &AtomicBool) -> Result<(), String> {
        let mut xml = Vec::new();
        io::stdin()
            .take(MAX_XML as u64 + 1)
            .read_to_end(&mut xml)
            .map_err(|e| format!("cannot read the definition of '{}' from libvirt: {e}", self.name))?;
        let run_dir = run_dir(&self.hook);
        if !is_ours(&xml, &run_dir) {
            return Ok(());
        }
        ours.store(true, Ordering::Release);
        if xml.len() > MAX_XML {
            return Err(format!(
                "the definition of '{}' is longer than {} MiB; shorten its metadata",
                self.name,
                MAX_XML >> 20
            ));
        }
        let xml = String::from_utf8(xml).map_err(|_| {
            format!("the definition of '{}' is not UTF-8; repair it with 'virsh edit'", self.name)
        })?;
        let reply = self.ask(&run_dir, xml)?;
        if reply.code != 0 {
            return Err(reply.message);
        }
        if let Some(xml) = reply.xml {
            let mut out = io::stdout().lock();
            out.write_all(xml.as_bytes())
                .and_then(|()| out.flush())
                .map_err(|e| format!("cannot give libvirt the definition of '{}': {e}", self.name))?;
        }
        Ok(())
    }

    fn ask(&self, run_dir: &Path, xml: String) -> Result<HookReply, String> {
        let path = run_dir.join("agent.sock");
        let socket = connect(&path, CONNECT.min(self.left())).map_err(|e| {
            format!(
                "encrypted VM '{}' cannot start: the vmseal agent does not answer on {} ({e}); start it with 'systemctl start vmseal-agent', then try again",
                self.name,
                path.display()
            )
        })?;
        let request = HookRequest {
            domain_name: shortened(&self.name),
            phase: self.phase,
            sub_phase: shortened(&self.sub_phase),
            extra: shortened(&self.extra),
            xml,
        };
        if !vmseal_agent::peer::is_trusted(&socket).unwrap_or(false) {
            return Err(format!(
                "encrypted VM '{}' cannot start: {} is not the vmseal agent's, another user listens there; see who: 'ss -xlp'",
                self.name,
                path.display()
            ));
        }
        self.exchange(socket, &request.encode()).map_err(|e| match e {
            Exchange::TooLate => self.too_late(),
            Exchange::Io(e) => format!(
                "encrypted VM '{}' cannot start: the vmseal agent hung up ({e}); see 'journalctl -u vmseal-agent'",
                self.name
            ),
            Exchange::Garbage(e) => format!(
                "encrypted VM '{}' cannot start: the vmseal agent's answer is not understood ({e}); are hook and agent of the same version?",
                self.name
            ),
        })
    }

    fn exchange(&self, mut socket: UnixStream, request: &[u8]) -> Result<HookReply, Exchange> {
        socket.set_write_timeout(Some(self.some_left()?))?;
        socket.write_all(request)?;
        let mut bytes = Vec::new();
        let mut chunk = [0u8; 16 << 10];
        loop {
            socket.set_read_timeout(Some(self.some_left()?))?;
            let n = match socket.read(&mut chunk) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            bytes.extend_from_slice(&chunk[..n]);
            // What is too long is known by its length field, so no more than one reply is ever kept.
            match HookReply::decode(&bytes) {
                Ok(reply) => return Ok(reply),
                Err(FrameError::Truncated) if n > 0 => {}
                Err(e) => return Err(Exchange::Garbage(e)),
            }
        }
    }

    fn too_late(&self) -> String {
        format!(
            "encrypted VM '{}' cannot start: the vmseal agent did not answer within {} s; see 'systemctl status vmseal-agent', then try again",
            self.name,
            self.phase.deadline_ms() / 1000
        )
    }

    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    fn some_left(&self) -> Result<Duration, Exchange> {
        let left = self.left();
        if left.is_zero() { Err(Exchange::TooLate) } else { Ok(left) }
    }
}

/// Why there is no reply.
enum Exchange {
    TooLate,
    Io(io::Error),
    Garbage(FrameError),
}

impl From<io::Error> for Exchange {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::TooLate,
            _ => Self::Io(e),
        }
    }
}

/// Connects in a thread of its own: a stopped agent with a full queue would hold us for ever.
fn connect(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let (out, inn) = mpsc::channel();
    let path = path.to_owned();
    thread::Builder::new().spawn(move || {
        let _ = out.send(UnixStream::connect(path));
    })?;
    inn.recv_timeout(timeout).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Whether the definition carries our metadata or names one of our sockets.
fn is_ours(xml: &[u8], run_dir: &Path) -> bool {
    let own = format!("{}/libvirt-", run_dir.display());
    let default = format!("{DEFAULT_RUN_DIR}/");
    [NAMESPACE, &own, &default].iter().any(|mark| contains(xml, mark.as_bytes()))
}

fn contains(bytes: &[u8], mark: &[u8]) -> bool {
    let Some((&first, rest)) = mark.split_first() else { return true };
    let mut bytes = bytes;
    while let Some(at) = bytes.iter().position(|&b| b == first) {
        bytes = &bytes[at + 1..];
        if bytes.starts_with(rest) {
            return true;
        }
    }
    false
}

fn run_dir(hook: &Path) -> PathBuf {
    let beside = hook.with_file_name(OWN_CONFIG);
    [beside.as_path(), Path::new(AGENT_CONFIG)]
        .into_iter()
        .find_map(|file| {
            let mut text = String::new();
            std::fs::File::open(file).ok()?.take(MAX_CONFIG).read_to_string(&mut text).ok()?;
            run_dir_of(&text)
        })
        .unwrap_or_else(|| DEFAULT_RUN_DIR.into())
}

/// The value of `run_dir = "…"` in a TOML text; the agent itself checks the rest of that file.
fn run_dir_of(text: &str) -> Option<PathBuf> {
    text.lines().find_map(|line| {
        let value = line.trim().strip_prefix("run_dir")?.trim_start().strip_prefix('=')?.trim_start();
        let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        let (dir, _) = value[1..].split_once(quote)?;
        let dir = dir.trim_end_matches('/');
        (!dir.is_empty()).then(|| dir.into())
    })
}

/// A text no longer than a frame allows, cut between characters.
fn shortened(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_TEXT.min(text.len()))].to_owned()
}

fn one_line(text: &str) -> String {
    let plain: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    format!("vmseal: {}", if plain.trim().is_empty() { "refused without a reason" } else { plain.trim() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vm_is_ours_by_namespace_or_socket_path_only() {
        let dir = Path::new("/srv/lab/run");
        let ours = |xml: &str| is_ours(xml.as_bytes(), dir);
        assert!(ours("<vmseal:vm xmlns:vmseal='urn:vmseal:domain:1'/>"));
        assert!(ours("<host transport='unix' socket='/srv/lab/run/libvirt-0011/vda.sock'/>"));
        assert!(ours("<host socket='/run/vmseal/libvirt-0011/vda.sock'/>"));
        assert!(!ours("<domain><name>vmseal</name><source file='/srv/lab/run/images/a.img'/></domain>"));
        assert!(!ours("urn:vmseal:domain"));
        assert!(!ours(""));
    }

    #[test]
    fn mark_is_found_after_a_false_beginning() {
        assert!(contains(b"aab", b"ab"));
        assert!(!contains(b"aa", b"ab"));
    }

    #[test]
    fn run_dir_is_read_from_a_toml_line() {
        assert_eq!(run_dir_of("state_dir = \"/a\"\n  run_dir=\"/b/c/\" # why"), Some("/b/c".into()));
        assert_eq!(run_dir_of("run_dir = '/b'"), Some("/b".into()));
        assert_eq!(run_dir_of("libvirt_run_dir = \"/b\""), None);
        assert_eq!(run_dir_of("run_dir_of = \"/b\"\n# run_dir = \"/c\""), None);
        assert_eq!(run_dir_of("run_dir = \"\""), None);
    }

    #[test]
    fn message_is_one_line() {
        assert_eq!(one_line("no key\nfor you\u{1b}[0m"), "vmseal: no key for you [0m");
        assert_eq!(one_line(" \n"), "vmseal: refused without a reason");
    }
}
