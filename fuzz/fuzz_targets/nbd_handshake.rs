//! Feeds [`vmseal_fuzz::nbd_handshake`]; see there.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmseal_fuzz::nbd_handshake::run(data));
