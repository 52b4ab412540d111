//! `vmseal-hook` against every kind of agent: exit codes and deadlines. The bounds on time are far above what is
//! needed, so that a busy machine does not fail them, and far below what would hold up libvirtd.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use vmseal_model::hook::{HookReply, HookRequest, Phase};

const REFUSING: [&str; 3] = ["prepare", "migrate", "restore"];
const OTHERS: [&str; 7] =
    ["start", "started", "stopped", "release", "reconnect", "attach", "from-the-future"];
const OURS: &str = "<domain><metadata><vmseal:vm xmlns:vmseal='urn:vmseal:domain:1'/></metadata></domain>";
const CLEAR: &str = "<domain type='kvm'><name>web01</name></domain>";

/// A directory with the hook in it, the file beside it that names a run directory, and that run directory.
struct Lab {
    dir: PathBuf,
}

impl Lab {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("vmseal-hook-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("run")).unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_vmseal-hook"), dir.join("50-vmseal")).unwrap();
        fs::write(dir.join("50-vmseal.conf"), format!("run_dir = \"{}\"\n", dir.join("run").display()))
            .unwrap();
        Self { dir }
    }

    fn listen(&self) -> UnixListener {
        UnixListener::bind(self.dir.join("run/agent.sock")).unwrap()
    }

    /// An agent that treats every caller alike; it lives as long as the test's process.
    fn agent(&self, treat: impl Fn(UnixStream) + Send + 'static) {
        let listener = self.listen();
        thread::spawn(move || listener.incoming().for_each(|caller| treat(caller.unwrap())));
    }

    fn hook(&self, phase: &str, xml: &str) -> (Output, Duration) {
        run(&self.dir.join("50-vmseal"), phase, xml)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn run(hook: &Path, phase: &str, xml: &str) -> (Output, Duration) {
    let begun = Instant::now();
    let mut child = Command::new(hook)
        .args(["web01", phase, "begin", "-"])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The hook may have ended without reading: libvirt ignores the broken pipe too.
    let _ = child.stdin.take().unwrap().write_all(xml.as_bytes());
    let output = child.wait_with_output().unwrap();
    (output, begun.elapsed())
}

fn read_request(mut caller: &UnixStream) -> HookRequest {
    let mut bytes = Vec::new();
    let mut chunk = [0u8; 4096];
    loop {
        let n = caller.read(&mut chunk).unwrap();
        bytes.extend_from_slice(&chunk[..n]);
        if let Ok(request) = HookRequest::decode(&bytes) {
            return request;
        }
    }
}

/// Runs every phase at once: refusing ones must exit 1 with one line, all others 0 and silently.
fn expect_refusal_only_where_allowed(
    lab: &Lab,
    refusing_within: Duration,
    others_within: Duration,
) -> Vec<String> {
    thread::scope(|scope| {
        let calls: Vec<_> = REFUSING
            .iter()
            .chain(&OTHERS)
            .map(|phase| (phase, scope.spawn(move || lab.hook(phase, OURS))))
            .collect();
        let mut messages = Vec::new();
        for (phase, call) in calls {
            let (output, took) = call.join().unwrap();
            let stderr = String::from_utf8(output.stderr).unwrap();
            assert!(output.stdout.is_empty(), "{phase}");
            if REFUSING.contains(phase) {
                assert_eq!(output.status.code(), Some(1), "{phase}: {stderr}");
                assert_eq!(stderr.lines().count(), 1, "{phase}: {stderr}");
                assert!(stderr.starts_with("vmseal: ") && stderr.contains("web01"), "{phase}: {stderr}");
                assert!(took < refusing_within, "{phase} took {took:?}");
                messages.push(stderr);
            } else {
                assert_eq!(output.status.code(), Some(0), "{phase}: {stderr}");
                assert_eq!(stderr, "", "{phase}");
                assert!(took < others_within, "{phase} took {took:?}");
            }
        }
        messages
    })
}

#[test]
fn clear_vm_starts_with_the_agent_dead() {
    let lab = Lab::new("clear");
    for phase in REFUSING.iter().chain(&OTHERS) {
        let (output, took) = lab.hook(phase, CLEAR);
        assert_eq!(output.status.code(), Some(0), "{phase}");
        assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{phase}");
        assert!(took < Duration::from_secs(5), "{phase} took {took:?}");
    }
}

#[test]
fn clear_vm_does_not_even_ask_the_agent() {
    let lab = Lab::new("unasked");
    let listener = lab.listen();
    listener.set_nonblocking(true).unwrap();
    assert_eq!(lab.hook("prepare", CLEAR).0.status.code(), Some(0));
    assert!(listener.accept().is_err());
}

#[test]
fn dead_agent_refuses_at_once_and_only_where_allowed() {
    let lab = Lab::new("dead");
    for message in expect_refusal_only_where_allowed(&lab, Duration::from_secs(5), Duration::from_secs(5)) {
        assert!(message.contains("systemctl start vmseal-agent"), "{message}");
    }
}

#[test]
fn killed_agent_that_left_its_socket_refuses_at_once_and_only_where_allowed() {
    let lab = Lab::new("left");
    drop(lab.listen());
    expect_refusal_only_where_allowed(&lab, Duration::from_secs(5), Duration::from_secs(5));
}

#[test]
fn stopped_agent_costs_a_second_or_ten_and_kills_no_guest() {
    let lab = Lab::new("stopped");
    // Like SIGSTOP: the kernel takes the connection, nobody ever reads.
    let _listener = lab.listen();
    for message in expect_refusal_only_where_allowed(&lab, Duration::from_secs(14), Duration::from_secs(4)) {
        assert!(message.contains("did not answer within 10 s"), "{message}");
    }
}

#[test]
fn agent_answering_garbage_refuses_only_where_allowed() {
    let lab = Lab::new("garbage");
    lab.agent(|mut caller| {
        read_request(&caller);
        let _ = caller.write_all(b"\0\xff\xff\xff\xffHTTP/1.1 200 OK");
    });
    expect_refusal_only_where_allowed(&lab, Duration::from_secs(8), Duration::from_secs(4));
}

#[test]
fn agent_hanging_up_refuses_only_where_allowed() {
    let lab = Lab::new("hangup");
    lab.agent(|caller| drop(read_request(&caller)));
    expect_refusal_only_where_allowed(&lab, Duration::from_secs(8), Duration::from_secs(4));
}

#[test]
fn agent_answering_without_end_is_cut_off() {
    let lab = Lab::new("endless");
    lab.agent(|mut caller| {
        read_request(&caller);
        thread::spawn(move || while caller.write_all(&[0; 1 << 16]).is_ok() {});
    });
    expect_refusal_only_where_allowed(&lab, Duration::from_secs(8), Duration::from_secs(4));
}

#[test]
fn refusal_of_the_agent_is_shown_in_one_line_where_allowed() {
    let lab = Lab::new("refuses");
    lab.agent(|mut caller| {
        let request = read_request(&caller);
        assert_eq!((request.domain_name.as_str(), request.xml.as_str()), ("web01", OURS));
        let reply = HookReply { code: 1, message: "web01: key k1 is\nmissing".into(), xml: None };
        let _ = caller.write_all(&reply.encode());
    });
    for message in expect_refusal_only_where_allowed(&lab, Duration::from_secs(8), Duration::from_secs(4)) {
        assert_eq!(message, "vmseal: web01: key k1 is missing\n");
    }
}

#[test]
fn consent_of_the_agent_is_silent_and_its_xml_goes_to_libvirt() {
    let lab = Lab::new("agrees");
    lab.agent(|mut caller| {
        let xml = (read_request(&caller).phase == Phase::Migrate).then(|| "<domain/>".to_owned());
        let _ = caller.write_all(&HookReply { code: 0, message: String::new(), xml }.encode());
    });
    for (phase, out) in [("prepare", ""), ("migrate", "<domain/>"), ("release", "")] {
        let (output, _) = lab.hook(phase, OURS);
        assert_eq!(output.status.code(), Some(0), "{phase}");
        assert_eq!(output.stdout, out.as_bytes(), "{phase}");
        assert!(output.stderr.is_empty(), "{phase}");
    }
}

#[test]
fn definition_over_the_limit_is_refused_for_our_vms_only() {
    let lab = Lab::new("huge");
    let padding = "x".repeat(9 << 20);
    assert_eq!(lab.hook("prepare", &format!("{CLEAR}{padding}")).0.status.code(), Some(0));
    let (output, _) = lab.hook("prepare", &format!("{OURS}{padding}"));
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(lab.hook("reconnect", &format!("{OURS}{padding}")).0.status.code(), Some(0));
}
