//! SHA-256 as text, and random tokens. What is stored of a token is its digest, so comparing is done by looking the
//! digest up: the time that takes says nothing about the token.

use std::fmt::Write as _;

use aws_lc_rs::digest::{SHA256, digest};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use vmseal_api::secret_text::SecretText;
use vmseal_keys::{SecretError, random_bytes};
use zeroize::Zeroize;

/// SHA-256.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

/// SHA-256 in hexadecimal digits.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&sha256(bytes))
}

/// Bytes in hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a String does not fail.
        let _ = write!(out, "{byte:02x}");
    }
    out
}

/// The bytes of hexadecimal digits; `None` if they are none.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let digit = |d: u8| char::from(d).to_digit(16).and_then(|d| u8::try_from(d).ok());
    digits.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

/// A token: `prefix` and 256 random bits.
pub fn random_token(prefix: &str) -> Result<SecretText, SecretError> {
    let mut bytes = random_bytes::<32>()?;
    let mut text = String::with_capacity(prefix.len() + 43);
    text.push_str(prefix);
    URL_SAFE_NO_PAD.encode_string(bytes, &mut text);
    bytes.zeroize();
    Ok(SecretText::new(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_read_back_and_others_are_refused() {
        assert_eq!(unhex(&hex(&[0, 0xff, 0x1a])), Some(vec![0, 0xff, 0x1a]));
        assert_eq!(unhex("0"), None);
        assert_eq!(unhex("zz"), None);
    }

    #[test]
    fn tokens_differ_and_hold_256_bits() {
        let (a, b) = (random_token("t_").unwrap(), random_token("t_").unwrap());
        assert_ne!(a.expose(), b.expose());
        assert_eq!(a.expose().len(), 2 + 43);
    }
}
