//! Feeds [`vmseal_fuzz::key_record`]; see there.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmseal_fuzz::key_record::run(data));
