//! A LUKS2 header: binary header and JSON of the input, with checksums that are right, in one copy or two; read, judged,
//! repaired, and its token written anew.

use std::{
    fs::File,
    io::{self, Cursor, Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
};

use aws_lc_rs::digest::{Context, SHA256};
use vmseal_luks::{HEADER_BYTES, Header, LuksError, Verdict, VmsealToken, binary_header, inspect, repair};

use crate::{disk::memory_file, input::Input};

/// Bytes of the binary header's fields that the input may set; the rest is zero but for magic, size and checksum.
const FIELDS: usize = 512;
/// Bytes of a file whose header is in it: as much as our own headers need, and a little payload.
const FILE: u64 = HEADER_BYTES + 4096;

/// Judges.
///
/// # Panics
///
/// If two ways to read a header disagree on it, or a header that was accepted is not after a change of ours.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (choice, size) = (input.u8(), input.u8());
    let copy_bytes = binary_header::COPY_SIZES[usize::from(size % 4)];
    let head = match choice & 1 {
        0 => binary_header_of(&mut input, copy_bytes),
        // As they come, the checksum too.
        _ => {
            let mut head = input.take(binary_header::BINARY_HEADER_LEN).to_vec();
            head.resize(binary_header::BINARY_HEADER_LEN, 0);
            head
        }
    };
    let mut json = input.take(copy_bytes as usize - binary_header::BINARY_HEADER_LEN).to_vec();
    json.resize(copy_bytes as usize - binary_header::BINARY_HEADER_LEN, 0);
    let mut bytes = vec![0; 2 * copy_bytes as usize];
    let (first, second) = bytes.split_at_mut(copy_bytes as usize);
    if choice & 2 == 0 {
        put(first, &head, &json, None, choice & 1 == 0);
    }
    if choice & 4 == 0 {
        put(second, &head, &json, Some(copy_bytes), choice & 1 == 0);
    }
    for detached in [None, Some(false), Some(true)] {
        judge(&bytes, detached);
    }
}

fn binary_header_of(input: &mut Input<'_>, copy_bytes: u64) -> Vec<u8> {
    let mut head = input.take(FIELDS).to_vec();
    head.resize(binary_header::BINARY_HEADER_LEN, 0);
    head[..6].copy_from_slice(&binary_header::PRIMARY_MAGIC);
    head[6..8].copy_from_slice(&[0, 2]);
    head[8..16].copy_from_slice(&copy_bytes.to_be_bytes());
    head[72..104].fill(0);
    head[72..78].copy_from_slice(b"sha256");
    head[256..264].fill(0);
    head
}

/// Puts a copy in its place; `seal`: with what its place asks for, and its checksum.
fn put(to: &mut [u8], head: &[u8], json: &[u8], secondary: Option<u64>, seal: bool) {
    let (head_to, json_to) = to.split_at_mut(head.len());
    head_to.copy_from_slice(head);
    json_to.copy_from_slice(json);
    if !seal {
        return;
    }
    if let Some(at) = secondary {
        head_to[..6].copy_from_slice(&binary_header::SECONDARY_MAGIC);
        head_to[256..264].copy_from_slice(&at.to_be_bytes());
    }
    head_to[448..512].fill(0);
    let mut sum = Context::new(&SHA256);
    sum.update(head_to);
    sum.update(json_to);
    head_to[448..480].copy_from_slice(sum.finish().as_ref());
}

/// The bytes, and zeros up to the length of a whole file.
struct Padded<'a>(Cursor<&'a [u8]>);

impl Read for Padded<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = FILE.saturating_sub(self.0.position()).min(buf.len() as u64) as usize;
        let got = self.0.read(&mut buf[..left])?;
        buf[got..left].fill(0);
        self.0.set_position(self.0.position() + (left - got) as u64);
        Ok(left)
    }
}

impl Seek for Padded<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        match to {
            SeekFrom::End(by) => self.0.seek(SeekFrom::Start(FILE.saturating_add_signed(by))),
            other => self.0.seek(other),
        }
    }
}

fn judge(bytes: &[u8], detached: Option<bool>) {
    let verdict = inspect(&mut Padded(Cursor::new(bytes)), detached).expect("memory can be read");
    assert!(!verdict.to_string().is_empty());
    if let Some(description) = verdict.description() {
        let _ = format!("{description:?}");
    }
    let Some(detached) = detached else { return };
    let file = memory_file(FILE).expect("memory");
    file.write_all_at(bytes, 0).expect("memory");
    let read = Header::read(&file, detached);
    match (&verdict, &read) {
        (Verdict::Accept(_), Ok(_) | Err(LuksError::Uuid { .. }))
        | (Verdict::AcceptReencrypting(_), Err(LuksError::Reencrypting))
        | (Verdict::Reject(..), Err(_)) => {}
        _ => panic!("{verdict} by one, {read:?} by the other"),
    }
    if let Ok(header) = read {
        change(&file, detached, &header);
    }
}

/// What we change stays a header that we accept, and says what we wrote.
fn change(file: &File, detached: bool, header: &Header) {
    let _ = (header.uuid(), header.unit_bytes(), header.payload_offset(), header.describe());
    match repair(file, detached) {
        Ok(_) => {}
        // Its sequence number is the last one there is.
        Err(LuksError::Frozen(_)) => {
            assert_eq!(Header::read(file, detached).expect("nothing was written").token(), header.token());
            return;
        }
        Err(error) => panic!("{error:?}"),
    }
    let read = Header::read(file, detached).expect("a repaired header is read");
    assert!(!read.needs_repair());
    assert_eq!(read.token(), header.token());
    let token = VmsealToken { records: vec![b"new".to_vec(), vec![7; 300]] };
    match Header::write_token(file, detached, &token) {
        Ok(()) => {
            let read = Header::read(file, detached).expect("a header we wrote is read");
            assert_eq!(read.token(), Some(token));
            assert!(!read.needs_repair());
        }
        Err(LuksError::Full { .. } | LuksError::Frozen(_)) => {
            assert_eq!(Header::read(file, detached).expect("nothing was written").token(), header.token());
        }
        Err(error) => panic!("{error:?}"),
    }
}
