//! An encrypted VM boots, remembers, and leaves nothing in clear; stock tools open what we wrote.

use std::{fs, path::PathBuf};

use vmseal_e2e::{house::House, lab::Lab, rounds, scan, shell};

const MARKER: &str = "VMSEAL-GUEST-MARKER-0b2d";

#[test]
fn encrypted_vm_boots_and_its_marker_is_in_no_file() {
    let house = House::start(Lab::for_test("boot"));
    let guest = house.guest("web01", &[("vda", "48M", "raw"), ("vdb", "64M", "qcow2")]);
    shell::must(shell::tool("mke2fs").args(["-q", "-t", "ext4"]).arg(&guest.disks[0].1));
    house.define(&guest);
    house.must_vmseal(&["vm", "encrypt", "web01"]);
    let shown = house.json(&["vm", "show", "web01"]);
    assert_eq!(shown["coverage"], "encrypted", "{shown}");
    for (_, image, _) in &guest.disks {
        assert!(!image.exists(), "{} is still there", image.display());
    }

    let mut console = house.boot(&guest);
    console.sh(&format!("mount -t ext4 /dev/vda /mnt && echo {MARKER} > /mnt/marker && sync && umount /mnt"));
    console.sh(&format!(
        "mkfs.ext4 -q /dev/vdb && mount -t ext4 /dev/vdb /mnt && echo {MARKER} > /mnt/m && umount /mnt"
    ));
    house.power_off(&guest, &mut console);
    assert_eq!(scan::files_with(&house.lab.state, &[MARKER.as_bytes()]), []);

    for _ in 0..rounds(1, 20) {
        let mut console = house.boot(&guest);
        let read = console.sh("mount -t ext4 /dev/vda /mnt && cat /mnt/marker && umount /mnt && mount -t ext4 /dev/vdb /mnt && cat /mnt/m");
        assert_eq!(read.matches(MARKER).count(), 2, "{read}");
        house.power_off(&guest, &mut console);
    }
}

#[test]
fn recovered_key_opens_the_volume_with_stock_tools_and_dm_crypt_reads_the_same() {
    let house = House::start(Lab::for_test("recover"));
    let mut guest = house.guest("web01", &[("vda", "24M", "raw")]);
    house.define(&guest);
    house.must_vmseal(&["vm", "encrypt", "web01"]);

    // The guest writes every unit, makes a file system, writes zeroes over a part, trims another and writes half of
    // that again. The other half is unspecified; every unit outside of it was written and counts.
    let mut console = house.boot(&guest);
    console.sh("dd if=/dev/urandom of=/dev/vda bs=1M count=24 2>/dev/null");
    console
        .sh("mkfs.ext4 -q -E nodiscard /dev/vda && mount -t ext4 /dev/vda /mnt && cp /init /mnt/a && sync");
    console.sh("umount /mnt && /bin/blkdiscard -f -z -o 1048576 -l 2097152 /dev/vda");
    console.sh("/bin/blkdiscard -f -o 8388608 -l 2097152 /dev/vda && sync");
    console.sh("dd if=/dev/urandom of=/dev/vda bs=1M seek=8 count=1 conv=notrunc,fsync 2>/dev/null");
    let written = |disk: &str| {
        format!(
            "echo 3 > /proc/sys/vm/drop_caches; {{ dd if={disk} bs=1M count=9; dd if={disk} bs=1M skip=10; }} \
             2>/dev/null | sha256sum"
        )
    };
    let ours = sha256_of(&console.sh(&written("/dev/vda")));
    let zeros = console.sh("dd if=/dev/vda bs=1M skip=1 count=2 2>/dev/null | tr -d '\\000' | wc -c");
    assert!(zeros.split_whitespace().last() == Some("0"), "write-zeroes left something: {zeros}");
    house.power_off(&guest, &mut console);

    let volume = PathBuf::from(format!("{}.vmseal", guest.disks[0].1.display()));
    let key = house.recover_key(&volume);
    let opened = shell::run(
        shell::tool("cryptsetup")
            .args(["open", "--type", "luks2", "--test-passphrase", "--key-size", "512", "--volume-key-file"])
            .arg(&key)
            .arg(&volume),
    );
    assert!(opened.ok(), "{}", opened.all());
    let wrong = house.lab.state.join("wrong.key");
    fs::write(&wrong, [7u8; 64]).unwrap();
    let refused = shell::run(
        shell::tool("cryptsetup")
            .args(["open", "--type", "luks2", "--test-passphrase", "--key-size", "512", "--volume-key-file"])
            .arg(&wrong)
            .arg(&volume),
    );
    assert!(!refused.ok(), "cryptsetup takes any key: this test proves nothing");

    // dm-crypt: the volume as a plain disk of another guest, opened there by its own kernel.
    let copy = house.lab.state.join("images/copy.img");
    fs::copy(&volume, &copy).unwrap();
    shell::must(
        shell::tool("dd")
            .arg(format!("if={}", key.display()))
            .arg(format!("of={}.key", copy.display()))
            .arg("status=none"),
    );
    let key_disk = PathBuf::from(format!("{}.key", copy.display()));
    shell::must(shell::tool("truncate").args(["-s", "4096"]).arg(&key_disk));
    guest.name = "judge".into();
    guest.memory_mib = 512;
    guest.disks = vec![("vda".into(), copy, "raw".into()), ("vdb".into(), key_disk, "raw".into())];
    house.define(&guest);
    let mut console = house.boot(&guest);
    console.sh("dd if=/dev/vdb of=/run/key bs=64 count=1 2>/dev/null");
    console.sh("cryptsetup open --type luks2 --key-size 512 --volume-key-file /run/key /dev/vda plain");
    let size = console.sh("blockdev --getsize64 /dev/mapper/plain");
    assert!(size.contains(&(24u32 << 20).to_string()), "dm-crypt sees another size: {size}");
    let theirs = sha256_of(&console.sh(&written("/dev/mapper/plain")));
    assert_eq!(ours, theirs, "dm-crypt reads something else");
    house.power_off(&guest, &mut console);
}

/// The hash in the output of sha256sum, wherever the console put it.
fn sha256_of(said: &str) -> String {
    said.split_whitespace()
        .find(|w| w.len() == 64 && w.chars().all(|c| c.is_ascii_hexdigit()))
        .unwrap_or_else(|| panic!("no hash in: {said}"))
        .to_owned()
}
