//! The agent's end of libvirt's hook: requests in on `agent.sock`, one reply each out. What a reply says is the
//! handler's business.
//!
//! libvirtd waits for a hook, so every caller gets a thread of its own and a slow one holds up nobody else. Only root
//! and this process's own user are listened to, although the socket's mode keeps others out already.

use std::{
    fs::{self, DirBuilder},
    io::{self, Read, Write},
    os::unix::{
        fs::{DirBuilderExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use vmseal_model::hook::{FrameError, HookReply, HookRequest};

use crate::peer;

/// How long a request may take to arrive, and a reply to be taken.
const EXCHANGE: Duration = Duration::from_secs(2);
/// Callers at once; libvirtd calls one hook a domain.
const MOST: usize = 256;

/// Decides what libvirt is told.
pub trait HookHandler: Send + Sync + 'static {
    /// The reply to what was asked at `asked`. Must not talk to libvirt, which waits for it.
    fn answer(&self, request: HookRequest, asked: Instant) -> HookReply;
}

/// Why nobody listens.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct ListenError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// Listens on `path` from now on; a socket that an earlier agent left there is replaced.
///
/// # Errors
///
/// [`ListenError`].
pub fn listen(path: &Path, handler: Arc<dyn HookHandler>) -> Result<(), ListenError> {
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source| ListenError { action, path, source }
    };
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(dir).map_err(failed("make", dir))?;
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("replace", path)(e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed("listen on", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed("close to others", path))?;
    let accept = move || {
        let busy = Arc::new(AtomicUsize::new(0));
        for caller in listener.incoming() {
            match caller {
                Ok(caller) => serve(caller, &handler, &busy),
                // Of the caller, or for want of descriptors: the next one may do better.
                Err(error) => {
                    tracing::warn!("a hook's call was lost: {error}");
                    thread::sleep(Duration::from_millis(20));
                }
            }
        }
    };
    thread::Builder::new().name("hooks".to_owned()).spawn(accept).map_err(failed("listen on", path))?;
    Ok(())
}

fn serve(caller: UnixStream, handler: &Arc<dyn HookHandler>, busy: &Arc<AtomicUsize>) {
    if busy.fetch_add(1, Ordering::AcqRel) >= MOST {
        busy.fetch_sub(1, Ordering::AcqRel);
        tracing::error!("more than {MOST} hooks at once; one was turned away");
        return;
    }
    let asked = Instant::now();
    let (handler, guard) = (Arc::clone(handler), Busy(Arc::clone(busy)));
    let spawned = thread::Builder::new().name("hook".to_owned()).spawn(move || {
        let _guard = guard;
        if let Err(error) = exchange(&caller, &*handler, asked) {
            tracing::warn!("a hook was not answered: {error}");
        }
    });
    if let Err(error) = spawned {
        tracing::error!("a hook was not answered: {error}");
    }
}

/// Counts a caller until it is dropped.
struct Busy(Arc<AtomicUsize>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn exchange(caller: &UnixStream, handler: &dyn HookHandler, asked: Instant) -> io::Result<()> {
    if !peer::is_trusted(caller)? {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let Some(request) = receive(caller)? else { return Ok(()) };
    let reply = handler.answer(request, asked);
    caller.set_write_timeout(Some(EXCHANGE))?;
    { caller }.write_all(&reply.encode())
}

/// The request; none from a caller that only looks whether somebody listens.
fn receive(caller: &UnixStream) -> io::Result<Option<HookRequest>> {
    let until = Instant::now() + EXCHANGE;
    let (mut bytes, mut chunk) = (Vec::new(), vec![0u8; 64 << 10]);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        caller.set_read_timeout(Some(left))?;
        let n = match { caller }.read(&mut chunk) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        bytes.extend_from_slice(&chunk[..n]);
        // A length that is too long ends it, so no more than one request is ever kept.
        match HookRequest::decode(&bytes) {
            Ok(request) => return Ok(Some(request)),
            Err(FrameError::Truncated) if n > 0 => {}
            Err(FrameError::Truncated) if bytes.is_empty() => return Ok(None),
            Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use vmseal_model::hook::Phase;

    use super::*;
    use crate::scratch::Scratch;

    struct Echo;

    impl HookHandler for Echo {
        fn answer(&self, request: HookRequest, _: Instant) -> HookReply {
            HookReply { code: 7, message: request.domain_name, xml: None }
        }
    }

    fn request(name: &str) -> HookRequest {
        let (sub_phase, extra) = ("begin".to_owned(), "-".to_owned());
        HookRequest {
            domain_name: name.into(),
            phase: Phase::Prepare,
            sub_phase,
            extra,
            xml: "<domain/>".into(),
        }
    }

    fn ask(path: &Path, bytes: &[u8]) -> Vec<u8> {
        let mut socket = UnixStream::connect(path).unwrap();
        socket.write_all(bytes).unwrap();
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        let mut reply = Vec::new();
        socket.read_to_end(&mut reply).unwrap();
        reply
    }

    #[test]
    fn every_caller_gets_its_reply_and_garbage_gets_none() {
        let scratch = Scratch::new();
        let path = scratch.path().join("run/agent.sock");
        fs::create_dir(scratch.path().join("run")).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        listen(&path, Arc::new(Echo)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

        // One that says nothing yet does not hold up the others.
        let _silent = UnixStream::connect(&path).unwrap();
        assert!(ask(&path, b"garbage and more garbage").is_empty());
        assert!(ask(&path, &request("web01").encode()[..20]).is_empty());
        assert!(ask(&path, b"").is_empty());
        let reply = HookReply::decode(&ask(&path, &request("web01").encode())).unwrap();
        assert_eq!((reply.code, reply.message.as_str()), (7, "web01"));
    }
}
