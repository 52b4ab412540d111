//! libvirt's hook: whatever state the agent is in, a guest lives and `virsh list` answers.

use std::{
    io::Write,
    os::unix::net::UnixListener,
    process::Command,
    time::{Duration, Instant},
};

use vmseal_e2e::{domain::Guest, house::House, lab::Lab, shell};

#[derive(Debug, Clone, Copy)]
enum Agent {
    Dead,
    Stopped,
    Garbage,
}

/// Every phase in which the hook must not refuse, against one state of the agent. A VM runs through started → libvirtd
/// restart (reconnect) → stopped → release, and a clear VM starts.
fn phases_with(agent: Agent) {
    let mut house = House::start(Lab::for_test(&format!("hooks-{agent:?}").to_lowercase()));
    let guest = house.guest("sealed", &[("vda", "8M", "raw")]);
    let clear = house.guest("clear", &[("vda", "8M", "raw")]);
    house.define(&guest);
    house.define(&clear);
    house.must_vmseal(&["vm", "encrypt", "sealed"]);
    let mut console = house.boot(&guest);

    let listener = disable(&mut house, agent);
    list_answers(&house);

    // reconnect: libvirtd dies and finds the VM running.
    house.libvirtd.kill();
    house.libvirtd.start_again();
    house.libvirtd.wait_answers();
    list_answers(&house);
    assert_eq!(house.libvirtd.must_virsh(&["domstate", "sealed"]).trim(), "running", "{agent:?}");
    console.sh("dd if=/dev/vda of=/dev/null bs=64k count=8 2>/dev/null");

    // prepare, start, started of a clear VM.
    let begin = Instant::now();
    let started = house.libvirtd.virsh(&["start", "clear"]);
    assert!(started.ok(), "{agent:?}: {}", started.all());
    assert!(begin.elapsed() < Duration::from_secs(8), "{agent:?}: a clear VM took {:?}", begin.elapsed());
    list_answers(&house);

    // stopped, release of the encrypted one.
    house.libvirtd.must_virsh(&["destroy", "sealed"]);
    list_answers(&house);
    house.wait_off("sealed");

    // The encrypted one is refused, in bounded time, and not lost.
    let refused = house.libvirtd.virsh(&["start", "sealed"]);
    assert!(!refused.ok(), "{agent:?}");
    assert!(refused.took < Duration::from_secs(12), "{agent:?}: {:?}", refused.took);
    enable(&mut house, agent, listener);
    let mut console = house.boot(&Guest { ..guest.clone() });
    house.power_off(&guest, &mut console);
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

#[test]
fn guest_lives_and_list_answers_with_the_agent_dead() {
    phases_with(Agent::Dead);
}

#[test]
fn guest_lives_and_list_answers_with_the_agent_stopped() {
    phases_with(Agent::Stopped);
}

#[test]
fn guest_lives_and_list_answers_with_an_agent_that_answers_garbage() {
    phases_with(Agent::Garbage);
}
