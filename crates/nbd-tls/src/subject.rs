//! The common name in a certificate's subject.
//!
//! In: the content of an X.501 Name as it stands in a certificate (DER, RFC 5280 §4.1.2.4). Out: its one common name, or
//! none. Of a certificate whose signature was verified already; malformed bytes give none all the same.

/// id-at-commonName, 2.5.4.3.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;

/// The common name, if there is exactly one.
pub fn common_name(name: &[u8]) -> Option<&str> {
    let (mut rest, mut found) = (name, None);
    while !rest.is_empty() {
        let mut set = take(&mut rest, SET)?;
        while !set.is_empty() {
            let mut attribute = take(&mut set, SEQUENCE)?;
            if take(&mut attribute, OBJECT_IDENTIFIER)? != COMMON_NAME {
                continue;
            }
            let kind = *attribute.first()?;
            if ![UTF8_STRING, PRINTABLE_STRING].contains(&kind) || found.is_some() {
                return None;
            }
            found = Some(std::str::from_utf8(take(&mut attribute, kind)?).ok()?);
        }
    }
    found
}

/// The content of the next element, which must have this tag.
fn take<'a>(from: &mut &'a [u8], tag: u8) -> Option<&'a [u8]> {
    let (head, rest) = from.split_first_chunk::<2>()?;
    if head[0] != tag {
        return None;
    }
    let (length, rest) = match head[1] {
        short @ ..=0x7f => (usize::from(short), rest),
        0x81 => (usize::from(*rest.first()?), &rest[1..]),
        0x82 => {
            let (bytes, rest) = rest.split_first_chunk::<2>()?;
            (usize::from(u16::from_be_bytes(*bytes)), rest)
        }
        _ => return None,
    };
    let (content, after) = rest.split_at_checked(length)?;
    *from = after;
    Some(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn element(tag: u8, content: &[u8]) -> Vec<u8> {
        let mut bytes = vec![tag];
        match content.len() {
            short @ ..=0x7f => bytes.push(short as u8),
            long @ 0x80..=0xff => bytes.extend([0x81, long as u8]),
            long => {
                bytes.push(0x82);
                bytes.extend((long as u16).to_be_bytes());
            }
        }
        bytes.extend(content);
        bytes
    }

    fn attribute(last: u8, kind: u8, text: &str) -> Vec<u8> {
        let pair = [element(0x06, &[0x55, 0x04, last]), element(kind, text.as_bytes())].concat();
        element(0x31, &element(0x30, &pair))
    }

    #[test]
    fn one_common_name_is_found_wherever_it_stands() {
        let name = [attribute(10, 0x0c, "vmseal host"), attribute(3, 0x13, "hv1.example")].concat();
        assert_eq!(common_name(&name), Some("hv1.example"));
        for long in [200, 3000] {
            let text = "x".repeat(long);
            assert_eq!(common_name(&attribute(3, 0x0c, &text)), Some(text.as_str()));
        }
    }

    #[test]
    fn none_two_or_another_alphabet_are_none() {
        assert_eq!(common_name(&[]), None);
        assert_eq!(common_name(&attribute(10, 0x0c, "o")), None);
        let two = [attribute(3, 0x0c, "a"), attribute(3, 0x0c, "b")].concat();
        assert_eq!(common_name(&two), None);
        assert_eq!(common_name(&attribute(3, 0x1e, "bmp")), None);
    }

    #[test]
    fn every_truncation_and_every_changed_byte_is_survived() {
        let name = [attribute(10, 0x0c, "o"), attribute(3, 0x0c, &"x".repeat(150))].concat();
        for end in 0..name.len() {
            // Cut between two elements it is a name without a common name.
            assert_eq!(common_name(&name[..end]), None, "cut at {end}");
        }
        for at in 0..name.len() {
            for value in 0..=255 {
                let mut changed = name.clone();
                changed[at] = value;
                let _ = common_name(&changed);
            }
        }
    }
}
