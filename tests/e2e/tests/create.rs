//! A VM made encrypted from the first, by what `virt-install` prints; a disk added; and all of it back in clear.

use std::{fs, process::Command};

use vmseal_e2e::{
    domain::Guest,
    house::{self, House, path},
    lab::Lab,
    scan, shell,
};

const MARKER: &str = "VMSEAL-GUEST-MARKER-c7d1";

/// The definition virt-install would use for a guest whose disk is not there yet.
fn printed(house: &House, guest: &Guest) -> String {
    let image = house::guest_image(&house.lab);
    let disk = &guest.disks[0].1;
    let outcome = shell::must(
        Command::new("virt-install")
            .args([
                "--connect",
                &house.libvirtd.uri(),
                "--print-xml",
                "--dry-run",
                "--import",
                "--virt-type",
                "qemu",
            ])
            .args(["--name", &guest.name, "--memory", "192", "--vcpus", "1", "--machine", "q35"])
            .args(["--osinfo", "detect=off,require=off", "--network", "none", "--graphics", "none"])
            .args([
                "--memballoon",
                "none",
                "--rng",
                "none",
                "--controller",
                "usb,model=none",
                "--noautoconsole",
            ])
            .arg("--disk")
            .arg(format!("path={},size=0.0625,format=raw,bus=virtio", disk.display()))
            .arg("--serial")
            .arg(format!("unix,path={},mode=bind", guest.console().display()))
            .arg("--boot")
            .arg(format!(
                "kernel={i}/vmlinuz,initrd={i}/initrd.gz,kernel_args=\"console=ttyS0 quiet panic=-1\"",
                i = image.display()
            )),
    );
    outcome.stdout
}

#[test]
fn vm_created_from_what_virt_install_prints_boots_gets_a_disk_and_can_leave() {
    let house = House::start(Lab::for_test("create"));
    // Only its names are used: no image is made.
    let mut guest = house.guest("made", &[]);
    let image = house.lab.folder("images").join("made.img");
    guest.disks.push(("vda".into(), image.clone(), "raw".into()));
    let xml = house.lab.state.join("made.xml");
    fs::write(&xml, printed(&house, &guest)).unwrap();
    assert!(!image.exists(), "virt-install --print-xml made the image");

    // Without a size nothing is begun.
    let refused = house.vmseal(&["vm", "create", "--xml", path(&xml)]);
    assert!(!refused.ok() && refused.all().contains("--disk-size vda="), "{}", refused.all());
    house.must_vmseal(&["vm", "create", "--xml", path(&xml), "--disk-size", "vda=64M"]);
    let shown = house.json(&["vm", "show", "made"]);
    assert_eq!(shown["coverage"], "encrypted", "{shown}");
    let again = house.vmseal(&["vm", "create", "--xml", path(&xml), "--disk-size", "vda=64M"]);
    assert!(!again.ok(), "the same VM was made twice: {}", again.all());

    let data = house.lab.folder("images").join("data.vol");
    let path_of_data = path(&data).to_owned();
    house.must_vmseal(&[
        "disk",
        "create",
        "made",
        "--target",
        "vdb",
        "--path",
        &path_of_data,
        "--size",
        "24M",
    ]);
    let mut console = house.boot(&guest);
    console.sh(&format!(
        "for d in vda vdb; do mkfs.ext4 -q /dev/$d && mount -t ext4 /dev/$d /mnt && echo {MARKER} > /mnt/m && umount /mnt; done"
    ));
    assert_eq!(console.sh("blockdev --getsize64 /dev/vdb").matches("25165824").count(), 1);
    house.power_off(&guest, &mut console);
    assert_eq!(scan::files_with(&house.lab.state, &[MARKER.as_bytes()]), []);

    // Back to clear: a clear VM needs nothing of ours, so the agent may be dead.
    house.must_vmseal(&["vm", "decrypt", "made"]);
    let shown = house.json(&["vm", "show", "made"]);
    assert_eq!(shown["coverage"], "clear", "{shown}");
    let xml = house.libvirtd.must_virsh(&["dumpxml", "made", "--inactive"]);
    // Not the bare name: the tree itself may lie in a folder of that name.
    for ours in ["urn:vmseal", "<vmseal", "vmseal:", "protocol='nbd'", ".vmseal", "control.sock", "vda.sock"]
    {
        assert!(!xml.contains(ours), "'{ours}' is left in:\n{xml}");
    }
    let mut house = house;
    house.kill_agent();
    let mut console = house.boot(&guest);
    let read =
        console.sh("for d in vda vdb; do mount -t ext4 /dev/$d /mnt && cat /mnt/m && umount /mnt; done");
    assert_eq!(read.matches(MARKER).count(), 2, "{read}");
    house.power_off(&guest, &mut console);
}
