//! `vmseal-nbd-tls` in front of a rig's disk, as the agent will start it; and certificates, good and bad.

use std::{
    fs::{self, File},
    io::Write,
    net::TcpListener,
    os::{
        fd::AsRawFd,
        unix::{
            fs::{OpenOptionsExt, PermissionsExt},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};

use crate::{
    rig::{BINARY, Plan, Rig, Spec},
    tools::fails,
};

/// Who certifies.
pub(crate) struct Authority {
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate to be made; what is said here is what is wrong with it.
pub(crate) struct Leaf<'a> {
    pub(crate) name: &'a str,
    pub(crate) dns: &'a [&'a str],
    pub(crate) usage: ExtendedKeyUsagePurpose,
    pub(crate) years: (i32, i32),
}

impl Leaf<'_> {
    pub(crate) fn client(name: &str) -> Leaf<'_> {
        Leaf { name, dns: &[], usage: ExtendedKeyUsagePurpose::ClientAuth, years: (2020, 2090) }
    }

    pub(crate) fn server(name: &str) -> Leaf<'_> {
        Leaf { usage: ExtendedKeyUsagePurpose::ServerAuth, ..Leaf::client(name) }
    }
}

fn params(name: &str, years: (i32, i32)) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "vmseal test");
    params.distinguished_name.push(DnType::CommonName, name);
    (params.not_before, params.not_after) = (date_time_ymd(years.0, 1, 1), date_time_ymd(years.1, 1, 1));
    params
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = params(name, (2020, 2090));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// Certificate and key, in PEM.
    pub(crate) fn certify(&self, leaf: &Leaf<'_>) -> (String, String) {
        let mut params = params(leaf.name, leaf.years);
        params.is_ca = IsCa::ExplicitNoCa;
        // QEMU wants both, though TLS 1.3 uses the first only.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![leaf.usage.clone()];
        params.subject_alt_names =
            leaf.dns.iter().map(|dns| SanType::DnsName((*dns).try_into().unwrap())).collect();
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    /// A directory as QEMU and libnbd want it: this client, and whom it believes.
    pub(crate) fn client(&self, directory: PathBuf, leaf: &Leaf<'_>, believes: &Self) -> PathBuf {
        let (certificate, key) = self.certify(leaf);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("ca-cert.pem"), &believes.pem).unwrap();
        fs::write(directory.join("client-cert.pem"), certificate).unwrap();
        write_key(&directory.join("client-key.pem"), &key, 0o600);
        directory
    }
}

pub(crate) fn write_key(path: &Path, key: &str, mode: u32) {
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path).unwrap();
    file.set_permissions(fs::Permissions::from_mode(mode)).unwrap();
    file.write_all(key.as_bytes()).unwrap();
}

/// A proxy that is to be started.
pub(crate) struct Proxy {
    pub(crate) authority: Authority,
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) ca: PathBuf,
    /// Options of its own.
    pub(crate) more: Vec<String>,
}

impl Proxy {
    /// Its files, in the rig's directory.
    pub(crate) fn new(rig: &Rig) -> Self {
        let authority = Authority::new("test CA");
        let (certificate, key) =
            authority.certify(&Leaf { dns: &["localhost"], ..Leaf::server("vmseal nbd") });
        let proxy = Self {
            certificate: rig.path("tls.pem"),
            key: rig.path("tls.key"),
            ca: rig.path("ca.pem"),
            more: own_user(),
            authority,
        };
        fs::write(&proxy.certificate, certificate).unwrap();
        write_key(&proxy.key, &key, 0o600);
        fs::write(&proxy.ca, &proxy.authority.pem).unwrap();
        proxy
    }

    pub(crate) fn with(mut self, more: &[&str]) -> Self {
        self.more.extend(more.iter().map(|word| (*word).to_owned()));
        self
    }

    fn command(&self, rig: &Rig, listener: &TcpListener) -> Command {
        let program = Path::new(BINARY).with_file_name("vmseal-nbd-tls");
        assert!(program.is_file(), "{} is missing: cargo build -p vmseal-nbd-tls", program.display());
        let mut command = Command::new(program);
        command.arg("--export").arg(&rig.disk().socket).arg("--certificate").arg(&self.certificate);
        command.arg("--key").arg(&self.key).arg("--client-ca").arg(&self.ca).args(&self.more);
        let fd = listener.as_raw_fd();
        // SAFETY: dup2 and fcntl are async-signal-safe; `fd` is open until after the spawn.
        unsafe {
            command.pre_exec(move || {
                let done = if fd == 3 { libc::fcntl(fd, libc::F_SETFD, 0) } else { libc::dup2(fd, 3) };
                if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
            });
        }
        command
    }

    /// What it says when it cannot start.
    pub(crate) fn fails(&self, rig: &Rig) -> String {
        fails(&mut self.command(rig, &TcpListener::bind("127.0.0.1:0").unwrap()))
    }

    /// Starts it and lets the disk know its process.
    pub(crate) fn start(self, rig: &Rig) -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let log = rig.path("tls.log");
        let process = self
            .command(rig, &listener)
            .stdin(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        fs::write(rig.path(PID_FILE), format!("{}\n", process.id())).unwrap();
        let port = listener.local_addr().unwrap().port();
        let running = Running { process, port, log, authority: self.authority };
        running.wait_for("serving");
        running
    }
}

/// As root it becomes somebody else.
fn own_user() -> Vec<String> {
    // SAFETY: geteuid has no arguments and cannot fail.
    if unsafe { libc::geteuid() } == 0 { vec!["--user".into(), "nobody".into()] } else { Vec::new() }
}

const PID_FILE: &str = "tls.pid";

/// A disk whose socket is for the process in a pid file: the proxy.
pub(crate) fn rig(spec: Spec) -> Rig {
    let mut plan = Plan::new(&[spec]);
    plan.pid_file = PID_FILE.into();
    let rig = plan.start();
    // The agent gives the socket to the proxy's group.
    fs::set_permissions(&rig.disk().socket, fs::Permissions::from_mode(0o666)).unwrap();
    rig
}

/// A proxy that serves; killed when dropped.
pub(crate) struct Running {
    pub(crate) process: Child,
    pub(crate) port: u16,
    pub(crate) authority: Authority,
    log: PathBuf,
}

impl Running {
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until it has said this.
    pub(crate) fn wait_for(&self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.log().contains(text) {
            assert!(Instant::now() < deadline, "no line {text:?}\n{}", self.log());
            std::thread::yield_now();
        }
    }

    /// A good client's directory.
    pub(crate) fn client(&self, rig: &Rig) -> PathBuf {
        self.authority.client(rig.path("client"), &Leaf::client("backup.example"), &self.authority)
    }

    /// `nbds://` for libnbd's tools, with the client's directory.
    pub(crate) fn uri(&self, rig: &Rig, client: &Path) -> String {
        format!("nbds://localhost:{}/{}?tls-certificates={}", self.port, rig.disk().id, client.display())
    }

    /// A number of kilobytes or a word from its status.
    pub(crate) fn status(&self, name: &str) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
        line.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
    }

    pub(crate) fn resident_kib(&self) -> u64 {
        self.status("VmRSS").split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}
