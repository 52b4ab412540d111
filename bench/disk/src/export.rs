//! The exports that are compared.

use std::fmt;

/// How a client reaches a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Way {
    /// NBD on a unix socket.
    Nbd,
    /// vhost-user-blk.
    Vhost,
}

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Export {
    /// `vmseal-disk`.
    Ours(Way),
    /// The same engine without the cipher.
    OursPlain(Way),
    /// QEMU, not encrypted.
    QemuRaw(Way),
    /// QEMU's LUKS.
    QemuLuks(Way),
    /// nbdkit's luks filter, by NBD.
    Nbdkit,
    /// `vmseal-disk` by NBD, behind QEMU's nbd driver, by vhost-user-blk: what a guest with an NBD disk has.
    OursInQemu,
}

impl Export {
    pub(crate) const ALL: [Self; 10] = [
        Self::Ours(Way::Vhost),
        Self::OursPlain(Way::Vhost),
        Self::QemuRaw(Way::Vhost),
        Self::QemuLuks(Way::Vhost),
        Self::OursInQemu,
        Self::Ours(Way::Nbd),
        Self::OursPlain(Way::Nbd),
        Self::QemuRaw(Way::Nbd),
        Self::QemuLuks(Way::Nbd),
        Self::Nbdkit,
    ];
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nbd => "nbd",
            Self::Vhost => "vhost-user",
        })
    }
}

impl fmt::Display for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ours(way) => write!(f, "ours {way}"),
            Self::OursPlain(way) => write!(f, "ours plain {way}"),
            Self::QemuRaw(way) => write!(f, "qemu raw {way}"),
            Self::QemuLuks(way) => write!(f, "qemu luks {way}"),
            Self::Nbdkit => write!(f, "nbdkit luks nbd"),
            Self::OursInQemu => write!(f, "ours nbd in qemu"),
        }
    }
}
