//! Fuzzes requests to the metadata service.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stackhand_tests::hostile::http(bytes));
