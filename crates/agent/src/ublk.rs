//! Whether this host has block devices by the kernel's ublk, and what else disks can be presented by here.
//!
//! Files of the host in, an answer for the server and for whoever starts a disk out. Loads the kernel's module when a
//! disk is to be started, and does nothing else to the host.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use vmseal_model::class::HostCapabilities;

use crate::{backend::process::Process, config::AgentConfig};

/// Who answers there makes devices.
const CONTROL: &str = "/dev/ublk-control";
/// The kernel's module.
const MODULE: &str = "ublk_drv";
/// How long loading it may take.
const LOADED: Duration = Duration::from_secs(2);
/// Most bytes read of a list of modules.
const MAX_LIST: u64 = 16 << 20;

/// What disks can be presented by on the host below `root`, which is `/` but for tests.
pub fn capabilities(config: &AgentConfig, root: &Path) -> HostCapabilities {
    let program = config.ublk_program();
    let missing = missing(root).or_else(|| {
        let is_there = at(root, &program.to_string_lossy()).is_file();
        (!is_there).then(|| format!("{} is not installed", program.display()))
    });
    HostCapabilities { ublk: missing.is_none(), no_ublk: missing.unwrap_or_default(), vhost_user: true }
}

/// Why this host has no ublk, in one line; none if it has it, or would have it with its module loaded.
pub fn missing(root: &Path) -> Option<String> {
    // The driver is io_uring's, and neither the disk process nor QEMU is root.
    if let Some(off) = io_uring_off(root) {
        return Some(off);
    }
    if at(root, CONTROL).exists() {
        return None;
    }
    let release = read(&at(root, "/proc/sys/kernel/osrelease")).unwrap_or_default();
    let release = release.trim();
    let has = |list: &str| {
        let lines = read(&at(root, &format!("/lib/modules/{release}/{list}"))).unwrap_or_default();
        // A line of modules.dep goes on with what the module needs.
        let named =
            |line: &str| line.split(':').next().is_some_and(|path| path.contains(&format!("/{MODULE}.ko")));
        lines.lines().any(named)
    };
    (!has("modules.dep") && !has("modules.builtin"))
        .then(|| format!("its kernel {release} has no module {MODULE}"))
}

/// Whether ublk can be used now, after loading its module if need be.
///
/// # Errors
///
/// Why not, in one line.
pub fn load(root: &Path) -> Result<(), String> {
    if let Some(missing) = missing(root) {
        return Err(missing);
    }
    if at(root, CONTROL).exists() {
        return Ok(());
    }
    let said = match modprobe() {
        Ok(said) if said.is_empty() && at(root, CONTROL).exists() => return Ok(()),
        Ok(said) if said.is_empty() => format!("{CONTROL} does not appear"),
        Ok(said) => said,
        Err(error) => format!("modprobe: {error}"),
    };
    Err(format!("its kernel's module {MODULE} cannot be loaded: {said}"))
}

/// Loads the module; what is said of it if that fails. A VM that starts does not wait for one that hangs in the kernel.
fn modprobe() -> io::Result<String> {
    let mut command = Command::new("modprobe");
    command.arg(MODULE).env_clear().env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let ended = Process::open(child.id().cast_signed()).is_ok_and(|process| process.wait_for(LOADED));
    if !ended {
        let _ = child.kill();
        thread::Builder::new().name("modprobe".to_owned()).spawn(move || child.wait())?;
        return Err(io::Error::other(format!("it has not ended within {} s", LOADED.as_secs())));
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Ok(match (output.status.success(), said.is_empty()) {
        (true, _) => String::new(),
        (false, true) => output.status.to_string(),
        (false, false) => said,
    })
}

/// Why io_uring is not for everybody here, in one line.
pub(crate) fn io_uring_off(root: &Path) -> Option<String> {
    match read(&at(root, "/proc/sys/kernel/io_uring_disabled"))?.trim() {
        "0" => None,
        value => Some(format!("io_uring is switched off (kernel.io_uring_disabled is {value})")),
    }
}

fn at(root: &Path, path: &str) -> std::path::PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn read(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_LIST).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Rules that keep the host off the devices, as `udev` has them; none if they are not installed.
pub fn has_udev_rules(root: &Path) -> bool {
    const DIRS: [&str; 4] =
        ["/etc/udev/rules.d", "/run/udev/rules.d", "/usr/lib/udev/rules.d", "/lib/udev/rules.d"];
    let ours = |entry: fs::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.contains("vmseal")
            && name.ends_with(".rules")
            && read(&entry.path()).is_some_and(|text| text.contains("ublk"))
    };
    DIRS.iter().any(|dir| {
        let entries = fs::read_dir(at(root, dir)).into_iter().flatten().flatten();
        entries.into_iter().any(ours)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    fn write(scratch: &Scratch, path: &str, text: &str) {
        let path = at(scratch.path(), path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn host_has_ublk_where_it_is_loaded_or_can_be() {
        let scratch = Scratch::new();
        let config = AgentConfig { ublk_binary: Some("/x/vmseal-ublk".into()), ..AgentConfig::default() };
        let said = || capabilities(&config, scratch.path());
        write(&scratch, "/proc/sys/kernel/osrelease", "6.12.1\n");
        assert_eq!((said().ublk, said().vhost_user), (false, true));
        assert_eq!(said().no_ublk, "its kernel 6.12.1 has no module ublk_drv");
        let dep = "/lib/modules/6.12.1/modules.dep";
        write(&scratch, dep, "kernel/drivers/block/other.ko.xz: kernel/drivers/block/ublk_drv.ko.xz\n");
        assert!(!said().ublk);
        write(&scratch, dep, "kernel/drivers/block/ublk_drv.ko.xz:\n");
        assert_eq!(said().no_ublk, "/x/vmseal-ublk is not installed");
        write(&scratch, "/x/vmseal-ublk", "");
        assert_eq!((said().ublk, said().no_ublk.as_str()), (true, ""));
        write(&scratch, dep, "");
        write(&scratch, "/lib/modules/6.12.1/modules.builtin", "kernel/drivers/block/ublk_drv.ko\n");
        assert!(said().ublk);
        write(&scratch, "/lib/modules/6.12.1/modules.builtin", "");
        write(&scratch, CONTROL, "");
        assert!(said().ublk && load(scratch.path()).is_ok());
    }

    #[test]
    fn host_without_io_uring_has_no_ublk() {
        let scratch = Scratch::new();
        write(&scratch, CONTROL, "");
        write(&scratch, "/proc/sys/kernel/io_uring_disabled", "0\n");
        assert_eq!(missing(scratch.path()), None);
        for value in ["1", "2"] {
            write(&scratch, "/proc/sys/kernel/io_uring_disabled", value);
            assert!(load(scratch.path()).unwrap_err().contains(&format!("io_uring_disabled is {value}")));
        }
    }

    #[test]
    fn udev_rules_are_those_of_ours_that_speak_of_ublk() {
        let scratch = Scratch::new();
        assert!(!has_udev_rules(scratch.path()));
        write(&scratch, "/etc/udev/rules.d/60-other.rules", "KERNEL==\"ublkb*\"");
        write(&scratch, "/etc/udev/rules.d/60-vmseal.rules", "# nothing");
        assert!(!has_udev_rules(scratch.path()));
        write(&scratch, "/usr/lib/udev/rules.d/60-vmseal.rules", "KERNEL==\"ublkb*\"");
        assert!(has_udev_rules(scratch.path()));
    }
}
