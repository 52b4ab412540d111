//! Provider gone, agent restarted, libvirtd restarted: who runs on, who is refused, who comes back by himself.

use std::{fs, time::Duration};

use vmseal_e2e::{house::House, lab::Lab, rounds, scan, shell};

#[test]
fn vm_without_its_key_is_refused_at_once_and_starts_by_itself_when_the_key_is_back() {
    let mut house = House::start(Lab::for_test("outage"));
    let runner = house.guest("runner", &[("vda", "16M", "raw")]);
    let wanted = house.guest("wanted", &[("vda", "16M", "raw")]);
    for guest in [&runner, &wanted] {
        house.define(guest);
        house.must_vmseal(&["vm", "encrypt", &guest.name]);
    }
    let mut console = house.boot(&runner);
    console.sh("dd if=/dev/urandom of=/run/words bs=64k count=4 2>/dev/null; dd if=/run/words of=/dev/vda 2>/dev/null; sync");

    let refused = house.vmseal(&["provider", "remove", "main"]);
    assert_eq!(refused.code(), 3, "{}", refused.all());
    assert!(refused.all().contains("runner") && refused.all().contains("wanted"), "{}", refused.all());
    for _ in 0..rounds(1, 20) {
        house.must_vmseal(&["provider", "remove", "main", "--danger-lose-keys"]);
        house.kill_agent();
        house.start_agent();

        let start = house.libvirtd.virsh(&["start", "wanted"]);
        assert!(!start.ok());
        assert!(start.took < Duration::from_secs(2), "refused after {:?}", start.took);
        let mut key = String::new();
        shell::until("the server knows that the VM is locked", Duration::from_secs(10), || {
            let shown = house.json(&["vm", "show", "wanted"]);
            key = shown["locked"]["key"].as_str().unwrap_or_default().to_owned();
            !key.is_empty()
        });
        assert!(start.stderr.contains(&format!("key {key} of provider main")), "{key}: {}", start.stderr);
        let shown = house.must_vmseal(&["vm", "show", "wanted"]).stdout;
        assert!(shown.contains("locked: ") && shown.contains("of main missing since"), "{shown}");
        assert!(shown.contains("not yet protected"), "{shown}");

        console.sh(
            "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vda bs=64k count=4 2>/dev/null | cmp - /run/words",
        );
        house.import_provider("main");
        running(&house, "wanted");
        house.libvirtd.must_virsh(&["destroy", "wanted"]);

        // A key that the agent holds needs no server.
        house.kill_server();
        house.libvirtd.must_virsh(&["start", "wanted"]);
        house.libvirtd.must_virsh(&["destroy", "wanted"]);

        // One that it does not hold is refused as above; the server comes back, and so does the VM.
        house.kill_agent();
        house.start_agent_alone();
        let start = house.libvirtd.virsh(&["start", "wanted"]);
        assert!(!start.ok() && start.took < Duration::from_secs(2), "{:?}: {}", start.took, start.all());
        assert!(start.stderr.contains(&format!("key {key} of provider main")), "{}", start.stderr);
        house.start_server();
        running(&house, "wanted");
        house.libvirtd.must_virsh(&["destroy", "wanted"]);
    }
}

#[test]
fn server_that_lost_its_disk_is_set_up_anew_from_the_backup() {
    let mut house = House::start(Lab::for_test("rebuilt"));
    let guest = house.guest("web01", &[("vda", "8M", "raw")]);
    house.define(&guest);
    house.must_vmseal(&["vm", "encrypt", "web01"]);
    let mut console = house.boot(&guest);

    house.kill_server();
    for entry in fs::read_dir(house.lab.state.join("server")).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            fs::remove_dir_all(entry.path()).unwrap();
        } else {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    house.start_server();
    house.import_provider("main");
    house.kill_agent();
    fs::remove_dir_all(house.lab.state.join("agent/pki")).unwrap();
    house.join();
    house.start_agent();

    console.sh("dd if=/dev/vda of=/dev/null bs=64k count=8 iflag=direct 2>/dev/null");
    house.power_off(&guest, &mut console);
    let mut console = house.boot(&guest);
    house.power_off(&guest, &mut console);
    let shown = house.json(&["vm", "show", "web01"]);
    assert_eq!(shown["coverage"], "encrypted", "{shown}");
    house.must_vmseal(&["vm", "decrypt", "web01"]);
}

#[test]
fn autostart_without_the_key_neither_hangs_nor_loses_a_vm() {
    let mut house = House::start(Lab::for_test("autostart"));
    let locked = house.guest("locked", &[("vda", "8M", "raw")]);
    let clear = house.guest("clear", &[("vda", "8M", "raw")]);
    for guest in [&locked, &clear] {
        house.define(guest);
        house.libvirtd.must_virsh(&["autostart", &guest.name]);
    }
    house.must_vmseal(&["vm", "encrypt", "locked"]);
    for _ in 0..rounds(1, 10) {
        house.must_vmseal(&["provider", "remove", "main", "--danger-lose-keys"]);
        house.kill_agent();
        house.start_agent();
        autostart(&mut house);
        running(&house, "clear");
        let all = house.libvirtd.must_virsh(&["list", "--all", "--name"]);
        assert!(all.contains("locked") && all.contains("clear"), "{all}");
        house.import_provider("main");
        running(&house, "locked");
        destroy_both(&house);

        // With its key there it is one like any other.
        autostart(&mut house);
        running(&house, "clear");
        running(&house, "locked");
        destroy_both(&house);
    }
}

/// Starts libvirtd as at a boot. It must answer, whatever hooks say.
fn autostart(house: &mut House) {
    house.libvirtd.kill();
    // Autostart runs once per boot: libvirt keeps the mark in its run folder.
    let _ = fs::remove_file(house.lab.state.join("run/qemu/autostarted"));
    house.libvirtd.start_again();
    let begin = std::time::Instant::now();
    house.libvirtd.wait_answers();
    assert!(begin.elapsed() < Duration::from_secs(20), "libvirtd answers after {:?}", begin.elapsed());
}

fn running(house: &House, name: &str) {
    shell::until(&format!("{name} runs"), Duration::from_secs(30), || {
        house.libvirtd.virsh(&["domstate", name]).stdout.trim() == "running"
    });
}

fn destroy_both(house: &House) {
    for name in ["locked", "clear"] {
        house.libvirtd.must_virsh(&["destroy", name]);
    }
}

#[test]
fn managed_save_metadata_change_and_start_works_and_old_metadata_is_repaired() {
    let house = House::start(Lab::for_test("managedsave"));
    let guest = house.guest("saver", &[("vda", "16M", "raw")]);
    house.define(&guest);
    house.must_vmseal(&["vm", "encrypt", "saver"]);
    let mut console = house.boot(&guest);
    console.sh("echo VMSEAL-BEFORE-SAVE > /run/x");
    house.libvirtd.must_virsh(&["managedsave", "saver"]);
    // The saved image keeps the XML it was made with; somebody empties the metadata of the definition meanwhile.
    house.libvirtd.must_virsh(&["metadata", "saver", "urn:vmseal:domain:1", "--config", "--remove"]);
    house.libvirtd.must_virsh(&["start", "saver"]);
    let mut console = vmseal_e2e::console::Console::open(&guest.console());
    console.wait_ready();
    assert!(console.sh("cat /run/x").contains("VMSEAL-BEFORE-SAVE"));
    shell::until("the definition's metadata is repaired", Duration::from_secs(20), || {
        house.libvirtd.must_virsh(&["dumpxml", "saver", "--inactive"]).contains("urn:vmseal:domain:1")
    });
    house.power_off(&guest, &mut console);
    let mut console = house.boot(&guest);
    house.power_off(&guest, &mut console);
}

#[test]
fn no_secret_is_in_any_log_or_state_file() {
    let house = House::start(Lab::for_test("canary"));
    let guest = house.guest("web01", &[("vda", "8M", "raw")]);
    house.define(&guest);
    house.must_vmseal(&["vm", "encrypt", "web01"]);
    let mut console = house.boot(&guest);
    house.power_off(&guest, &mut console);
    // The password file is the test's own; everything else is the product's.
    fs::remove_file(house.lab.state.join("backup-password")).unwrap();
    let marker = vmseal_e2e::house::SECRET_MARKER.as_bytes();
    assert_eq!(scan::files_with(&house.lab.state, &[marker]), []);
}
