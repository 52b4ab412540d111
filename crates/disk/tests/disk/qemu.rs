//! A real QEMU whose processor is halted: its devices are used by the test (qtest), its state asked and changed by QMP.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    rig::{Disk, Scratch},
    tools::tool,
};

/// A QEMU, ended when dropped.
pub(crate) struct Qemu {
    process: Child,
    said: BufReader<ChildStdout>,
    monitor: BufReader<UnixStream>,
    qtest: BufReader<UnixStream>,
    _scratch: Scratch,
}

impl Qemu {
    /// A PC with these arguments; none if QEMU is not installed.
    pub(crate) fn start(arguments: &[&str]) -> Option<Self> {
        tool("qemu-system-x86_64")?;
        // What qemu-io says goes to standard output, and is to be read line by line.
        let mut command: Command = tool("stdbuf")?;
        command.args(["-oL", "qemu-system-x86_64"]);
        let scratch = Scratch::new();
        let (monitor, qtest) = (scratch.path("qmp"), scratch.path("qtest"));
        // Firmware that halts at the first instruction: `hlt`, and back to it.
        let firmware = scratch.path("firmware");
        let mut bytes = vec![0xff; 64 << 10];
        bytes[0xfff0..0xfff3].copy_from_slice(&[0xf4, 0xeb, 0xfd]);
        std::fs::write(&firmware, bytes).unwrap();
        let socket = |path: &PathBuf| format!("unix:{},server=on,wait=off", path.display());
        let mut process = command
            .args([
                "-machine",
                "pc,accel=tcg,memory-backend=mem",
                "-display",
                "none",
                "-nodefaults",
                "-m",
                "64M",
            ])
            .args(["-object", "memory-backend-memfd,id=mem,size=64M,share=on"])
            .args(["-qmp", &socket(&monitor), "-qtest", &socket(&qtest), "-qtest-log", "none"])
            .arg("-bios")
            .arg(&firmware)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let connect = |path: &PathBuf| {
            let deadline = Instant::now() + Duration::from_secs(60);
            loop {
                match UnixStream::connect(path) {
                    Ok(stream) => {
                        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                        return BufReader::new(stream);
                    }
                    Err(error) => assert!(Instant::now() < deadline, "QEMU does not listen: {error}"),
                }
                std::thread::yield_now();
            }
        };
        // In the order in which it makes them.
        let (qtest, monitor) = (connect(&qtest), connect(&monitor));
        let said = BufReader::new(process.stdout.take().unwrap());
        let mut qemu = Self { process, said, monitor, qtest, _scratch: scratch };
        let mut greeting = String::new();
        qemu.monitor.read_line(&mut greeting).unwrap();
        qemu.ask("qmp_capabilities", json!({})).unwrap();
        Some(qemu)
    }

    /// What QMP answers: what it returns, or its error.
    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        self.monitor.get_mut().write_all(line.as_bytes()).unwrap();
        loop {
            let mut line = String::new();
            if self.monitor.read_line(&mut line).unwrap() == 0 {
                panic!("QEMU has ended ({:?}) before it answered {command}", self.process.wait());
            }
            let mut answer: Value = serde_json::from_str(&line).unwrap();
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            if let Some(error) = answer.get("error") {
                return Err(error["desc"].as_str().unwrap().into());
            }
        }
    }

    /// Asks until the answer is what is waited for.
    pub(crate) fn wait_for(&mut self, command: &str, holds: impl Fn(&Value) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let answer = self.ask(command, json!({})).unwrap();
            if holds(&answer) {
                return;
            }
            assert!(Instant::now() < deadline, "{command} still says {answer}");
        }
    }

    /// Reads or writes as a device of the guest does, or who uses a node: `read -P 7 0 1M`. Panics if that fails.
    pub(crate) fn io(&mut self, on: &str, order: &str) {
        let line = format!("qemu-io {on} \"{order}\"");
        let answer = self.ask("human-monitor-command", json!({ "command-line": line })).unwrap();
        assert_eq!(answer, "", "{line}");
        loop {
            let mut said = String::new();
            assert!(self.said.read_line(&mut said).unwrap() > 0, "QEMU has ended");
            assert!(!said.contains("ailed"), "{line}: {said}");
            if said.starts_with("wrote") || said.starts_with("read") {
                return;
            }
        }
    }

    /// Bytes of a block node.
    pub(crate) fn size(&mut self, node: &str) -> u64 {
        let nodes = self.ask("query-named-block-nodes", json!({})).unwrap();
        let node = nodes.as_array().unwrap().iter().find(|found| found["node-name"] == node).unwrap();
        node["image"]["virtual-size"].as_u64().unwrap()
    }

    /// An access of the processor: `outl 0xcf8 0x80000000`, and what it read.
    pub(crate) fn access(&mut self, line: &str) -> u64 {
        writeln!(self.qtest.get_mut(), "{line}").unwrap();
        loop {
            let mut answer = String::new();
            assert!(self.qtest.read_line(&mut answer).unwrap() > 0, "QEMU has ended");
            if let Some(value) = answer.trim_end().strip_prefix("OK") {
                let digits = value.trim().trim_start_matches("0x");
                return if digits.is_empty() { 0 } else { u64::from_str_radix(digits, 16).unwrap() };
            }
            assert!(answer.starts_with("IRQ"), "{line}: {answer}");
        }
    }

    /// Ends it as libvirt does. It may be gone before it has answered, or taken the end of the line.
    pub(crate) fn quit(mut self) {
        let _ = self.monitor.get_mut().write_all(b"{\"execute\":\"quit\"}");
        assert!(self.process.wait().unwrap().success());
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A disk by NBD, as libvirt writes it.
pub(crate) fn nbd_node(disk: &Disk) -> String {
    format!(
        "driver=nbd,node-name=nbd0,server.type=unix,server.path={},export={},reconnect-delay=20",
        disk.socket.display(),
        disk.id
    )
}
