//! A disk of class `fast`: QEMU gets it by vhost-user-blk, the guest notices nothing, and it can be changed back. And
//! what `auto` is where the kernel has no ublk.

use vmseal_e2e::{house::House, lab::Lab, rounds, shell, writer};

const MARKER: &str = "VMSEAL-GUEST-MARKER-5e1f";

/// The domain's definition without the white space between elements.
fn definition(house: &House, more: &[&str]) -> String {
    let mut args = vec!["dumpxml", "worker"];
    args.extend(more);
    house.libvirtd.must_virsh(&args).lines().map(str::trim).collect()
}

/// What the guest sees of a disk: its size and serial number.
fn seen(console: &mut vmseal_e2e::console::Console, disk: &str) -> String {
    let said =
        console.sh(&format!("echo $(blockdev --getsize64 /dev/{disk}) $(cat /sys/block/{disk}/serial)"));
    said.lines().last().unwrap_or_default().trim().to_owned()
}

#[test]
fn fast_disk_survives_its_worker_and_can_become_compatible() {
    let house = House::start(Lab::for_test("class"));
    let guest = house.guest("worker", &[("vda", "8M", "raw"), ("vdb", "16M", "raw")]);
    house.define(&guest);
    let clear = definition(&house, &["--inactive"]);
    let refused = house.vmseal(&["disk", "set", "--class", "fast", "worker", "vda"]);
    assert_eq!(refused.code(), 3, "{}", refused.all());
    assert!(refused.stderr.contains("vm encrypt worker --disk vda --class fast"), "{}", refused.stderr);

    house.must_vmseal(&["vm", "encrypt", "worker", "--class", "fast"]);
    let xml = definition(&house, &["--inactive"]);
    assert_eq!(xml.matches("<disk type='vhostuser'").count(), 2, "{xml}");
    assert!(
        xml.contains("<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"),
        "{xml}"
    );
    let shown = house.must_vmseal(&["disk", "show", "worker", "vda"]).stdout;
    assert!(shown.contains("class: fast") && shown.contains("cannot: snapshots"), "{shown}");
    assert_eq!(house.json(&["disk", "show", "worker", "vda"])["class"], "fast");

    let mut console = house.boot(&guest);
    assert!(seen(&mut console, "vda").ends_with("8388608 VS-vda"), "{}", seen(&mut console, "vda"));
    console.sh(&format!(
        "mkfs.ext4 -q /dev/vdb && mount -t ext4 /dev/vdb /mnt && echo {MARKER} > /mnt/m && umount /mnt"
    ));
    writer::begin(&mut console);
    writer::goes_on(&mut console, "nothing");
    let refused = house.vmseal(&["disk", "set", "--class", "compatible", "worker", "vda"]);
    assert_eq!(refused.code(), 3, "{}", refused.all());
    assert!(
        refused.stderr.contains("[vm-running]") && refused.stderr.contains("virsh shutdown worker"),
        "{}",
        refused.stderr
    );
    // Asking for what it is changes nothing, and is fine.
    let same = house.must_vmseal(&["disk", "set", "--class", "fast", "worker", "vda"]);
    assert!(same.stderr.contains("is fast already"), "{}", same.stderr);
    for round in 0..rounds(3, 100) {
        let (_, worker) = house.disk_pids("worker").expect("the disk answers");
        kill(worker);
        writer::goes_on(&mut console, &format!("worker killed, round {round}"));
    }
    let (keeper, _) = house.disk_pids("worker").expect("the disk answers");
    kill(keeper);
    writer::goes_on(&mut console, "keeper killed");
    writer::check(&mut console);
    house.power_off(&guest, &mut console);
    shell::until("its sockets are gone", std::time::Duration::from_secs(20), || {
        let sockets = std::fs::read_dir(&house.lab.run).expect("own folder");
        !sockets.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libvirt-"))
    });

    // The same data through NBD, with everything in the definition that libvirt had refused meanwhile.
    for disk in ["vda", "vdb"] {
        house.must_vmseal(&["disk", "set", "--class", "compatible", "worker", disk]);
    }
    let xml = definition(&house, &["--inactive"]);
    assert!(!xml.contains("vhostuser") && !xml.contains("memoryBacking"), "{xml}");
    assert!(xml.contains("<serial>VS-vda</serial>"), "{xml}");
    let mut console = house.boot(&guest);
    assert!(seen(&mut console, "vda").ends_with("8388608 VS-vda"), "{}", seen(&mut console, "vda"));
    let read = console.sh("mount -t ext4 /dev/vdb /mnt && cat /mnt/m && umount /mnt");
    assert!(read.contains(MARKER), "{read}");
    let blocks = console.sh("dd if=/dev/vda bs=4096 count=1000 2>/dev/null | tr -d '0\\000' | wc -c");
    let blocks: u64 = blocks.split_whitespace().last().and_then(|word| word.parse().ok()).expect("a number");
    assert!(blocks > 0, "nothing of what was written is there");
    house.power_off(&guest, &mut console);

    // And all the way back.
    house.must_vmseal(&["disk", "set", "--class", "fast", "worker", "vdb"]);
    house.must_vmseal(&["vm", "decrypt", "worker"]);
    let sorted = |xml: &str| {
        let mut words: Vec<String> = xml.split(['<', '>', ' ', '/']).map(str::to_owned).collect();
        words.sort();
        words
    };
    // libvirt keeps the addresses it gave, and leaves out nothing that was there.
    assert_eq!(sorted(&definition(&house, &["--inactive"])), sorted(&clear));
}

#[test]
fn auto_is_nbd_where_the_kernel_has_no_ublk_and_a_block_device_is_refused_there() {
    if std::path::Path::new("/dev/ublk-control").exists() {
        eprintln!("skipped: this kernel has ublk");
        return;
    }
    let house = House::start(Lab::for_test("ublk"));
    let guest = house.guest("worker", &[("vda", "8M", "raw")]);
    house.define(&guest);
    house.must_vmseal(&["vm", "encrypt", "worker", "--class", "auto"]);
    let shown = house.must_vmseal(&["disk", "show", "worker", "vda"]).stdout;
    let disk = house.json(&["disk", "show", "worker", "vda"]);
    let why = disk["why"].as_str().unwrap_or_default();
    assert!(why.starts_with("its host has no ublk: ") && !why.ends_with(": "), "{disk}");
    assert_eq!((&disk["class"], &disk["asked"]), (&"compatible".into(), &"auto".into()), "{disk}");
    assert!(shown.contains(&format!("asked for: auto\nbecause: {why}\n")), "{shown}");
    let hosts = house.json(&["host", "list"]);
    let host = &vmseal_e2e::house::items(&hosts)[0];
    assert_eq!(host["capabilities"]["ublk"], false, "{host}");
    assert_eq!(host["capabilities"]["vhost_user"], true, "{host}");

    // A definition from a host that has it, or by hand.
    let id = disk["id"].as_str().expect("an encrypted disk has an id");
    let text = house.libvirtd.must_virsh(&["dumpxml", "--inactive", "worker"]);
    let (from, to) = (text.find("<source protocol").expect("NBD"), text.find("</source>").expect("NBD"));
    let device =
        format!("{}<source dev='/dev/vmseal/{id}'/>{}", &text[..from], &text[to + "</source>".len()..]);
    let device = device.replace("<disk type='network'", "<disk type='block'");
    let file = house.lab.state.join("device.xml");
    std::fs::write(&file, device).expect("own folder");
    house.libvirtd.must_virsh(&["define", vmseal_e2e::house::path(&file)]);
    let refused = house.libvirtd.virsh(&["start", "worker"]);
    assert!(!refused.ok(), "{}", refused.all());
    for part in [
        "VM 'worker' does not start: disk vda gets no block device (ublk): ",
        "vmseal disk set --class compatible worker vda",
    ] {
        assert!(refused.stderr.contains(part), "{}", refused.stderr);
    }
    let sockets = std::fs::read_dir(&house.lab.run).expect("own folder");
    let left = sockets.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("libvirt-"));
    assert_eq!(left.count(), 0, "nothing is left behind");
    shell::until("the server hears of it", std::time::Duration::from_secs(20), || {
        house.json(&["disk", "show", "worker", "vda"])["class"] == "ublk"
    });
    let shown = house.must_vmseal(&["disk", "show", "worker", "vda"]).stdout;
    assert!(shown.contains("needs: the kernel's ublk driver") && !shown.contains("because"), "{shown}");

    // What it said to do helps.
    house.must_vmseal(&["disk", "set", "--class", "compatible", "worker", "vda"]);
    let mut console = house.boot(&guest);
    assert!(seen(&mut console, "vda").ends_with("8388608 VS-vda"), "{}", seen(&mut console, "vda"));
    house.power_off(&guest, &mut console);
    house.must_vmseal(&["disk", "set", "--class", "auto", "worker", "vda"]);
}

fn kill(pid: i32) {
    assert!(pid > 1);
    // SAFETY: sends a signal to a process of this house's own disk, which it named on its own socket.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
}
