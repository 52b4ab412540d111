//! A disk that is shown larger while it is in use. In: an order; out: the new size, on the medium and told to whoever can
//! be told.

use std::sync::Arc;

use vmseal_model::id::DiskId;

use crate::{
    custody::{Custody, CustodyError},
    export::Export,
    latch::SharedPage,
    log,
    setup::MAX_PRESENTED,
    volume::VolumeError,
};

/// Why a disk keeps its size.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResizeError {
    /// No such disk.
    #[error("this disk process serves no disk {0}")]
    NoDisk(DiskId),
    /// Not now.
    #[error(transparent)]
    Custody(#[from] CustodyError),
    /// Fewer bytes.
    #[error(
        "{target} shows {now} bytes: it can only grow while it is in use, for a guest may have data beyond {wanted}. Make file \
         systems in it smaller, power the VM off, and resize then"
    )]
    Shrinks {
        /// The disk.
        target: String,
        /// What it shows.
        now: u64,
        /// What was asked for.
        wanted: u64,
    },
    /// A size no disk has.
    #[error(
        "{target} cannot show {wanted} bytes: not a number of its units of {unit}, or more than one key may have"
    )]
    Size {
        /// The disk.
        target: String,
        /// What was asked for.
        wanted: u64,
        /// Bytes of a unit.
        unit: u64,
    },
    /// A network store.
    #[error("{0} lies behind a store helper, which does not change its size in use: power the VM off first")]
    Remote(String),
    /// The store.
    #[error("{target} keeps its {now} bytes: {cause}")]
    Volume {
        /// The disk.
        target: String,
        /// What it shows.
        now: u64,
        /// Why.
        cause: VolumeError,
    },
}

/// Shows more bytes of the disk with this place in the setup. The same number again is told again.
pub(crate) fn grow(
    exports: &[Arc<Export>],
    custody: &Custody,
    page: &SharedPage,
    disk: DiskId,
    wanted: u64,
) -> Result<u64, ResizeError> {
    let of_disk = |export: &Arc<Export>| export.name() == disk.to_string();
    let at = exports.iter().position(of_disk).ok_or(ResizeError::NoDisk(disk))?;
    let Some(export) = exports.get(at) else { return Err(ResizeError::NoDisk(disk)) };
    let _turn = custody.serving("resize")?;
    let (volume, target) = (export.volume(), export.target().to_owned());
    let (layout, now) = (volume.layout(), volume.presented_bytes());
    if wanted < now {
        return Err(ResizeError::Shrinks { target, now, wanted });
    }
    if !wanted.is_multiple_of(layout.unit) || wanted > MAX_PRESENTED {
        return Err(ResizeError::Size { target, wanted, unit: layout.unit });
    }
    if volume.store().link().is_some() && wanted > now {
        return Err(ResizeError::Remote(target));
    }
    if layout.read_only && wanted > now {
        return Err(ResizeError::Volume { target, now, cause: VolumeError::ReadOnly });
    }
    // On the page first: a client must not see it shrink with the next worker.
    let grown = volume.grow_to(wanted, || page.set_presented(at, wanted));
    grown.map_err(|cause| ResizeError::Volume { target: target.clone(), now, cause })?;
    log::line(format_args!("{target}: shows {wanted} bytes now, {now} before"));
    if let Err(error) = export.link().tell_config_changed() {
        log::line(format_args!("{target}: the front end did not take the news of its size: {error}"));
    }
    Ok(wanted)
}
