//! Fuzzes DNS queries of guests.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stackhand_tests::hostile::dns(bytes));
