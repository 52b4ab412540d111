//! Feeds [`vmseal_fuzz::owner_block`]; see there.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmseal_fuzz::owner_block::run(data));
