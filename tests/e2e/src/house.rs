//! Server, agent and libvirtd of one lab, put together as an administrator would: by the product's own commands.

use std::{
    fs,
    io::Write,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::Value;

use crate::{
    console::Console,
    domain::Guest,
    lab::{self, Lab, bin},
    libvirtd::Libvirtd,
    shell::{self, Outcome},
};

/// Password of every test's key backup; the marker shows it in any output it should not be in.
pub const BACKUP_PASSWORD: &str = "VMSEAL-TEST-SECRET-backup-password";
/// Marker in every test's secrets.
pub const SECRET_MARKER: &str = "VMSEAL-TEST-SECRET";

/// One house. Dropped: agent, server, disks, guests and libvirtd end, the lab goes.
#[derive(Debug)]
pub struct House {
    /// libvirtd; ends its guests when dropped, so it comes first.
    pub libvirtd: Libvirtd,
    agent: Option<Child>,
    server: Option<Child>,
    ports: (u16, u16),
    /// Its folders.
    pub lab: Lab,
}

impl House {
    /// Starts everything: server, a native provider `main` with a verified backup, the host joined, agent connected.
    pub fn start(lab: Lab) -> Self {
        let mut house = Self::bare(lab);
        house.start_server();
        house.create_provider("main");
        house.join();
        house.start_agent();
        house
    }

    /// libvirtd and the configuration files only.
    pub fn bare(lab: Lab) -> Self {
        let libvirtd = Libvirtd::start(&lab, bin("vmseal-hook"));
        let ports = (free_port(), free_port());
        let house = Self { libvirtd, agent: None, server: None, ports, lab };
        house.configure();
        house
    }

    fn configure(&self) {
        let (run, state) = (&self.lab.run, &self.lab.state);
        for folder in ["server", "agent", "logs"] {
            self.lab.folder(folder);
        }
        // The server runs as `vmseal` and makes its socket in the run folder; the agent, root, makes its own there.
        shell::must(shell::tool("chown").arg("root:vmseal").arg(run));
        fs::set_permissions(run, fs::Permissions::from_mode(0o1775)).expect("own folder");
        shell::must(shell::tool("chown").arg("vmseal:vmseal").arg(state.join("server")));
        shell::must(shell::tool("chown").arg("libvirt-qemu").arg(self.lab.folder("serial")));
        let server = format!(
            "state_dir = \"{state}/server\"\nrun_dir = \"{run}\"\nhttps_listen = \"127.0.0.1:{https}\"\n\
             agent_listen = \"127.0.0.1:{agents}\"\npublic_address = \"127.0.0.1\"\n",
            state = state.display(),
            run = run.display(),
            https = self.ports.0,
            agents = self.ports.1,
        );
        let agent = format!(
            "state_dir = \"{state}/agent\"\nrun_dir = \"{run}\"\nlog_dir = \"{state}/logs\"\nlibvirt_uri = \"{uri}\"\n\
             libvirt_run_dir = \"{pids}\"\ndisk_binary = \"{disk}\"\nhook_dir = \"{state}/etc/hooks/qemu.d\"\n",
            state = state.display(),
            run = run.display(),
            uri = self.libvirtd.uri(),
            pids = self.libvirtd.pid_files().display(),
            disk = bin("vmseal-disk").display(),
        );
        fs::write(state.join("server.toml"), server).expect("own folder");
        fs::write(state.join("agent.toml"), agent).expect("own folder");
    }

    /// Has the agent know a Ceph cluster; before it is started.
    pub fn know_ceph(&self, conf: &Path) {
        let more =
            format!("rbd_binary = \"{}\"\nceph_conf = \"{}\"\n", bin("vmseal-rbd").display(), conf.display());
        let agent = self.lab.state.join("agent.toml");
        let text = fs::read_to_string(&agent).expect("own file");
        fs::write(&agent, text + &more).expect("own folder");
    }

    /// Starts the server as its own user and waits for its socket.
    pub fn start_server(&mut self) {
        let mut command = shell::tool("setpriv");
        command
            .args(["--reuid=vmseal", "--regid=vmseal", "--clear-groups", "--"])
            .arg(bin("vmseal-server"))
            .args(["run", "--config"])
            .arg(self.lab.state.join("server.toml"));
        self.server = Some(self.daemon(command, "server"));
        shell::until("the server answers", Duration::from_secs(30), || self.vmseal(&["status"]).ok());
    }

    /// Starts the agent and waits until the server sees it.
    pub fn start_agent(&mut self) {
        self.start_agent_alone();
        shell::until("the agent is connected", Duration::from_secs(30), || self.host_connected());
    }

    /// Starts the agent and waits for its socket only.
    pub fn start_agent_alone(&mut self) {
        self.run_agent(Command::new(bin("vmseal-agent")));
    }

    /// Starts the agent that is built with fail points: it aborts at the one named, as a kill -9 there would.
    pub fn start_agent_failing_at(&mut self, point: &str) {
        let mut command = Command::new(bin("vmseal-agent-failpoints"));
        command.env("VMSEAL_FAILPOINT", point);
        self.run_agent(command);
        shell::until("the agent is connected", Duration::from_secs(30), || self.host_connected());
    }

    /// Installs this as the disk program, under a new name, for the agent's next start. Gives where it lies.
    pub fn install_disk_program(&self, program: &[u8]) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = (0..)
            .map(|n| self.lab.state.join(format!("vmseal-disk-{n}")))
            .find(|path| !path.exists())
            .expect("numbers do not end");
        fs::write(&path, program).expect("own folder");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("own file");
        let config = self.lab.state.join("agent.toml");
        let is_other = |line: &&str| !line.starts_with("disk_binary");
        let mut lines = fs::read_to_string(&config).expect("own file");
        lines = lines.lines().filter(is_other).map(|line| format!("{line}\n")).collect();
        // In front: further down it would be part of some table.
        fs::write(&config, format!("disk_binary = \"{}\"\n{lines}", path.display())).expect("own file");
        path
    }

    /// Waits until the agent has died by itself.
    pub fn wait_agent_died(&mut self, deadline: Duration) -> bool {
        let child = self.agent.as_mut().expect("the agent was started");
        let died = shell::wait_within(child, deadline).is_some();
        if died {
            self.agent = None;
        }
        died
    }

    fn run_agent(&mut self, mut command: Command) {
        command.args(["run", "--config"]).arg(self.lab.state.join("agent.toml"));
        let _ = fs::remove_file(self.agent_socket());
        self.agent = Some(self.daemon(command, "agent"));
        shell::until("the agent listens", Duration::from_secs(30), || self.agent_socket().exists());
    }

    fn agent_socket(&self) -> PathBuf {
        self.lab.run.join("agent.sock")
    }

    fn host_connected(&self) -> bool {
        let hosts = self.json(&["host", "list"]);
        items(&hosts).iter().any(|h| h["state"] == "connected")
    }

    fn daemon(&self, mut command: Command, name: &str) -> Child {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.lab.state.join("logs").join(format!("{name}.log")))
            .expect("own folder");
        command
            .env("RUST_BACKTRACE", "1")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be shared"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap_or_else(|e| panic!("{name} does not start: {e}"))
    }

    /// Makes a native provider and its verified backup, `<state>/<name>.p12`.
    pub fn create_provider(&self, name: &str) {
        self.must_vmseal(&["provider", "create", "--native", name]);
        self.back_up_provider(name);
    }

    /// Exports and so verifies the backup of a native provider.
    pub fn back_up_provider(&self, name: &str) {
        let password = self.lab.state.join("backup-password");
        fs::write(&password, BACKUP_PASSWORD).expect("own folder");
        fs::set_permissions(&password, fs::Permissions::from_mode(0o600)).expect("own file");
        let out = self.backup(name);
        self.must_vmseal(&[
            "provider",
            "export",
            name,
            "--out",
            path(&out),
            "--password-file",
            path(&password),
        ]);
    }

    /// Brings a provider back from its backup.
    pub fn import_provider(&self, name: &str) {
        let password = self.lab.state.join("backup-password");
        self.must_vmseal(&[
            "provider",
            "import",
            path(&self.backup(name)),
            "--password-file",
            path(&password),
        ]);
    }

    /// Recovers a volume's key from the backup of `main`, as an administrator without a server would: a file of 64
    /// bytes.
    pub fn recover_key(&self, volume: &Path) -> PathBuf {
        let key = self.lab.state.join("recovered.key");
        let _ = fs::remove_file(&key);
        self.must_vmseal(&[
            "key",
            "recover",
            "--volume",
            path(volume),
            "--backup",
            path(&self.backup("main")),
            "--password-file",
            path(&self.lab.state.join("backup-password")),
            "--out",
            path(&key),
        ]);
        key
    }

    /// Where the backup of a provider is.
    pub fn backup(&self, name: &str) -> PathBuf {
        self.lab.state.join(format!("{name}.p12"))
    }

    /// Joins this host: the token goes from `host add` to the agent's standard input.
    pub fn join(&self) {
        let reply = self.json(&["host", "add"]);
        let token = reply["token"].as_str().expect("host add prints a token").to_owned();
        let mut child = Command::new(bin("vmseal-agent"))
            .args(["join", "-", "--config"])
            .arg(self.lab.state.join("agent.toml"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("vmseal-agent starts");
        child.stdin.take().expect("it is piped").write_all(token.as_bytes()).expect("it reads its token");
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success(), "join failed: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// A `vmseal` command against this house.
    pub fn vmseal(&self, args: &[&str]) -> Outcome {
        self.vmseal_within(args, Duration::from_secs(60))
    }

    /// A `vmseal` command with a deadline of its own.
    pub fn vmseal_within(&self, args: &[&str], deadline: Duration) -> Outcome {
        let mut command = Command::new(bin("vmseal"));
        command.arg("--socket").arg(self.lab.run.join("api.sock")).args(args).env("NO_COLOR", "1");
        shell::run_within(&mut command, deadline)
    }

    /// A `vmseal` command that must succeed.
    pub fn must_vmseal(&self, args: &[&str]) -> Outcome {
        let outcome = self.vmseal_within(args, Duration::from_secs(300));
        assert!(
            outcome.ok(),
            "vmseal {args:?} failed with {}:\n{}\n{}",
            outcome.code(),
            outcome.all(),
            self.logs()
        );
        outcome
    }

    /// A `vmseal` command with JSON output.
    pub fn json(&self, args: &[&str]) -> Value {
        let mut all = args.to_vec();
        all.extend(["--output", "json"]);
        let outcome = self.must_vmseal(&all);
        serde_json::from_str(&outcome.stdout)
            .unwrap_or_else(|e| panic!("vmseal {args:?} printed no JSON ({e}):\n{}", outcome.stdout))
    }

    /// The agent's pid.
    pub fn agent_pid(&self) -> i32 {
        self.agent.as_ref().expect("the agent runs").id() as i32
    }

    /// The server's pid.
    pub fn server_pid(&self) -> i32 {
        self.server.as_ref().expect("the server runs").id() as i32
    }

    /// kill -9 of the agent, and gone.
    pub fn kill_agent(&mut self) {
        end(self.agent.take());
    }

    /// kill -9 of the server, and gone.
    pub fn kill_server(&mut self) {
        end(self.server.take());
    }

    /// Pids of a domain's keeper and worker, from the agent's folder of sockets: (keeper, worker).
    pub fn disk_pids(&self, domain: &str) -> Option<(i32, i32)> {
        let uuid = self.libvirtd.must_virsh(&["domuuid", domain]).trim().to_owned();
        let status = crate::scan::disk_status(&self.lab.run.join(format!("libvirt-{uuid}/control.sock")))?;
        Some((status.keeper_pid, status.worker_pid))
    }

    /// Defines a guest and waits until the server has heard of it.
    pub fn define(&self, guest: &Guest) {
        self.define_as(guest, &guest.xml());
    }

    /// The same with a definition of the test's own.
    pub fn define_as(&self, guest: &Guest, xml: &str) {
        let file = self.lab.state.join(format!("{}.xml", guest.name));
        fs::write(&file, xml).expect("own folder");
        self.libvirtd.must_virsh(&["define", path(&file)]);
        shell::until("the server has the VM", Duration::from_secs(30), || {
            self.vmseal(&["vm", "show", &guest.name]).ok()
        });
    }

    /// A guest with these disks: target, size, format. Images are made, empty, below `images`.
    pub fn guest(&self, name: &str, disks: &[(&str, &str, &str)]) -> Guest {
        let images = self.lab.folder("images");
        let disks = disks
            .iter()
            .map(|(target, size, format)| {
                let image = images.join(format!("{name}-{target}.{format}"));
                shell::must(
                    shell::tool("qemu-img").args(["create", "-q", "-f", format]).arg(&image).arg(size),
                );
                ((*target).to_owned(), image, (*format).to_owned())
            })
            .collect();
        Guest {
            name: name.to_owned(),
            disks,
            serial: self.lab.folder("serial"),
            image: guest_image(&self.lab),
            memory_mib: 192,
        }
    }

    /// Starts a guest by virsh and gives its console, ready.
    pub fn boot(&self, guest: &Guest) -> Console {
        let outcome = self.libvirtd.virsh(&["start", &guest.name]);
        assert!(outcome.ok(), "virsh start {}: {}\n{}", guest.name, outcome.all(), self.logs());
        let mut console = Console::open(&guest.console());
        console.wait_ready();
        console
    }

    /// Powers a guest off from within and waits until libvirt sees it.
    pub fn power_off(&self, guest: &Guest, console: &mut Console) {
        console.send("sync; poweroff -f\n");
        self.wait_off(&guest.name);
    }

    /// Waits until libvirt says that a domain is off.
    pub fn wait_off(&self, name: &str) {
        shell::until("the guest is off", Duration::from_secs(90), || {
            self.libvirtd.virsh(&["domstate", name]).stdout.trim() == "shut off"
        });
    }

    /// The last lines of the agent's and the server's logs, for a failing test.
    pub fn logs(&self) -> String {
        ["agent", "server"]
            .iter()
            .map(|name| {
                let text =
                    fs::read_to_string(self.lab.state.join(format!("logs/{name}.log"))).unwrap_or_default();
                let lines: Vec<_> = text.lines().rev().take(25).collect();
                let last: String = lines.into_iter().rev().map(|l| format!("  {l}\n")).collect();
                format!("{name}'s log:\n{last}")
            })
            .collect()
    }

    /// Lets everything run on and forgets it; gives the pids of agent, server and libvirtd.
    pub fn leave(mut self) -> [u32; 3] {
        let pids = [
            self.agent.take().map_or(0, |c| c.id()),
            self.server.take().map_or(0, |c| c.id()),
            self.libvirtd.pid(),
        ];
        let _left = std::mem::ManuallyDrop::new(self);
        pids
    }
}

impl Drop for House {
    fn drop(&mut self) {
        end(self.agent.take());
        end(self.server.take());
        end_disks(&self.lab.run);
    }
}

/// Ends the keepers whose control sockets are below a run folder.
pub fn end_disks(run: &Path) {
    let Ok(folders) = fs::read_dir(run) else { return };
    for folder in folders.flatten() {
        if let Some(status) = crate::scan::disk_status(&folder.path().join("control.sock")) {
            for pid in [status.keeper_pid, status.worker_pid] {
                // SAFETY: sends a signal to the processes that answered on this lab's own socket.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
        }
    }
}

/// The path as text; labs have plain names.
pub fn path(path: &Path) -> &str {
    path.to_str().expect("paths of a lab are UTF-8")
}

/// The list in a JSON answer: the array itself, or the page's `items`.
pub fn items(value: &Value) -> &[Value] {
    value.as_array().or_else(|| value["items"].as_array()).map_or(&[], Vec::as_slice)
}

/// Kernel and initramfs, made once, where QEMU can read them.
pub fn guest_image(lab: &Lab) -> PathBuf {
    let made = lab::target_dir().join("lab-guest");
    shell::must(Command::new(lab::tree().join("tests/lab/guest.sh")).arg(&made));
    let here = lab.folder("guest");
    for name in ["vmlinuz", "initrd.gz"] {
        let link = here.join(name);
        if !link.exists() {
            fs::hard_link(made.join(name), &link).expect("both are below the target folder");
        }
    }
    here
}

fn end(child: Option<Child>) {
    if let Some(mut child) = child {
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    listener.local_addr().expect("a bound listener has an address").port()
}
