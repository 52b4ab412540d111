//! NBD as far as STARTTLS, on both sides.
//!
//! To a client we are a server that demands TLS (fixed newstyle, "FORCEDTLS" of the protocol's document): until it asks for
//! that, every option is refused and nothing of the export is told. Towards the disk process we are the client that has
//! read the greeting; what the client says within TLS goes on from there. No byte after STARTTLS is read here, so
//! nothing that was sent in clear can pass for something sent within TLS.

use std::io::{self, Read, Write};

const NBDMAGIC: &[u8; 8] = b"NBDMAGIC";
const IHAVEOPT: &[u8; 8] = b"IHAVEOPT";
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// What we offer in both ways, and the disk process too: fixed newstyle, no zeroes.
const FLAGS: u16 = 0b11;
const FIXED_NEWSTYLE: u32 = 1;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_STARTTLS: u32 = 5;
const REP_ACK: u32 = 1;
const REP_ERR_INVALID: u32 = 1 << 31 | 3;
const REP_ERR_TLS_REQD: u32 = 1 << 31 | 5;

/// Longest option that is skipped: a name of 4096 bytes with some queries.
const MAX_OPTION: u32 = 16 << 10;
/// Most options before STARTTLS.
const MAX_OPTIONS: usize = 32;

/// What a client said in clear that matters later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientFlags(u32);

/// Why there is no TLS with a peer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GreetingError {
    /// It left in order.
    #[error("it left without TLS")]
    Left,
    /// It named an export in clear, to which there is no answer but the end.
    #[error("it wanted an export without TLS; give the client TLS credentials")]
    Plain,
    /// Not NBD, or not as the protocol has it.
    #[error("it does not speak NBD: {0}")]
    Protocol(&'static str),
    /// The connection.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Greets a client and waits for STARTTLS, which is answered. The next byte is TLS.
///
/// # Errors
///
/// [`GreetingError`].
pub fn until_starttls(client: &mut (impl Read + Write)) -> Result<ClientFlags, GreetingError> {
    let mut greeting = [NBDMAGIC.as_slice(), IHAVEOPT].concat();
    greeting.extend(FLAGS.to_be_bytes());
    client.write_all(&greeting)?;
    let flags = u32::from_be_bytes(take(client)?);
    if flags & FIXED_NEWSTYLE == 0 || flags & !u32::from(FLAGS) != 0 {
        return Err(GreetingError::Protocol("unknown or missing client flags"));
    }
    for _ in 0..MAX_OPTIONS {
        if take(client)? != *IHAVEOPT {
            return Err(GreetingError::Protocol("wrong magic before an option"));
        }
        let option = u32::from_be_bytes(take(client)?);
        let length = u32::from_be_bytes(take(client)?);
        if length > MAX_OPTION {
            return Err(GreetingError::Protocol("an option is too long"));
        }
        let skipped = io::copy(&mut Read::take(&mut *client, length.into()), &mut io::sink())?;
        if skipped < length.into() {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        match option {
            OPT_STARTTLS if length == 0 => {
                reply(client, option, REP_ACK, b"")?;
                return Ok(ClientFlags(flags));
            }
            OPT_STARTTLS => reply(client, option, REP_ERR_INVALID, b"STARTTLS has no content")?,
            OPT_ABORT => {
                // It may have gone already.
                let _ = reply(client, option, REP_ACK, b"");
                return Err(GreetingError::Left);
            }
            OPT_EXPORT_NAME => return Err(GreetingError::Plain),
            _ => reply(client, option, REP_ERR_TLS_REQD, b"TLS is demanded here: STARTTLS comes first")?,
        }
    }
    Err(GreetingError::Protocol("too many options before STARTTLS"))
}

/// Reads the disk process's greeting and says the client's flags, so that options come next.
///
/// # Errors
///
/// [`GreetingError`].
pub fn of_export(export: &mut (impl Read + Write), client: ClientFlags) -> Result<(), GreetingError> {
    if take(export)? != *NBDMAGIC || take(export)? != *IHAVEOPT {
        return Err(GreetingError::Protocol("wrong magic"));
    }
    let offered = u32::from(u16::from_be_bytes(take(export)?));
    if client.0 & !offered != 0 {
        return Err(GreetingError::Protocol("it lacks what the client was offered"));
    }
    export.write_all(&client.0.to_be_bytes())?;
    Ok(())
}

fn take<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn reply(to: &mut impl Write, option: u32, kind: u32, text: &[u8]) -> io::Result<()> {
    let mut bytes = REPLY_MAGIC.to_be_bytes().to_vec();
    for number in [option, kind, text.len() as u32] {
        bytes.extend(number.to_be_bytes());
    }
    bytes.extend(text);
    to.write_all(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A peer that says this and hears everything.
    struct Peer {
        says: io::Cursor<Vec<u8>>,
        hears: Vec<u8>,
    }

    impl Read for Peer {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            self.says.read(into)
        }
    }

    impl Write for Peer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.hears.extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn peer(parts: &[&[u8]]) -> Peer {
        Peer { says: io::Cursor::new(parts.concat()), hears: Vec::new() }
    }

    fn option(number: u32, content: &[u8]) -> Vec<u8> {
        let length = content.len() as u32;
        [IHAVEOPT, number.to_be_bytes().as_slice(), &length.to_be_bytes(), content].concat()
    }

    #[test]
    fn every_option_but_starttls_is_refused_and_nothing_after_it_is_read() {
        let mut client = peer(&[
            &3u32.to_be_bytes(),
            &option(3, b""),
            &option(7, &[0; 4096]),
            &option(5, b"x"),
            &option(5, b""),
            b"TLS",
        ]);
        assert_eq!(until_starttls(&mut client).unwrap(), ClientFlags(3));
        let mut rest = Vec::new();
        client.says.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"TLS");
        let kinds: Vec<u32> = client.hears[18..]
            .windows(8)
            .enumerate()
            .filter(|(_, window)| *window == REPLY_MAGIC.to_be_bytes())
            .map(|(at, _)| u32::from_be_bytes(client.hears[18 + at + 12..][..4].try_into().unwrap()))
            .collect();
        assert_eq!(kinds, [REP_ERR_TLS_REQD, REP_ERR_TLS_REQD, REP_ERR_INVALID, REP_ACK]);
    }

    #[test]
    fn what_is_not_nbd_ends_it() {
        let flags = 3u32.to_be_bytes();
        let long = [IHAVEOPT, 7u32.to_be_bytes().as_slice(), &u32::MAX.to_be_bytes()].concat();
        for (says, why) in [
            (vec![0u32.to_be_bytes().as_slice()], "flags"),
            (vec![7u32.to_be_bytes().as_slice()], "flags"),
            (vec![&flags, b"GET / HTTP/1.1\r\n\r\n"], "magic"),
            (vec![&flags, &long], "too long"),
            (vec![&flags, &option(3, b"").repeat(MAX_OPTIONS + 1)], "too many"),
        ] {
            let error = until_starttls(&mut peer(&says)).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let named = until_starttls(&mut peer(&[&flags, &option(1, b"disk")])).unwrap_err();
        assert!(matches!(named, GreetingError::Plain));
        let left = until_starttls(&mut peer(&[&flags, &option(2, b"")])).unwrap_err();
        assert!(matches!(left, GreetingError::Left));
        let cut = option(7, &[0; 100]);
        let cut = until_starttls(&mut peer(&[&flags, &cut[..50]])).unwrap_err();
        assert!(matches!(cut, GreetingError::Io(_)));
    }

    #[test]
    fn export_hears_the_flags_of_the_client_if_it_has_them() {
        let greeting = |flags: u16| [NBDMAGIC.as_slice(), IHAVEOPT, &flags.to_be_bytes()].concat();
        let mut export = peer(&[&greeting(3)]);
        of_export(&mut export, ClientFlags(3)).unwrap();
        assert_eq!(export.hears, 3u32.to_be_bytes());
        assert!(of_export(&mut peer(&[&greeting(1)]), ClientFlags(3)).is_err());
        assert!(of_export(&mut peer(&[&[0; 18]]), ClientFlags(3)).is_err());
    }
}
