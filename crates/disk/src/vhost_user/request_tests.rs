//! Requests over memory that is cut into pieces in every way.

use proptest::prelude::*;

use super::*;

const WRITE_CACHE: u64 = features::DISCARD | features::WRITE_ZEROES;

/// A request's bytes, laid out in pieces of these lengths.
struct Laid {
    /// Owns what the pieces point to.
    _memory: Vec<Box<[u8]>>,
    chain: Chain,
}

fn lay(readable: &[u8], cuts: &[usize], writable: &[usize]) -> Laid {
    let (mut memory, mut chain, mut guest) = (Vec::new(), Chain::default(), 0x1000);
    let mut rest = readable;
    let mut cuts = cuts.iter().copied().chain(std::iter::repeat(usize::MAX));
    while !rest.is_empty() {
        let (here, after) = rest.split_at(cuts.next().unwrap_or(1).clamp(1, rest.len()));
        push(&mut memory, &mut chain.readable, here.to_vec(), &mut guest);
        rest = after;
    }
    for len in writable {
        push(&mut memory, &mut chain.writable, vec![0; *len], &mut guest);
    }
    Laid { _memory: memory, chain }
}

fn push(memory: &mut Vec<Box<[u8]>>, pieces: &mut Vec<Piece>, bytes: Vec<u8>, guest: &mut u64) {
    let mut bytes = bytes.into_boxed_slice();
    pieces.push(Piece { base: bytes.as_mut_ptr(), len: bytes.len(), guest: *guest });
    // A gap, so that nothing seems to follow.
    *guest += bytes.len() as u64 + 64;
    memory.push(bytes);
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn command(readable: &[u8], writable: &[usize]) -> Result<Command, RequestError> {
    let mut laid = lay(readable, &[], writable);
    parse(&mut laid.chain, WRITE_CACHE, false).map(|parsed| parsed.command)
}

#[test]
fn what_is_asked_for_is_understood() {
    let carry = |operation, offset, len| Ok(Command::Carry { operation, offset, len });
    assert_eq!(command(&header(IN, 2), &[4096, 1]), carry(Operation::Read, 1024, 4096));
    let write = [header(OUT, 3), vec![1; 512]].concat();
    assert_eq!(command(&write, &[1]), carry(Operation::Write { fua: false }, 1536, 512));
    assert_eq!(command(&header(FLUSH, 99), &[1]), carry(Operation::Flush, 0, 0));
    assert_eq!(command(&header(GET_ID, 0), &[20, 1]), Ok(Command::Identify));
    let discard = [header(DISCARD, 0), range(8, 16, 0)].concat();
    assert_eq!(command(&discard, &[1]), carry(Operation::Discard, 4096, 8192));
    let zeroes = [header(WRITE_ZEROES, 0), range(8, 16, UNMAP)].concat();
    assert_eq!(command(&zeroes, &[1]), carry(Operation::WriteZeroes { fua: false }, 4096, 8192));
    assert_eq!(command(&header(7, 0), &[1]), Ok(Command::Answer(UNSUPPORTED)));
    assert_eq!(command(&header(IN, u64::MAX), &[512, 1]), Ok(Command::Answer(IO_ERROR)));
}

#[test]
fn what_was_not_agreed_on_is_unsupported_and_write_through_reaches_every_write() {
    let parsed = |readable: &[u8], accepted| {
        parse(&mut lay(readable, &[], &[1]).chain, accepted, true).map(|parsed| parsed.command)
    };
    for kind in [DISCARD, WRITE_ZEROES] {
        let bytes = [header(kind, 0), range(0, 8, 0)].concat();
        assert_eq!(parsed(&bytes, 0), Ok(Command::Answer(UNSUPPORTED)));
    }
    let write = [header(OUT, 0), vec![0; 512]].concat();
    let zeroes = [header(WRITE_ZEROES, 0), range(0, 8, 0)].concat();
    let is = |command, wanted| matches!(command, Ok(Command::Carry { operation, .. }) if operation == wanted);
    assert!(is(parsed(&write, WRITE_CACHE), Operation::Write { fua: true }));
    assert!(is(parsed(&zeroes, WRITE_CACHE), Operation::WriteZeroes { fua: true }));
}

#[test]
fn chains_that_are_no_requests_are_errors() {
    for (name, readable, writable, expected) in [
        ("nothing", &[][..], &[][..], RequestError::NoStatus),
        ("header_only", &[0; 16], &[], RequestError::NoStatus),
        ("status_only", &[], &[1], RequestError::NoHeader),
        ("header_cut", &[0; 15], &[1], RequestError::NoHeader),
    ] {
        assert_eq!(command(readable, writable), Err(expected), "{name}");
    }
}

proptest! {
    /// How a request is cut does not change what it says, and its pieces are what it is about.
    #[test]
    fn cuts_do_not_matter(
        sector in 0u64..1 << 40,
        data in proptest::collection::vec(any::<u8>(), 1..600),
        cuts in proptest::collection::vec(1usize..40, 0..40),
        writable in proptest::collection::vec(1usize..300, 1..8),
    ) {
        let bytes = [header(OUT, sector), data.clone()].concat();
        let mut laid = lay(&bytes, &cuts, &[1]);
        let parsed = parse(&mut laid.chain, 0, false).unwrap();
        let operation = Operation::Write { fua: false };
        prop_assert_eq!(parsed.command, Command::Carry { operation, offset: sector * 512, len: data.len() as u64 });
        let mut read: Vec<u8> = Vec::new();
        for piece in &laid.chain.readable {
            // SAFETY: pieces of `laid`.
            read.extend(unsafe { std::slice::from_raw_parts(piece.base, piece.len) });
        }
        prop_assert_eq!(read, data);

        let mut laid = lay(&header(IN, sector), &cuts, &writable);
        let end = laid.chain.writable.last().map(|piece| piece.guest + piece.len as u64 - 1);
        let parsed = parse(&mut laid.chain, 0, false).unwrap();
        let total = writable.iter().sum::<usize>() as u64;
        prop_assert_eq!((parsed.writable, Some(parsed.status_guest)), (total, end));
        prop_assert_eq!(super::total(&laid.chain.writable), total - 1);
    }

    #[test]
    fn any_bytes_are_a_request_or_an_error(
        bytes in proptest::collection::vec(any::<u8>(), 0..64),
        kind in 0u32..16,
        cuts in proptest::collection::vec(1usize..20, 0..8),
        writable in proptest::collection::vec(1usize..40, 0..4),
        accepted: u64,
        fua: bool,
    ) {
        let mut bytes = bytes;
        bytes.iter_mut().zip(kind.to_le_bytes()).for_each(|(to, from)| *to = from);
        let mut laid = lay(&bytes, &cuts, &writable);
        let _ = parse(&mut laid.chain, accepted, fua);
    }
}
