//! What an expanded AES-256 key consists of, worked out from FIPS 197 and slow: so that searches of memory know what to
//! look for, whoever expanded the key.

/// The round keys of AES-256 under a key, 15 of 16 bytes, and those of the equivalent inverse cipher (FIPS 197 §5.2,
/// §5.3.5): what a search for a key schedule looks for.
pub fn aes256_round_keys(key: &[u8; 32]) -> Vec<[u8; 16]> {
    let sbox = sbox();
    let mut words: Vec<[u8; 4]> = key.chunks(4).map(|c| c.try_into().expect("4 bytes")).collect();
    let mut rcon = 1u8;
    for i in 8..60 {
        let mut t = words[i - 1];
        if i % 8 == 0 {
            t = [sbox[t[1] as usize] ^ rcon, sbox[t[2] as usize], sbox[t[3] as usize], sbox[t[0] as usize]];
            rcon = double(rcon);
        } else if i % 8 == 4 {
            t = t.map(|b| sbox[b as usize]);
        }
        let before = words[i - 8];
        words.push([0, 1, 2, 3].map(|j| before[j] ^ t[j]));
    }
    let forward: Vec<[u8; 16]> =
        words.chunks(4).map(|c| c.concat().try_into().expect("four words are 16 bytes")).collect();
    let inverse = forward[1..14].iter().map(inverse_mix);
    forward.iter().copied().chain(inverse).collect()
}

fn double(b: u8) -> u8 {
    b << 1 ^ if b & 0x80 != 0 { 0x1b } else { 0 }
}

fn times(a: u8, b: u8) -> u8 {
    let (mut a, mut product) = (a, 0);
    for bit in 0..8 {
        if b >> bit & 1 == 1 {
            product ^= a;
        }
        a = double(a);
    }
    product
}

fn sbox() -> [u8; 256] {
    let mut table = [0u8; 256];
    for (x, slot) in table.iter_mut().enumerate() {
        let inverse = (1..=255u8).find(|&y| times(x as u8, y) == 1).unwrap_or(0);
        *slot = (0..5).fold(0x63, |s, n| s ^ inverse.rotate_left(n));
    }
    table
}

fn inverse_mix(key: &[u8; 16]) -> [u8; 16] {
    let mut out = [0u8; 16];
    for (column, mixed) in key.chunks(4).zip(out.chunks_mut(4)) {
        for (row, slot) in mixed.iter_mut().enumerate() {
            *slot = (0..4).fold(0, |s, j| s ^ times(column[(row + j) % 4], [0x0e, 0x0b, 0x0d, 0x09][j]));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aes256_schedule_is_that_of_fips_197_appendix_a3() {
        let key: [u8; 32] = [
            0x60, 0x3d, 0xeb, 0x10, 0x15, 0xca, 0x71, 0xbe, 0x2b, 0x73, 0xae, 0xf0, 0x85, 0x7d, 0x77, 0x81,
            0x1f, 0x35, 0x2c, 0x07, 0x3b, 0x61, 0x08, 0xd7, 0x2d, 0x98, 0x10, 0xa3, 0x09, 0x14, 0xdf, 0xf4,
        ];
        let keys = aes256_round_keys(&key);
        assert_eq!(keys[2][..4], [0x9b, 0xa3, 0x54, 0x11]);
        assert_eq!(keys[14][12..], [0x70, 0x6c, 0x63, 0x1e]);
    }
}
