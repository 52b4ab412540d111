//! States of VMs, hosts and providers, in the field's words.

use serde::{Deserialize, Serialize};

/// How much of a VM is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Coverage {
    /// All disks.
    Encrypted,
    /// Some disks.
    PartlyEncrypted,
    /// No disk.
    Clear,
}

impl Coverage {
    /// Coverage of a VM with so many encrypted disks out of all its writable disks.
    pub fn of(encrypted: usize, all: usize) -> Self {
        match (encrypted, all) {
            (0, _) => Self::Clear,
            (e, a) if e >= a => Self::Encrypted,
            _ => Self::PartlyEncrypted,
        }
    }

    /// The word for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Encrypted => "encrypted",
            Self::PartlyEncrypted => "partly encrypted",
            Self::Clear => "clear",
        }
    }
}

/// What a VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// It runs.
    Running,
    /// Paused, by the administrator or by an I/O error.
    Paused,
    /// It is off.
    Off,
    /// It is off and a saved image waits.
    Saved,
    /// Its key cannot be had now.
    Locked,
    /// Its host does not answer.
    Unknown,
}

impl VmState {
    /// Whether QEMU may be there: where nobody can say, it may.
    pub fn has_qemu(self) -> bool {
        matches!(self, Self::Running | Self::Paused | Self::Unknown)
    }

    /// The word for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Off => "off",
            Self::Saved => "saved",
            Self::Locked => "locked",
            Self::Unknown => "unknown",
        }
    }
}

/// What lies inside a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InnerFormat {
    /// The disk's bytes.
    Raw,
    /// A qcow2 image, QEMU's business.
    Qcow2,
}

impl InnerFormat {
    /// libvirt's and QEMU's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// From libvirt's word.
    pub fn from_libvirt(word: &str) -> Option<Self> {
        match word {
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coverage_counts_disks() {
        assert_eq!(Coverage::of(0, 0), Coverage::Clear);
        assert_eq!(Coverage::of(0, 2), Coverage::Clear);
        assert_eq!(Coverage::of(1, 2), Coverage::PartlyEncrypted);
        assert_eq!(Coverage::of(2, 2), Coverage::Encrypted);
    }
}
