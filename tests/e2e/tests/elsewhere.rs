//! The same volume under another house, with its own server, agent and libvirtd and only the backup of the provider:
//! refused while it runs here, started from the definition when it does not.

use std::{fs, path::PathBuf};

use vmseal_e2e::{
    house::{House, path},
    lab::Lab,
    shell,
};

const MARKER: &str = "VMSEAL-GUEST-MARKER-5e1a";

#[test]
fn volume_that_runs_here_is_refused_elsewhere_and_starts_there_from_the_backup_later() {
    let here = House::start(Lab::for_test("here"));
    let guest = here.guest("mover", &[("vda", "16M", "raw")]);
    shell::must(shell::tool("mke2fs").args(["-q", "-t", "ext4"]).arg(&guest.disks[0].1));
    here.define(&guest);
    here.must_vmseal(&["vm", "encrypt", "mover"]);
    let mut console = here.boot(&guest);
    console.sh(&format!("mount -t ext4 /dev/vda /mnt && echo {MARKER} > /mnt/marker && umount /mnt && sync"));

    let mut there = House::bare(Lab::for_test("there"));
    there.start_server();
    for name in ["main.p12", "backup-password"] {
        fs::copy(here.lab.state.join(name), there.lab.state.join(name)).unwrap();
    }
    there.import_provider("main");
    there.join();
    there.start_agent();
    let xml = here.libvirtd.must_virsh(&["dumpxml", "mover", "--inactive", "--security-info"]);
    let moved = xml
        .replace(
            &*here.lab.run.join("libvirt-").to_string_lossy(),
            &there.lab.run.join("libvirt-").to_string_lossy(),
        )
        .replace(path(&guest.console()), path(&there.lab.folder("serial").join("mover")));
    let file = there.lab.state.join("mover.xml");
    fs::write(&file, moved).unwrap();
    there.libvirtd.must_virsh(&["define", path(&file)]);

    let volume = PathBuf::from(format!("{}.vmseal", guest.disks[0].1.display()));
    let before = shell::must(shell::tool("sha256sum").arg(&volume)).stdout;
    let second = there.libvirtd.virsh(&["start", "mover"]);
    assert!(!second.ok(), "one volume runs twice");
    assert!(second.stderr.contains("vda") && second.stderr.contains("in use"), "{}", second.stderr);
    let after = shell::must(shell::tool("sha256sum").arg(&volume)).stdout;
    assert_eq!(before, after, "a refused start changed the volume");
    console.sh("dd if=/dev/vda of=/dev/null bs=64k count=8 iflag=direct 2>/dev/null");
    here.power_off(&guest, &mut console);

    let moved = vmseal_e2e::domain::Guest { serial: there.lab.folder("serial"), ..guest.clone() };
    let mut console = there.boot(&moved);
    let read = console.sh("mount -t ext4 /dev/vda /mnt && cat /mnt/marker && umount /mnt");
    assert!(read.contains(MARKER), "{read}");
    let back = here.libvirtd.virsh(&["start", "mover"]);
    assert!(!back.ok() && back.stderr.contains("in use"), "{}", back.all());
    there.power_off(&moved, &mut console);
}
