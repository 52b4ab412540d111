//! An NBD client's requests after a good handshake. What is answered is held against what was asked.

use crate::{input::Input, nbd_handshake::talk};

/// Most bytes of one write.
const MOST: u32 = 16 << 10;

/// Talks: requests with the right magic, and ranges that are mostly within the disk, until the input ends.
///
/// # Panics
///
/// If an answer is not one to a request that was made, or a request is answered twice.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let choice = input.u8();
    let structured = choice & 0x40 != 0;
    let mut says = handshake(structured);
    let mut asked = 0u64;
    let mut broken = false;
    while !input.is_empty() && asked < 200 && !broken {
        asked += 1;
        let (form, flags, kind) = (input.u8(), u16::from(input.u8()), u16::from(input.u8() % 10));
        // The highest bits of the form: leave the disk, leave alignment, break the stream.
        let mut offset = u64::from(input.u16()) % 600 * 512;
        let mut length = u32::from(input.u8()) % 40 * 512;
        if form & 0x80 != 0 {
            offset = offset.wrapping_mul(input.u64() | 1);
        }
        if form & 0x40 != 0 {
            length = length.wrapping_add(u32::from(input.u8()));
        }
        broken = form & 0x20 != 0 && form & 0x1f == 0x1f;
        let magic: u32 = if broken { input.u32() } else { 0x2560_9513 };
        says.extend(magic.to_be_bytes());
        says.extend(flags.to_be_bytes());
        says.extend(kind.to_be_bytes());
        says.extend(asked.to_be_bytes());
        says.extend(offset.to_be_bytes());
        says.extend(length.to_be_bytes());
        if kind == 1 {
            says.resize(says.len() + length.min(MOST) as usize, form);
            broken |= length > MOST;
        }
    }
    let hears = talk(choice, &says);
    check(&hears, structured, asked);
}

fn handshake(structured: bool) -> Vec<u8> {
    let mut says = 3u32.to_be_bytes().to_vec();
    let mut option = |number: u32, content: &[u8]| {
        says.extend(b"IHAVEOPT");
        says.extend(number.to_be_bytes());
        says.extend((content.len() as u32).to_be_bytes());
        says.extend(content);
    };
    if structured {
        option(8, &[]);
        option(10, b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation");
    }
    option(7, &[0; 6]);
    says
}

/// Answers to options, then answers to requests. Simple ones to reads cannot be told apart from their data, so there
/// only the first is looked at.
fn check(hears: &[u8], structured: bool, asked: u64) {
    let Some(mut rest) = hears.get(18..) else { panic!("no greeting: {hears:?}") };
    let word =
        |bytes: &[u8], at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let long =
        |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    while rest.len() >= 20 && long(rest, 0) == 0x0003_e889_0455_65a9 {
        let len = 20 + word(rest, 16) as usize;
        rest = rest.get(len..).expect("a whole answer to an option");
    }
    let mut answered = std::collections::HashSet::new();
    while rest.len() >= 16 {
        let cookie = long(rest, 8);
        assert!((1..=asked).contains(&cookie), "an answer to {cookie} of {asked}");
        assert!(answered.insert(cookie), "{cookie} is answered twice");
        match word(rest, 0) {
            // Without data: those of reads are structured.
            0x6744_6698 if structured => rest = &rest[16..],
            0x6744_6698 => return,
            0x668e_33ef => {
                assert!(structured && rest[5] == 1, "one chunk, the last");
                let len = 20 + rest.get(16..20).map_or(0, |len| word(len, 0)) as usize;
                match rest.get(len..) {
                    Some(next) => rest = next,
                    // The client broke the stream, and the server closed in the middle.
                    None => return,
                }
            }
            other => panic!("an answer with magic {other:#x}"),
        }
    }
}
