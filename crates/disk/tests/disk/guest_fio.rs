//! fio in a real guest, on a disk it has by vhost-user or NBD, while the disk's workers are killed.
//!
//! Nothing in the guest knows of it: what fio reads back is what it wrote, and no request of the guest fails. Kills come
//! after so many bytes of work, drawn from a seed; so they fall into handshakes, into batches and between them.

use std::{
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use crate::{
    guest::Guest,
    rig::{MIB, Rig, Spec, hex, kill},
    seed::Random,
    vhost_user,
};

/// Each of the three jobs has a part of its own.
const DISK: u64 = 32 * MIB;

/// One round of fio: all over each part, and every block that was written is read back and checked. The third job trims
/// before it writes. (fio 3.33 gets three things wrong on any disk: with `loops` it looks for wrong blocks after `randrw`
/// and does not write after trims, which it does not either at an `offset`.)
const JOBS: &str = "\
[global]
filename=/dev/vda
direct=1
randseed=${SEED}
verify=crc32c
verify_fatal=1
verify_state_save=0
[mixed]
offset=4m
size=8m
rw=randrw
bssplit=512/20:4k/30:16k/20:64k/20:256k/10
ioengine=io_uring
iodepth=16
fsync=32
[written]
offset=12m
size=16m
rw=randwrite
bsrange=512-256k
ioengine=libaio
iodepth=8
fdatasync=16
verify_backlog=64
[trimmed]
size=4m
rw=randtrimwrite
bsrange=512-256k
ioengine=libaio
iodepth=4
fsync=32
";

/// fio writes once and checks later: these options are the same in both calls.
const ONCE: &str = "checked --name=once --filename=/dev/vda --direct=1 --size=4m --rw=randwrite --bsrange=512-256k \
    --randseed=1 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --ioengine=libaio --iodepth=8 --minimal";

/// Runs fio, which does not say by its status alone whether what it read was right.
const CHECKED: &str = "checked() { fio \"$@\" > /run/said 2>&1 && ! grep -q verify /run/said; }";

/// Rounds until there is a file that says stop. What they did goes to `/run/did`, a round that fails ends it.
const ROUNDS: &str = "\
while [ ! -e /run/stop ]; do
  export SEED=$((SEED + 1))
  if ! checked --output-format=json --output=/run/result /run/jobs; then
    cat /run/said /run/result > /run/failed
    exit 1
  fi
  grep -oE '\"(jobname|error|io_bytes)\" : [^,]+' /run/result | sed 's/.* : //' | xargs -n 5 >> /run/did
done
";

/// What the kernel says when a request fails, by disk.
fn failed_requests(guest: &mut Guest, disk: &str) -> String {
    guest.sh(&format!("dmesg | grep -iE '{disk}.*(error|timed out)|(error|timed out).*{disk}' || true"))
}

/// Kills workers at work until there were `kills` and `least` has passed; gives how many, and the bytes they had moved.
fn kill_workers(
    rig: &Rig,
    guest: &mut Guest,
    random: &mut Random,
    kills: usize,
    least: Duration,
) -> (usize, u64) {
    let (began, mut killed, mut moved) = (Instant::now(), 0, 0);
    while killed < kills || began.elapsed() < least {
        // One in six is killed as soon as it answers, while QEMU connects.
        let work = if random.chance(1, 6) { 0 } else { random.below(16 * MIB) };
        let deadline = Instant::now() + Duration::from_secs(60);
        let (worker, done) = loop {
            let status = rig.status();
            let done = status.disks[0].written_bytes + status.disks[0].read_bytes;
            if done >= work {
                break (status.worker_pid, done);
            }
            if Instant::now() > deadline {
                let said = guest.try_sh("cat /run/failed /run/said; dmesg | tail -n 20").1;
                panic!("{done} bytes of {work} in a minute: {status:?}; the guest says: {said}");
            }
            // Two processors carry guest, worker and this.
            std::thread::sleep(Duration::from_millis(2));
        };
        kill(worker, libc::SIGKILL);
        killed += 1;
        moved += done;
    }
    (killed, moved)
}

/// What the rounds of one job did together, in bytes.
#[derive(Default)]
struct Did {
    rounds: u64,
    read: u64,
    written: u64,
    trimmed: u64,
}

impl Did {
    /// Adds up lines: a job's name, its error, what it read, wrote and trimmed.
    fn of(lines: &str, job: &str) -> Self {
        let mut did = Self::default();
        for line in lines.lines() {
            let [name, "0", moved @ ..] = &line.split_whitespace().collect::<Vec<_>>()[..] else {
                panic!("{line} in {lines}")
            };
            let moved: Vec<u64> = moved.iter().map(|bytes| bytes.parse().unwrap()).collect();
            let [read, written, trimmed] = moved[..] else { panic!("{line} in {lines}") };
            if *name == job {
                did.rounds += 1;
                did.read += read;
                did.written += written;
                did.trimmed += trimmed;
            }
        }
        did
    }
}

#[test]
fn guest_fio_finds_no_fault_by_vhost_user_while_workers_are_killed() {
    no_fault(&vhost_user::rig(&[Spec::fixed(DISK)]), 8);
}

#[test]
fn guest_fio_finds_no_fault_by_nbd_while_workers_are_killed() {
    no_fault(&Rig::with(Spec::fixed(DISK)), 4);
}

/// Kills `kills` workers, or in the full count workers for ten minutes.
fn no_fault(rig: &Rig, kills: usize) {
    let soak = std::env::var_os("VMSEAL_SOAK").is_some();
    let (kills, least) = if soak { (100, Duration::from_secs(600)) } else { (kills, Duration::ZERO) };
    let mut random = Random::for_test("guest_fio");
    // vdb is the volume's file for dm-crypt in the guest; of vdc every read fails.
    let volume = format!(
        "file,filename={},node-name=vdb,read-only=on,locking=off,cache.direct=off",
        rig.disk().file.display()
    );
    let more = [
        "-blockdev",
        &volume,
        "-device",
        "virtio-blk-pci,drive=vdb,addr=0x5",
        "-blockdev",
        "blkdebug,node-name=vdc,image.driver=null-co,image.size=1048576,inject-error.0.event=none,inject-error.0.errno=5",
        "-device",
        "virtio-blk-pci,drive=vdc,addr=0x6",
    ];
    let Some(mut guest) = Guest::boot(rig, &more) else { return };
    assert_eq!(guest.sh("ls /sys/block/vda/mq | wc -l"), "2");
    guest.sh(CHECKED);
    guest.sh(&format!("cat > /run/jobs <<'EOF'\n{JOBS}EOF\ncat > /run/rounds <<'EOF'\n{ROUNDS}EOF\n"));
    guest.sh(&format!("(SEED={}; . /run/rounds) & rounds=$!", random.below(1 << 32)));

    let began = Instant::now();
    let (killed, moved) = kill_workers(rig, &mut guest, &mut random, kills, least);
    let (status, _) = guest.try_sh("touch /run/stop; wait $rounds");
    assert_eq!(status, 0, "{}", guest.try_sh("cat /run/failed").1);
    println!("guest fio: {killed} workers killed, {} MiB moved by them, {:?}", moved / MIB, began.elapsed());
    let did = guest.sh("cat /run/did");
    for name in ["mixed", "written", "trimmed"] {
        let Did { rounds, read, written, trimmed } = Did::of(&did, name);
        println!(
            "guest fio: {name}: {rounds} rounds, {written} bytes written and verified, {read} read, {trimmed} trimmed"
        );
        // Each byte that was written was read back.
        assert!(rounds > 0 && written > rounds * MIB && read >= written, "{did}");
        assert_eq!(trimmed, if name == "trimmed" { written } else { 0 }, "{did}");
    }
    assert_eq!(failed_requests(&mut guest, "vda"), "");
    assert_eq!(rig.log().matches("died (signal 9)").count(), killed, "{}", rig.log());

    same_by_dm_crypt(rig, &mut guest);
    a_wrong_byte_is_found(rig, &mut guest);
    guest.try_sh("dd if=/dev/vdc of=/dev/null bs=4096 count=1");
    assert!(failed_requests(&mut guest, "vdc").contains("I/O error"), "a failed read would not be seen");
}

/// The volume holds what the guest sees, says dm-crypt.
fn same_by_dm_crypt(rig: &Rig, guest: &mut Guest) {
    let key: String = hex(&rig.disk().payload[..64]);
    let escaped: String = (0..64).map(|at| format!("\\x{}", &key[2 * at..2 * at + 2])).collect();
    guest.sh(&format!("printf '{escaped}' > /run/key; wc -c /run/key"));
    guest.sh(&format!(
        "cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 --key-file /run/key --offset {} \
         --readonly /dev/vdb other",
        rig.disk().setup.payload_offset / 512
    ));
    guest.sh("echo 3 > /proc/sys/vm/drop_caches; cmp /dev/vda /dev/mapper/other");
}

/// One byte of ciphertext that is changed is found by fio, and by nobody before.
fn a_wrong_byte_is_found(rig: &Rig, guest: &mut Guest) {
    guest.sh(&format!("{ONCE} --do_verify=0 && {ONCE} --verify_only"));
    let (volume, at) = (rig.disk().open(), rig.disk().setup.payload_offset + MIB + 700);
    let mut byte = [0];
    volume.read_exact_at(&mut byte, at).unwrap();
    volume.write_all_at(&[!byte[0]], at).unwrap();
    volume.sync_data().unwrap();
    let (status, said) = guest.try_sh(&format!("{ONCE} --verify_only || (cat /run/said; false)"));
    assert!(
        status == 1 && said.contains("verify failed"),
        "fio did not find the wrong byte: {status} {said}"
    );
}
