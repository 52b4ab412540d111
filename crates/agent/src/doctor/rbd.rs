//! Whether this host, if it has volumes on Ceph RBD, can have them.
//!
//! It has if Ceph is configured for the agent, or the agent holds or held an image here. Where not, nothing is missing.

use std::path::Path;

use vmseal_api::agent::v1::Warning;

use super::{Host, is_executable, warning};
use crate::spawn::{ServiceUser, SpawnError};

/// Where distributions put libraries.
const DIRECTORIES: [&str; 5] =
    ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib"];
/// What the helper loads, and Debian's packages with that.
const LIBRARIES: [(&str, &str); 2] = [("librados.so.2", "librados2"), ("librbd.so.1", "librbd1")];

/// The first thing that is missing.
pub(super) fn finding(host: &Host<'_>) -> Option<Warning> {
    let config = host.config;
    let configured = [&config.ceph_conf, &config.ceph_keyring].into_iter().any(Option::is_some)
        || config.ceph_user.is_some();
    if !configured && host.metadata(config.state_dir.join("rbd")).is_none() {
        return None;
    }
    let program = config.rbd_program();
    if !host.metadata(&program).is_some_and(|file| is_executable(&file)) {
        return warning(
            "rbd-program-missing",
            format!("{} is missing or not executable: no disk on Ceph RBD can be served", program.display()),
            "install vmseal-rbd there, or set rbd_binary in agent.toml".to_owned(),
        );
    }
    let name = &config.rbd_user;
    let elsewhere =
        || host.is_this_host() && !matches!(ServiceUser::find(name), Err(SpawnError::NoUser { .. }));
    if !name.is_empty() && !host.has_entry("/etc/passwd", name) && !elsewhere() {
        return warning(
            "rbd-user-missing",
            format!(
                "there is no user {name}, as which helpers for Ceph RBD run: no disk there can be served"
            ),
            format!(
                "useradd --system --user-group --shell /usr/sbin/nologin {name}, or set rbd_user in agent.toml"
            ),
        );
    }
    for (library, package) in LIBRARIES {
        let there = |directory: &str| host.metadata(Path::new(directory).join(library)).is_some();
        if !DIRECTORIES.iter().any(|directory| there(directory)) {
            return warning(
                "librbd-missing",
                format!("{library} is not installed: no disk on Ceph RBD can be served"),
                format!("apt install {package}"),
            );
        }
    }
    for path in [&config.ceph_conf, &config.ceph_keyring].into_iter().flatten() {
        if host.metadata(path).is_none() {
            return warning(
                "ceph-file-missing",
                format!(
                    "{}, named in agent.toml, is not there: no disk on Ceph RBD can be served",
                    path.display()
                ),
                "copy it from a host of the Ceph cluster: docs/operate/ceph.md".to_owned(),
            );
        }
    }
    None
}
