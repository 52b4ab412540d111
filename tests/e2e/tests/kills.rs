//! kill -9 of every process of the house, under guest I/O: no guest error, every acknowledged block is there.

use std::time::{Duration, Instant};

use vmseal_e2e::{console::Console, house::House, lab::Lab, rounds, shell};

const WRITER: &str = r#"cat > /run/writer <<'W'
#!/bin/sh
# Writes numbered 4 KiB blocks, each synced, and says which number is surely on the disk.
n=0
while [ ! -e /run/stop ]; do
  n=$((n+1))
  printf '%0512d%0512d%0512d%0512d%0512d%0512d%0512d%0512d' $n $n $n $n $n $n $n $n > /run/block
  if dd if=/run/block of=/dev/vda bs=4096 seek=$((n % 1000)) count=1 conv=notrunc,fsync 2>/run/dderr; then
    echo $n > /run/acked
  else
    echo "$n: $(cat /run/dderr)" >> /run/errors
  fi
done
echo done > /run/writer-done
W
chmod +x /run/writer; : > /run/errors; rm -f /run/stop /run/writer-done; echo 0 > /run/acked; /run/writer >/dev/null 2>&1 & true"#;

const CHECKER: &str = r#"last=$(cat /run/acked); echo 3 > /proc/sys/vm/drop_caches; bad=0; i=$last; low=$((last > 999 ? last - 998 : 1));
while [ $i -ge $low ]; do
  want=$(printf '%0512d' $i | head -c 512)
  got=$(dd if=/dev/vda bs=512 skip=$((i % 1000 * 8)) count=1 2>/dev/null)
  [ "$want" = "$got" ] || { bad=$((bad+1)); echo "block $i"; }
  i=$((i-1))
done; echo "checked $((last - low + 1)) bad $bad errors $(wc -l < /run/errors)""#;

fn acked(console: &mut Console) -> u64 {
    let mut number = None;
    // The shell's prompt may stand before it; while the writer replaces it, there is none.
    shell::until("the guest says what it wrote", Duration::from_secs(20), || {
        number = console.sh("cat /run/acked").split_whitespace().last().and_then(|word| word.parse().ok());
        number.is_some()
    });
    number.expect("it was waited for")
}

/// Waits until the guest got an acknowledgement after now: I/O goes on.
fn io_goes_on(console: &mut Console, what: &str) {
    let before = acked(console);
    let mut now = before;
    shell::until(&format!("after {what}, the guest's writes go on"), Duration::from_secs(60), || {
        now = acked(console);
        now > before + 1
    });
}

#[test]
fn guest_sees_no_error_when_any_process_is_killed() {
    let mut house = House::start(Lab::for_test("kills"));
    let guest = house.guest("worker", &[("vda", "8M", "raw")]);
    house.define(&guest);
    house.must_vmseal(&["vm", "encrypt", "worker"]);
    let mut console = house.boot(&guest);
    console.sh(WRITER);
    io_goes_on(&mut console, "nothing");

    for round in 0..rounds(2, 50) {
        let (_, worker) = house.disk_pids("worker").expect("the disk answers");
        kill(worker);
        io_goes_on(&mut console, &format!("worker killed, round {round}"));

        house.kill_agent();
        io_goes_on(&mut console, "agent killed");
        house.start_agent();

        house.kill_server();
        io_goes_on(&mut console, "server killed");
        house.start_server();

        house.libvirtd.kill();
        io_goes_on(&mut console, "libvirtd killed");
        house.libvirtd.start_again();
        house.libvirtd.wait_answers();

        // A lost keeper takes its worker along: I/O stalls until the agent starts a new pair.
        let (keeper, _) = house.disk_pids("worker").expect("the disk answers");
        kill(keeper);
        io_goes_on(&mut console, "keeper killed");
    }

    // Agent and worker together, with no provider to ask.
    house.must_vmseal(&["provider", "remove", "main", "--danger-lose-keys"]);
    let (_, worker) = house.disk_pids("worker").expect("the disk answers");
    house.kill_agent();
    kill(worker);
    io_goes_on(&mut console, "agent and worker killed with the provider gone");

    console.sh("touch /run/stop; while [ ! -e /run/writer-done ]; do sleep 1; done");
    let checked = console.sh(CHECKER);
    assert!(checked.contains("bad 0 errors 0"), "{checked}");
    assert_eq!(house.libvirtd.must_virsh(&["domstate", "worker"]).trim(), "running");
}

#[test]
fn lost_keeper_stalls_the_guest_until_somebody_starts_it_again() {
    let mut house = House::start(Lab::for_test("keeper"));
    let guest = house.guest("worker", &[("vda", "8M", "raw")]);
    house.define(&guest);
    house.must_vmseal(&["vm", "encrypt", "worker"]);
    let mut console = house.boot(&guest);
    console.sh(WRITER);
    io_goes_on(&mut console, "nothing");
    for _ in 0..rounds(1, 20) {
        let (keeper, _) = house.disk_pids("worker").expect("the disk answers");
        house.kill_agent();
        kill(keeper);
        io_stalls(&mut console);
        house.start_agent();
        io_goes_on(&mut console, "the agent came back");

        // With no key to be had, the next agent cannot either, and the guest waits on.
        house.must_vmseal(&["provider", "remove", "main", "--danger-lose-keys"]);
        house.kill_agent();
        house.start_agent();
        let (keeper, _) = house.disk_pids("worker").expect("the disk answers");
        kill(keeper);
        io_stalls(&mut console);
        let locked = house.vmseal(&["vm", "repair", "worker"]);
        assert_eq!(locked.code(), 4, "{}", locked.all());
        assert!(locked.stderr.contains("of provider main cannot be had"), "{}", locked.stderr);
        assert_eq!(house.libvirtd.must_virsh(&["domstate", "worker"]).trim(), "running");
        house.import_provider("main");
        house.must_vmseal(&["vm", "repair", "worker"]);
        io_goes_on(&mut console, "the key came back");
    }
    console.sh("touch /run/stop; while [ ! -e /run/writer-done ]; do sleep 1; done");
    let checked = console.sh(CHECKER);
    assert!(checked.contains("bad 0 errors 0"), "{checked}");
    house.power_off(&guest, &mut console);
}

/// The guest lives, and for two seconds none of its writes is acknowledged; it writes about twenty a second.
fn io_stalls(console: &mut Console) {
    let (mut last, mut since) = (acked(console), Instant::now());
    shell::until("the guest's writes stall", Duration::from_secs(30), || {
        let now = acked(console);
        if now != last {
            (last, since) = (now, Instant::now());
        }
        since.elapsed() > Duration::from_secs(2)
    });
}

fn kill(pid: i32) {
    assert!(pid > 1);
    // SAFETY: sends a signal to a process of this house's own disk, which it named on its own socket.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
}
