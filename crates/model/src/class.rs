//! Classes of disks: by which way QEMU is given one, and what that lets libvirt do with it.
//!
//! A class is asked for by a [`ClassChoice`] and decided by [`resolve`] when a disk is defined, for it stands in the
//! domain's XML and libvirt fixes that until the next definition. From then on the definition says what the class is;
//! every other place that names it has a copy.

use serde::{Deserialize, Serialize};

use crate::control::ExportKind;

/// Most hosts that are named where one would do.
const NAMED: usize = 3;

/// How a disk is presented to QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskClass {
    /// NBD on a unix socket: works everywhere, with every libvirt block job.
    #[default]
    Compatible,
    /// A block device of the host, by the kernel's ublk: every libvirt block job, at the speed of a device. Nobody asks for
    /// it by name: it is what [`ClassChoice::Auto`] is where every host has it.
    Ublk,
    /// vhost-user-blk on a unix socket: the worker reads and writes the guest's memory itself.
    Fast,
}

impl DiskClass {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Compatible, Self::Ublk, Self::Fast];

    /// The word for people, and in the metadata.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Compatible => "compatible",
            Self::Ublk => "ublk",
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
            Self::Ublk => ExportKind::Ublk,
            Self::Fast => ExportKind::VhostUser,
        }
    }

    /// What it is, for people.
    pub fn is(self) -> &'static str {
        match self {
            Self::Compatible => "NBD on a unix socket",
            Self::Ublk => "a block device of the host, made for this VM by the kernel's ublk",
            Self::Fast => "vhost-user-blk on a unix socket, straight from and to the guest's memory",
        }
    }

    /// What libvirt can do with it, for people.
    pub fn can(self) -> &'static str {
        match self {
            Self::Compatible | Self::Ublk => {
                "snapshots, checkpoints, backup, block copy, throttling, statistics, save and restore; any bus; raw and \
                 qcow2 inside"
            }
            Self::Fast => "save and restore; the fastest way",
        }
    }

    /// What libvirt refuses to do with it, for people; empty for nothing.
    pub fn cannot(self) -> &'static str {
        match self {
            Self::Compatible | Self::Ublk => "",
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
            Self::Ublk => "the kernel's ublk driver (ublk_drv) and io_uring, on each host the VM starts on",
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

/// What one host can present disks by. What is not said, as by an agent that knows nothing of it, is not there.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HostCapabilities {
    /// Block devices by the kernel's ublk.
    pub ublk: bool,
    /// Why not, in one line; empty where it has them, or where nobody says.
    pub no_ublk: String,
    /// vhost-user-blk.
    pub vhost_user: bool,
}

/// What all hosts have on which a VM may come to run, as far as the server knows them. What is not said, as by a server
/// that knows nothing of it, is not there.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct GroupCapabilities {
    /// Each has [`HostCapabilities::ublk`].
    pub ublk: bool,
    /// Those that have not, by name.
    pub without_ublk: Vec<String>,
}

/// What was asked for when a disk was defined, and why it became the class it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chosen {
    /// What was asked for.
    pub asked: ClassChoice,
    /// Why that is this class, in one line.
    pub why: String,
}

/// A class, and how it came about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The class.
    pub class: DiskClass,
    /// How it came about.
    pub chosen: Chosen,
}

/// The class of a disk that is being defined, `here` being the host that defines it and `group` all hosts.
///
/// The rule: who names a class gets it or a refusal, never another one. `auto` takes the fastest class with which
/// libvirt can still do everything, on each host the VM may run on; the class stands in the XML, and a VM moves with its
/// XML. That is a block device where every host has ublk, and `compatible` elsewhere: `fast` costs snapshots and backup,
/// so nobody gets it who did not ask.
pub fn resolve(asked: ClassChoice, here: &HostCapabilities, group: &GroupCapabilities) -> Resolved {
    let (class, why) = match asked {
        ClassChoice::Compatible => (DiskClass::Compatible, "it was asked for".to_owned()),
        ClassChoice::Fast => (DiskClass::Fast, "it was asked for".to_owned()),
        ClassChoice::Auto if here.ublk && group.ublk => (DiskClass::Ublk, "every host has ublk".to_owned()),
        ClassChoice::Auto => (DiskClass::Compatible, no_ublk(here, group)),
    };
    Resolved { class, chosen: Chosen { asked, why } }
}

fn no_ublk(here: &HostCapabilities, group: &GroupCapabilities) -> String {
    let others = &group.without_ublk;
    match others.as_slice() {
        _ if !here.ublk && here.no_ublk.is_empty() => "its host has no ublk".to_owned(),
        _ if !here.ublk => format!("its host has no ublk: {}", here.no_ublk),
        [] => "the server does not say whether every host has ublk".to_owned(),
        [one] => format!("host {one} has no ublk"),
        _ => {
            let named = others.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
            let more = others.len().saturating_sub(NAMED);
            let more = if more == 0 { String::new() } else { format!(" and {more} more") };
            format!("hosts {named}{more} have no ublk")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here(ublk: bool) -> HostCapabilities {
        HostCapabilities { ublk, vhost_user: true, ..HostCapabilities::default() }
    }

    fn group(without_ublk: &[&str]) -> GroupCapabilities {
        let without_ublk: Vec<String> = without_ublk.iter().map(|name| (*name).to_owned()).collect();
        GroupCapabilities { ublk: without_ublk.is_empty(), without_ublk }
    }

    fn auto(here: &HostCapabilities, group: &GroupCapabilities) -> (DiskClass, String) {
        let Resolved { class, chosen } = resolve(ClassChoice::Auto, here, group);
        assert_eq!(
            (class.cannot(), chosen.asked),
            ("", ClassChoice::Auto),
            "auto costs no libvirt operation"
        );
        (class, chosen.why)
    }

    #[test]
    fn auto_is_a_block_device_where_every_host_has_ublk() {
        assert_eq!(auto(&here(true), &group(&[])), (DiskClass::Ublk, "every host has ublk".into()));
    }

    #[test]
    fn auto_is_nbd_where_a_host_lacks_ublk_and_says_which() {
        let missing = HostCapabilities { no_ublk: "no module".into(), ..here(false) };
        for (here, group, why) in [
            (missing, group(&["hv1"]), "its host has no ublk: no module"),
            (here(false), group(&[]), "its host has no ublk"),
            (here(true), group(&["hv2"]), "host hv2 has no ublk"),
            (here(true), group(&["a", "b", "c"]), "hosts a, b, c have no ublk"),
            (here(true), group(&["a", "b", "c", "d", "e"]), "hosts a, b, c and 2 more have no ublk"),
            (here(true), GroupCapabilities::default(), "the server does not say whether every host has ublk"),
        ] {
            assert_eq!(auto(&here, &group), (DiskClass::Compatible, why.to_owned()));
        }
    }

    #[test]
    fn named_class_is_what_one_gets() {
        for choice in ClassChoice::ALL.into_iter().filter(|choice| !choice.is_auto()) {
            for (here, group) in [(here(true), group(&[])), (here(false), group(&["hv1"]))] {
                let resolved = resolve(choice, &here, &group);
                assert_eq!(resolved.class.as_str(), choice.as_str());
                assert_eq!(resolved.chosen, Chosen { asked: choice, why: "it was asked for".into() });
            }
        }
    }

    #[test]
    fn host_or_server_that_says_nothing_has_nothing() {
        assert_eq!(serde_json::from_str::<HostCapabilities>("{}").unwrap(), HostCapabilities::default());
        assert_eq!(serde_json::from_str::<GroupCapabilities>("{}").unwrap(), GroupCapabilities::default());
        assert_eq!(
            auto(&HostCapabilities::default(), &GroupCapabilities::default()).0,
            DiskClass::Compatible
        );
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
