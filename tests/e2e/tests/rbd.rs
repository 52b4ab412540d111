//! A VM whose disk is an RBD image, with a real cluster: encrypted, booted, written to while its helper, its worker and the
//! agent are killed, stopped, started again, decrypted. QEMU speaks to no cluster: it gets NBD.

use std::{fs, path::Path, time::Duration};

use vmseal_e2e::{ceph::Ceph, house::House, lab::Lab, rounds, shell, writer};

#[test]
fn guest_on_rbd_sees_no_error_when_its_helper_is_killed() {
    let mut house = House::bare(Lab::for_test("rbd"));
    let Some(ceph) = Ceph::start(&house.lab) else { return };
    house.know_ceph(&ceph.conf());
    house.start_server();
    house.create_provider("main");
    house.join();
    house.start_agent();

    let guest = house.guest("worker", &[("vda", "8M", "raw")]);
    let image = guest.disks[0].1.clone();
    shell::must(shell::tool("rbd").arg("-c").arg(ceph.conf()).arg("import").arg(&image).arg("rbd/worker"));
    fs::remove_file(&image).expect("own file");
    let file = format!("<source file='{}'/>", image.display());
    let xml = guest.xml().replace("<disk type='file'", "<disk type='network'");
    let xml = xml.replace(&file, "<source protocol='rbd' name='rbd/worker'/>");
    assert!(xml.contains("protocol='rbd'"), "{xml}");
    house.define_as(&guest, &xml);

    house.must_vmseal(&["vm", "encrypt", "worker"]);
    assert_eq!(ceph.rbd(&["ls", "rbd"]).trim(), "worker.vmseal");
    let mut console = house.boot(&guest);
    writer::begin(&mut console);
    writer::goes_on(&mut console, "nothing");
    for round in 0..rounds(1, 50) {
        kill(helper(&house));
        writer::goes_on(&mut console, &format!("helper killed, round {round}"));
        let (_, worker) = house.disk_pids("worker").expect("the disk answers");
        kill(worker);
        writer::goes_on(&mut console, &format!("worker killed, round {round}"));
    }
    // Nobody starts another helper while there is no agent; the guest waits, and the next agent finds out.
    let last = helper(&house);
    house.kill_agent();
    writer::goes_on(&mut console, "agent killed");
    kill(last);
    house.start_agent();
    writer::goes_on(&mut console, "agent and helper killed");
    // A lost keeper takes its helper along.
    let (keeper, _) = house.disk_pids("worker").expect("the disk answers");
    kill(keeper);
    writer::goes_on(&mut console, "keeper killed");
    writer::check(&mut console);
    let last = helper(&house);
    house.power_off(&guest, &mut console);
    shell::until("the image is given back", Duration::from_secs(30), || {
        !Path::new(&format!("/proc/{last}")).exists()
            && !ceph.rbd(&["status", "rbd/worker.vmseal"]).contains("watcher=")
    });
    let volume = house.lab.state.join("exported");
    ceph.export("rbd/worker.vmseal", &volume);
    assert!(fs::read(&volume).expect("own file").starts_with(b"LUKS\xba\xbe"));

    // Stopped and started, of another class: what was written is there, and a helper may die there too.
    house.must_vmseal(&["disk", "set", "--class", "fast", "worker", "vda"]);
    let mut console = house.boot(&guest);
    let blocks = console.sh("dd if=/dev/vda bs=4096 count=1000 2>/dev/null | tr -d '0\\000' | wc -c");
    let blocks: u64 = blocks.split_whitespace().last().and_then(|word| word.parse().ok()).expect("a number");
    assert!(blocks > 0, "nothing of what was written is there");
    kill(helper(&house));
    writer::begin(&mut console);
    writer::goes_on(&mut console, "helper of a fast disk killed");
    writer::check(&mut console);
    house.power_off(&guest, &mut console);

    // Another client has the image: the start says who.
    let holder = Holder::start(&ceph, &house);
    let refused = house.libvirtd.virsh(&["start", "worker"]);
    assert!(!refused.ok() && refused.all().contains("is in use by another client"), "{}", refused.all());
    assert!(refused.all().contains("127.0.0.1:0/"), "who: {}", refused.all());
    assert!(refused.all().contains("rbd status rbd/worker.vmseal"), "what to do: {}", refused.all());
    drop(holder);

    house.must_vmseal(&["vm", "decrypt", "worker"]);
    assert_eq!(ceph.rbd(&["ls", "rbd"]).trim(), "worker");
    let xml = house.libvirtd.must_virsh(&["dumpxml", "--inactive", "worker"]);
    assert!(xml.contains("<source protocol='rbd' name='rbd/worker'"), "{xml}");
}

/// The helper's pid, as the agent keeps it.
fn helper(house: &House) -> i32 {
    let mut pid = None;
    shell::until("a helper is there", Duration::from_secs(30), || {
        let files = fs::read_dir(house.lab.state.join("agent/rbd")).into_iter().flatten().flatten();
        let pids = files.filter_map(|file| {
            let text = fs::read_to_string(file.path()).ok()?;
            let pid = serde_json::from_str::<serde_json::Value>(&text).ok()?["pid"].as_i64()?;
            i32::try_from(pid).ok()
        });
        pid = pids.into_iter().find(|pid| Path::new(&format!("/proc/{pid}")).exists());
        pid.is_some()
    });
    pid.expect("it was waited for")
}

/// A helper that nobody here started for a VM: another host's, for all that can be seen.
struct Holder {
    process: std::process::Child,
    _listens: std::os::fd::OwnedFd,
}

impl Holder {
    fn start(ceph: &Ceph, house: &House) -> Self {
        use std::io::{BufRead, BufReader};
        let socket = house.lab.run.join("holder.sock");
        let listener = packet_listener(&socket);
        let mut child = std::process::Command::new(vmseal_e2e::lab::bin("vmseal-rbd"))
            .args(["--pool", "rbd", "--image", "worker.vmseal", "--socket"])
            .arg(&socket)
            .arg("--conf")
            .arg(ceph.conf())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("vmseal-rbd starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("it is piped"))
            .read_line(&mut line)
            .expect("it says a line");
        assert!(line.starts_with("owner "), "{line}");
        Self { process: child, _listens: listener }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // In order, so that the lock is given back.
        // SAFETY: a process of this test.
        unsafe { libc::kill(self.process.id() as i32, libc::SIGTERM) };
        let _ = self.process.wait();
    }
}

fn packet_listener(path: &Path) -> std::os::fd::OwnedFd {
    use std::os::{
        fd::{AsRawFd, FromRawFd},
        unix::ffi::OsStrExt,
    };
    // SAFETY: sockaddr_un is plain data and long enough for the path; the descriptor is new and ours alone.
    unsafe {
        let mut address: libc::sockaddr_un = std::mem::zeroed();
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        let bytes = path.as_os_str().as_bytes();
        assert!(bytes.len() < address.sun_path.len());
        for (to, from) in address.sun_path.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        let fd = libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0);
        assert!(fd >= 0);
        let socket = std::os::fd::OwnedFd::from_raw_fd(fd);
        let length = std::mem::size_of_val(&address) as libc::socklen_t;
        assert_eq!(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length), 0);
        assert_eq!(libc::listen(socket.as_raw_fd(), 8), 0);
        socket
    }
}

fn kill(pid: i32) {
    assert!(pid > 1);
    // SAFETY: sends a signal to a process of this house's own disk, which it named in its own files.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
}
