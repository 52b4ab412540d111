//! kill -9 of every process of the house, under guest I/O: no guest error, every acknowledged block is there.

use std::{
    fs::File,
    path::Path,
    time::{Duration, Instant},
};

use vmseal_luks::OwnerBlock;
use vmseal_model::id::HostId;

use vmseal_e2e::{console::Console, house::House, lab::Lab, rounds, shell, writer};

#[test]
fn guest_sees_no_error_when_any_process_is_killed() {
    let mut house = House::start(Lab::for_test("kills"));
    let guest = house.guest("worker", &[("vda", "8M", "raw")]);
    house.define(&guest);
    house.must_vmseal(&["vm", "encrypt", "worker"]);
    let mut console = house.boot(&guest);
    writer::begin(&mut console);
    writer::goes_on(&mut console, "nothing");

    for round in 0..rounds(2, 50) {
        let (_, worker) = house.disk_pids("worker").expect("the disk answers");
        kill(worker);
        writer::goes_on(&mut console, &format!("worker killed, round {round}"));

        house.kill_agent();
        writer::goes_on(&mut console, "agent killed");
        house.start_agent();

        house.kill_server();
        writer::goes_on(&mut console, "server killed");
        house.start_server();

        house.libvirtd.kill();
        writer::goes_on(&mut console, "libvirtd killed");
        house.libvirtd.start_again();
        house.libvirtd.wait_answers();

        // A lost keeper takes its worker along: I/O stalls until the agent starts a new pair.
        let (keeper, _) = house.disk_pids("worker").expect("the disk answers");
        kill(keeper);
        writer::goes_on(&mut console, "keeper killed");

        let program = std::fs::read(vmseal_e2e::lab::bin("vmseal-disk")).expect("it was built");
        let installed = house.install_disk_program(&program);
        house.kill_agent();
        house.start_agent();
        runs_from(&house, &installed);
        writer::goes_on(&mut console, "disk program replaced");

        let (_, worker) = house.disk_pids("worker").expect("the disk answers");
        let broken = house.install_disk_program(b"#!/bin/sh\nexit 1\n");
        house.kill_agent();
        house.start_agent();
        shell::until("the worker of the program before is back", Duration::from_secs(30), || {
            house.disk_pids("worker").is_some_and(|(_, now)| now != worker)
        });
        runs_from(&house, &installed);
        writer::goes_on(&mut console, "disk program replaced by one that does not serve");
        std::fs::remove_file(broken).expect("own file");
        house.install_disk_program(&program);
    }

    // Agent and worker together, with no provider to ask.
    house.must_vmseal(&["provider", "remove", "main", "--danger-lose-keys"]);
    let (_, worker) = house.disk_pids("worker").expect("the disk answers");
    house.kill_agent();
    kill(worker);
    writer::goes_on(&mut console, "agent and worker killed with the provider gone");

    writer::check(&mut console);
    assert_eq!(house.libvirtd.must_virsh(&["domstate", "worker"]).trim(), "running");
}

#[test]
fn lost_keeper_stalls_the_guest_until_somebody_starts_it_again() {
    let mut house = House::start(Lab::for_test("keeper"));
    let guest = house.guest("worker", &[("vda", "8M", "raw")]);
    house.define(&guest);
    house.must_vmseal(&["vm", "encrypt", "worker"]);
    let mut console = house.boot(&guest);
    writer::begin(&mut console);
    writer::goes_on(&mut console, "nothing");
    for _ in 0..rounds(1, 20) {
        let (keeper, _) = house.disk_pids("worker").expect("the disk answers");
        house.kill_agent();
        kill(keeper);
        io_stalls(&mut console);
        house.start_agent();
        writer::goes_on(&mut console, "the agent came back");

        // With no key to be had, the next agent cannot either, and the guest waits on.
        house.must_vmseal(&["provider", "remove", "main", "--danger-lose-keys"]);
        house.kill_agent();
        house.start_agent();
        let (keeper, _) = house.disk_pids("worker").expect("the disk answers");
        kill(keeper);
        io_stalls(&mut console);
        let locked = house.vmseal(&["vm", "repair", "worker"]);
        assert_eq!(locked.code(), 4, "{}", locked.all());
        assert!(locked.stderr.contains("of provider main cannot be had"), "{}", locked.stderr);
        assert_eq!(house.libvirtd.must_virsh(&["domstate", "worker"]).trim(), "running");
        house.import_provider("main");
        house.must_vmseal(&["vm", "repair", "worker"]);
        writer::goes_on(&mut console, "the key came back");
    }
    writer::check(&mut console);
    house.power_off(&guest, &mut console);
}

#[test]
fn guest_whose_volume_another_host_had_meanwhile_does_not_go_on() {
    let mut house = House::start(Lab::for_test("meanwhile"));
    let guest = house.guest("worker", &[("vda", "8M", "raw")]);
    house.define(&guest);
    house.must_vmseal(&["vm", "encrypt", "worker"]);
    let mut console = house.boot(&guest);
    writer::begin(&mut console);
    writer::goes_on(&mut console, "nothing");
    let (keeper, _) = house.disk_pids("worker").expect("the disk answers");
    house.kill_agent();
    kill(keeper);
    io_stalls(&mut console);
    // The lock is free now. What a host does that starts the VM and shuts it down in order.
    let volume = format!("{}.vmseal", guest.disks[0].1.display());
    let file = File::options().read(true).write(true).open(&volume).expect("a volume lies there");
    let other = HostId::from_bytes([0x0b; 16]);
    let held = OwnerBlock::read(&file).expect("it was held").taken_by(other);
    held.released().write(&file).expect("own file");
    drop(file);
    let before = std::fs::read(&volume).expect("own file");

    house.start_agent();
    let refused = house.vmseal(&["vm", "repair", "worker"]);
    for part in ["the guest cannot go on with", &other.to_string(), "had the volume since", "virsh destroy"] {
        assert!(refused.stderr.contains(part), "{part}: {}", refused.all());
    }
    io_stalls(&mut console);
    assert!(std::fs::read(&volume).expect("own file") == before, "nothing was written");
    house.libvirtd.must_virsh(&["destroy", "worker"]);
    let mut console = house.boot(&guest);
    house.power_off(&guest, &mut console);
}

/// Waits until the VM's disk is served from this file.
fn runs_from(house: &House, program: &Path) {
    use std::os::unix::fs::MetadataExt;
    let wanted = std::fs::metadata(program).expect("own file").ino();
    shell::until("the worker runs the installed program", Duration::from_secs(30), || {
        let Some((_, worker)) = house.disk_pids("worker") else { return false };
        std::fs::metadata(format!("/proc/{worker}/exe")).is_ok_and(|about| about.ino() == wanted)
    });
}

/// The guest lives, and for two seconds none of its writes is acknowledged; it writes about twenty a second.
fn io_stalls(console: &mut Console) {
    let (mut last, mut since) = (writer::acked(console), Instant::now());
    shell::until("the guest's writes stall", Duration::from_secs(30), || {
        let now = writer::acked(console);
        if now != last {
            (last, since) = (now, Instant::now());
        }
        since.elapsed() > Duration::from_secs(2)
    });
}

fn kill(pid: i32) {
    assert!(pid > 1);
    // SAFETY: sends a signal to a process of this house's own disk, which it named on its own socket.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
}
