//! What is not right on this host: its configuration files and `/proc` and `/sys` in, findings with a way out.
//!
//! Only looks: changes nothing, asks neither libvirt nor the server. A file that cannot be read finds nothing, except
//! where its absence is the finding. Reads are bounded, for this runs with every inventory.

mod landlock;
mod rbd;
mod speed;
mod swap;
mod ublk;

use std::{
    fs::{self, File, Metadata},
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use vmseal_api::agent::v1::Warning;
use vmseal_keys::{Protection, protection};

use crate::{
    accounts,
    config::AgentConfig,
    spawn::{ServiceUser, SpawnError},
};

/// Most bytes read of a file.
const MAX_FILE: u64 = 1 << 20;
/// libvirt-guests itself, where distributions put it: its defaults differ from one to the other.
const GUESTS_SCRIPTS: [&str; 2] = ["/usr/lib/libvirt/libvirt-guests.sh", "/usr/libexec/libvirt-guests.sh"];
/// Its configuration, and what is meant there if nothing is said: Debian's and Red Hat's.
const GUESTS_CONFIG: [(&str, &str); 2] =
    [("/etc/default/libvirt-guests", "shutdown"), ("/etc/sysconfig/libvirt-guests", "suspend")];
/// A unit that is a link to `/dev/null` is masked: it never runs.
const GUESTS_UNIT: &str = "/etc/systemd/system/libvirt-guests.service";
/// libvirt's rules for QEMU, and the file of ours that they include.
const QEMU_RULES: &str = "/etc/apparmor.d/abstractions/libvirt-qemu";
const OUR_RULES: &str = "/etc/apparmor.d/abstractions/libvirt-qemu.d/vmseal";
/// The hook's name in its directory.
const HOOK: &str = "50-vmseal";

/// Everything that is not right, below `root`, which is `/` but for tests.
pub fn findings(config: &AgentConfig, root: &Path) -> Vec<Warning> {
    let host = Host { config, root };
    [
        host.suspended_guests(),
        swap::finding(&host),
        host.rules(),
        host.hook(),
        host.disk_program(),
        host.disk_user(),
        host.qemu_group(),
        rbd::finding(&host),
        secret_memory(protection()),
        landlock::finding(),
        speed::io_uring(&host),
        speed::cipher(&host),
        ublk::program(&host),
        ublk::rules(&host),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// What is not right below `root` on a host with so many disks that are block devices.
pub fn of_devices(root: &Path, devices: usize) -> Option<Warning> {
    ublk::kernel(root, devices)
}

fn warning(code: &str, message: String, hint: String) -> Option<Warning> {
    Some(Warning { code: code.to_owned(), message, hint })
}

/// Where to look.
struct Host<'a> {
    config: &'a AgentConfig,
    root: &'a Path,
}

impl Host<'_> {
    /// A path of the host, below the root.
    fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The beginning of a file, if it is there and can be read.
    fn read(&self, path: impl AsRef<Path>) -> Option<String> {
        let mut bytes = Vec::new();
        File::open(self.at(path)).ok()?.take(MAX_FILE).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn metadata(&self, path: impl AsRef<Path>) -> Option<Metadata> {
        fs::metadata(self.at(path)).ok()
    }

    /// A saved image holds the guest's memory, and in it whatever the guest decrypted.
    fn suspended_guests(&self) -> Option<Warning> {
        if fs::read_link(self.at(GUESTS_UNIT)).is_ok_and(|to| to == Path::new("/dev/null")) {
            return None;
        }
        let script = GUESTS_SCRIPTS.iter().find_map(|path| self.read(path));
        let config = GUESTS_CONFIG.iter().find_map(|(path, meant)| Some((*path, *meant, self.read(path)?)));
        if script.is_none() && config.is_none() {
            return None;
        }
        let (path, meant, text) = config.unwrap_or((GUESTS_CONFIG[0].0, GUESTS_CONFIG[0].1, String::new()));
        // The script sets its default before it reads the configuration; what is indented is set later, by a case.
        let default = script.as_ref().and_then(|script| assigned(script.lines(), "ON_SHUTDOWN").next());
        let set = assigned(text.lines().map(str::trim_start), "ON_SHUTDOWN").last();
        let action = set.clone().or(default).unwrap_or_else(|| meant.to_owned());
        if action != "suspend" {
            return None;
        }
        let why = match set {
            Some(_) => format!("ON_SHUTDOWN=suspend in {path}"),
            None => format!("ON_SHUTDOWN is not set in {path}, which means suspend"),
        };
        warning(
            "libvirt-guests-suspend",
            format!(
                "libvirt-guests saves running VMs when this host shuts down ({why}): their memory is written to disk \
                 in clear"
            ),
            format!("set ON_SHUTDOWN=shutdown in {path}"),
        )
    }

    /// Without our rule QEMU is kept from the sockets of its disks.
    fn rules(&self) -> Option<Warning> {
        let enabled = self.read("/sys/module/apparmor/parameters/enabled")?;
        if !enabled.starts_with('Y') || self.metadata(QEMU_RULES).is_none() {
            return None;
        }
        let run_dir = self.config.run_dir.display();
        let message = match self.read(OUR_RULES) {
            None => {
                format!("AppArmor is on, and {OUR_RULES} is missing: it keeps VMs from their encrypted disks")
            }
            Some(rules) if !rules.contains(&format!("{run_dir}/libvirt-")) => {
                format!(
                    "AppArmor is on, and {OUR_RULES} does not name {run_dir}: VMs are kept from their disks"
                )
            }
            Some(_) => return None,
        };
        let hint = format!(
            "install deploy/apparmor/vmseal there, with {run_dir} in its rule; VMs load it when they start"
        );
        warning("apparmor-rule-missing", message, hint)
    }

    /// Without the hook an encrypted VM finds nobody at its sockets.
    fn hook(&self) -> Option<Warning> {
        let hook = self.config.hook_dir.join(HOOK);
        let shown = hook.display();
        match self.metadata(&hook) {
            None => warning(
                "hook-missing",
                format!("libvirt's hook {shown} is missing: encrypted VMs do not start"),
                format!(
                    "install -D -m 0755 vmseal-hook {shown}, then restart libvirtd, which looks for hooks when it starts"
                ),
            ),
            Some(file) if !is_executable(&file) => warning(
                "hook-not-executable",
                format!("libvirt's hook {shown} is not executable: encrypted VMs do not start"),
                format!("chmod 0755 {shown}"),
            ),
            Some(_) => None,
        }
    }

    fn disk_program(&self) -> Option<Warning> {
        let program = self.config.disk_program();
        if self.metadata(&program).is_some_and(|file| is_executable(&file)) {
            return None;
        }
        warning(
            "disk-program-missing",
            format!("{} is missing or not executable: no disk can be served", program.display()),
            "install vmseal-disk there, or set disk_binary in agent.toml".to_owned(),
        )
    }

    fn disk_user(&self) -> Option<Warning> {
        let name = &self.config.disk_user;
        let elsewhere =
            || self.is_this_host() && !matches!(ServiceUser::find(name), Err(SpawnError::NoUser { .. }));
        if name.is_empty() || self.has_entry("/etc/passwd", name) || elsewhere() {
            return None;
        }
        warning(
            "disk-user-missing",
            format!("there is no user {name}, as which disk processes run: no disk can be served"),
            format!(
                "useradd --system --user-group --shell /usr/sbin/nologin {name}, or set disk_user in agent.toml"
            ),
        )
    }

    fn qemu_group(&self) -> Option<Warning> {
        let name = &self.config.qemu_group;
        let elsewhere = || self.is_this_host() && accounts::group(name).is_some();
        if name.is_empty() || self.has_entry("/etc/group", name) || elsewhere() {
            return None;
        }
        warning(
            "qemu-group-missing",
            format!("there is no group {name}, with which QEMU would reach its disks"),
            "set qemu_group in agent.toml to a group that QEMU's user is in, and nobody else".to_owned(),
        )
    }

    /// Whether the files know that name; the name service, which may be slow, is asked only about others.
    fn has_entry(&self, file: &str, name: &str) -> bool {
        let named = |line: &str| line.split_once(':').is_some_and(|(first, _)| first == name);
        self.read(file).is_some_and(|text| text.lines().any(named))
    }

    fn is_this_host(&self) -> bool {
        self.root == Path::new("/")
    }
}

fn secret_memory(protection: Protection) -> Option<Warning> {
    match protection {
        Protection::MemfdSecret => None,
        Protection::Mlock => warning(
            "secret-memory-weak",
            "this kernel offers no memfd_secret: keys lie in locked memory, which root can read".to_owned(),
            "boot with secretmem.enable=1 (Linux 5.14 to 6.4), or a kernel with CONFIG_SECRETMEM".to_owned(),
        ),
    }
}

fn is_executable(file: &Metadata) -> bool {
    file.is_file() && file.permissions().mode() & 0o111 != 0
}

/// The values that lines of a shell script give a variable, as far as they are plain words.
fn assigned<'a>(lines: impl Iterator<Item = &'a str>, name: &str) -> impl Iterator<Item = String> {
    lines.filter_map(move |line| {
        let line = line.strip_prefix("export ").unwrap_or(line);
        let value = line.strip_prefix(name)?.strip_prefix('=')?;
        let word = value.split([' ', '\t', ';', '#']).next().unwrap_or_default();
        Some(word.trim_matches(['"', '\'']).to_owned())
    })
}

#[cfg(test)]
mod tests;
