//! Feeds [`vmseal_fuzz::disk_frames`]; see there.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmseal_fuzz::disk_frames::run(data));
