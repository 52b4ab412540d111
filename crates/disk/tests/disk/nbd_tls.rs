//! Disks over TLS: the clients that there are, through `vmseal-nbd-tls`.

use std::{
    fs,
    path::Path,
    process::{Child, Command},
    time::{Duration, Instant},
};

use crate::{
    rig::{MIB, Spec, pattern},
    tls_rig::{Proxy, rig},
    tools::{ok, python, tool},
};

const SIZE: u64 = 16 * MIB;

/// QEMU's words for a disk with this client's certificate.
fn qemu(port: u16, disk: &impl std::fmt::Display, client: &Path) -> [String; 4] {
    [
        "--object".into(),
        format!("tls-creds-x509,id=tls,endpoint=client,dir={}", client.display()),
        "--image-opts".into(),
        format!("driver=nbd,host=localhost,port={port},export={disk},tls-creds=tls"),
    ]
}

#[test]
fn tools_of_qemu_write_and_read_over_tls() {
    let (Some(mut io), Some(mut img)) = (tool("qemu-io"), tool("qemu-img")) else { return };
    let rig = rig(Spec::fixed(SIZE));
    let proxy = Proxy::new(&rig).with(&["--allow", "backup.example"]).start(&rig);
    let client = proxy.client(&rig);
    let disk = qemu(proxy.port, &rig.disk().id, &client);
    let said = ok(io
        .args(&disk)
        .args(["-c", "write -P 0x5e 1M 3M", "-c", "flush", "-c", "write -z 2M 64k", "-c", "discard 9M 64k"])
        .args(["-c", "read -P 0x5e 1M 1M", "-c", "read -P 0 2M 64k", "-c", "read -P 0 5M 64k"]));
    assert!(!said.contains("failed"), "{said}");
    let mut expected = vec![0; SIZE as usize];
    expected[MIB as usize..4 * MIB as usize].fill(0x5e);
    expected[2 * MIB as usize..][..64 << 10].fill(0);
    let copy = rig.path("copy.raw");
    ok(img.args(["convert", "-O", "raw"]).args(&disk).arg(&copy));
    let (copy, mut stored) = (fs::read(&copy).unwrap(), rig.disk().stored_plain());
    // What was discarded may read as anything.
    let discarded = 9 * MIB as usize..(9 << 20) + (64 << 10);
    stored[discarded.clone()].fill(0);
    assert!(stored == expected, "the volume holds something else");
    let mut copy = copy;
    copy[discarded].fill(0);
    assert!(copy == expected, "the copy holds something else");
    proxy.wait_for("(CN \"backup.example\") is connected");
    proxy.wait_for("ended after");
}

#[test]
fn tools_of_libnbd_copy_to_and_fro_over_several_connections() {
    let (Some(mut info), Some(_)) = (tool("nbdinfo"), tool("nbdcopy")) else { return };
    let rig = rig(Spec::fixed(SIZE));
    let proxy = Proxy::new(&rig).start(&rig);
    let client = proxy.client(&rig);
    let uri = proxy.uri(&rig, &client);
    let said = ok(info.args(["--json", &uri]));
    assert!(said.contains("\"TLS\": true") && said.contains(&SIZE.to_string()), "{said}");
    let (from, to) = (rig.path("from.raw"), rig.path("to.raw"));
    let data = pattern(7, SIZE as usize);
    fs::write(&from, &data).unwrap();
    ok(tool("nbdcopy").unwrap().args(["--connections=4", "--threads=4", "--flush"]).arg(&from).arg(&uri));
    assert!(rig.disk().stored_plain() == data, "the volume holds something else");
    ok(tool("nbdcopy").unwrap().args(["--connections=4", "--threads=4"]).arg(&uri).arg(&to));
    assert!(fs::read(&to).unwrap() == data, "the copy holds something else");
    let most = proxy.log().matches("is connected").count();
    assert!(most >= 9, "nbdcopy made {most} connections");
}

#[test]
fn a_hundred_connections_one_after_another_and_as_many_as_are_allowed_together() {
    let script = "
import nbd, sys
uri, together, all = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def connect():
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.connect_uri(uri)
    assert h.get_tls_negotiated()
    return h
held = [connect() for _ in range(together)]
for at, h in enumerate(held):
    h.pwrite(bytes([at + 1]) * 4096, at * 4096)
try:
    connect()
    sys.exit('one too many was served')
except nbd.Error:
    pass
for at, h in enumerate(held):
    assert h.pread(4096, at * 4096) == bytes([at + 1]) * 4096
    h.shutdown()
served, tries = 0, 0
while served < all:
    # The last ones may not have ended yet.
    tries += 1
    assert tries < 100 * all
    try:
        h = connect()
    except nbd.Error:
        continue
    assert h.pread(4096, 0) == b'\\1' * 4096
    h.shutdown()
    served += 1
print('served', served)
";
    let rig = rig(Spec::fixed(SIZE));
    let proxy = Proxy::new(&rig).with(&["--connections", "12"]).start(&rig);
    let uri = proxy.uri(&rig, &proxy.client(&rig));
    let Some(mut python) = python(script) else { return };
    // Strangers that say nothing take none of their places.
    let strangers: Vec<_> =
        (0..20).map(|_| std::net::TcpStream::connect(("127.0.0.1", proxy.port)).unwrap()).collect();
    assert_eq!(ok(python.args([&uri, "12", "100"])), "served 100\n");
    drop(strangers);
    proxy.wait_for("there are 12 clients already; see --connections");
    let resident = proxy.resident_kib();
    println!("nbd over tls: {resident} KiB resident after 112 connections");
    assert!(resident < 64 << 10, "{resident} KiB are resident");
}

/// Ends with its scope.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Not a proof of anything but a figure: what a copy takes, beside QEMU's own server with TLS and no encryption at rest.
#[test]
fn throughput_is_told_beside_that_of_qemu_nbd() {
    let (Some(mut qemu_nbd), Some(_)) = (tool("qemu-nbd"), tool("nbdcopy")) else { return };
    const BYTES: u64 = 64 * MIB;
    let memory = crate::vhost_user::directory_in_memory("tls");
    let rig = rig(Spec { directory: Some(memory.0.clone()), ..Spec::fixed(BYTES) });
    let proxy = Proxy::new(&rig).start(&rig);
    let client = proxy.client(&rig);
    // QEMU's server: a plain file, the same certificates.
    let (certificate, key) = proxy
        .authority
        .certify(&crate::tls_rig::Leaf { dns: &["localhost"], ..crate::tls_rig::Leaf::server("qemu") });
    let directory = rig.path("server");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("ca-cert.pem"), &proxy.authority.pem).unwrap();
    fs::write(directory.join("server-cert.pem"), certificate).unwrap();
    crate::tls_rig::write_key(&directory.join("server-key.pem"), &key, 0o600);
    let plain = memory.0.join("plain.raw");
    fs::write(&plain, pattern(1, BYTES as usize)).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let _server = Ends(
        qemu_nbd
            .args([
                "--object",
                &format!("tls-creds-x509,id=t,endpoint=server,verify-peer=on,dir={}", directory.display()),
            ])
            .args(["--tls-creds", "t", "--persistent", "--shared=8", "--bind=127.0.0.1", "--format=raw"])
            .args([format!("--port={port}")])
            .arg(&plain)
            .spawn()
            .unwrap(),
    );
    let theirs = format!("nbds://localhost:{port}/?tls-certificates={}", client.display());
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "qemu-nbd does not listen");
        std::thread::yield_now();
    }
    let ours = proxy.uri(&rig, &client);
    let copy = |what: &mut Command| {
        let began = Instant::now();
        ok(what);
        (BYTES / MIB) as f64 / began.elapsed().as_secs_f64()
    };
    let (mut reads, mut writes) = ([0f64; 2], [0f64; 2]);
    for _ in 0..3 {
        for (which, uri) in [&ours, &theirs].into_iter().enumerate() {
            let nbdcopy = || {
                let mut command = tool("nbdcopy").unwrap();
                command.arg("--connections=1");
                command
            };
            reads[which] = reads[which].max(copy(nbdcopy().arg(uri).arg("null:")));
            writes[which] = writes[which].max(copy(nbdcopy().arg(&plain).arg(uri)));
        }
    }
    println!(
        "nbd over tls, MiB/s, one connection, best of three: read {:.0}, write {:.0}; qemu-nbd without encryption at \
         rest: read {:.0}, write {:.0}",
        reads[0], writes[0], reads[1], writes[1]
    );
}
