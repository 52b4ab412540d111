//! Messages as bytes.

use std::fs::File;

use proptest::prelude::*;

use super::*;

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn fds(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| null()).collect()
}

#[test]
fn headers_of_another_version_are_refused() {
    let header = |code: u32, flags: u32, len: u32| {
        let mut bytes = [0; HEADER];
        for (to, from) in bytes.iter_mut().zip([code, flags, len].iter().flat_map(|word| word.to_ne_bytes()))
        {
            *to = from;
        }
        Header::parse(&bytes)
    };
    assert_eq!(header(1, 1, 0), Ok(Header { code: 1, need_reply: false, len: 0 }));
    assert_eq!(header(1, 9, 8), Ok(Header { code: 1, need_reply: true, len: 8 }));
    for flags in [0, 2, 3, 5, 0x11, u32::MAX] {
        assert_eq!(header(1, flags, 0), Err(MessageError::Flags(flags)));
    }
    assert!(header(1, 1, MAX_BODY as u32).is_ok());
    assert_eq!(header(1, 1, u32::MAX), Err(MessageError::TooLong(u32::MAX)));
}

#[test]
fn in_flight_messages_have_qemus_padding_or_none() {
    let spec = InflightSpec { len: 0x1_0000_0001, offset: 4096, queues: 3, size: 128 };
    let body = spec.to_body();
    for len in [20, 24] {
        let message = Message::parse(31, &body[..len], vec![]).unwrap();
        assert!(matches!(message, Message::GetInflight(parsed) if parsed == spec), "{len} bytes");
    }
    assert_eq!(Message::parse(31, &body[..22], vec![]).unwrap_err(), MessageError::Size(31, 22));
    assert!(Message::parse(32, &body, fds(1)).is_ok());
    assert_eq!(Message::parse(32, &body, vec![]).unwrap_err(), MessageError::Descriptors(32, 0));
    assert_eq!(Message::parse(32, &body, fds(2)).unwrap_err(), MessageError::Descriptors(32, 2));
}

#[test]
fn descriptor_may_come_with_a_region_that_is_removed() {
    let body = [0; 40];
    assert!(Message::parse(38, &body, vec![]).is_ok());
    assert!(Message::parse(38, &body, fds(1)).is_ok());
    assert!(Message::parse(38, &body, fds(2)).is_err());
}

proptest! {
    #[test]
    fn any_bytes_are_a_message_or_an_error(
        code in 0u32..48,
        body in proptest::collection::vec(any::<u8>(), 0..300),
        count in 0usize..4,
    ) {
        let _ = Message::parse(code, &body, fds(count));
    }

    #[test]
    fn bodies_of_the_right_size_with_small_values_never_panic(
        code in 0u32..48,
        words in proptest::collection::vec(0u32..40, 0..40),
        count in 0usize..4,
    ) {
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let _ = Message::parse(code, &body, fds(count));
    }
}
