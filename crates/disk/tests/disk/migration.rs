//! A live migration between two real QEMUs, whose disk goes from one disk process to another at the moment it should.

use serde_json::json;
use vmseal_luks::OwnerBlock;
use vmseal_model::control::Phase;

use crate::{
    handover::{activate, drain, hand_over, held_by, host, resume},
    nbd_client::Client,
    qemu::{Qemu, nbd_node},
    rig::{MIB, Plan, Rig, Spec},
    tools::{ok, tool},
};

/// What uses the disk in a guest.
const DISK: &str = "-d /machine/peripheral/vda/virtio-backend";

/// A qcow2 image inside a volume that grows, as libvirt has it.
fn qemu(rig: &Rig, more: &[&str]) -> Option<Qemu> {
    let node = nbd_node(rig.disk());
    let disk = "virtio-blk-pci,drive=disk0,id=vda,addr=4";
    let mut arguments =
        vec!["-blockdev", &node, "-blockdev", "driver=qcow2,node-name=disk0,file=nbd0", "-device", disk];
    arguments.extend(more);
    Qemu::start(&arguments)
}

fn has(qemu: &mut Qemu, pattern: u8, megabyte: u8) {
    qemu.io(DISK, &format!("read -P {pattern} {megabyte}M 1M"));
}

fn write(qemu: &mut Qemu, pattern: u8, megabyte: u8) {
    qemu.io(DISK, &format!("write -P {pattern} {megabyte}M 1M"));
}

#[test]
fn guest_migrates_with_its_disk_and_back_again() {
    let Some(mut qemu_img) = tool("qemu-img") else { return };
    let mut sides = vec![held_by(host(1), Spec::growing(64 * MIB))];
    ok(qemu_img.args(["create", "-q", "-f", "qcow2", &sides[0].disk().uri(), "16M"]));
    let Some(mut source) = qemu(&sides[0], &[]) else { return };
    write(&mut source, 1, 0);
    for hop in 1..=3u8 {
        let to = host(1 + hop);
        // All of them live to the end: one that gave the disk away must not come back.
        let there: Plan = sides[0].plan.elsewhere(to, true);
        let socket = there.scratch.path("migration");
        let uri = format!("unix:{}", socket.display());
        sides.push(there.start());
        let [.., from_rig, to_rig] = &sides[..] else { panic!() };
        // It opens its disk, and reads there, before the source has stopped.
        let Some(mut destination) = qemu(to_rig, &["-S", "-incoming", "defer"]) else { return };
        let capability = json!({ "capabilities": [{ "capability": "late-block-activate", "state": true }] });
        destination.ask("migrate-set-capabilities", capability).unwrap();
        destination.ask("migrate-incoming", json!({ "uri": uri })).unwrap();
        write(&mut source, 10 + hop, hop);
        source.ask("migrate", json!({ "uri": uri })).unwrap();
        source.wait_for("query-migrate", |answer| answer["status"] == "completed");
        destination.wait_for("query-migrate", |answer| answer["status"] == "completed");

        drain(from_rig).unwrap();
        let given = hand_over(from_rig, to).unwrap();
        assert_eq!(activate(to_rig, None).unwrap(), given + 1);
        assert_eq!(to_rig.status().phase, Phase::Serving);
        destination.ask("cont", json!({})).unwrap();
        // What the source still says at its end is nobody's wait.
        source.quit();
        source = destination;
        has(&mut source, 1, 0);
        has(&mut source, 10 + hop, hop);
        write(&mut source, 20 + hop, hop);
        has(&mut source, 20 + hop, hop);
    }
    source.quit();
    let last = sides.last().unwrap();
    ok(tool("qemu-img").unwrap().args(["check", "-q", &last.disk().uri()]));
    let block = OwnerBlock::read(&last.disk().open()).unwrap();
    assert_eq!((block.host, block.generation), (host(4), 7));
}

#[test]
fn guest_goes_on_at_its_source_after_a_migration_that_came_to_nothing() {
    let Some(mut qemu_img) = tool("qemu-img") else { return };
    let from = held_by(host(1), Spec::growing(64 * MIB));
    ok(qemu_img.args(["create", "-q", "-f", "qcow2", &from.disk().uri(), "16M"]));
    let Some(mut source) = qemu(&from, &[]) else { return };
    write(&mut source, 1, 0);
    let there = from.plan.elsewhere(host(2), true);
    let uri = format!("unix:{}", there.scratch.path("migration").display());
    let to = there.start();
    let Some(mut destination) = qemu(&to, &["-S", "-incoming", "defer"]) else { return };
    destination.ask("migrate-incoming", json!({ "uri": uri })).unwrap();
    source.ask("migrate", json!({ "uri": uri })).unwrap();
    source.wait_for("query-migrate", |answer| answer["status"] == "completed");
    hand_over(&from, host(2)).unwrap();
    // The destination is lost before it took the disk.
    destination.quit();
    drop(to);
    resume(&from, None).unwrap();
    source.ask("cont", json!({})).unwrap();
    has(&mut source, 1, 0);
    write(&mut source, 2, 1);
    has(&mut source, 2, 1);
    source.quit();
    assert_eq!(Client::connect(&from.disk().socket).unwrap().size, 64 * MIB);
}
