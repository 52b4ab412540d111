//! Owner blocks of every release and in every state a crash leaves: published bytes, and every write cut short at every
//! sector.

use std::{cell::RefCell, io};

use vmseal_luks::{
    ClaimError, HeaderFile, OWNER_BLOCK_LEN, OWNER_BLOCK_OFFSET, OWNER_COPY_OFFSET, OwnerBlock, OwnerError,
    OwnerState,
};
use vmseal_model::id::HostId;

/// Both copies; and sectors that may still be written before the power goes.
struct Medium {
    copies: RefCell<[[u8; OWNER_BLOCK_LEN]; 2]>,
    sectors_left: RefCell<usize>,
}

impl Medium {
    fn new(copies: [[u8; OWNER_BLOCK_LEN]; 2]) -> Self {
        Self { copies: RefCell::new(copies), sectors_left: RefCell::new(usize::MAX) }
    }

    fn place(at: u64) -> usize {
        [OWNER_BLOCK_OFFSET, OWNER_COPY_OFFSET]
            .iter()
            .position(|place| *place == at)
            .expect("one of two places")
    }
}

impl HeaderFile for Medium {
    fn byte_len(&self) -> io::Result<u64> {
        Ok(OWNER_COPY_OFFSET + OWNER_BLOCK_LEN as u64)
    }
    fn get(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.copy_from_slice(&self.copies.borrow()[Self::place(at)]);
        Ok(())
    }
    fn put(&self, at: u64, buf: &[u8]) -> io::Result<()> {
        for (sector, bytes) in buf.chunks(512).enumerate() {
            let mut left = self.sectors_left.borrow_mut();
            if *left == 0 {
                return Err(io::Error::other("power is gone"));
            }
            *left -= 1;
            self.copies.borrow_mut()[Self::place(at)][sector * 512..][..512].copy_from_slice(bytes);
        }
        Ok(())
    }
    fn settle(&self) -> io::Result<()> {
        Ok(())
    }
}

fn host(byte: u8) -> HostId {
    HostId::from_bytes([byte; 16])
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

fn copy(case: &serde_json::Value) -> [u8; OWNER_BLOCK_LEN] {
    let mut copy = [0; OWNER_BLOCK_LEN];
    if !case.is_null() {
        copy[..56].copy_from_slice(&bytes(case["head"].as_str().unwrap()));
        copy[4064..].copy_from_slice(&bytes(case["sum"].as_str().unwrap()));
    }
    copy
}

fn say(read: Result<OwnerBlock, OwnerError>) -> String {
    let short = |host: HostId| format!("{:02x}", host.to_bytes()[0]);
    match read {
        Ok(OwnerBlock { host, generation, state, hand_over_to }) => {
            let state = match state {
                OwnerState::Free => "free",
                OwnerState::Held => "held",
                OwnerState::HandedOver => "handed over",
            };
            let to = hand_over_to.map_or(String::new(), |to| format!(", to {}", short(to)));
            format!("{state}, host {}, generation {generation}{to}", short(host))
        }
        Err(OwnerError::Damaged { .. }) => "damaged".into(),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn published_owner_blocks_read_as_they_are_said_to() {
    let vectors: serde_json::Value = serde_json::from_str(include_str!("vectors/owner-blocks.json")).unwrap();
    let cases = vectors["cases"].as_array().unwrap();
    for case in cases {
        let medium = Medium::new([copy(&case["first"]), copy(&case["second"])]);
        assert_eq!(say(OwnerBlock::read(&medium)), case["reads"].as_str().unwrap(), "{}", case["name"]);
    }
    println!("luks/owner: {} states of two copies, as expected", cases.len());
    assert_eq!(cases.len(), 14);
}

#[test]
fn write_that_is_cut_short_anywhere_leaves_the_block_before_or_the_new_one() {
    let held = OwnerBlock::NEVER_HELD.taken_by(host(1));
    let given = held.handed_over(host(1), host(2));
    let zeros = [0; OWNER_BLOCK_LEN];
    // A volume nobody held; one of an older release; at rest; after a crash between the copies, either way.
    let starts = [
        ([zeros, zeros], OwnerBlock::NEVER_HELD),
        ([held.encode(), zeros], held),
        ([held.encode(), held.encode()], held),
        ([held.encode(), given.encode()], given),
        ([given.encode(), held.encode()], given),
    ];
    for (copies, before) in starts {
        let next = before.taken_by(host(3));
        for sectors in 0..=16 {
            let medium = Medium::new(copies);
            *medium.sectors_left.borrow_mut() = sectors;
            assert_eq!(next.write(&medium).is_ok(), sectors == 16);
            let reads = OwnerBlock::read(&medium).unwrap();
            assert!(reads == before || reads == next, "{sectors} sectors: {reads:?}");
            assert_eq!(reads == next, sectors >= 8, "{sectors} sectors");
            // And the next write, whole, is what counts from then on, in both copies.
            *medium.sectors_left.borrow_mut() = usize::MAX;
            let last = reads.released();
            last.write(&medium).unwrap();
            assert_eq!(OwnerBlock::read(&medium), Ok(last));
            let [first, second] = *medium.copies.borrow();
            assert!(first == second && first == last.encode());
        }
    }
}

#[test]
fn volume_is_taken_by_whom_it_is_free_for() {
    let [a, b, c] = [host(1), host(2), host(3)];
    let never = OwnerBlock::NEVER_HELD;
    let (held, given) = (never.taken_by(a), never.taken_by(a).handed_over(a, b));
    let held_by_a = ClaimError::Held { host: a, generation: 1 };
    let given_to_b = ClaimError::HandedOver { from: a, to: b, generation: 2 };
    let cases = [
        (never, b, None, Ok(1)),
        (held.released(), b, None, Ok(3)),
        (held, a, None, Ok(2)),
        (held, b, None, Err(held_by_a)),
        (held, b, Some(c), Err(held_by_a)),
        (held, b, Some(a), Ok(2)),
        (given, b, None, Ok(3)),
        (given, a, None, Ok(3)),
        (given, c, None, Err(given_to_b)),
        // That who gave it away has ended says nothing of who was given it.
        (given, c, Some(a), Err(given_to_b)),
        (given, c, Some(b), Ok(3)),
    ];
    for (block, who, ended, expected) in cases {
        let claimed = block.claimed_by(who, ended);
        assert_eq!(claimed.map(|taken| taken.generation), expected, "{block:?} by {who}, {ended:?} ended");
        if let Ok(taken) = claimed {
            assert_eq!((taken.host, taken.state, taken.hand_over_to), (who, OwnerState::Held, None));
        }
    }
    assert_eq!(held.started_by(Some(b)), Ok(held.taken_by(b)));
    assert_eq!(held.started_by(None), Ok(held));
    for (who, may) in [(Some(a), true), (Some(b), true), (Some(c), false), (None, false)] {
        assert_eq!(given.started_by(who).is_ok(), may, "{who:?}");
    }
}
