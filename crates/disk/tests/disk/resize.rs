//! Disks that become larger while they are in use, and who hears of it.

use std::{
    fs,
    time::{Duration, Instant},
};

use serde_json::json;
use vmseal_model::control::{ControlReply, ControlRequest, ExportKind};

use crate::{
    handover::{ask, drain, held_by, host},
    nbd_client::*,
    qemu::{Qemu, nbd_node},
    rig::{BINARY, MIB, Plan, Rig, Spec, kill, pattern, wait_gone},
    upgrade::{copy, upgrade},
    vhost_driver::{ALL, Driver},
    vhost_user::connect,
};

fn resize(rig: &Rig, bytes: u64) -> Result<u64, String> {
    match ask(rig, &ControlRequest::Resize { disk: rig.disk().id, presented_bytes: bytes })? {
        ControlReply::Resized { presented_bytes } => Ok(presented_bytes),
        other => panic!("{other:?}"),
    }
}

#[test]
fn disk_grows_by_zeros_under_its_client_and_stays_so_with_the_next_worker() {
    for unit in [512, 4096] {
        let rig = Rig::with(Spec { unit, ..Spec::fixed(4 * MIB) });
        let mut client = Client::connect(&rig.disk().socket).unwrap();
        client.write(3 * MIB, &pattern(1, 1 << 20), 0).unwrap();
        assert_eq!(client.write(4 * MIB, &pattern(2, 4096), 0).unwrap_err().errno(), Some(ENOSPC));
        assert_eq!(resize(&rig, 6 * MIB), Ok(6 * MIB));
        assert_eq!(resize(&rig, 6 * MIB), Ok(6 * MIB), "again");
        let status = &rig.status().disks[0];
        assert_eq!((status.presented_bytes, status.stored_bytes), (6 * MIB, 6 * MIB));
        assert!(client.read(3 * MIB, 3 << 20).unwrap() == [pattern(1, 1 << 20), vec![0; 2 << 20]].concat());
        client.write(6 * MIB - 4096, &pattern(2, 4096), 0).unwrap();
        let plain = rig.disk().stored_plain();
        assert_eq!(plain.len() as u64, 6 * MIB);
        assert!(plain[4 << 20..(6 << 20) - 4096].iter().all(|byte| *byte == 0), "it holds encrypted zeros");
        assert_eq!(Client::connect(&rig.disk().socket).unwrap().size, 6 * MIB, "who connects now is told");

        for (wanted, why) in
            [(4 * MIB, "only grow"), (6 * MIB + 100, "number of its units"), (1 << 50, "one key")]
        {
            let message = resize(&rig, wanted).unwrap_err();
            assert!(message.contains(why), "{message}");
        }
        let worker = rig.status().worker_pid;
        kill(worker, libc::SIGKILL);
        wait_gone(worker);
        let mut client = Client::connect(&rig.disk().socket).unwrap();
        assert_eq!(client.size, 6 * MIB);
        assert!(client.read(6 * MIB - 4096, 4096).unwrap() == pattern(2, 4096));
    }
}

#[test]
fn volume_that_grows_by_itself_shows_more_and_stores_no_more() {
    let rig = Rig::with(Spec::growing(4 * MIB));
    resize(&rig, 1 << 30).unwrap();
    assert_eq!(fs::metadata(&rig.disk().file).unwrap().len(), 16 * MIB);
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    assert_eq!(client.size, 1 << 30);
    client.write(5 * MIB, &pattern(1, 4096), 0).unwrap();
    assert!(client.read(5 * MIB, 8192).unwrap() == [pattern(1, 4096), vec![0; 4096]].concat());
}

#[test]
fn disk_keeps_its_size_where_it_cannot_grow() {
    let rig = Rig::with(Spec { read_only: true, ..Spec::fixed(MIB) });
    assert!(resize(&rig, 2 * MIB).unwrap_err().contains("read-only"));
    let rig = held_by(host(1), Spec::fixed(MIB));
    drain(&rig).unwrap();
    assert!(resize(&rig, 2 * MIB).unwrap_err().contains("drained"));
    let mut plan = Plan::new(&[Spec::fixed(MIB)]);
    let Some(device) = crate::loop_device::LoopDevice::of(&plan.disks[0].file) else { return };
    plan.disks[0].file.clone_from(&device.0);
    let rig = plan.start();
    let message = resize(&rig, 2 * MIB).unwrap_err();
    assert!(message.contains("keeps its 1048576 bytes") && message.contains("no space"), "{message}");
    assert_eq!(rig.status().disks[0].presented_bytes, MIB);
    // The device is made larger, and then the disk.
    device.resize(19 * MIB);
    assert_eq!(resize(&rig, 3 * MIB), Ok(3 * MIB));
    let mut client = Client::connect(&rig.disk().socket).unwrap();
    assert!(client.read(MIB, 2 << 20).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn front_end_hears_of_the_new_size_and_reads_it() {
    let mut plan = Plan::new(&[Spec::fixed(4 * MIB)]);
    plan.disks[0].setup.export = ExportKind::VhostUser;
    let rig = plan.start();
    let mut driver = Driver::new(connect(&rig.disk().socket), 1, ALL);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    vhost::vhost_user::VhostUserFrontend::set_backend_request_fd(&mut driver.frontend, &theirs).unwrap();
    // The next message is handled after that one.
    assert_eq!(driver.config()[..8], (4 * MIB / 512).to_le_bytes());
    resize(&rig, 8 * MIB).unwrap();
    let mut message = [0; 12];
    std::io::Read::read_exact(&mut &ours, &mut message).unwrap();
    assert_eq!(message[..4], 2u32.to_ne_bytes(), "CONFIG_CHANGE_MSG");
    assert_eq!(driver.config()[..8], (8 * MIB / 512).to_le_bytes());
    assert_eq!(driver.write(8 * MIB / 512 - 8, &pattern(1, 4096)), 0);
    assert!(rig.disk().stored_plain()[(8 << 20) - 4096..] == pattern(1, 4096));
}

#[test]
fn guest_of_a_real_qemu_sees_its_vhost_user_disk_grow() {
    let mut plan = Plan::new(&[Spec::fixed(4 * MIB)]);
    plan.disks[0].setup.export = ExportKind::VhostUser;
    let rig = plan.start();
    let channel = format!("socket,id=c0,path={}", rig.disk().socket.display());
    let device = "vhost-user-blk-pci,chardev=c0,num-queues=1,addr=4";
    let Some(mut qemu) = Qemu::start(&["-chardev", &channel, "-device", device]) else { return };
    // As a legacy driver on port 0xc000 with its queue at 1 MiB: PCI device 4, then the virtio registers.
    for line in [
        "outl 0xcf8 0x80002010",
        "outl 0xcfc 0xc000",
        "outl 0xcf8 0x80002004",
        "outl 0xcfc 0x7",
        "outb 0xc012 0x1",
        "outb 0xc012 0x3",
        "outl 0xc004 0x0",
        "outw 0xc00e 0x0",
        "outl 0xc008 0x100",
        "outb 0xc012 0x7",
    ] {
        qemu.access(line);
    }
    assert_eq!(qemu.access("inl 0xc014"), 4 * MIB / 512);
    let deadline = Instant::now() + Duration::from_secs(20);
    resize(&rig, 8 * MIB).unwrap();
    while qemu.access("inl 0xc014") != 8 * MIB / 512 {
        assert!(Instant::now() < deadline, "the guest still sees {} sectors", qemu.access("inl 0xc014"));
    }
    // Configuration changed: bit 1 of the interrupt status.
    assert_eq!(qemu.access("inb 0xc013") & 2, 2, "the guest was not told");
}

#[test]
fn qemu_takes_the_new_size_of_an_nbd_disk_once_it_has_connected_again() {
    let rig = Rig::with(Spec::fixed(4 * MIB));
    let node = nbd_node(rig.disk());
    let Some(mut qemu) = Qemu::start(&["-blockdev", &node]) else { return };
    assert_eq!(qemu.size("nbd0"), 4 * MIB);
    resize(&rig, 8 * MIB).unwrap();
    let wanted = json!({ "node-name": "nbd0", "size": 8 * MIB });
    let refused = qemu.ask("block_resize", wanted.clone()).unwrap_err();
    assert!(refused.contains("Cannot grow NBD nodes"), "{refused}");
    // Another worker, of the same program: connections begin anew, and no request fails.
    let worker = rig.status().worker_pid;
    assert_eq!(upgrade(&rig, &copy(&rig, BINARY, "same")), ControlReply::Upgrading);
    wait_gone(worker);
    // It notices when it asks for something.
    qemu.io("nbd0", "read 0 4096");
    qemu.ask("block_resize", wanted).unwrap();
    assert_eq!(qemu.size("nbd0"), 8 * MIB);
    qemu.quit();
}
