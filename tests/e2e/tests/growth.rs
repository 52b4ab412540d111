//! qcow2 inside a volume: the guest fills its disk and takes snapshots, and nothing ends with an error.

use vmseal_e2e::{house::House, lab::Lab, shell};

#[test]
fn guest_fills_its_disk_and_snapshots_fit_in_the_volume() {
    let house = House::start(Lab::for_test("growth"));
    let guest = house.guest("grower", &[("vda", "96M", "qcow2")]);
    house.define(&guest);
    house.must_vmseal(&["vm", "encrypt", "grower"]);
    let mut console = house.boot(&guest);
    console.sh("dd if=/dev/urandom of=/dev/vda bs=1M count=96 2>/dev/null; sync");
    let first = console.sh("echo 3 > /proc/sys/vm/drop_caches; md5sum /dev/vda");
    house.libvirtd.must_virsh(&["snapshot-create-as", "grower", "one"]);
    console.sh("dd if=/dev/urandom of=/dev/vda bs=1M count=96 2>/dev/null; sync");
    house.libvirtd.must_virsh(&["snapshot-create-as", "grower", "two"]);
    console.sh("dd if=/dev/urandom of=/dev/vda bs=1M count=96 2>/dev/null; sync");
    let errors = console.sh("dmesg | grep -ciE 'I/O error|blk_update' || true");
    assert!(errors.trim().ends_with('0'), "{errors}");
    assert_eq!(house.libvirtd.must_virsh(&["domstate", "grower"]).trim(), "running");
    house.libvirtd.must_virsh(&["snapshot-revert", "grower", "one"]);
    let mut console = vmseal_e2e::console::Console::open(&guest.console());
    console.wait_ready();
    let again = console.sh("echo 3 > /proc/sys/vm/drop_caches; md5sum /dev/vda");
    let hash = |s: &str| s.split_whitespace().find(|w| w.len() == 32).map(str::to_owned);
    assert_eq!(hash(&first), hash(&again));
    // libvirt deletes internal snapshots of a network disk while the VM runs only.
    for snapshot in ["one", "two"] {
        house.libvirtd.must_virsh(&["snapshot-delete", "grower", snapshot]);
    }
    house.power_off(&guest, &mut console);

    // In clear again it is an image without a fault, and holds what the guest read last.
    house.must_vmseal(&["vm", "decrypt", "grower"]);
    let image = &guest.disks[0].1;
    shell::must(shell::tool("qemu-img").args(["check", "-f", "qcow2"]).arg(image));
    let raw = image.with_extension("raw");
    shell::must(shell::tool("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).arg(image).arg(&raw));
    let outside = shell::must(shell::tool("md5sum").arg(&raw)).stdout;
    assert_eq!(hash(&first), hash(&outside));
}
