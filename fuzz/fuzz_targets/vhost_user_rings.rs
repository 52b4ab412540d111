//! Feeds [`vmseal_fuzz::vhost_user_rings`]; see there.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmseal_fuzz::vhost_user_rings::run(data));
