//! What a request's 28 bytes mean, and whether it may be carried out. Nothing here does I/O.

use super::wire::*;
use crate::volume::Layout;

/// Bytes of a request without its payload.
pub(super) const REQUEST_BYTES: usize = 28;

/// A request as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) kind: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

/// A request that may be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    Write { fua: bool },
    Disconnect,
    Flush,
    Trim { fua: bool },
    WriteZeroes { fua: bool },
    BlockStatus { one: bool },
}

/// What the handshake settled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Session {
    /// Structured replies.
    pub(super) structured: bool,
    /// The context `base:allocation`.
    pub(super) allocation: bool,
}

impl Request {
    /// Takes a request apart; `None` without its magic.
    pub(super) fn parse(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let (magic, rest) = bytes.split_first_chunk()?;
        let (flags, rest) = rest.split_first_chunk()?;
        let (kind, rest) = rest.split_first_chunk()?;
        let (cookie, rest) = rest.split_first_chunk()?;
        let (offset, rest) = rest.split_first_chunk()?;
        let (length, _) = rest.split_first_chunk()?;
        (u32::from_be_bytes(*magic) == REQUEST_MAGIC).then(|| Self {
            flags: u16::from_be_bytes(*flags),
            kind: u16::from_be_bytes(*kind),
            cookie: u64::from_be_bytes(*cookie),
            offset: u64::from_be_bytes(*offset),
            length: u32::from_be_bytes(*length),
        })
    }

    /// The command, or the error to answer with.
    pub(super) fn check(&self, layout: &Layout, session: Session) -> Result<Command, u32> {
        let fua = self.flags & CMD_FLAG_FUA != 0;
        let (command, allowed, changes) = match self.kind {
            CMD_READ => (Command::Read, if session.structured { CMD_FLAG_DF } else { 0 }, false),
            CMD_WRITE => (Command::Write { fua }, 0, true),
            CMD_DISC => return Ok(Command::Disconnect),
            CMD_FLUSH => (Command::Flush, 0, false),
            CMD_TRIM => (Command::Trim { fua }, 0, true),
            CMD_WRITE_ZEROES => (Command::WriteZeroes { fua }, CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO, true),
            CMD_BLOCK_STATUS if session.allocation => {
                (Command::BlockStatus { one: self.flags & CMD_FLAG_REQ_ONE != 0 }, CMD_FLAG_REQ_ONE, false)
            }
            _ => return Err(EINVAL),
        };
        // FUA is allowed on every command and means something where data is written.
        if self.flags & !(allowed | CMD_FLAG_FUA) != 0 {
            return Err(EINVAL);
        }
        if changes && layout.read_only {
            return Err(EPERM);
        }
        if command == Command::Flush {
            return if self.offset == 0 && self.length == 0 { Ok(command) } else { Err(EINVAL) };
        }
        let length = u64::from(self.length);
        if length == 0 || !length.is_multiple_of(layout.unit) || !self.offset.is_multiple_of(layout.unit) {
            return Err(EINVAL);
        }
        if self.offset.checked_add(length).is_none_or(|end| end > layout.presented) {
            return Err(if matches!(command, Command::Write { .. } | Command::WriteZeroes { .. }) {
                ENOSPC
            } else {
                EINVAL
            });
        }
        if command == Command::Read && self.length > MAX_PAYLOAD {
            return Err(EOVERFLOW);
        }
        // Encrypted zeros have to be written out: there is no fast way.
        if self.flags & CMD_FLAG_FAST_ZERO != 0 {
            return Err(ENOTSUP);
        }
        Ok(command)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LAYOUT: Layout = Layout {
        unit: 4096,
        payload_offset: 0,
        presented: 1 << 30,
        grows: false,
        read_only: false,
        discard: true,
    };
    const ALL: Session = Session { structured: true, allocation: true };

    fn request(kind: u16, flags: u16, offset: u64, length: u32) -> Request {
        Request { flags, kind, cookie: 1, offset, length }
    }

    #[test]
    fn each_defect_has_its_error() {
        let check = |kind, flags, offset, length| request(kind, flags, offset, length).check(&LAYOUT, ALL);
        assert_eq!(check(CMD_READ, CMD_FLAG_DF, 0, 4096), Ok(Command::Read));
        assert_eq!(check(CMD_READ, 0, 1, 4096), Err(EINVAL), "offset unaligned");
        assert_eq!(check(CMD_READ, 0, 0, 512), Err(EINVAL), "length unaligned");
        assert_eq!(check(CMD_READ, 0, 0, 0), Err(EINVAL), "empty");
        assert_eq!(check(CMD_READ, 0, 1 << 30, 4096), Err(EINVAL), "past the end");
        assert_eq!(check(CMD_READ, 0, u64::MAX - 4095, 4096), Err(EINVAL), "sum too large");
        assert_eq!(check(CMD_READ, 0, 0, MAX_PAYLOAD + 4096), Err(EOVERFLOW), "too much at once");
        assert_eq!(check(CMD_READ, CMD_FLAG_NO_HOLE, 0, 4096), Err(EINVAL), "foreign flag");
        assert_eq!(check(CMD_WRITE, CMD_FLAG_FUA, 0, 4096), Ok(Command::Write { fua: true }));
        assert_eq!(check(CMD_WRITE, 0, 1 << 30, 4096), Err(ENOSPC));
        assert_eq!(
            check(CMD_WRITE_ZEROES, CMD_FLAG_NO_HOLE, 0, 1 << 30),
            Ok(Command::WriteZeroes { fua: false })
        );
        assert_eq!(check(CMD_WRITE_ZEROES, CMD_FLAG_FAST_ZERO, 0, 4096), Err(ENOTSUP));
        assert_eq!(check(CMD_TRIM, 0, 1 << 30, 4096), Err(EINVAL));
        assert_eq!(check(CMD_FLUSH, CMD_FLAG_FUA, 0, 0), Ok(Command::Flush));
        assert_eq!(check(CMD_FLUSH, 0, 0, 4096), Err(EINVAL));
        assert_eq!(check(5, 0, 0, 4096), Err(EINVAL), "CACHE is not offered");
        assert_eq!(check(8, 0, 0, 4096), Err(EINVAL), "RESIZE is not offered");
        let one = check(CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE, 0, 4096);
        assert_eq!(one, Ok(Command::BlockStatus { one: true }));
        let plain = Session::default();
        assert_eq!(
            request(CMD_BLOCK_STATUS, 0, 0, 4096).check(&LAYOUT, plain),
            Err(EINVAL),
            "not negotiated"
        );
        assert_eq!(
            request(CMD_READ, CMD_FLAG_DF, 0, 4096).check(&LAYOUT, plain),
            Err(EINVAL),
            "not negotiated"
        );
    }

    #[test]
    fn read_only_disk_takes_nothing_that_changes_it() {
        let layout = Layout { read_only: true, ..LAYOUT };
        for kind in [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES] {
            assert_eq!(request(kind, 0, 0, 4096).check(&layout, ALL), Err(EPERM));
        }
        for kind in [CMD_READ, CMD_BLOCK_STATUS] {
            assert!(request(kind, 0, 0, 4096).check(&layout, ALL).is_ok());
        }
        assert!(request(CMD_FLUSH, 0, 0, 0).check(&layout, ALL).is_ok());
    }

    proptest! {
        #[test]
        fn no_request_panics_and_none_that_passes_is_out_of_bounds(
            mut bytes in any::<[u8; 16]>().prop_flat_map(|head| (Just(head), any::<[u8; 12]>()))
                .prop_map(|(head, tail)| <[u8; 28]>::try_from([head.as_slice(), &tail].concat()).unwrap()),
            kind in 0u16..12, structured: bool, allocation: bool, magic: bool
        ) {
            if magic {
                bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
                bytes[6..8].copy_from_slice(&kind.to_be_bytes());
            }
            if let Some(request) = Request::parse(&bytes) {
                let checked = request.check(&LAYOUT, Session { structured, allocation });
                if let Ok(command) = checked && !matches!(command, Command::Disconnect | Command::Flush) {
                    prop_assert!(request.offset + u64::from(request.length) <= LAYOUT.presented);
                    prop_assert!(request.length > 0 && request.length % 4096 == 0);
                }
            }
        }

        #[test]
        fn checks_hold_near_the_borders(
            kind in 0u16..9, flags in 0u16..64, offset in (0u64..8, -2i64..3), length in (0u32..4, -2i32..3)
        ) {
            let offset = ((offset.0 << 27) as i64).wrapping_add(offset.1 * 4096) as u64;
            let length = (length.0 << 24).wrapping_add((length.1 * 4096) as u32);
            let checked = request(kind, flags, offset, length).check(&LAYOUT, ALL);
            if matches!(checked, Ok(Command::Read | Command::Write { .. } | Command::Trim { .. })) {
                prop_assert!(offset + u64::from(length) <= LAYOUT.presented);
            }
        }
    }
}
