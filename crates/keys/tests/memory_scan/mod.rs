//! Looks for key bytes in all memory of this process that can be read, which secret memory cannot.
//!
//! The scan itself must not keep what it looks for: needles are stored inverted, and compared in registers.

use std::{fs::File, os::unix::fs::FileExt};

/// Pieces of keys to look for.
pub(crate) struct Needles {
    /// Eight bytes each, inverted.
    words: Vec<u64>,
    /// Which low 16 bits occur at all.
    first: Vec<bool>,
}

impl Needles {
    pub(crate) fn new() -> Self {
        Self { words: Vec::new(), first: vec![false; 1 << 16] }
    }

    /// Adds every eight bytes of `secret`, in both byte orders and with the words of either half swapped, as ciphers
    /// and hashes hold them.
    pub(crate) fn add(&mut self, secret: &[u8]) {
        for chunk in secret.chunks_exact(8) {
            let word = !u64::from_le_bytes(chunk.try_into().unwrap());
            let halves =
                (word as u32).swap_bytes() as u64 | (((word >> 32) as u32).swap_bytes() as u64) << 32;
            for form in [word, word.swap_bytes(), halves] {
                self.words.push(form);
                self.first[(form & 0xffff) as usize] = true;
            }
        }
    }

    fn hits(&self, bytes: &[u8]) -> Vec<usize> {
        let found = |word: u64| self.first[(word & 0xffff) as usize] && self.words.contains(&word);
        let windows = bytes.windows(8).enumerate();
        windows
            .filter(|(_, w)| found(!u64::from_le_bytes((*w).try_into().unwrap())))
            .map(|(at, _)| at)
            .collect()
    }
}

/// Where needles lie, as mapping and offset; and how many bytes were read.
pub(crate) fn scan(needles: &Needles) -> (Vec<String>, usize) {
    let memory = File::open("/proc/self/mem").unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    // A fixed buffer: it holds nothing that does not lie elsewhere, and it is left out.
    let mut buffer = vec![0u8; 1 << 20];
    let (mut found, mut read) = (Vec::new(), 0);
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (start, end) = fields.next().unwrap().split_once('-').unwrap();
        let (start, end) = (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap());
        // Read-only file mappings are the program itself.
        if !fields.next().unwrap().starts_with("rw") {
            continue;
        }
        let mut at = start;
        while at + 8 <= end {
            let want = usize::try_from(end - at).unwrap().min(buffer.len());
            // Secret memory answers with an error: that is the point of it.
            let Ok(got @ 8..) = memory.read_at(&mut buffer[..want], at) else { break };
            read += got;
            let own = buffer.as_ptr() as u64..buffer.as_ptr() as u64 + buffer.len() as u64;
            let places = needles.hits(&buffer[..got]).into_iter().map(|hit| at + hit as u64);
            found.extend(
                places.filter(|place| !own.contains(place)).map(|place| format!("{place:#x} in {line}")),
            );
            // Overlap, so that a needle across two reads is found.
            at += got as u64 - 7;
            if at + 7 >= end {
                break;
            }
        }
    }
    (found, read)
}
