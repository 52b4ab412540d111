//! Who is not let through to a disk by `vmseal-nbd-tls`, and what it says of them.

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    time::{Duration, Instant},
};

use rcgen::ExtendedKeyUsagePurpose;

use crate::{
    rig::{MIB, Rig, Spec},
    tls_rig::{Authority, Leaf, Proxy, Running, rig, write_key},
    tools::{fails, ok, python, tool},
    vhost_user::kill_worker,
};

/// Python's TLS, which can be told to do what no good client does: port, newest TLS, directory of the client's certificate
/// or `-`. Prints `served` if an option was answered within TLS.
const CLIENT: &str = "
import socket, ssl, struct, sys
port, newest, client = int(sys.argv[1]), sys.argv[2], sys.argv[3]
s = socket.create_connection(('127.0.0.1', port))
def take(s, count):
    data = b''
    while len(data) < count:
        piece = s.recv(count - len(data))
        if not piece: raise EOFError
        data += piece
    return data
assert take(s, 16) == b'NBDMAGICIHAVEOPT' and take(s, 2) == b'\\0\\3'
s.sendall(struct.pack('>I', 3) + b'IHAVEOPT' + struct.pack('>II', 5, 0))
assert struct.unpack('>QIII', take(s, 20))[1:] == (5, 1, 0)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
if newest == '1.2': context.maximum_version = ssl.TLSVersion.TLSv1_2
if client != '-': context.load_cert_chain(client + '/client-cert.pem', client + '/client-key.pem')
s = context.wrap_socket(s)
s.sendall(b'IHAVEOPT' + struct.pack('>II', 3, 0))
assert struct.unpack('>QI', take(s, 12))[1] == 3
print('served', s.version())
";

fn client(proxy: &Running, newest: &str, directory: &Path) -> Option<std::process::Command> {
    let mut python = python(CLIENT)?;
    python.args([proxy.port.to_string().as_str(), newest]).arg(directory);
    Some(python)
}

/// No client of the proxy's has reached the disk.
fn untouched(rig: &Rig) {
    let status = &rig.status().disks[0];
    assert_eq!((status.client_pid, status.refused_clients), (0, 0), "{status:?}");
    assert!(!rig.log().contains("connected"), "{}", rig.log());
}

#[test]
fn who_does_not_show_a_good_certificate_never_reaches_the_disk() {
    let rig = rig(Spec::fixed(4 * MIB));
    let proxy = Proxy::new(&rig).with(&["--allow", "backup.example", "--allow", "hv2"]).start(&rig);
    let (ours, other) = (&proxy.authority, Authority::new("another CA"));
    let good = proxy.client(&rig);
    let make =
        |name: &str, authority: &Authority, leaf: Leaf<'_>| authority.client(rig.path(name), &leaf, ours);
    let expired = make("expired", ours, Leaf { years: (2020, 2021), ..Leaf::client("backup.example") });
    let early = make("early", ours, Leaf { years: (2080, 2090), ..Leaf::client("backup.example") });
    let stranger = make("stranger", &other, Leaf::client("backup.example"));
    let server = make("server", ours, Leaf::server("backup.example"));
    let unlisted = make("unlisted", ours, Leaf { dns: &["hv3.example"], ..Leaf::client("hv3") });
    let usage = ExtendedKeyUsagePurpose::ClientAuth;
    let by_dns = make("by-dns", ours, Leaf { dns: &["hv2"], usage, ..Leaf::client("anything") });
    for (newest, directory, says) in [
        ("1.3", Path::new("-"), "it shows no certificate; it needs one of the authority in --client-ca"),
        ("1.2", &good, "there is no TLS 1.3 that both can"),
        ("1.3", &expired, "its certificate is refused: certificate expired: verification time"),
        ("1.3", &early, "its certificate is refused: certificate not valid yet"),
        ("1.3", &stranger, "its certificate is not of the authority in --client-ca"),
        ("1.3", &server, "its certificate is refused"),
        ("1.3", &unlisted, "none of its names (CN \"hv3\", DNS \"hv3.example\") was given with --allow"),
    ] {
        let Some(mut client) = client(&proxy, newest, directory) else { return };
        fails(&mut client);
        proxy.wait_for(says);
    }
    untouched(&rig);
    for directory in [&good, &by_dns] {
        let said = ok(&mut client(&proxy, "1.3", directory).unwrap());
        assert_eq!(said, "served TLSv1.3\n");
    }
}

#[test]
fn without_tls_nothing_is_told_of_the_disk() {
    let (Some(mut info), Some(mut img)) = (tool("nbdinfo"), tool("qemu-img")) else { return };
    let rig = rig(Spec::fixed(4 * MIB));
    let proxy = Proxy::new(&rig).start(&rig);
    let said = fails(info.args(["--list", &format!("nbd://localhost:{}", proxy.port)]));
    assert!(!said.contains(&rig.disk().id.to_string()), "{said}");
    let said = fails(img.args(["info", &format!("nbd://localhost:{}/{}", proxy.port, rig.disk().id)]));
    assert!(said.contains("TLS") || said.contains("tls"), "{said}");
    // A client that knows no options, and an answer to nothing.
    let mut old = TcpStream::connect(("127.0.0.1", proxy.port)).unwrap();
    old.write_all(
        &[&3u32.to_be_bytes(), b"IHAVEOPT".as_slice(), &1u32.to_be_bytes(), &0u32.to_be_bytes()].concat(),
    )
    .unwrap();
    let mut heard = Vec::new();
    old.read_to_end(&mut heard).unwrap();
    assert_eq!(heard.len(), 18, "only the greeting: {heard:?}");
    proxy.wait_for("it wanted an export without TLS; give the client TLS credentials");
    untouched(&rig);
}

#[test]
fn client_that_does_not_believe_us_leaves_and_a_line_says_so() {
    let (Some(mut by_address), Some(mut by_authority)) = (tool("nbdinfo"), tool("nbdinfo")) else { return };
    let rig = rig(Spec::fixed(4 * MIB));
    let proxy = Proxy::new(&rig).start(&rig);
    let good = proxy.client(&rig);
    let line = "it must know our authority, and connect by a name that is in the certificate";
    fails(by_address.arg(proxy.uri(&rig, &good).replace("localhost", "127.0.0.1")));
    proxy.wait_for(line);
    let other = Authority::new("another CA");
    let distrusts = proxy.authority.client(rig.path("distrusts"), &Leaf::client("backup.example"), &other);
    fails(by_authority.arg(proxy.uri(&rig, &distrusts)));
    // OpenSSL says why it leaves.
    let Some(mut python) = python(&CLIENT.replace("False, ssl.CERT_NONE", "False, ssl.CERT_REQUIRED")) else {
        return;
    };
    fails(python.args([proxy.port.to_string().as_str(), "1.3"]).arg(&good));
    proxy.wait_for("it does not accept our certificate (UnknownCA)");
    assert_eq!(proxy.log().matches(line).count(), 3, "{}", proxy.log());
    untouched(&rig);
}

#[test]
fn client_hears_the_end_of_a_worker_and_is_served_by_the_next() {
    let rig = rig(Spec::fixed(4 * MIB));
    let proxy = Proxy::new(&rig).start(&rig);
    let good = proxy.client(&rig);
    let Some(mut holds) = python(&format!("{CLIENT}sys.stdout.flush()\nwhile s.recv(4096): pass\n")) else {
        return;
    };
    holds.args([proxy.port.to_string().as_str(), "1.3"]).arg(&good);
    let mut holds = holds.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut served = [0; 15];
    holds.stdout.take().unwrap().read_exact(&mut served).unwrap();
    kill_worker(&rig);
    assert!(holds.wait().unwrap().success(), "the end was not in order");
    ok(&mut client(&proxy, "1.3", &good).unwrap());
}

/// STARTTLS is granted; what comes next is up to the test.
fn start_tls(proxy: &Running) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", proxy.port)).unwrap();
    stream
        .write_all(
            &[&3u32.to_be_bytes(), b"IHAVEOPT".as_slice(), &5u32.to_be_bytes(), &0u32.to_be_bytes()].concat(),
        )
        .unwrap();
    stream.read_exact(&mut [0; 18 + 20]).unwrap();
    stream
}

#[test]
fn garbage_ends_a_connection_and_nothing_else() {
    let rig = rig(Spec::fixed(4 * MIB));
    let proxy = Proxy::new(&rig).start(&rig);
    let mut http = TcpStream::connect(("127.0.0.1", proxy.port)).unwrap();
    http.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let _ = http.read_to_end(&mut Vec::new());
    proxy.wait_for("it does not speak NBD");
    // NBD that goes on in clear after STARTTLS; random bytes; a record that is longer than any may be.
    let clear = [b"IHAVEOPT".as_slice(), &7u32.to_be_bytes(), &0u32.to_be_bytes()].concat();
    for garbage in [clear, crate::rig::pattern(5, 70_000), vec![22, 3, 1, 0xff, 0xff, 1, 0, 0xff, 0xff]] {
        let mut stream = start_tls(&proxy);
        // It may have hung up already.
        let _ = stream.write_all(&garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    proxy.wait_for("TLS failed");
    untouched(&rig);
    let directory = proxy.client(&rig);
    let Some(mut client) = client(&proxy, "1.3", &directory) else { return };
    ok(&mut client);
}

#[test]
fn slow_handshakes_are_cut_at_the_deadline_and_keep_clients_out_no_longer() {
    let rig = rig(Spec::fixed(4 * MIB));
    let proxy = Proxy::new(&rig).with(&["--handshake-seconds", "1", "--handshakes", "2"]).start(&rig);
    let began = Instant::now();
    let mut silent = TcpStream::connect(("127.0.0.1", proxy.port)).unwrap();
    let mut slow = start_tls(&proxy);
    // Both places are taken: a good client waits, and is served.
    let directory = proxy.client(&rig);
    let Some(mut client) = client(&proxy, "1.3", &directory) else { return };
    let waiting = std::thread::spawn(move || ok(&mut client));
    // The beginning of a handshake record, and no more of it. (Bytes one by one: `deadline.rs`.)
    slow.write_all(&[22, 3, 1, 2, 0, 1]).unwrap();
    let _ = silent.read_to_end(&mut Vec::new());
    let _ = slow.read_to_end(&mut Vec::new());
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(10), "{took:?}");
    assert_eq!(waiting.join().unwrap(), "served TLSv1.3\n");
    assert_eq!(proxy.log().matches("is turned away: not done in time").count(), 2, "{}", proxy.log());
}

#[test]
fn client_that_takes_nothing_costs_no_memory() {
    let rig = rig(Spec::fixed(32 * MIB));
    let proxy = Proxy::new(&rig).start(&rig);
    let directory = proxy.client(&rig);
    let Some(mut python) = python(&format!("{CLIENT}{READS_NOTHING}")) else { return };
    python.args([proxy.port.to_string().as_str(), "1.3"]).arg(&directory);
    let before = proxy.resident_kib();
    let mut child =
        python.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null()).spawn().unwrap();
    // The disk has read until everything between it and the client was full, and stands still.
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut last = (0, Instant::now());
    loop {
        let read = rig.status().disks[0].read_bytes;
        if read != last.0 {
            last = (read, Instant::now());
        }
        if read > 0 && last.1.elapsed() > Duration::from_millis(500) {
            break;
        }
        assert!(Instant::now() < deadline, "it goes on and on: {read} bytes");
        std::thread::yield_now();
    }
    let after = proxy.resident_kib();
    assert!(last.0 < 512 * MIB, "{} bytes were read for nobody", last.0);
    assert!(after < before + (8 << 10), "{before} KiB became {after} KiB");
    // Its end is the end.
    drop(child.stdin.take());
    let _ = child.wait();
    proxy.wait_for("ended after");
}

/// Goes on from [`CLIENT`]: takes the rest of the reply to LIST, opens the export and asks for a gigabyte.
const READS_NOTHING: &str = "
kind, length = struct.unpack('>II', take(s, 8))
take(s, length)
_, _, _, length = struct.unpack('>QIII', take(s, 20))
s.sendall(b'IHAVEOPT' + struct.pack('>II', 1, 0))
take(s, 10)
for at in range(1024):
    s.sendall(struct.pack('>IHHQQI', 0x25609513, 0, 0, at, at % 32 << 20, 1 << 20))
sys.stdin.read()
";

#[test]
fn it_is_nobody_can_do_nothing_and_shows_no_key() {
    let rig = rig(Spec::fixed(4 * MIB));
    let proxy = Proxy::new(&rig);
    let key = std::fs::read_to_string(&proxy.key).unwrap();
    let proxy = proxy.start(&rig);
    assert_eq!((proxy.status("NoNewPrivs").as_str(), proxy.status("Seccomp").as_str()), ("1", "2"));
    assert_eq!(proxy.status("CapEff").trim_start_matches('0'), "");
    assert_eq!(proxy.status("CapPrm").trim_start_matches('0'), "");
    assert!(!proxy.status("Uid").split_whitespace().any(|uid| uid == "0"), "{}", proxy.status("Uid"));
    let line = key.lines().nth(1).unwrap();
    for file in ["cmdline", "environ"] {
        let text = std::fs::read(format!("/proc/{}/{file}", proxy.process.id())).unwrap();
        assert!(!String::from_utf8_lossy(&text).contains(line), "the key stands in {file}");
    }
    assert!(!proxy.log().contains(line));
}

#[test]
fn what_cannot_be_served_is_said_before_anything_is() {
    let rig = rig(Spec::fixed(4 * MIB));
    let proxy = Proxy::new(&rig);
    let key = std::fs::read_to_string(&proxy.key).unwrap();
    write_key(&proxy.key, &key, 0o640);
    let said = proxy.fails(&rig);
    assert!(
        said.contains("can be read by others than its owner (mode 640)") && said.contains("chmod 0600"),
        "{said}"
    );
    write_key(&proxy.key, &Authority::new("x").certify(&Leaf::server("x")).1, 0o600);
    assert!(
        proxy.fails(&rig).contains("certificate and private key cannot be used"),
        "{}",
        proxy.fails(&rig)
    );
    write_key(&proxy.key, "no key", 0o600);
    assert!(proxy.fails(&rig).contains("holds none in PEM"));
    write_key(&proxy.key, &key, 0o600);
    std::fs::write(&proxy.ca, "").unwrap();
    assert!(proxy.fails(&rig).contains("client CA") && proxy.fails(&rig).contains("holds none in PEM"));
    std::fs::write(&proxy.ca, &proxy.authority.pem).unwrap();
    let bad = Proxy { more: vec!["--listen-fd".into(), "1".into()], ..Proxy::new(&rig) };
    assert!(bad.fails(&rig).contains("usage:"));
    let bad = Proxy::new(&rig).with(&["--listen-fd", "77"]);
    assert!(bad.fails(&rig).contains("descriptor 77 is no listening TCP socket"));
    let bad = Proxy { more: Vec::new(), ..Proxy::new(&rig) };
    // SAFETY: geteuid has no arguments and cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        assert!(bad.fails(&rig).contains("does not serve the network as root; give --user"));
        let bad = Proxy { more: vec!["--user".into(), "nobody-of-that-name".into()], ..Proxy::new(&rig) };
        assert!(bad.fails(&rig).contains("there is no user"));
    }
}
