//! What must be refused, each with its own message, and nothing changed on disk.

use std::{
    fs,
    os::unix::{fs::FileExt, net::UnixStream},
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use vmseal_e2e::{
    domain::Guest,
    house::{House, path},
    lab::Lab,
    shell,
};

fn volume(guest: &Guest, disk: usize) -> PathBuf {
    PathBuf::from(format!("{}.vmseal", guest.disks[disk].1.display()))
}

fn fingerprint(file: &Path) -> String {
    shell::must(shell::tool("sha256sum").arg(file)).stdout
}

/// Starting must be refused with these words, and the volume stays as it was.
fn refused(house: &House, guest: &Guest, words: &[&str]) {
    let before = fingerprint(&volume(guest, 0));
    let start = house.libvirtd.virsh(&["start", &guest.name]);
    assert!(!start.ok(), "{} started", guest.name);
    for word in words {
        assert!(start.stderr.contains(word), "'{word}' is not in: {}", start.stderr);
    }
    assert_eq!(before, fingerprint(&volume(guest, 0)), "a refused start changed the volume");
    assert_eq!(house.libvirtd.must_virsh(&["domstate", &guest.name]).trim(), "shut off");
}

/// Replaces a domain's definition by an edited one.
fn edit(house: &House, name: &str, change: impl Fn(String) -> String) -> String {
    let xml = house.libvirtd.must_virsh(&["dumpxml", name, "--inactive", "--security-info"]);
    let file = house.lab.state.join("edited.xml");
    fs::write(&file, change(xml.clone())).unwrap();
    house.libvirtd.must_virsh(&["define", path(&file)]);
    xml
}

fn restore(house: &House, xml: &str) {
    let file = house.lab.state.join("restored.xml");
    fs::write(&file, xml).unwrap();
    house.libvirtd.must_virsh(&["define", path(&file)]);
}

fn records(xml: &str) -> Vec<String> {
    xml.split("<vmseal:record>").skip(1).map(|r| r.split('<').next().unwrap_or("").to_owned()).collect()
}

#[test]
fn edited_metadata_moved_records_and_damaged_volumes_are_refused() {
    let mut house = House::start(Lab::for_test("tamper"));
    let one = house.guest("one", &[("vda", "8M", "raw"), ("vdb", "8M", "raw")]);
    let two = house.guest("two", &[("vda", "8M", "raw")]);
    for guest in [&one, &two] {
        house.define(guest);
        house.must_vmseal(&["vm", "encrypt", &guest.name]);
    }
    let ours = records(&house.libvirtd.must_virsh(&["dumpxml", "one", "--inactive"]));
    let other = records(&house.libvirtd.must_virsh(&["dumpxml", "two", "--inactive"]));
    assert_eq!((ours.len(), other.len()), (2, 1));

    // Metadata is a copy, never the authority: with any other copy good, an edited one changes nothing.
    let before = edit(&house, "one", |xml| xml.replace(&ours[0], &other[0]));
    let mut console = house.boot(&one);
    house.power_off(&one, &mut console);
    restore(&house, &before);

    // The VM's id is changed: another VM's key would be asked for.
    let vm =
        before.split("<vmseal:vm").nth(1).and_then(|x| x.split(" id=\"").nth(1)).map(|x| x[..36].to_owned());
    let vm = vm.expect("metadata has the VM's id");
    let before = edit(&house, "one", |xml| xml.replace(&vm, "00000000-1111-4222-8333-444444444444"));
    refused(&house, &one, &["belongs to VM", &vm]);
    restore(&house, &before);

    // Whole headers swapped between disks, and the records in the definition with them.
    let before = edit(&house, "one", |xml| swap(&xml, &ours[0], &ours[1]));
    let volumes = [volume(&one, 0), volume(&one, 1)];
    let good = volumes.each_ref().map(|v| read_header(v));
    write_header(&volumes[0], &good[1]);
    write_header(&volumes[1], &good[0]);
    refused(&house, &one, &["vda", "its header has"]);
    write_header(&volumes[0], &good[0]);
    write_header(&volumes[1], &good[1]);
    restore(&house, &before);

    // A volume whose header says: no encryption.
    write_header(&volumes[0], &edited_header(&good[0], "\"aes-xts-plain64\"", "\"cipher_null-ecb\""));
    refused(&house, &one, &["vda", "cipher_null"]);
    write_header(&volumes[0], &good[0]);

    // A volume cut short.
    let whole = fs::metadata(&volumes[0]).unwrap().len();
    let tail = fs::read(&volumes[0]).unwrap()[(whole - 65_536) as usize..].to_vec();
    let file = fs::OpenOptions::new().write(true).open(&volumes[0]).unwrap();
    file.set_len(whole - 65_536).unwrap();
    refused(&house, &one, &["vda", "truncated"]);
    file.write_all_at(&tail, whole - 65_536).unwrap();

    // A host and a server that never saw the VM: only the copies in the definition and in the header are left.
    // Whatever the host reports of the edited copies meanwhile, the key opens none of them.
    for (record, words) in [
        (ours[1].clone(), "it belongs to disk"),
        (other[0].clone(), "it belongs to VM"),
        (flipped(&ours[0]), "verifies"),
    ] {
        let before = edit(&house, "one", |xml| swap(&xml, &ours[0], &record));
        write_header(&volumes[0], &edited_header(&good[0], &ours[0], &record));
        forget(&mut house);
        refused(&house, &one, &["vda", words]);
        write_header(&volumes[0], &good[0]);
        restore(&house, &before);
    }

    // All undone: it starts.
    let mut console = house.boot(&one);
    house.power_off(&one, &mut console);
}

/// Puts one text in the place of the other and the other way round.
fn swap(text: &str, a: &str, b: &str) -> String {
    text.replace(a, "@@").replace(b, a).replace("@@", b)
}

/// A record with one bit of its last byte changed, in base64 as it came.
fn flipped(record: &str) -> String {
    let mut bytes = BASE64.decode(record).expect("a record is base64");
    *bytes.last_mut().expect("a record has bytes") ^= 1;
    BASE64.encode(bytes)
}

/// Both copies of the LUKS2 header with its JSON.
fn read_header(volume: &Path) -> Vec<u8> {
    fs::read(volume).unwrap()[..131_072].to_vec()
}

fn write_header(volume: &Path, header: &[u8]) {
    fs::OpenOptions::new().write(true).open(volume).unwrap().write_all_at(header, 0).unwrap();
}

/// Throws away what agent and server know of every key record.
fn forget(house: &mut House) {
    house.kill_agent();
    fs::remove_dir_all(house.lab.state.join("agent/records")).unwrap();
    // Nothing is learnt from records that no start has verified, so there may be none.
    assert!(sql(house, "delete from floors") <= 3);
    house.start_agent();
}

/// The header with something else in its JSON and the checksums made right again, as an attacker would.
fn edited_header(header: &[u8], old: &str, new: &str) -> Vec<u8> {
    let mut header = header.to_vec();
    let half = header.len() / 2;
    for at in [0, half] {
        let json = &mut header[at + 4096..at + half];
        let end = json.iter().position(|&b| b == 0).expect("the JSON is padded");
        let text = String::from_utf8(json[..end].to_vec()).expect("JSON is UTF-8");
        assert!(text.contains(old), "'{old}' is not in {text}");
        let text = text.replace(old, new);
        json.fill(0);
        json[..text.len()].copy_from_slice(text.as_bytes());
        header[at + 448..at + 512].fill(0);
        let digest = sha256(&header[at..at + half]);
        header[at + 448..at + 480].copy_from_slice(&digest);
    }
    header
}

fn sha256(bytes: &[u8]) -> Vec<u8> {
    let file = std::env::temp_dir().join(format!("vmseal-header-{}", std::process::id()));
    fs::write(&file, bytes).unwrap();
    let hex = shell::must(shell::tool("sha256sum").arg(&file)).stdout;
    fs::remove_file(&file).unwrap();
    (0..32).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect()
}

#[test]
fn old_epoch_is_refused_though_its_record_verifies() {
    let house = House::start(Lab::for_test("epoch"));
    let guest = house.guest("old", &[("vda", "8M", "raw")]);
    house.define(&guest);
    house.must_vmseal(&["vm", "encrypt", "old"]);
    // Whoever saw a newer record remembers: here the server's floor, one above what the host has.
    let disk = house.json(&["vm", "show", "old"])["disks"][0]["id"].as_str().expect("a disk id").to_owned();
    raise_floor(&house, &disk);
    refused(&house, &guest, &["older", "vda"]);
}

/// Raises the server's floor of a disk in its database, as an update that this host missed would have.
fn raise_floor(house: &House, disk: &str) {
    let raised = sql(house, &format!("update floors set epoch=epoch+1, record=x'' where disk_id='{disk}'"));
    assert_eq!(raised, 1);
}

/// Changes the server's database behind its back; gives how many rows.
fn sql(house: &House, statement: &str) -> u32 {
    let script = "import sqlite3,sys\nc=sqlite3.connect(sys.argv[1])\nn=c.execute(sys.argv[2]).rowcount\n\
                  c.commit()\nprint(n)\n";
    let database = house.lab.state.join("server/server.db");
    let changed = shell::must(shell::tool("python3").args(["-c", script]).arg(database).arg(statement));
    changed.stdout.trim().parse().expect("a number of rows")
}

#[test]
fn running_volume_is_closed_to_everybody_else() {
    let house = House::start(Lab::for_test("closed"));
    let guest = house.guest("busy", &[("vda", "8M", "raw")]);
    house.define(&guest);
    house.must_vmseal(&["vm", "encrypt", "busy"]);
    let mut console = house.boot(&guest);
    let volume = volume(&guest, 0);

    // `qemu-img info` takes no lock on a raw file; whatever reads or writes data does.
    let copy = house.lab.state.join("stolen.img");
    let image = shell::run(shell::tool("qemu-img").args(["convert", "-O", "raw"]).arg(&volume).arg(&copy));
    assert!(!image.ok() && image.stderr.contains("lock"), "{}", image.all());

    // A second VM on the same volume: the definition copied under another name and UUID.
    let xml = house.libvirtd.must_virsh(&["dumpxml", "busy", "--inactive", "--security-info"]);
    let uuid = house.libvirtd.must_virsh(&["domuuid", "busy"]).trim().to_owned();
    let copy = xml
        .replace("<name>busy</name>", "<name>twin</name>")
        .replace(&format!("<uuid>{uuid}</uuid>"), "")
        .replace("/serial/busy", "/serial/twin");
    fs::write(house.lab.state.join("twin.xml"), copy).unwrap();
    house.libvirtd.must_virsh(&["define", path(&house.lab.state.join("twin.xml"))]);
    let start = house.libvirtd.virsh(&["start", "twin"]);
    assert!(!start.ok() && start.stderr.contains("vmseal"), "{}", start.all());

    // Another process with QEMU's own user at the socket: dropped before a byte.
    let socket = house.lab.run.join(format!("libvirt-{uuid}/vda.sock"));
    assert!(UnixStream::connect(&socket).is_ok(), "root may connect and is dropped after");
    let stranger = shell::run(
        shell::tool("setpriv")
            .args([
                "--reuid=libvirt-qemu",
                "--regid=libvirt-qemu",
                "--clear-groups",
                "timeout",
                "5",
                "nbdinfo",
            ])
            .arg(format!("nbd+unix:///?socket={}", socket.display())),
    );
    assert!(!stranger.ok(), "{}", stranger.all());
    let status =
        vmseal_e2e::scan::disk_status(&socket.with_file_name("control.sock")).expect("the disk answers");
    assert!(status.disks[0].refused_clients >= 2, "{status:?}");
    assert_eq!(status.disks[0].client_pid, house.libvirtd.qemu_pid("busy").expect("QEMU runs"));
    let log = fs::read_to_string(house.lab.state.join(format!("logs/disk-{uuid}.log"))).unwrap();
    assert!(log.matches("vda: refused").count() >= 2, "{log}");
    console.sh("dd if=/dev/vda of=/dev/null bs=64k count=8 2>/dev/null");
    house.power_off(&guest, &mut console);
}
