//! Feeds [`vmseal_fuzz::luks_header`]; see there.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmseal_fuzz::luks_header::run(data));
