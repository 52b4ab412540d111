//! Classes of disks: by which way QEMU is given one, and what that lets libvirt do with it.
//!
//! A class is asked for by a [`ClassChoice`] and decided by [`resolve`] when a disk is defined, for it stands in the
//! domain's XML and libvirt fixes that until the next definition. From then on the definition says what the class is;
//! every other place that names it has a copy.

use serde::{Deserialize, Serialize};

use crate::control::ExportKind;

/// How a disk is presented to QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskClass {
    /// NBD on a unix socket: works everywhere, with every libvirt block job.
    #[default]
    Compatible,
    /// vhost-user-blk on a unix socket: the worker reads and writes the guest's memory itself.
    Fast,
}

impl DiskClass {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Compatible, Self::Fast];

    /// The word for people, and in the metadata.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Compatible => "compatible",
            Self::Fast => "fast",
        }
    }

    /// The class of a word; `None` for one a newer version knows.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.as_str() == word)
    }

    /// What its socket speaks.
    pub fn export(self) -> ExportKind {
        match self {
            Self::Compatible => ExportKind::Nbd,
            Self::Fast => ExportKind::VhostUser,
        }
    }

    /// What it is, for people.
    pub fn is(self) -> &'static str {
        match self {
            Self::Compatible => "NBD on a unix socket",
            Self::Fast => "vhost-user-blk on a unix socket, straight from and to the guest's memory",
        }
    }

    /// What libvirt can do with it, for people.
    pub fn can(self) -> &'static str {
        match self {
            Self::Compatible => {
                "snapshots, checkpoints, backup, block copy, throttling, statistics, save and restore; any bus; raw and \
                 qcow2 inside"
            }
            Self::Fast => "save and restore; the fastest way",
        }
    }

    /// What libvirt refuses to do with it, for people; empty for nothing.
    pub fn cannot(self) -> &'static str {
        match self {
            Self::Compatible => "",
            Self::Fast => {
                "snapshots, checkpoints, backup, block copy, resize, throttling and statistics by libvirt: it refuses \
                 them for vhost-user disks"
            }
        }
    }

    /// What a disk and its VM must be for it, for people; empty for nothing.
    pub fn needs(self) -> &'static str {
        match self {
            Self::Compatible => "",
            Self::Fast => "bus virtio, raw inside, writable, and memory of the VM that is shared (memfd)",
        }
    }
}

/// What an administrator asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClassChoice {
    /// Whatever loses nothing on this host: see [`resolve`].
    #[default]
    Auto,
    /// [`DiskClass::Compatible`].
    Compatible,
    /// [`DiskClass::Fast`].
    Fast,
}

impl ClassChoice {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Auto, Self::Compatible, Self::Fast];

    /// The word for people, and in the agent protocol.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Compatible => "compatible",
            Self::Fast => "fast",
        }
    }

    /// The choice of a word. No word at all is [`ClassChoice::Auto`], as a sender says it that knows no classes.
    pub fn from_word(word: &str) -> Option<Self> {
        if word.is_empty() {
            return Some(Self::Auto);
        }
        Self::ALL.into_iter().find(|choice| choice.as_str() == word)
    }

    /// Whether it is [`ClassChoice::Auto`].
    pub fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

/// What a host can present disks by, as far as [`resolve`] asks for it. Nothing is asked yet: NBD and vhost-user-blk
/// are in every QEMU that is supported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct HostCapabilities {}

/// The class of a disk that is being defined.
///
/// The rule: who names a class gets it or a refusal, never another one. `auto` takes the fastest class with which
/// libvirt can still do everything, on each host the VM may run on; the class stands in the XML, and a VM moves with its
/// XML. That is `compatible`: `fast` costs snapshots and backup, so nobody gets it who did not ask.
pub fn resolve(requested: ClassChoice, _host: HostCapabilities) -> DiskClass {
    match requested {
        ClassChoice::Auto | ClassChoice::Compatible => DiskClass::Compatible,
        ClassChoice::Fast => DiskClass::Fast,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_never_costs_a_libvirt_operation() {
        let class = resolve(ClassChoice::Auto, HostCapabilities::default());
        assert_eq!((class, class.cannot()), (DiskClass::Compatible, ""));
    }

    #[test]
    fn named_class_is_what_one_gets() {
        for choice in ClassChoice::ALL.into_iter().filter(|choice| !choice.is_auto()) {
            assert_eq!(resolve(choice, HostCapabilities::default()).as_str(), choice.as_str());
        }
    }

    #[test]
    fn words_are_what_serde_writes_and_unknown_ones_are_none() {
        for class in DiskClass::ALL {
            assert_eq!(serde_json::to_string(&class).unwrap(), format!("\"{}\"", class.as_str()));
            assert_eq!(DiskClass::from_word(class.as_str()), Some(class));
        }
        for choice in ClassChoice::ALL {
            assert_eq!(serde_json::to_string(&choice).unwrap(), format!("\"{}\"", choice.as_str()));
            assert_eq!(ClassChoice::from_word(choice.as_str()), Some(choice));
        }
        assert_eq!(ClassChoice::from_word(""), Some(ClassChoice::Auto));
        assert_eq!((DiskClass::from_word("auto"), DiskClass::from_word("warp")), (None, None));
        assert_eq!(ClassChoice::from_word("warp"), None);
    }
}
