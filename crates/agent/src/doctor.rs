//! What is not right on this host: the configuration and the host's files in, findings for the administrator out.
//!
//! Looks only, changes nothing, asks no libvirt.

use std::path::Path;

use vmseal_api::agent::v1::Warning;

use crate::config::AgentConfig;

/// The findings; paths are looked up under `root`, which is `/` but in tests.
pub fn findings(config: &AgentConfig, root: &Path) -> Vec<Warning> {
    let under = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    let mut findings = Vec::new();
    let hook = config.hook_dir.join("50-vmseal");
    if !under(&hook).exists() {
        findings.push(Warning {
            code: "hook-missing".to_owned(),
            message: format!("libvirt's hook {} is not there, so no encrypted VM starts", hook.display()),
            hint: format!("install it: ln -s /usr/libexec/vmseal/vmseal-hook {}", hook.display()),
        });
    }
    findings
}
