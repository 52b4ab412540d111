//! The warden of one disk: makes it a block device of the host, has it served again after a worker died, and ends it.
//!
//! In: the disk's id and the socket where its worker listens. Out: `/dev/vmseal/<disk-id>`, as long as somebody keeps the
//! disk. It is root, for the ublk driver wants that, and small for that reason: it sees neither a key nor a byte of the
//! disk. What it says to the worker: `docs/formats/ublk-handshake.md`; why it is as it is: `docs/design/ublk.md`.
//!
//! | module | what |
//! |---|---|
//! | [`abi`] | numbers and layouts of the driver |
//! | [`control`] | commands to the driver, on a ring |
//! | [`device`] | one device: make, start, recover, end |
//! | [`refill`] | what makes a recovery safe whose predecessor was cut off |
//! | [`names`] | the link, the mark for udev, the lock |
//! | [`privileges`] | what is left of root's rights |
//! | [`talk`] | frames to and from the worker |
//! | [`signals`] | the order to end, and waiting |
//! | [`warden`] | its life |

#![deny(unsafe_op_in_unsafe_fn)]

pub mod abi;
pub mod control;
pub mod device;
pub mod names;
pub mod privileges;
pub mod refill;
pub mod signals;
pub mod talk;
pub mod warden;

use std::{
    error::Error,
    fmt,
    io::{self, Write},
};

/// Writes one line for the administrator to standard error.
pub fn line(text: fmt::Arguments<'_>) {
    // A log that cannot be written is no reason to leave a device alone.
    let _ = io::stderr().write_all(format!("vmseal-ublk[{}] {text}\n", std::process::id()).as_bytes());
}

/// An error and its causes on one line.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
