//! Fuzzes messages on the bus.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stackhand_tests::hostile::envelope(bytes));
