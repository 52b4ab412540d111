//! libvirt's hook: whatever state the agent is in, a guest lives and `virsh list` answers.

use std::{
    io::Write,
    os::unix::net::UnixListener,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use vmseal_e2e::{domain::Guest, house::House, lab::Lab, rounds, shell};

#[derive(Debug, Clone, Copy)]
enum Agent {
    Dead,
    Stopped,
    Garbage,
}

#[test]
fn guest_lives_and_list_answers_whatever_the_agent_does() {
    let mut house = House::start(Lab::for_test("hooks"));
    let guest = house.guest("sealed", &[("vda", "8M", "raw")]);
    let clear = house.guest("clear", &[("vda", "8M", "raw")]);
    house.define(&guest);
    house.define(&clear);
    house.must_vmseal(&["vm", "encrypt", "sealed"]);
    for _ in 0..rounds(1, 10) {
        for agent in [Agent::Dead, Agent::Stopped, Agent::Garbage] {
            let begin = Instant::now();
            phases_with(&mut house, &guest, &clear, agent);
            println!("agent {agent:?}: every phase in {:?}", begin.elapsed());
        }
    }
}

/// Every phase in which the hook must not refuse, against one state of the agent. A VM runs through start and started,
/// then libvirtd's restart (reconnect), stopped and release; a clear VM starts meanwhile.
fn phases_with(house: &mut House, guest: &Guest, clear: &Guest, agent: Agent) {
    let mut console = house.boot(guest);
    let listener = disable(house, agent);
    list_answers(house);

    // start, started: libvirtd calls them after a prepare that an agent must have answered, so they are called as it
    // would. They may not fail, which would end the QEMU that runs by then.
    let xml = house.libvirtd.must_virsh(&["dumpxml", "sealed", "--security-info"]);
    for (phase, sub) in [("start", "begin"), ("started", "begin"), ("reconnect", "begin")] {
        let (code, took) = call_hook(house, "sealed", phase, sub, &xml);
        assert_eq!(code, Some(0), "{agent:?}: the hook failed in {phase}");
        assert!(took < Duration::from_secs(2), "{agent:?}: the hook took {took:?} in {phase}");
    }

    // reconnect: libvirtd dies and finds the VM running.
    house.libvirtd.kill();
    house.libvirtd.start_again();
    house.libvirtd.wait_answers();
    list_answers(house);
    assert_eq!(house.libvirtd.must_virsh(&["domstate", "sealed"]).trim(), "running", "{agent:?}");
    console.sh("dd if=/dev/vda of=/dev/null bs=64k count=8 iflag=direct 2>/dev/null");

    // prepare, start, started of a clear VM.
    let begin = Instant::now();
    let started = house.libvirtd.virsh(&["start", &clear.name]);
    assert!(started.ok(), "{agent:?}: {}", started.all());
    assert!(begin.elapsed() < Duration::from_secs(8), "{agent:?}: a clear VM took {:?}", begin.elapsed());
    list_answers(house);
    house.libvirtd.must_virsh(&["destroy", &clear.name]);

    // stopped, release of the encrypted one; the list is asked for while they run.
    std::thread::scope(|scope| {
        let destroy = scope.spawn(|| house.libvirtd.must_virsh(&["destroy", "sealed"]));
        while !destroy.is_finished() {
            list_answers(house);
        }
    });
    house.wait_off("sealed");

    // The encrypted one is refused, in bounded time, and not lost.
    let refused = house.libvirtd.virsh(&["start", "sealed"]);
    assert!(!refused.ok() && refused.stderr.contains("vmseal"), "{agent:?}: {}", refused.all());
    assert!(refused.took < Duration::from_secs(14), "{agent:?}: {:?}", refused.took);
    enable(house, agent, listener);
    let mut console = house.boot(guest);
    house.power_off(guest, &mut console);
}

/// Runs the installed hook as libvirtd does: its exit code and how long it took.
fn call_hook(house: &House, name: &str, phase: &str, sub: &str, xml: &str) -> (Option<i32>, Duration) {
    let begin = Instant::now();
    let mut child = Command::new(house.lab.state.join("etc/hooks/qemu.d/50-vmseal"))
        .args([name, phase, sub, "-"])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the hook is installed");
    // It need not read all of it.
    let _ = child.stdin.take().expect("it is piped").write_all(xml.as_bytes());
    let status = shell::wait_within(&mut child, Duration::from_secs(15)).expect("the hook ends by itself");
    (status.code(), begin.elapsed())
}

fn list_answers(house: &House) {
    let list = house.libvirtd.virsh(&["list", "--all"]);
    assert!(list.ok(), "{}", list.all());
    assert!(list.took < Duration::from_secs(2), "virsh list took {:?}", list.took);
}

fn disable(house: &mut House, agent: Agent) -> Option<UnixListener> {
    match agent {
        Agent::Dead => {
            house.kill_agent();
            None
        }
        Agent::Stopped => {
            shell::must(Command::new("kill").args(["-STOP", &house.agent_pid().to_string()]));
            None
        }
        Agent::Garbage => {
            house.kill_agent();
            let socket = house.lab.run.join("agent.sock");
            let _ = std::fs::remove_file(&socket);
            let listener = UnixListener::bind(&socket).unwrap();
            let answering = listener.try_clone().unwrap();
            std::thread::spawn(move || {
                for stream in answering.incoming() {
                    let Ok(mut stream) = stream else { return };
                    let _ = stream.write_all(&[0xff; 65_536]);
                }
            });
            Some(listener)
        }
    }
}

fn enable(house: &mut House, agent: Agent, listener: Option<UnixListener>) {
    drop(listener);
    if matches!(agent, Agent::Stopped) {
        shell::must(Command::new("kill").args(["-CONT", &house.agent_pid().to_string()]));
    } else {
        house.start_agent();
    }
}
