//! The data key and its schedule are in no other process, in no core dump.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use vmseal_e2e::{house::House, lab::Lab, scan};

const NOTHING: [usize; 0] = [];

#[test]
fn data_key_is_in_no_memory_and_no_core_of_anyone_but_the_disk() {
    let house = House::start(Lab::for_test("memory"));
    let guest = house.guest("secret", &[("vda", "16M", "raw")]);
    house.define(&guest);
    house.must_vmseal(&["vm", "encrypt", "secret"]);
    let mut console = house.boot(&guest);
    console.sh("dd if=/dev/urandom of=/dev/vda bs=1M count=16 2>/dev/null; sync; dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null");

    let volume = PathBuf::from(format!("{}.vmseal", guest.disks[0].1.display()));
    let key = house.recover_key(&volume);
    let bytes: [u8; 64] = fs::read(&key).unwrap().try_into().expect("a volume key has 64 bytes");
    fs::remove_file(&key).unwrap();
    let halves: [[u8; 32]; 2] = [bytes[..32].try_into().unwrap(), bytes[32..].try_into().unwrap()];
    let rounds: Vec<[u8; 16]> = halves.iter().flat_map(scan::aes256_round_keys).collect();
    let mut needles: Vec<&[u8]> = halves.iter().map(|h| &h[..]).collect();
    needles.extend(rounds.iter().map(|r| &r[..]));

    assert_eq!(scan::files_with(&house.lab.state, &needles), [], "key material in a file");

    let (keeper, worker) = house.disk_pids("secret").expect("the disk answers");
    let qemu = house.libvirtd.qemu_pid("secret").expect("QEMU runs");
    let folder = house.lab.folder("cores");
    planted_key_is_found(&folder);
    for (name, pid) in [
        ("agent", house.agent_pid()),
        ("server", house.server_pid()),
        ("libvirtd", house.libvirtd.pid() as i32),
        ("QEMU", qemu),
        ("keeper", keeper),
    ] {
        assert_eq!(scan::memory_with(pid, &needles), NOTHING, "key material in the memory of {name}");
        assert_eq!(scan::core_with(pid, &folder, &needles), NOTHING, "key material in a core of {name}");
    }
    let active =
        scan::disk_status(&house.lab.run.join(format!(
            "libvirt-{}/control.sock",
            house.libvirtd.must_virsh(&["domuuid", "secret"]).trim()
        )))
        .expect("the disk answers")
        .secret_memory;
    // The disk process itself works with the key. At rest it has it in secret memory alone, which nobody can read; where
    // the kernel has none, it is in its own memory and nowhere else.
    if active == "memfd_secret" {
        assert_eq!(scan::memory_with(worker, &needles), NOTHING, "key material in the memory of the worker");
        assert_eq!(
            scan::core_with(worker, &folder, &needles),
            NOTHING,
            "key material in a core of the worker"
        );
    } else {
        println!("secret memory is {active}: the worker's own memory was not searched");
    }
    house.power_off(&guest, &mut console);
}

/// The search must be able to find: a key in another process's memory, in its core, in a register of it only.
fn planted_key_is_found(folder: &Path) {
    let key = *b"VMSEAL-TEST-SECRET-planted-key-!";
    let rounds = scan::aes256_round_keys(&key);
    let schedule: Vec<String> = rounds[..15].concat().iter().map(|b| format!("{b:02x}")).collect();
    let script = format!("key = bytes.fromhex('{}'); print('ready', flush=True); input()", schedule.concat());
    let mut holder = Command::new("python3")
        .args(["-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 starts");
    let mut said = [0u8; 5];
    holder.stdout.as_mut().expect("it is piped").read_exact(&mut said).expect("it gets ready");
    let pid = holder.id() as i32;
    let needles = [&key[..], &rounds[14][..], b"VMSEAL-NOT-THERE"];
    assert_eq!(scan::memory_with(pid, &needles), [0, 1]);
    assert_eq!(scan::core_with(pid, folder, &needles), [0, 1]);

    let register = *b"IN-REGISTER-ONLY";
    assert_eq!(scan::core_with(pid, folder, &[&register]), NOTHING);
    let number = |half: &[u8]| u64::from_le_bytes(half.try_into().expect("8 bytes"));
    let sets = [0, 1].map(|i| format!("set $xmm7.v2_int64[{i}] = {:#x}", number(&register[8 * i..][..8])));
    assert_eq!(scan::core_after(pid, folder, &sets, &[&register]), [0], "register notes are not searched");
    holder.kill().expect("it is ours");
    holder.wait().expect("it is ours");
}
