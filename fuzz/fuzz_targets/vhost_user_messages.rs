//! Feeds [`vmseal_fuzz::vhost_user_messages`]; see there.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmseal_fuzz::vhost_user_messages::run(data));
